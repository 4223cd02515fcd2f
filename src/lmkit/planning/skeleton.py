"""A model without memory, on torch's meta device: what its parts take, where they can go, and its keys and values."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lmkit.checkpoint.bounds import Bounds
from lmkit.checkpoint.code import import_without_kernels
from lmkit.checkpoint.tasks import auto_class
from lmkit.errors import OptionError
from lmkit.kernels.ordered import DTYPES
from lmkit.kernels.packed import packs
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.tied import Int8Embedding, wide_head
from lmkit.kernels.together import joinable, siblings
from lmkit.planning.keyvalues import KeyValueBytes, key_values, tried
from lmkit.planning.placement import home
from lmkit.planning.running import how_rows_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig

    from lmkit.planning.placement import Placement
    from lmkit.planning.precision import Precision
    from lmkit.planning.trial import Case


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model that stays whole.

    Attributes:
        name: The module's name; `""` for weights of the model itself.
        dtypes: What its weights are held in, that of most bytes first.
        bytes: What they take.
    """

    name: str
    dtypes: tuple[str, ...]
    bytes: int


class Skeleton:
    """A checkpoint's model as it will be loaded, without its weights.

    Attributes:
        model: The transformers model, on the meta device.
        precision: What its weights will be held in, what cannot be quantized left out.
        running: How rows of it will run.
        key_values: What its keys and values take; None where that only shows when it runs.
        parameters: How many numbers it has before it is quantized, tied weights counted once.
        untied: The weights that have values of their own in the file, and those that they would be tied to.
        rows: How many tokens adapters give it; None if it keeps its own.
        packs: Whether linear layers on a CPU will be kept in the order of the processor's own kernel.
        twice_bytes: What linear layers take whose weight is another module's too.
        shapes: Of each weight before it is quantized, tied ones once.
        buffers_bytes: What it computes once and keeps, such as masks and positions; they are in no file.
        together: The linear layers that read the same input and will be one product, by groups, if all is on a CPU;
            None where that was looked for, and only shows when the model runs.
    """

    def __init__(
        self,
        case: Case,
        placed: Placement,
        precision: Precision,
        *,
        known: KeyValueBytes | None = None,
        device_map: Mapping[str, str] | None = None,
    ) -> None:
        """Build the model of a config, quantized as `precision` says.

        Args:
            case: What is asked for, and what is known of the checkpoint.
            placed: The devices it will be on.
            precision: What its weights will be held in.
            known: What its keys and values take, from a skeleton that computes in the same dtype.
            device_map: Where its parts will be, for quantizers that leave some of them wide for it.
        """
        self._case, wish = case, case.wish
        plain: Any = copy.deepcopy(case.config)
        quantization = getattr(plain, "quantization_config", None)
        if quantization is not None:
            del plain.quantization_config  # measured wide first
        attention, name = wish.attn_implementation, case.source.name
        check = functools.partial(Bounds.of(case.tensors).check_built, content=case.config.to_dict(), name=name)
        try:
            with _Counting(check):
                self.model = self._empty(plain, precision.dtype, attention)
        except ValueError as error:
            if attention is None:
                raise
            raise OptionError(f"attn_implementation={attention!r} is not to be had: {error}") from error
        asked = attention is not None
        wanted = {"compiled": wish.compile is True, "asked": asked, "kernels": bool(wish.compile)}
        self.running = how_rows_run(wish.task, self.model, placed.device_type, **wanted)
        if not _attends_eagerly(self.model):
            self.model = self._empty(plain, precision.dtype, "eager")
        self.untied = {name: self.model.all_tied_weights_keys[name] for name in case.untied(self.model)}
        ties = {name: origin for name, origin in self.model.all_tied_weights_keys.items() if name not in self.untied}
        self.shapes = {name: tuple(one.shape) for name, one in self.model.state_dict().items() if name not in ties}
        self.rows = case.rows(self.model)
        if self.rows is not None:
            self.model.resize_token_embeddings(self.rows, mean_resizing=False)
        names = dict(self.model.named_parameters(remove_duplicate=False))
        self.parameters = sum(tensor.numel() for name, tensor in names.items() if name not in ties)
        self.twice_bytes = sum(
            tensor.nbytes
            for name, tensor in names.items()
            if name in ties and type(self.model.get_submodule(name.rpartition(".")[0])) is torch.nn.Linear
        )
        saved = self.model.state_dict()
        self.buffers_bytes = sum(buffer.nbytes for name, buffer in self.model.named_buffers() if name not in saved)
        looks = placed.device_type == "cpu" and precision.name not in ("float32", "float16") and known is None
        outputs, groups = self._tried(looks=looks) if known is None else (None, ())
        encodes = bool(self.model.config.is_encoder_decoder)
        self.key_values = None if wish.task == "masked" else known or key_values(outputs, encodes=encodes)
        self._wide = self._kept_wide(precision.dtype)
        # On a CPU with bfloat16 units, bitsandbytes cannot multiply all layers.
        traps = placed.device_type == "cpu" and case.machine.bfloat16("cpu")
        if traps and getattr(precision.quantization, "load_in_4bit", False):
            precision = dataclasses.replace(precision, quantization=self._without_traps(precision.quantization))
        if self.untied and hasattr(precision.quantization, "untied"):  # lmkit's own, which packs heads
            own: Any = copy.copy(precision.quantization)
            own.untied = [*self.untied]
            precision = dataclasses.replace(precision, quantization=own)
        self.precision = precision
        self.quantizer = self._quantize(quantization, placed, device_map)
        plain_half = self.quantizer is None and self.precision.dtype is torch.bfloat16
        self.packs = placed.device_type == "cpu" and plain_half and packs()
        self.native = bool(wish.compile) and placed.device_type == "cpu" and self._is_own()
        for name in self.untied:
            self.model.all_tied_weights_keys.pop(name, None)
        self.together = None if groups is None else tuple(group for group in groups if self._joins(group))

    @property
    def head_bytes(self) -> int:
        """What a copy in 8 bits takes of an output layer that lmkit's own quantizer leaves wide."""
        head = wide_head(self.model, self.quantizer)
        return 0 if head is None else head.weight.numel()

    def _is_own(self) -> bool:
        """Say whether lmkit's own kernels multiply by what is quantized."""
        config = getattr(self.quantizer, "quantization_config", None)
        return str(getattr(config, "quant_method", "")) == "lmkit" and self.precision.dtype in DTYPES

    def _tried(self, *, looks: bool) -> tuple[Any, tuple[tuple[str, ...], ...] | None]:
        """Try the model without values; where that `looks`, say which linear layers read the same input."""
        run = functools.partial(tried, self.model, keeps=self._case.wish.task != "masked")
        outputs, groups = siblings(self.model, run) if looks else (None, ())
        if outputs is not None:
            return outputs, groups
        return run() if self._case.wish.task != "masked" else None, None if looks else ()

    def _joins(self, names: Iterable[str]) -> bool:
        """Say whether layers that read the same input are packed or quantized alike, each with a weight of its own."""
        ties, modules = self.model.all_tied_weights_keys, {name: self.model.get_submodule(name) for name in names}
        if not self.packs:
            return joinable([*modules.values()])
        weights = {f"{name}.weight": module.weight for name, module in modules.items()}
        plain = all(type(module) is torch.nn.Linear for module in modules.values())
        own = not weights.keys() & {*ties, *ties.values()}
        return plain and own and all(self._held(*weight)[0] == "bfloat16" for weight in weights.items())

    def _without_traps(self, quantization: Any) -> Any:
        """Leave out what bitsandbytes' 4-bit kernel for bfloat16 processors cannot multiply.

        It takes outputs in multiples of 32 and inputs in multiples of 64, and finds out at the first forward pass.
        """
        from transformers.quantizers.base import get_keys_to_not_convert

        linear = [
            (name, part.weight.shape if isinstance(part, torch.nn.Linear) else part.weight.shape[::-1])
            for name, part in self.model.named_modules()
            if isinstance(part, (torch.nn.Linear, Conv1D))
        ]
        if awkward := [name for name, (outputs, inputs) in linear if outputs % 32 or inputs % 64]:
            quantization = copy.deepcopy(quantization)
            # A list of one's own replaces the one that transformers would make.
            own = quantization.llm_int8_skip_modules or get_keys_to_not_convert(self.model)
            quantization.llm_int8_skip_modules = [*own, *awkward]
        return quantization

    def _empty(self, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> Any:
        """Build the model of a config on the meta device, with an attention in transformers' words if there is one."""
        how: dict[str, Any] = {"trust_remote_code": self._case.wish.access.trust_remote_code}
        how |= {} if attention is None else {"attn_implementation": attention}
        with torch.device("meta"):
            kind = auto_class(self._case.wish.task, config)
            return kind.from_config(copy.deepcopy(config), dtype=dtype, **how).eval()

    def _quantize(self, saved: Any, placed: Placement, device_map: Mapping[str, str] | None) -> Any:
        """Put quantized modules in, as the checkpoint or the precision has them; return transformers' quantizer."""
        precision, case = self.precision, self._case
        wanted = precision.quantization or saved
        if wanted is None or _method(wanted) == "gguf":
            return None
        from transformers.quantizers.auto import AutoHfQuantizer

        if _method(wanted).startswith("bitsandbytes"):
            import_without_kernels("bitsandbytes", trusted=case.wish.access.trust_remote_code)
        pre_quantized = saved is not None
        quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(wanted), pre_quantized=pre_quantized)
        # On this machine transformers can tell if its devices compute what a file holds quantized.
        if pre_quantized and placed.max_memory.keys() <= case.machine.devices.keys():
            quantizer.validate_environment(device_map=None, weights_only=True)
            if getattr(quantizer.quantization_config, "dequantize", False):
                word = str(precision.dtype).removeprefix("torch.")
                reason = f"the file's {precision.name} is widened as it is read: no device here computes it"
                self.precision = dataclasses.replace(precision, name=word, reason=reason)
                return None
        quantizer.preprocess_model(
            model=self.model, dtype=precision.dtype, device_map=device_map, checkpoint_files=None, use_kernels=False
        )
        return quantizer

    def _kept_wide(self, dtype: torch.dtype) -> list[tuple[re.Pattern[str], torch.dtype]]:
        """Return which weights transformers keeps in another dtype, by the name's pattern."""
        plan: Mapping[str, torch.dtype] = self.model._get_dtype_plan(dtype)  # noqa: SLF001 - as from_pretrained does
        return [(re.compile(rf"(^|\.){re.escape(name)}(\.|$)"), kept) for name, kept in plan.items()]

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Yield the name, the dtype and the bytes of each weight, tied ones once."""
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in self.model.all_tied_weights_keys:
                yield name, *self._held(name, tensor)

    def _held(self, name: str, tensor: torch.Tensor) -> tuple[str, int]:
        path, _, leaf = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        if isinstance(module, (QuantizedLinear, Int8Embedding)) and leaf in ("weight", "scales"):
            return getattr(module, "NAME", "int8"), tensor.nbytes
        if self.quantizer is not None and self.quantizer.param_needs_quantization(self.model, name):
            return _bitsandbytes(module, tensor, self.quantizer, name, self.model)
        dtype = tensor.dtype
        if type(module).__module__.startswith("bitsandbytes"):
            dtype = self.precision.dtype  # of its bias, which is made in torch's default
        if dtype.is_floating_point:
            dtype = next((kept for pattern, kept in self._wide if pattern.search(name)), dtype)
        return str(dtype).removeprefix("torch."), tensor.numel() * dtype.itemsize

    def parts(self) -> list[Part]:
        """Return the parts that stay whole, in order: blocks, and what is not in one."""
        return _summed(self.tensors(), self.homes())

    def homes(self) -> list[str]:
        """Name the modules that stay whole: each block, and each module that has no block below it."""
        return whole_modules(self.model)[0]

    def blocks(self) -> list[str]:
        """Name the blocks, between which a model may be divided."""
        return whole_modules(self.model)[1]

    def own(self, name: str = "") -> list[str]:
        """Name the weights and buffers of a module, the model by default, which are in no module below it."""
        module = self.model.get_submodule(name)
        return [leaf for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]

    def reads_only(self, block: str) -> bool:
        """Say whether a block is the encoder's, which keeps no keys and values."""
        return bool(self.model.config.is_encoder_decoder) and "encoder" in block.split(".")

    def groups(self) -> list[list[str]]:
        """Return the names of parts that have to be together, since they share a weight."""
        homes = self.homes()
        ties: Mapping[str, str] = self.model.all_tied_weights_keys
        names = {module: name for name, module in self.model.named_modules()}
        # A quantized head that is its embedding holds that in a tuple, and no tie is left.
        heads = [(name, names[part]) for module, name in names.items() for part in getattr(module, "_embedding", ())]
        pairs = {frozenset((home(one, homes), home(other, homes))) for one, other in (*ties.items(), *heads)}
        return [sorted(pair) for pair in pairs if len(pair) > 1]

    def divided(self, limits: Mapping[str, int]) -> dict[str, str]:
        """Divide the model among devices with these budgets, as transformers and accelerate do.

        Returns:
            A device per module name; `"disk"` where no budget is left.
        """
        from transformers.integrations import accelerate

        numbered: dict[str | int, int] = {
            "cpu" if name == "cpu" else int(name.partition(":")[2]): size for name, size in limits.items()
        }
        library: Any = accelerate
        quantizer: Any = copy.copy(self.quantizer)
        if quantizer is not None:  # it is not to refuse a map with parts on the CPU: `load` says what is refused
            quantizer.validate_environment = lambda **_: None
        found: Mapping[str, str | int] = {}
        for way in ("balanced", "sequential"):
            # What from_pretrained calls. Balancing holds room back, and what then has no place may have one without.
            # It stumbles over a tied weight whose module has its place already, in budgets that hold little.
            with contextlib.suppress(IndexError):
                found = library._get_device_map(self.model, way, dict(numbered), quantizer)  # noqa: SLF001
            if found and "disk" not in found.values():
                break
        kind = next((name.partition(":")[0] for name in limits if name != "cpu"), "cuda")
        found = found or {"": "disk"}
        return {name: f"{kind}:{where}" if isinstance(where, int) else where for name, where in found.items()}


class _Counting(TorchFunctionMode):
    """Counts the tensors that a new model is made of, and their numbers, in the thread that makes it."""

    def __init__(self, check: Callable[[int, int], None]) -> None:
        super().__init__()
        self.check, self.tensors, self.elements = check, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        if (name := getattr(func, "__name__", "")) in ("empty", "ones", "zeros", "full", "rand", "randn"):
            self.tensors += 1
            self.elements += made.numel() if name == "empty" else 0  # others are of masks, too, which no file holds
            self.check(self.tensors, self.elements)
        return made


def _attends_eagerly(model: Any) -> bool:
    """Have a model attend without masks' values, of which there are none on meta; say whether all its parts do."""
    # Its modules leave warning filters behind when they are first imported; a load takes those back.
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if all(part._can_set_attn_implementation() for part in parts):  # noqa: SLF001 - asked as the kernel asks
        model.set_attn_implementation("eager")
    return all(part.config._attn_implementation == "eager" for part in parts)  # noqa: SLF001 - it has no public name


def whole_modules(model: Any) -> tuple[list[str], list[str]]:
    """Name the modules of a model that stay whole, and those of them that are blocks."""
    classes = set(model._no_split_modules or ())  # noqa: SLF001 - what accelerate goes by
    found: list[str] = []
    blocks: list[str] = []

    def descend(name: str, module: torch.nn.Module) -> bool:
        """Add what is whole at or below a module; say whether a block is among it."""
        if type(module).__name__ in classes:
            found.append(name)
            blocks.append(name)
            return True
        before = len(found)
        inside = [descend(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
        if name and not any(inside):
            del found[before:]
            found.append(name)
        elif any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            found.insert(before, name)
        return any(inside)

    descend("", model)
    return found or [""], blocks


def held(model: Any) -> list[tuple[Part, str]]:
    """Measure the parts of a loaded model: what each really holds, and the device that most of it is on."""
    homes = whole_modules(model)[0]
    devices: dict[str, Counter[str]] = {name: Counter() for name in ["", *homes]}
    tensors: list[tuple[str, str, int]] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module: Any = model.get_submodule(name.rpartition(".")[0])
        size, dtype = _real(tensor, module), getattr(module, "NAME", None) or str(tensor.dtype).removeprefix("torch.")
        state: Any = getattr(tensor, "quant_state", None)
        tensors.append((name, getattr(state, "quant_type", dtype), size))
        devices[home(name, homes)][str(tensor.device)] += max(size, 1)
    return [(part, devices[part.name].most_common(1)[0][0]) for part in _summed(tensors, homes)]


def _real(tensor: Any, module: Any) -> int:
    """Count the bytes of a weight, bitsandbytes' scales included, which it moves to the module when it first runs."""
    state, scale = getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)
    if scale is None and tensor is module._parameters.get("weight"):  # noqa: SLF001
        scale = getattr(getattr(module, "state", None), "SCB", None)
    size = tensor.nbytes if not tensor.is_mkldnn else tensor.numel() * tensor.element_size()
    if scale is not None:
        size += scale.nbytes
    while state is not None:
        size += sum(part.nbytes for part in (state.absmax, state.code, state.offset) if part is not None)
        state = state.state2 if state.nested else None
    return int(size)


def _summed(tensors: Iterable[tuple[str, str, int]], homes: list[str]) -> list[Part]:
    """Sum the bytes of weights by the modules they are in."""
    sizes: dict[str, Counter[str]] = {name: Counter() for name in ["", *homes]}
    for name, dtype, size in tensors:
        sizes[home(name, homes)][dtype] += size
    return [
        Part(name, tuple(dtype for dtype, _ in counted.most_common()), counted.total())
        for name, counted in sizes.items()
        if counted
    ]


def _method(config: Any) -> str:
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


BLOCK, NESTED = 64, 256
"""How many weights share a scale in bitsandbytes' 4-bit types, and how many of those scales share one in turn."""


def _bitsandbytes(module: Any, tensor: torch.Tensor, quantizer: Any, name: str, model: Any) -> tuple[str, int]:
    """Return what one quantized weight is held in, scales and tables included."""
    size = int(tensor.numel() * quantizer.param_element_size(model, name, tensor))
    settings = quantizer.quantization_config
    if getattr(settings, "load_in_8bit", False):
        return "int8", size + 4 * module.out_features
    if getattr(settings, "load_in_4bit", False):
        blocks = -(-tensor.numel() // BLOCK)
        nested = blocks + 4 * (-(-blocks // NESTED) + NESTED + 1)
        scales = nested if settings.bnb_4bit_use_double_quant else 4 * blocks
        return str(settings.bnb_4bit_quant_type), size + scales + 4 * 16
    return str(_method(settings)), size
