"""A model without memory, on torch's meta device: what its parts take, where they can go, and its keys and values."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from lmkit.keyvalues import KeyValueBytes, key_values
from lmkit.quantized import Int8Embedding, QuantizedLinear
from lmkit.tasks import auto_class

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedConfig

    from lmkit.precision import Precision
    from lmkit.tasks import Task

__all__ = ["Part", "Skeleton"]


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
        key_values: What its keys and values take; None where that only shows when it runs.
        parameters: How many numbers it has before it is quantized, tied weights counted once.
        twice_bytes: What linear layers take whose weight is another module's too.
        shapes: Of each weight before it is quantized, tied ones once.
        buffers_bytes: What it computes once and keeps, such as masks and positions; they are in no file.
    """

    def __init__(
        self,
        task: Task,
        config: PreTrainedConfig,
        precision: Precision,
        *,
        trusted: bool = False,
        untied: Collection[str] = (),
        traps: bool = False,
        here: bool = False,
        known: KeyValueBytes | None = None,
        device_map: Mapping[str, str] | None = None,
    ) -> None:
        """Build the model of a config, quantized as `precision` says.

        Args:
            task: What it will be loaded for.
            config: Its config.
            precision: What its weights will be held in.
            trusted: Whether its own code may run.
            untied: Weights that transformers ties in a new model of this family, and that the file has of their own.
            traps: Whether it will compute on a CPU with bfloat16 units, where bitsandbytes cannot multiply all layers.
            here: Whether its devices are on this machine, where transformers can tell if they compute what a file holds
                quantized.
            known: What its keys and values take, from a skeleton that computes in the same dtype.
            device_map: Where its parts will be, for quantizers that leave some of them wide for it.
        """
        plain: Any = copy.deepcopy(config)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            del plain.quantization_config  # measured wide first
        with torch.device("meta"):
            # Other attention asks masks for their values, and there are none.
            self.model: Any = auto_class(task).from_config(
                plain, dtype=precision.dtype, attn_implementation="eager", trust_remote_code=trusted
            )
        self.model.eval()
        for name in untied:
            self.model.all_tied_weights_keys.pop(name, None)
        ties: Mapping[str, str] = self.model.all_tied_weights_keys
        names = dict(self.model.named_parameters(remove_duplicate=False))
        self.parameters = sum(tensor.numel() for name, tensor in names.items() if name not in ties)
        self.twice_bytes = sum(
            tensor.nbytes
            for name, tensor in names.items()
            if name in ties and type(self.model.get_submodule(name.rpartition(".")[0])) is torch.nn.Linear
        )
        saved = self.model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in saved.items() if name not in ties}
        self.buffers_bytes = sum(buffer.nbytes for name, buffer in self.model.named_buffers() if name not in saved)
        self.key_values = None if task == "masked" else known or key_values(self.model)
        self._wide = self._kept_wide(precision.dtype)
        if traps and getattr(precision.quantization, "load_in_4bit", False):
            precision = dataclasses.replace(precision, quantization=self._without_traps(precision.quantization))
        self.precision = precision
        self.quantizer = self._quantize(quantization, precision, here=here, device_map=device_map)

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

    def _quantize(
        self, saved: Any, precision: Precision, *, here: bool, device_map: Mapping[str, str] | None = None
    ) -> Any:
        """Put quantized modules in, as the checkpoint or the precision has them; return transformers' quantizer."""
        wanted = precision.quantization or saved
        if wanted is None or _method(wanted) == "gguf":
            return None
        from transformers.quantizers.auto import AutoHfQuantizer

        pre_quantized = saved is not None
        quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(wanted), pre_quantized=pre_quantized)
        if here and pre_quantized:
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
            if name in self.model.all_tied_weights_keys:
                continue
            module, _, leaf = name.rpartition(".")
            dtype, size = self._held(self.model.get_submodule(module), leaf, name, tensor)
            yield name, dtype, size

    def _held(self, module: Any, leaf: str, name: str, tensor: torch.Tensor) -> tuple[str, int]:
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
        homes = self.homes()
        return _summed(self.tensors(), homes)

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
        pairs = {frozenset((home(one, homes), home(other, homes))) for one, other in ties.items()}
        pairs |= {
            frozenset((home(name, homes), home(names[id(part)], homes)))
            for names in [{id(module): name for name, module in self.model.named_modules()}]
            for name, module in self.model.named_modules()
            for part in getattr(module, "_embedding", ())
        }
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
        quantizer = _unchecked(self.quantizer)
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
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
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


def home(name: str, homes: Sequence[str]) -> str:
    """Return which of some modules a weight or module is in, the innermost of them; `""` if it is in none."""
    return max((one for one in homes if not one or f"{name}.".startswith(f"{one}.")), key=len, default="")


def _unchecked(quantizer: Any) -> Any:
    """Return a quantizer that does not refuse a map with parts on the CPU: `load` says what is refused."""
    if quantizer is None:
        return None
    quantizer = copy.copy(quantizer)
    quantizer.validate_environment = lambda **_: None
    return quantizer


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
