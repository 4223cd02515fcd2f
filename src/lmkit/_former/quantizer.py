"""Moved to `lmkit.kernels.quantizer`."""

from lmkit.kernels.quantizer import WeightOnlyConfig
