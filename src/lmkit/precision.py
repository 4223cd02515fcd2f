"""One word of precision to a dtype or a quantization, for a device, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from lmkit.errors import PrecisionError, listed, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["Precision", "PrecisionWord"]

PrecisionName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "nf4"]
PrecisionWord: TypeAlias = PrecisionName | Literal["fp32", "bf16", "fp16", "8bit", "4bit"]

PRECISION_WORDS: Final[Mapping[str, PrecisionName]] = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "int8": "int8",
    "8bit": "int8",
    "int4": "int4",
    "4bit": "int4",
    "nf4": "nf4",
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
    saved: str | torch.dtype | None,
    device_type: str,
    *,
    bfloat16: bool,
    packed: str | None = None,
) -> Precision:
    """Turn a word, or a quantization config, into what the weights will be held in.

    Args:
        precision: One of `PRECISION_WORDS`, or a transformers quantization config.
        saved: The checkpoint's own dtype; None if it has none, as a GGUF file.
        device_type: Where the model will compute, such as `"cpu"` or `"cuda"`.
        bfloat16: Whether that computes bfloat16 natively.
        packed: How the file's weights are quantized already, such as `"gguf"`, or `"int4"` if lmkit did it; None if
            they are not.

    Raises:
        PrecisionError: An unknown word, the nearest one is named; or one this checkpoint or device cannot do.
    """
    import torch

    if isinstance(precision, str) and precision not in PRECISION_WORDS:
        msg = (
            f"unknown precision {precision!r}.{nearest(precision, PRECISION_WORDS)} "
            f"Accepted: {listed(PRECISION_WORDS)}, or a transformers quantization config."
        )
        raise PrecisionError(msg)
    computed, reason = _automatic(_dtype(saved), device_type, bfloat16=bfloat16)
    if not isinstance(precision, str):
        _check_possible(repr(precision), "custom", device_type, packed)
        return Precision("custom", computed, _config(precision), "the quantization config as passed", "custom")
    name = PRECISION_WORDS[precision]
    _check_possible(repr(precision), name, device_type, packed)
    if packed not in (None, "gguf"):
        dtype = getattr(torch, name) if name in WIDE else computed
        return Precision(str(packed), dtype, None, f"the checkpoint is quantized already: {packed}", precision)
    if name == "auto":
        return Precision(str(computed).removeprefix("torch."), computed, None, reason, precision)
    if name in WIDE:
        return Precision(name, getattr(torch, name), None, "as asked", precision)
    if device_type in OWN_DEVICES and name != "nf4":
        return Precision(name, computed, _own(name), _OWN[name], precision)
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


def possible_words(device_type: str, packed: str | None) -> list[str]:
    """Return the words that a kind of device, and a checkpoint that is `packed` already, can do."""
    if packed is not None:
        return ["auto", *WIDE, *([packed] if packed in ("int8", "int4") else [])]
    return ["auto", *WIDE, "int8", "int4", *(["nf4"] if device_type != "mps" else [])]


def _check_possible(given: str, name: str, device_type: str, packed: str | None) -> None:
    words = possible_words(device_type, packed)
    if packed is not None and name not in words:
        msg = (
            f"precision={given} would quantize weights that the file holds quantized already ({packed}): "
            f"pass {listed(words)}, or load the unquantized checkpoint."
        )
        raise PrecisionError(msg)
    if name != "custom" and name not in words:
        msg = f"precision={given} is not to be had on {device_type!r}: pass {listed(words)}."
        raise PrecisionError(msg)


def _config(config: Any) -> QuantizationConfigMixin:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if not isinstance(config, QuantizationConfigMixin):
        msg = (
            f"precision={config!r} is not accepted: pass one of {listed(PRECISION_WORDS)}, "
            "or a transformers quantization config."
        )
        raise PrecisionError(msg)
    return config


def _dtype(saved: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    return getattr(torch, saved.removeprefix("torch."), None) if isinstance(saved, str) else saved


def _automatic(saved: torch.dtype | None, device_type: str, *, bfloat16: bool) -> tuple[torch.dtype, str]:
    """Choose what to compute in: the checkpoint's dtype, unless the device runs it badly."""
    import torch

    known = {torch.float64: torch.float32, torch.float32: torch.float32, torch.float16: torch.float16}
    wanted = known.get(saved, torch.bfloat16) if saved is not None else torch.bfloat16
    origin = f"the checkpoint's {str(saved).removeprefix('torch.')}" if saved else "the file has no dtype of its own"
    if device_type == "cpu" and wanted in (torch.bfloat16, torch.float16):
        if bfloat16:
            return torch.bfloat16, f"{origin}; this processor computes bfloat16 natively"
        return torch.float32, f"{origin}; this processor has no native half precision"
    if wanted is torch.bfloat16 and not bfloat16:
        return torch.float32, f"{origin}; this device only emulates bfloat16 ('float16' is faster, with less range)"
    return wanted, origin


def _own(name: str) -> QuantizationConfigMixin:
    from lmkit.quantizer import WeightOnlyConfig

    return WeightOnlyConfig(int(name.removeprefix("int")))


def _bitsandbytes(name: str, computed: torch.dtype) -> QuantizationConfigMixin:
    import transformers

    hf: Any = transformers  # its config classes are untyped

    options: dict[str, Any] = {"load_in_8bit": True}
    if name != "int8":
        # Left alone, bitsandbytes takes fp4 and computes in float32.
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": computed,
        }
    config: QuantizationConfigMixin = hf.BitsAndBytesConfig(**options)
    return config
