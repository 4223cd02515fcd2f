"""What the kernel of `norms.cpp` gives, and how it is tried."""

from __future__ import annotations

from typing import Any

import torch

from lmkit.kernels.native.build import NoKernelsError

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""How far a number may be from float64's, as a share of itself."""


def describe(name: str) -> None:
    """Tell torch the shape of what the operator of a library gives, so that it can be traced."""
    torch.library.register_fake(f"{name}::rms_norm", lambda given, _weight, _eps: torch.empty_like(given))


def check(operators: Any, _isa: str) -> None:
    """Compare the kernel with a norm in float64, on odd shapes.

    Raises:
        NoKernelsError: It is wrong.
    """
    draws = torch.Generator().manual_seed(0)
    for size, dtype in ((1, torch.float32), (37, torch.float32), (100, torch.bfloat16)):
        rows, weight = (torch.randn(shape, generator=draws).to(dtype) for shape in ((3, 2, size), (size,)))
        expected = normed(rows, weight, 1e-5)
        off = float(((operators.rms_norm(rows, weight, 1e-5) - expected) / expected).abs().max())
        if not off < TOLERANCE[dtype]:
            raise NoKernelsError(f"what was compiled takes norms wrongly: {str(dtype)[6:]}, off by {off:.2g}")


def normed(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide rows by the root of their mean square in float64, and multiply. *Shape:* `(…, size)` to the same."""
    wide = rows.double()
    found: torch.Tensor = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    return found
