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
    """

    name: str
    dtype: torch.dtype
    quantization: QuantizationConfigMixin | None
    reason: str

    def __str__(self) -> str:
        """Return the name with the reason."""
        return f"{self.name} ({self.reason})"


def resolve_precision(
    precision: str | QuantizationConfigMixin,
    saved: str | torch.dtype | None,
    device_type: str,
    *,
    packed: str | None = None,
) -> Precision:
    """Turn a word, or a quantization config, into what the weights will be held in.

    Args:
        precision: One of `PRECISION_WORDS`, or a transformers quantization config.
        saved: The checkpoint's own dtype; None if it has none, as a GGUF file.
        device_type: Where the model will compute, such as `"cpu"` or `"cuda"`.
        packed: How the file's weights are quantized already, such as `"gguf"`; None if they are not.

    Raises:
        PrecisionError: An unknown word, the nearest one is named; or one this checkpoint cannot do.
    """
    import torch

    if isinstance(precision, str) and precision not in PRECISION_WORDS:
        msg = (
            f"unknown precision {precision!r}.{nearest(precision, PRECISION_WORDS)} "
            f"Accepted: {listed(PRECISION_WORDS)}, or a transformers quantization config."
        )
        raise PrecisionError(msg)
    if packed is not None and (not isinstance(precision, str) or PRECISION_WORDS[precision] in _QUANTIZED):
        msg = (
            f"precision={precision!r} would quantize weights that the file holds quantized already ({packed}): "
            "pass 'auto', 'float32', 'bfloat16' or 'float16', or load the unquantized checkpoint."
        )
        raise PrecisionError(msg)
    if not isinstance(precision, str):
        return _passed_through(precision, saved, device_type)
    name = PRECISION_WORDS[precision]
    computed, reason = _automatic(_dtype(saved), device_type)
    if packed not in (None, "gguf"):
        dtype = computed if name == "auto" else getattr(torch, name)
        return Precision(str(packed), dtype, None, f"the checkpoint is quantized already: {packed}")
    if name == "auto":
        return Precision(str(computed).removeprefix("torch."), computed, None, reason)
    if name in ("int8", "int4", "nf4"):
        return Precision(name, computed, _bitsandbytes(name, computed), _QUANTIZED[name])
    return Precision(name, getattr(torch, name), None, "as asked")


_QUANTIZED = {
    "int8": "as asked: bitsandbytes LLM.int8()",
    "int4": "as asked: bitsandbytes nf4, double quantization, the better of its two 4-bit types",
    "nf4": "as asked: bitsandbytes nf4, double quantization",
}


def _passed_through(config: Any, saved: str | torch.dtype | None, device_type: str) -> Precision:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if not isinstance(config, QuantizationConfigMixin):
        msg = (
            f"precision={config!r} is not accepted: pass one of {listed(PRECISION_WORDS)}, "
            "or a transformers quantization config."
        )
        raise PrecisionError(msg)
    return Precision(
        "custom",
        _automatic(_dtype(saved), device_type)[0],
        config,
        "the quantization config as passed",
    )


def _dtype(saved: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    return getattr(torch, saved.removeprefix("torch."), None) if isinstance(saved, str) else saved


def _automatic(saved: torch.dtype | None, device_type: str) -> tuple[torch.dtype, str]:
    """Choose what to compute in: the checkpoint's dtype, unless the device runs it badly."""
    import torch

    wanted = saved or torch.bfloat16
    origin = f"the checkpoint's {str(saved).removeprefix('torch.')}" if saved else "the file has no dtype of its own"
    if device_type == "cpu" and wanted in (torch.bfloat16, torch.float16):
        if computes_bfloat16():
            return torch.bfloat16, f"{origin}; this processor computes bfloat16 natively"
        return torch.float32, f"{origin}; this processor has no native half precision"
    return wanted, origin


def computes_bfloat16() -> bool:
    """Ask the processor whether it multiplies bfloat16 matrices natively (AMX, AVX512-BF16 or Arm BF16)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))


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
