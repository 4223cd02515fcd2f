"""Moved to `lmkit.kernels.quantized`."""

from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.tied import Int8Embedding, TiedHead
