"""`LoadPlan`: everything that is decided about a load before its weights are read.

It is made of the config and the headers of the weight files alone. `load()` makes one and executes exactly it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lmkit.adapters import check_base
from lmkit.configs import context_length, packing, read_config
from lmkit.errors import PlacementError
from lmkit.fitting import Layout, ModulePlan, lay_out, longest, offload, shortage, size
from lmkit.packing import packs
from lmkit.picture import drawn, written
from lmkit.placement import resolve_placement
from lmkit.precision import possible_words, resolve_precision
from lmkit.results import Result
from lmkit.skeleton import KeyValueBytes, Skeleton
from lmkit.tasks import check_task
from lmkit.weights import check_tokenizer, read_json, reading

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedConfig

    from lmkit.adapters import Adapter
    from lmkit.headers import TensorInfo
    from lmkit.machine import Machine
    from lmkit.placement import Devices, Placement
    from lmkit.precision import Precision
    from lmkit.tasks import Task
    from lmkit.weights import Source

__all__ = ["LoadPlan"]

LONGEST = 2**20
"""How many tokens are considered where nothing bounds a model's context."""


@dataclass(frozen=True, slots=True)
class LoadPlan(Result):
    """What will be loaded, in what precision, where to, and why.

    Bytes are those of weights and of keys and values; what a forward pass computes with comes on top. `str()` is a
    table, a notebook shows a picture, `to_dict()` is JSON.

    Attributes:
        task: What the model is loaded for.
        name: The name as the caller wrote it.
        architecture: What the checkpoint calls its model; its model type if it does not say.
        model_class: The transformers class that will hold it.
        parameters: How many numbers it has, tied weights counted once.
        precision: What the weights will be held in.
        placement: Which devices may hold them, and how much of each.
        device_map: A device, or `"disk"`, per module name, where `""` is the whole model.
        modules: The parts that stay whole, each with its device, its dtype and its bytes.
        kernels: `"packed"` where linear layers are kept in the order of the processor's own kernel, else `"torch"`.
        key_values: What keys and values of one row take; None for masked models, which keep none, and where that only
            shows when the model runs.
        context_length: The most tokens the model takes at once; None where nothing bounds it.
        fits: Whether all of it fits its devices.
        reasons: Why, a sentence per automatic choice; under `"fits"` what does not fit, and what would.
    """

    task: Task
    name: str
    architecture: str
    model_class: str
    parameters: int
    precision: Precision
    placement: Placement
    device_map: Mapping[str, str]
    modules: tuple[ModulePlan, ...]
    kernels: Literal["torch", "packed"]
    key_values: KeyValueBytes | None
    context_length: int | None
    fits: bool
    reasons: Mapping[str, str]
    _layout: Layout = field(repr=False, compare=False)

    @property
    def weights_bytes(self) -> int:
        """What the weights take in all, scales of quantized ones included."""
        return sum(module.bytes for module in self.modules)

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """What the weights take on each device, the disk among them."""
        return self._layout.bytes_per_device

    @property
    def kv_bytes_per_token(self) -> int | None:
        """What keys and values of one more token take, before any window is full; of an encoder-decoder, of its output.

        None where `key_values` is.
        """
        return None if self.key_values is None else self.key_values.of(1) - self.key_values.fixed

    def max_rows(self, tokens: int, source_tokens: int | None = None) -> int | None:
        """Return how many rows fit beside the weights.

        Args:
            tokens: How many tokens each row may have, its prompt included.
            source_tokens: Of an encoder-decoder, how many its source may have; as many if left out.

        Returns:
            None where `key_values` is.
        """
        if self.key_values is None:
            return None
        return self._layout.rows(self.key_values.of(tokens, tokens if source_tokens is None else source_tokens))

    def __str__(self) -> str:
        """Write the plan as a table for people."""
        return written(self)

    def _repr_html_(self) -> str:
        """Draw the plan for a notebook: a bar per device, the parts within it; every text escaped."""
        return drawn(self)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for.

    Attributes:
        task: What the model is for.
        precision: A word, or a transformers quantization config.
        devices: As `load` takes it.
        reserve_tokens: How many tokens of keys and values have to fit beside the weights.
        trust_remote_code: Whether the checkpoint's own code may run.
        adapters: What will be put on the model.
    """

    task: Task
    precision: Any
    devices: Devices
    reserve_tokens: int = 0
    trust_remote_code: bool = False
    adapters: Sequence[Adapter] = ()


def make_plan(
    wish: Wish,
    source: Source,
    tensors: Mapping[str, TensorInfo] | None,
    machine: Machine,
    *,
    absent: bool = False,
) -> tuple[LoadPlan, PreTrainedConfig]:
    """Decide how to load a checkpoint; only its config and the headers of its weights are read.

    Args:
        wish: What the caller asked for.
        source: The checkpoint's small files.
        tensors: What the headers of its weights say; None for pickles.
        machine: What is here.
        absent: Plan for devices that are not here, too.

    Raises:
        UnknownTaskError: The checkpoint was made for another task.
        WeightsError: A file is absent, broken or refused.
        PrecisionError: `precision` is not accepted.
        PlacementError: `devices` is not accepted. What does not fit is said in the plan.
    """
    config = read_config(source, trusted=wish.trust_remote_code)
    model_class = check_task(wish.task, config, source.name, trusted=wish.trust_remote_code)
    placed = resolve_placement(wish.devices, machine, absent=absent)
    chosen = _precision(wish.precision, source, config, placed, machine, tensors)
    check_tokenizer(source)
    if (source.folder / "generation_config.json").is_file() and not source.gguf_file:
        read_json(source.folder / "generation_config.json")  # transformers goes on without a broken one
    skeleton = _skeleton(wish, source, config, chosen, tensors, traps=placed.device_type == "cpu" and machine.bfloat16("cpu"))
    chosen = skeleton.precision
    packed = placed.device_type == "cpu" and str(chosen.dtype) == "torch.bfloat16" and packs()
    packed = packed and skeleton.quantizer is None
    for adapter in wish.adapters:
        check_base(adapter, skeleton)
    added = [tensor.elements for adapter in wish.adapters for tensor in adapter.tensors.values()]
    adapters = sum(added) * chosen.dtype.itemsize
    beside = (skeleton.twice_bytes if packed else 0) + adapters
    layout = lay_out(skeleton, placed, beside=beside)
    reasons = {"precision": chosen.reason, "devices": placed.reason} | _told(source, chosen, skeleton, tensors, adapters)
    if packed:
        twice = f"; the output layer, whose weight is the embedding's, is held twice: {size(skeleton.twice_bytes)} more"
        reasons["kernels"] = "bfloat16 on this CPU: linear layers are reordered once for its matrix kernel"
        reasons["kernels"] += twice if skeleton.twice_bytes else ""
    if (slow := offload(layout, placed)) is not None:
        reasons["offload"] = slow
    reserved = skeleton.key_values.of(wish.reserve_tokens, wish.reserve_tokens) if skeleton.key_values else 0
    short = shortage(layout, placed, chosen.name, reserved)
    if short is not None:
        reasons["fits"] = f"{short}. {_instead(wish, source, config, placed, chosen, tensors, layout, skeleton)}"
    plan = LoadPlan(
        task=wish.task,
        name=source.name,
        architecture=(config.architectures or [config.model_type])[0],
        model_class=model_class,
        parameters=skeleton.parameters,
        precision=chosen,
        placement=placed,
        device_map=layout.device_map,
        modules=layout.modules,
        kernels="packed" if packed else "torch",
        key_values=skeleton.key_values,
        context_length=context_length(config),
        fits=short is None,
        reasons=reasons,
        _layout=layout,
    )
    return plan, config


def _precision(
    word: Any,
    source: Source,
    config: PreTrainedConfig,
    placed: Placement,
    machine: Machine,
    tensors: Mapping[str, TensorInfo] | None,
) -> Precision:
    # Only what the checkpoint says: PreTrainedConfig.dtype is None where config.json has none.
    saved = None if source.gguf_file else config.dtype or _dtype_of(tensors)
    kind = placed.device_type
    return resolve_precision(word, saved, kind, bfloat16=machine.bfloat16(kind), packed=packing(source, config))


def _dtype_of(tensors: Mapping[str, TensorInfo] | None) -> str | None:
    """Return the dtype of the first weight that is a float, as transformers takes it."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
    return next((names[tensor.dtype] for tensor in (tensors or {}).values() if tensor.dtype in names), None)


def _skeleton(
    wish: Wish,
    source: Source,
    config: PreTrainedConfig,
    precision: Precision,
    tensors: Mapping[str, TensorInfo] | None,
    *,
    traps: bool = False,
) -> Skeleton:
    """Build the model without memory."""
    untied: Collection[str] = ()
    if source.gguf_file is None and source.read_config().get("tie_word_embeddings") is False:
        untied = tuple(tensors or ())  # transformers ties a T5's head whatever its config says, unless the file has one
    with reading(f"the config of {source.name!r}"):
        return Skeleton(wish.task, config, precision, trusted=wish.trust_remote_code, untied=untied, traps=traps)


def _told(
    source: Source,
    precision: Precision,
    skeleton: Skeleton,
    tensors: Mapping[str, TensorInfo] | None,
    adapters: int,
) -> dict[str, str]:
    """Say what happens to weights that are held otherwise than in their file."""
    told: dict[str, str] = {}
    if source.gguf_file is not None:
        inside = size(sum(tensor.nbytes for tensor in (tensors or {}).values()))
        told["format"] = f"GGUF: the {inside} of packed weights are widened to {precision.dtype} as they are read"
    if skeleton.quantizer is not None:
        held = list(skeleton.tensors())
        wide = sum(bytes_ for _, dtype, bytes_ in held if "float" in dtype)
        total = sum(bytes_ for _, _, bytes_ in held)
        told["quantized"] = f"{size(total - wide)} are quantized; {size(wide)} stay in {precision.dtype}"
    if adapters:
        told["adapter"] = f"{size(adapters)} beside the model's own weights"
    return told


def _instead(
    wish: Wish,
    source: Source,
    config: PreTrainedConfig,
    placed: Placement,
    chosen: Precision,
    tensors: Mapping[str, TensorInfo] | None,
    layout: Layout,
    skeleton: Skeleton,
) -> str:
    """Say what would fit: fewer tokens, else the widest precision that does, with the most tokens of one row."""
    most = context_length(config) or LONGEST
    if layout.fits() and wish.reserve_tokens and "disk" not in layout.bytes_per_device:
        return f"In {chosen.name}, up to {longest(skeleton.key_values, layout, most):,} tokens fit."
    own = sum(module.bytes for module in layout.modules)
    for word in [word for word in NARROWER if word in possible_words(placed.device_type, packing(source, config))]:
        kind = placed.device_type
        other = resolve_precision(word, None, kind, bfloat16=True, packed=packing(source, config))
        smaller = _skeleton(wish, source, config, other, tensors)
        tried = lay_out(smaller, placed)
        if tried.fits() and "disk" not in tried.bytes_per_device and sum(m.bytes for m in tried.modules) < own:
            tokens = longest(smaller.key_values, tried, most)
            return f"precision={word!r} would fit ({size(sum(m.bytes for m in tried.modules))})" + (
                f", with up to {tokens:,} tokens in one row." if smaller.key_values else "."
            )
    return (
        "No precision makes it fit: name larger or more devices, or a folder for what does not fit: "
        "devices={…, 'disk': 'offload/'}."
    )


NARROWER = ("bfloat16", "int8", "int4")
"""Words to try in turn where a precision does not fit."""


def check_fits(plan: LoadPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlacementError: It does not; the message names the device, what is needed and what is there, and what would fit.
    """
    if not plan.fits:
        msg = f"the devices cannot hold {plan.name!r}: {plan.reasons['fits']}"
        raise PlacementError(msg)
