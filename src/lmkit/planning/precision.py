"""One word of precision to a dtype or a quantization, for a device, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from lmkit.errors import PrecisionError, listed, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

PrecisionName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "nf4"]
PrecisionWord: TypeAlias = PrecisionName | Literal["fp32", "bf16", "fp16", "8bit", "4bit"]

_SHORT = {"float32": ["fp32"], "bfloat16": ["bf16"], "float16": ["fp16"], "int8": ["8bit"], "int4": ["4bit"]}
PRECISION_WORDS: Final[Mapping[str, PrecisionName]] = {
    word: name for name in get_args(PrecisionName) for word in (name, *_SHORT.get(name, ()))
}
"""Each precision's name and its short forms."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What the weights are held in.

    Attributes:
        name: The word, resolved: never `"auto"`; `"custom"` for a quantization config passed through.
        dtype: What is computed in, and what modules that are not quantized are held in.
        quantization: The transformers quantization config, or None.
        reason: Why.
        asked: The word as the caller wrote it; `"custom"` for a quantization config.
    """

    name: str
    dtype: torch.dtype
    quantization: QuantizationConfigMixin | None
    reason: str
    asked: str = "auto"

    def __str__(self) -> str:
        """Return the name with the reason."""
        return f"{self.name} ({self.reason})"


OWN_DEVICES: Final = ("cpu", "mps")
"""Kinds of devices on which `"int8"` and `"int4"` are lmkit's own; elsewhere they are bitsandbytes'."""


def resolve_precision(
    precision: str | QuantizationConfigMixin,
    dtype: str | torch.dtype | None,
    device_type: str,
    *,
    bfloat16: bool,
    saved: str | None = None,
) -> Precision:
    """Turn a word, or a quantization config, into what the weights will be held in.

    Args:
        precision: One of `PRECISION_WORDS`, or a transformers quantization config.
        dtype: The checkpoint's own dtype; None if it has none, as a GGUF file.
        device_type: Where the model will compute, such as `"cpu"` or `"cuda"`.
        bfloat16: Whether that computes bfloat16 natively.
        saved: How the file's weights are quantized already, such as `"gguf"`, or `"int4"` if lmkit did it; None if
            they are not.

    Raises:
        PrecisionError: An unknown word, the nearest one is named; or one this checkpoint or device cannot do.
    """
    import torch

    if isinstance(precision, str) and precision not in PRECISION_WORDS:
        raise PrecisionError(
            f"unknown precision {precision!r}.{nearest(precision, PRECISION_WORDS)} "
            f"Accepted: {listed(PRECISION_WORDS)}, or a transformers quantization config."
        )
    computed, reason = _automatic(dtype, device_type, bfloat16=bfloat16)
    name = PRECISION_WORDS[precision] if isinstance(precision, str) else "custom"
    _check_possible(repr(precision), name, device_type, saved)
    if not isinstance(precision, str):
        return Precision(name, computed, _config(precision), "the quantization config as passed", name)
    if saved not in (None, "gguf"):
        held = getattr(torch, name) if name in WIDE else computed
        return Precision(str(saved), held, None, f"the checkpoint is quantized already: {saved}", precision)
    if name == "auto":
        return Precision(str(computed).removeprefix("torch."), computed, None, reason, precision)
    if name in WIDE:
        return Precision(name, getattr(torch, name), None, "as asked", precision)
    if device_type in OWN_DEVICES and name != "nf4":
        from lmkit.kernels.quantizer import WeightOnlyConfig

        own = WeightOnlyConfig(int(name.removeprefix("int")))
        return Precision(name, computed, own, _OWN[name], precision)
    return Precision(name, computed, _bitsandbytes(name, computed), _BITSANDBYTES[name], precision)


WIDE: Final = ("float32", "bfloat16", "float16")
"""The words that are dtypes."""

_OWN = {
    "int8": "as asked: lmkit's own weight-only quantizer, a scale for each output",
    "int4": (
        "as asked: lmkit's own weight-only quantizer, a scale and an offset for 32 weights; the output layer in int8"
    ),
}
_BITSANDBYTES = {
    "int8": "as asked: bitsandbytes LLM.int8()",
    "int4": "as asked: bitsandbytes nf4, double quantization, the better of its two 4-bit types",
    "nf4": "as asked: bitsandbytes nf4, double quantization",
}


def possible_words(device_type: str, saved: str | None) -> list[str]:
    """Return the words that a kind of device, and a checkpoint that is `saved` quantized already, can do."""
    if saved is not None:
        return ["auto", *WIDE, *([saved] if saved in ("int8", "int4") else [])]
    return ["auto", *WIDE, "int8", "int4", *(["nf4"] if device_type != "mps" else [])]


def _check_possible(given: str, name: str, device_type: str, saved: str | None) -> None:
    words = possible_words(device_type, saved)
    if name in words or (name == "custom" and saved is None):
        return
    if saved is not None:
        raise PrecisionError(
            f"precision={given} would quantize weights that the file holds quantized already ({saved}): "
            f"pass {listed(words)}, or load the unquantized checkpoint."
        )
    raise PrecisionError(f"precision={given} is not to be had on {device_type!r}: pass {listed(words)}.")


def _config(config: Any) -> QuantizationConfigMixin:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if not isinstance(config, QuantizationConfigMixin):
        raise PrecisionError(
            f"precision={config!r} is not accepted: pass one of {listed(PRECISION_WORDS)}, "
            "or a transformers quantization config."
        )
    return config


def _automatic(saved: str | torch.dtype | None, device_type: str, *, bfloat16: bool) -> tuple[torch.dtype, str]:
    """Choose what to compute in: the checkpoint's dtype, unless the device runs it badly."""
    import torch

    own = getattr(torch, saved.removeprefix("torch."), None) if isinstance(saved, str) else saved
    known = {torch.float64: torch.float32, torch.float32: torch.float32, torch.float16: torch.float16}
    wanted = known.get(own, torch.bfloat16) if own is not None else torch.bfloat16
    origin = f"the checkpoint's {str(own).removeprefix('torch.')}" if own else "the file has no dtype of its own"
    if device_type == "cpu" and wanted in (torch.bfloat16, torch.float16):
        if bfloat16:
            return torch.bfloat16, f"{origin}; this processor computes bfloat16 natively"
        return torch.float32, f"{origin}; this processor has no native half precision"
    if wanted is torch.bfloat16 and not bfloat16:
        return torch.float32, f"{origin}; this device only emulates bfloat16 ('float16' is faster, with less range)"
    return wanted, origin


def _bitsandbytes(name: str, computed: torch.dtype) -> QuantizationConfigMixin:
    from transformers import BitsAndBytesConfig

    make: Callable[..., QuantizationConfigMixin] = BitsAndBytesConfig  # it is untyped
    if name == "int8":
        return make(load_in_8bit=True)
    # Left alone, bitsandbytes takes fp4 and computes in float32.
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": computed}
    return make(load_in_4bit=True, **nf4)
