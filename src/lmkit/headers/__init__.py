"""What weight files hold, read from their headers alone: nothing in a file is believed unchecked."""

from __future__ import annotations

from lmkit.headers.files import Stream, TensorInfo, check_regular, is_regular
from lmkit.headers.gguf import GgufHeader, parse_gguf, read_gguf
from lmkit.headers.safetensors import parse_safetensors, read_safetensors

__all__ = [
    "GgufHeader",
    "Stream",
    "TensorInfo",
    "check_regular",
    "is_regular",
    "parse_gguf",
    "parse_safetensors",
    "read_gguf",
    "read_safetensors",
]
