"""Quantized layers for tests: filled as a load fills them, and widened by the documented format alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lmkit.kernels.quantized import GROUP


def known(request: pytest.FixtureRequest, reason: str, *, where: bool = True) -> None:
    """Expect a test to fail for a known fault, and to be told when it is mended."""
    if where:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return the same random numbers for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(kind: Any, weight: torch.Tensor, dtype: torch.dtype, *, bias: bool = False, packed: bool = True) -> Any:
    """Make a layer of a weight, as a load does."""
    outputs, inputs = weight.shape
    layer = kind(inputs, outputs, dtype, bias=bias)
    integers, scales = kind.quantize(weight, dtype)
    own = {"bias": numbers(outputs, seed=9).to(dtype)} if bias else {}
    layer.load_state_dict({"weight": integers, "scales": scales, **own})
    if packed:
        layer.pack()
    return layer


def widened(state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Widen what a layer saves, by the documented format alone.

    Returns:
        The weight in float64; and how large the numbers are that it is summed from, which is what rounding goes by.
    """
    weight, scales = state["weight"], state["scales"].double()
    if weight.dtype is torch.int8:
        wide = weight.double() * scales[:, None]
        return wide, wide.abs()
    levels = torch.empty(len(weight), 2 * weight.shape[1], dtype=torch.float64)
    levels[:, 0::2], levels[:, 1::2] = (weight % 16).double(), (weight // 16).double()
    by_row = scales.transpose(0, 1).repeat_interleave(GROUP, 1)  # (groups, rows, 2) as saved
    scaled = (levels - 8) * by_row[..., 0]
    return scaled + by_row[..., 1], scaled.abs() + by_row[..., 1].abs()
