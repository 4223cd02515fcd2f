"""Moved to `lmkit.kernels.quantized`."""

from lmkit.kernels.quantized import Int4Linear, Int8Embedding, Int8Linear, TiedHead
