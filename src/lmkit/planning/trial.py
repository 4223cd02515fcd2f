"""One way to hold a model, tried on paper: a precision, the model without memory in it, and where its parts go."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lmkit.checkpoint.config import context, known_rotary, saved_quantization
from lmkit.checkpoint.files import Source, mapped_weights, reading
from lmkit.checkpoint.find import Access
from lmkit.errors import PrecisionError, listed
from lmkit.kernels.native.build import instructions
from lmkit.kernels.native.operators import refusal
from lmkit.kernels.packed import multiplies
from lmkit.planning.adapters import Adapter, check_base, rows_of
from lmkit.planning.layout import Layout, lay_out, longest, measured_again, on_devices, shortage, size
from lmkit.planning.precision import Precision, possible_words, resolve_precision
from lmkit.planning.skeleton import Skeleton
from lmkit.planning.weight_names import with_own_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig

    from lmkit.checkpoint.headers import TensorInfo
    from lmkit.checkpoint.tasks import Task
    from lmkit.planning.keyvalues import KeyValueBytes
    from lmkit.planning.machine import Machine
    from lmkit.planning.placement import Devices, Placement

LONGEST = 2**20
"""How many tokens are considered where nothing bounds a model's context."""

NARROWER = ("bfloat16", "int8", "int4")
"""Words to try in turn where a precision does not fit."""

PREFIX_CACHE_BYTES = 256 * 2**20
"""What `prefix_cache_bytes` is when nobody says: a chat of 11,000 tokens on SmolLM2-135M, 2,000 on a model of 7B."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for.

    Attributes:
        task: What the model is for.
        precision: A word, or a transformers quantization config.
        devices: As `load` takes it.
        reserve_tokens: For how many tokens of one row keys and values have to fit beside the weights.
        context_length: How many tokens the model takes at once; what its config says if None.
        compile: Whether the decode step and lmkit's own kernels are to be compiled, or `"kernels"` alone.
        prefix_cache_bytes: How many bytes of keys and values of recent prompts may be kept.
        attn_implementation: Which attention is asked for; None leaves it to lmkit.
        language: Which one the model is to work in, of a checkpoint with weights for each.
        adapters: What will be put on the model.
        access: How files are found, and whether the checkpoint's own code may run.
    """

    task: Task
    precision: Any
    devices: Devices
    reserve_tokens: int = 0
    context_length: int | None = None
    compile: bool | Literal["kernels"] = False
    prefix_cache_bytes: int = PREFIX_CACHE_BYTES
    attn_implementation: str | None = None
    language: str | None = None
    adapters: Sequence[Adapter] = ()
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked for, and all that is known before weights are read.

    Attributes:
        wish: What was asked for.
        machine: What is here.
        source: Its small files.
        tensors: What the headers of its weights say; None for pickles.
        config: Its config.
    """

    wish: Wish
    machine: Machine
    source: Source
    tensors: Mapping[str, TensorInfo] | None
    config: PreTrainedConfig

    @property
    def saved_quantization(self) -> str | None:
        """How its weights are quantized in their file already."""
        return saved_quantization(self.source, self.config)

    @property
    def context(self) -> tuple[int | None, str | None]:
        """How many tokens the model takes at once, and why."""
        return context(self.config, self.wish.context_length)

    @property
    def dtype(self) -> Any:
        """The dtype that it says it has, else that of its first weight; None for a GGUF file."""
        if self.source.gguf_file:
            return None
        names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        first = (names[tensor.dtype] for tensor in (self.tensors or {}).values() if tensor.dtype in names)
        # PreTrainedConfig.dtype is None where config.json has none.
        return self.config.dtype or next(first, None)

    def untied(self, model: Any) -> list[str]:
        """Return which weights of a new model, where they are tied, the file has with values of their own."""
        if self.source.gguf_file is not None or not model.all_tied_weights_keys:
            return []
        weights = functools.cache(lambda: mapped_weights(self.source))
        return with_own_values(model, self.tensors or weights(), weights)

    def rows(self, model: Any) -> int | None:
        """Return how many tokens adapters give a model; None if it keeps its own."""
        return rows_of(self.wish.adapters, model)


@dataclass(frozen=True, slots=True)
class Trial:
    """A model in one precision on some devices.

    Attributes:
        case: What it is tried for.
        placed: The devices and their budgets.
        skeleton: The model without memory.
        layout: Where its parts go.
        adapters: What adapters take, in bytes.
        native: Whether linear layers will be multiplied by lmkit's own kernels, unless they fail to build: those that
            are quantized, or where these kernels have one for it, those in bfloat16.
    """

    case: Case
    placed: Placement
    skeleton: Skeleton
    layout: Layout
    adapters: int
    native: bool

    @classmethod
    def of(cls, case: Case, placed: Placement, word: str | None = None, like: Trial | None = None) -> Trial:
        """Try a precision, the one that was asked for by default; `like` a trial whose measurements may still hold.

        Raises:
            PrecisionError: It is not accepted, or an adapter replaces what it would quantize.
        """
        wish, kind = case.wish, placed.device_type
        units = case.machine.bfloat16(kind)
        precision = resolve_precision(
            word or wish.precision, case.dtype, kind, bfloat16=units, saved=case.saved_quantization
        )
        same = like is not None and precision.dtype is like.skeleton.precision.dtype
        skeleton = _skeleton(case, placed, precision, like.skeleton.key_values if like and same else None)
        for adapter in wish.adapters:
            check_base(adapter, skeleton)
        adapters = sum(adapter.elements for adapter in wish.adapters) * skeleton.precision.dtype.itemsize
        half = skeleton.packs and bool(wish.compile)
        native = (skeleton.native or half) and refusal() is None and (not half or multiplies(instructions()))
        twice = skeleton.twice_bytes if skeleton.packs else skeleton.head_bytes if native else 0
        layout = lay_out(skeleton, placed, beside=adapters + skeleton.buffers_bytes + twice)
        native = native and (not half or "cpu" in layout.bytes_per_device)
        trial = cls(case, placed, skeleton, layout, adapters, native=native)
        return trial._measured_again() if trial._left_wide else trial

    @property
    def _left_wide(self) -> bool:
        """Whether a config of bitsandbytes allows parts beside an accelerator, which transformers does not quantize."""
        settings: Any = getattr(self.skeleton.quantizer, "quantization_config", None)
        allowed = getattr(settings, "llm_int8_enable_fp32_cpu_offload", False)
        return bool(allowed and self._places & {"cpu", "disk"})

    def _measured_again(self) -> Trial:
        """Return the same places, with what parts take that are left wide there."""
        skeleton = _skeleton(
            self.case, self.placed, self.skeleton.precision, self.skeleton.key_values, self.layout.device_map
        )
        return replace(self, skeleton=skeleton, layout=measured_again(self.layout, skeleton))

    @property
    def _places(self) -> set[str]:
        return {module.device for module in self.layout.modules}

    @property
    def packed(self) -> bool:
        """Whether linear layers will be kept in the order of the processor's own kernel."""
        return self.skeleton.packs and "cpu" in self.layout.bytes_per_device

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers that will be one product, by groups."""
        return self.skeleton.together or () if self._places == {"cpu"} else ()

    @property
    def reserved(self) -> int:
        """The bytes of keys and values that have to fit."""
        tokens = self.case.wish.reserve_tokens
        return self.skeleton.key_values.of(tokens, tokens) if self.skeleton.key_values and tokens else 0

    @property
    def only_the_cpu_has_room(self) -> bool:
        """Whether accelerators were named, and none of them has room for a part."""
        here = self.placed.device_type != "cpu" and "cpu" in self.placed.max_memory
        return here and self.layout.main == "cpu"

    def shortage(self) -> str | None:
        """Say what does not fit, and what would; None if all fits."""
        short = shortage(self.layout, self.placed, self.skeleton.precision.name, self.reserved)
        return self.undividable() if short is None else f"{short}. {self._instead()}"

    def undividable(self) -> str | None:
        """Say that bitsandbytes refuses parts on the CPU or a disk beside an accelerator, unless its config allows it.

        lmkit's own layers can be on a CPU beside an accelerator, but accelerate reads no integers from a disk.
        """
        settings: Any = getattr(self.skeleton.quantizer, "quantization_config", None)
        if settings is not None and str(settings.quant_method) == "lmkit" and "disk" in self._places:
            return (
                "int8 and int4 cannot be read from a disk part by part. Raise a budget, or pass precision='bfloat16'."
            )
        beside = self._places & {"cpu", "disk"}
        if getattr(settings, "llm_int8_enable_fp32_cpu_offload", True) or not beside or self._places == {"cpu"}:
            return None
        return (
            f"bitsandbytes wants all parts on accelerators, and some would be on {listed(sorted(beside))}. Name larger "
            "or more accelerators, or pass a BitsAndBytesConfig with llm_int8_enable_fp32_cpu_offload=True."
        )

    def _instead(self) -> str:
        """Say what would fit: fewer tokens, else the widest precision that does, with the most tokens of one row."""
        most = self.case.context[0] or LONGEST
        if on_devices(self.layout):
            tokens = longest(self.skeleton.key_values, self.layout, most)
            return f"In {self.skeleton.precision.name}, up to {tokens:,} tokens fit."
        own = sum(module.bytes for module in self.layout.modules)
        possible = possible_words(self.placed.device_type, self.case.saved_quantization)
        for word in (word for word in NARROWER if word in possible):
            try:
                tried = Trial.of(self.case, self.placed, word, self)
            except PrecisionError:  # of an adapter that replaces what would be quantized
                continue
            total = sum(module.bytes for module in tried.layout.modules)
            if total < own and on_devices(tried.layout) and tried.undividable() is None:
                key_values = tried.skeleton.key_values
                row = f", with up to {longest(key_values, tried.layout, most):,} tokens in one row"
                return f"precision={word!r} would fit: {size(total)}{row if key_values else ''}."
        if self.placed.offload_folder is not None:
            return "No precision makes it fit: name larger or more devices."
        return (
            "No precision makes it fit: name larger or more devices, or a folder for what does not fit: "
            "devices={…, 'disk': 'offload/'}."
        )


def _skeleton(
    case: Case,
    placed: Placement,
    precision: Precision,
    known: KeyValueBytes | None,
    device_map: Mapping[str, str] | None = None,
) -> Skeleton:
    """Build the model without memory."""
    with reading(f"the config of {case.source.name!r}"), known_rotary(case.config, case.source.name):
        return Skeleton(case, placed, precision, known=known, device_map=device_map)
