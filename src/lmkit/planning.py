"""Everything about a load is decided here, from the config and the headers of the weight files alone.

`load()` makes a `LoadPlan` and executes exactly it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmkit.adapters import check_base
from lmkit.configs import context_length, packing, read_config
from lmkit.copies import copies_bytes
from lmkit.errors import PlacementError, PrecisionError, listed
from lmkit.fitting import Layout, lay_out, longest, measured_again, offload, on_devices, shortage, size
from lmkit.matching import check_names
from lmkit.packing import packs
from lmkit.placement import Placement, resolve_placement
from lmkit.plans import LoadPlan
from lmkit.precision import possible_words, resolve_precision
from lmkit.quantized import KERNEL_ROWS
from lmkit.skeleton import Skeleton
from lmkit.tasks import check_task
from lmkit.weights import check_tokenizer, read_json, reading

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from transformers import PreTrainedConfig

    from lmkit.adapters import Adapter
    from lmkit.headers import TensorInfo
    from lmkit.keyvalues import KeyValueBytes
    from lmkit.machine import Machine
    from lmkit.placement import Devices
    from lmkit.precision import Precision
    from lmkit.tasks import Task
    from lmkit.weights import Source

__all__ = ["Wish", "check_fits", "make_plan"]

LONGEST = 2**20
"""How many tokens are considered where nothing bounds a model's context."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for.

    Attributes:
        task: What the model is for.
        precision: A word, or a transformers quantization config.
        devices: As `load` takes it.
        reserve_tokens: For how many tokens of one row keys and values have to fit beside the weights.
        trust_remote_code: Whether the checkpoint's own code may run.
        adapters: What will be put on the model.
        wide_copy_bytes: How many bytes quantized layers may take for wide copies.
    """

    task: Task
    precision: Any
    devices: Devices
    reserve_tokens: int = 0
    trust_remote_code: bool = False
    adapters: Sequence[Adapter] = ()
    wide_copy_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        source: Its small files.
        tensors: What the headers of its weights say; None for pickles.
        config: Its config.
    """

    source: Source
    tensors: Mapping[str, TensorInfo] | None
    config: PreTrainedConfig

    @property
    def packed(self) -> str | None:
        """How its weights are quantized in their file already."""
        return packing(self.source, self.config)

    @property
    def dtype(self) -> Any:
        """The dtype that it says it has, else that of its first weight; None for a GGUF file."""
        if self.source.gguf_file:
            return None
        names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        first = (names[tensor.dtype] for tensor in (self.tensors or {}).values() if tensor.dtype in names)
        # PreTrainedConfig.dtype is None where config.json has none.
        return self.config.dtype or next(first, None)

    @property
    def untied(self) -> Collection[str]:
        """Weights that it has of its own although transformers ties them in a new model, as it does a T5's head."""
        says = None if self.source.gguf_file else self.source.read_config().get("tie_word_embeddings")
        return tuple(self.tensors or ()) if says is False else ()


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
        PrecisionError: `precision` is not accepted, or an adapter replaces what it would quantize.
        PlacementError: `devices` is not accepted. What does not fit is said in the plan.
    """
    found = Found(source, tensors, read_config(source, trusted=wish.trust_remote_code))
    model_class = check_task(wish.task, found.config, source.name, trusted=wish.trust_remote_code)
    placed = resolve_placement(wish.devices, machine, absent=absent)
    kind = placed.device_type
    chosen = resolve_precision(wish.precision, found.dtype, kind, bfloat16=machine.bfloat16(kind), packed=found.packed)
    _check_beside(source)
    here = all(name in machine.devices for name in placed.max_memory)
    built: Any = functools.partial(_skeleton, traps=kind == "cpu" and machine.bfloat16("cpu"), here=here)
    skeleton: Skeleton = built(wish, found, chosen)
    chosen = skeleton.precision
    if tensors is not None and found.packed is None:
        with reading(f"the weights of {source.name!r}"):
            check_names(skeleton, found.config, tensors, source.name)
    added = _adapters_bytes(wish, skeleton)
    copies = _copies_bytes(wish, skeleton, kind)
    layout = lay_out(skeleton, placed, beside=added + copies + _beside(skeleton, kind))
    if kind != "cpu" and "cpu" in placed.max_memory and layout.main == "cpu":
        without = replace(wish, devices=_without_accelerators(placed))
        plan, config = make_plan(without, source, tensors, machine, absent=absent)
        told = "no accelerator has room for a part, so that the CPU holds and computes all of it"
        return replace(plan, reasons={**plan.reasons, "offload": plan.reasons.get("offload", told)}), config
    if _left_wide(skeleton, layout):
        skeleton = built(wish, found, chosen, known=skeleton.key_values, device_map=layout.device_map)
        layout = measured_again(layout, skeleton)
    short = shortage(layout, placed, chosen.name, _reserved(wish, skeleton))
    if short is not None:
        short += f". {_instead(wish, found, placed, machine, skeleton=skeleton, layout=layout)}"
    else:
        short = _undividable(layout, skeleton)
    packed = _packed(skeleton, kind) and "cpu" in layout.bytes_per_device
    reasons = {
        "precision": chosen.reason,
        "devices": placed.reason,
        "format": _widened(found, skeleton),
        "quantized": _quantized(skeleton),
        "kernels": _kernels(skeleton) if packed else None,
        "copies": _copies(wish, copies),
        "adapter": f"{size(added)} beside the model's own weights" if added else None,
        "offload": offload(layout, placed),
        "fits": short,
    }
    plan = LoadPlan(
        task=wish.task,
        name=source.name,
        architecture=(found.config.architectures or [found.config.model_type])[0],
        model_class=model_class,
        parameters=skeleton.parameters,
        precision=skeleton.precision,
        placement=placed,
        device_map=layout.device_map,
        modules=layout.modules,
        kernels="packed" if packed else "torch",
        key_values=skeleton.key_values,
        context_length=context_length(found.config),
        fits=short is None,
        reasons={what: reason for what, reason in reasons.items() if reason},
        _layout=layout,
    )
    return plan, found.config


def _without_accelerators(placed: Placement) -> Placement:
    """Return what is left of a placement whose accelerators have no room for any part: the CPU computes."""
    device_map = {"": "cpu"} if placed.offload_folder is None else "auto"
    limits = {"cpu": placed.max_memory["cpu"]}
    reason = f"{placed.reason}; no accelerator has room for a part"
    return Placement(device_map, limits, placed.offload_folder, placed.bytes_per_second, reason)


def check_fits(plan: LoadPlan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlacementError: It does not; the message names the device, what is needed and what is there, and what would fit.
    """
    if not plan.fits:
        msg = f"the devices cannot hold {plan.name!r}: {plan.reasons['fits']}"
        raise PlacementError(msg)


def _skeleton(
    wish: Wish,
    found: Found,
    precision: Precision,
    *,
    traps: bool = False,
    here: bool = False,
    known: KeyValueBytes | None = None,
    device_map: Mapping[str, str] | None = None,
) -> Skeleton:
    """Build the model without memory."""
    with reading(f"the config of {found.source.name!r}"):
        return Skeleton(
            wish.task,
            found.config,
            precision,
            trusted=wish.trust_remote_code,
            untied=found.untied,
            traps=traps,
            here=here,
            known=known,
            device_map=device_map,
        )


def _adapters_bytes(wish: Wish, skeleton: Skeleton) -> int:
    """Check that adapters were made for the model, and sum what they take."""
    for adapter in wish.adapters:
        check_base(adapter, skeleton)
    numbers = sum(tensor.elements for adapter in wish.adapters for tensor in adapter.tensors.values())
    return numbers * skeleton.precision.dtype.itemsize


def _packed(skeleton: Skeleton, kind: str) -> bool:
    """Say whether linear layers will be kept in the order of the processor's own kernel."""
    half = str(skeleton.precision.dtype) == "torch.bfloat16"
    return kind == "cpu" and half and packs() and skeleton.quantizer is None


def _beside(skeleton: Skeleton, kind: str) -> int:
    """Return what a model needs beside its weights: for buffers, and for layers that are held twice."""
    buffers: int = skeleton.buffers_bytes
    return buffers + (skeleton.twice_bytes if _packed(skeleton, kind) else 0)


def _copies_bytes(wish: Wish, skeleton: Skeleton, kind: str) -> int:
    """Return what wide copies of lmkit's quantized layers may come to."""
    return min(wish.wide_copy_bytes, copies_bytes(skeleton.model)) if wish.wide_copy_bytes and kind == "cpu" else 0


def _copies(wish: Wish, copies: int) -> str | None:
    if not wish.wide_copy_bytes:
        return None
    if not copies:
        return "none: wide copies are for int8 and int4 on a CPU that computes bfloat16"
    return f"up to {size(copies)} of bfloat16 copies, made when more than {KERNEL_ROWS} rows first come"


def _check_beside(source: Source) -> None:
    """Check the files beside the weights, of which transformers would go on without a broken one."""
    check_tokenizer(source)
    if (source.folder / "generation_config.json").is_file() and not source.gguf_file:
        read_json(source.folder / "generation_config.json")


def _reserved(wish: Wish, skeleton: Skeleton) -> int:
    """Return the bytes of keys and values that have to fit."""
    tokens = wish.reserve_tokens
    return skeleton.key_values.of(tokens, tokens) if skeleton.key_values and tokens else 0


def _undividable(layout: Layout, skeleton: Skeleton) -> str | None:
    """Say that bitsandbytes refuses parts on the CPU or a disk beside an accelerator, unless its config allows it.

    lmkit's own layers can be on a CPU beside an accelerator, but accelerate reads no integers from a disk.
    """
    settings: Any = getattr(skeleton.quantizer, "quantization_config", None)
    places = {module.device for module in layout.modules}
    if settings is not None and str(settings.quant_method) == "lmkit" and "disk" in places:
        return "int8 and int4 cannot be read from a disk part by part. Raise a budget, or pass precision='bfloat16'."
    if getattr(settings, "llm_int8_enable_fp32_cpu_offload", True) or not places & {"cpu", "disk"}:
        return None
    if places == {"cpu"}:
        return None
    beside = sorted(places & {"cpu", "disk"})
    return (
        f"bitsandbytes wants all parts on accelerators, and some would be on {listed(beside)}. Name larger or more "
        "accelerators, or pass a BitsAndBytesConfig with llm_int8_enable_fp32_cpu_offload=True."
    )


def _left_wide(skeleton: Skeleton, layout: Layout) -> bool:
    """Say whether a config of bitsandbytes allows parts beside an accelerator, which transformers does not quantize."""
    settings: Any = getattr(skeleton.quantizer, "quantization_config", None)
    allowed = getattr(settings, "llm_int8_enable_fp32_cpu_offload", False)
    return bool(allowed and {module.device for module in layout.modules} & {"cpu", "disk"})


def _widened(found: Found, skeleton: Skeleton) -> str | None:
    """Say that a GGUF file's weights are not held as they lie there."""
    if found.source.gguf_file is None:
        return None
    inside = size(sum(tensor.nbytes for tensor in (found.tensors or {}).values()))
    return f"GGUF: the {inside} of packed weights are widened to {skeleton.precision.dtype} as they are read"


def _quantized(skeleton: Skeleton) -> str | None:
    """Say how much of a quantized model is not."""
    if skeleton.quantizer is None:
        return None
    held = [(dtype, count) for _, dtype, count in skeleton.tensors()]
    wide = sum(count for dtype, count in held if "float" in dtype)
    total = sum(count for _, count in held)
    return f"{size(total - wide)} are quantized, {size(wide)} stay in {skeleton.precision.dtype}"


def _kernels(skeleton: Skeleton) -> str:
    reason = "bfloat16 on this CPU: linear layers are reordered once for its matrix kernel"
    if not skeleton.twice_bytes:
        return reason
    return f"{reason}; those whose weight is another module's too are held twice, {size(skeleton.twice_bytes)} more"


def _instead(
    wish: Wish, found: Found, placed: Placement, machine: Machine, *, skeleton: Skeleton, layout: Layout
) -> str:
    """Say what would fit: fewer tokens, else the widest precision that does, with the most tokens of one row."""
    most = context_length(found.config) or LONGEST
    if on_devices(layout):
        return f"In {skeleton.precision.name}, up to {longest(skeleton.key_values, layout, most):,} tokens fit."
    own = sum(module.bytes for module in layout.modules)
    kind = placed.device_type
    if (copies := _copies_bytes(wish, skeleton, kind)) and on_devices(replace(layout, beside=layout.beside - copies)):
        return "Without wide_copy_bytes it would fit."
    native = machine.bfloat16(kind)
    for word in (word for word in NARROWER if word in possible_words(kind, found.packed)):
        other = resolve_precision(word, found.dtype, kind, bfloat16=native, packed=found.packed)
        known = skeleton.key_values if other.dtype is skeleton.precision.dtype else None
        smaller = _skeleton(wish, found, other, traps=kind == "cpu" and native, known=known)
        try:
            added = _adapters_bytes(wish, smaller)
        except PrecisionError:  # of an adapter that replaces what would be quantized
            continue
        beside = added + _copies_bytes(wish, smaller, kind) + _beside(smaller, kind)
        tried = lay_out(smaller, placed, beside=beside)
        total = sum(module.bytes for module in tried.modules)
        if total < own and on_devices(tried) and _undividable(tried, smaller) is None:
            tokens = longest(smaller.key_values, tried, most)
            row = f", with up to {tokens:,} tokens in one row" if smaller.key_values else ""
            return f"precision={word!r} would fit: {size(total)}{row}."
    if placed.offload_folder is not None:
        return "No precision makes it fit: name larger or more devices."
    return (
        "No precision makes it fit: name larger or more devices, or a folder for what does not fit: "
        "devices={…, 'disk': 'offload/'}."
    )


NARROWER = ("bfloat16", "int8", "int4")
"""Words to try in turn where a precision does not fit."""
