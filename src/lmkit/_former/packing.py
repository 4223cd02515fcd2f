"""Moved to `lmkit.kernels.packed`."""

from lmkit.kernels.packed import PackedLinear
