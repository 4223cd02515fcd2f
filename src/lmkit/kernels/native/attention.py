"""What the kernel of `attention.cpp` gives, and how it is tried."""

from __future__ import annotations

import itertools
from typing import Any, Final

import torch

from lmkit.kernels.native.build import NoKernelsError

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""How far attended values may be from float64's, as a share of the largest."""

HIDDEN: Final = -1e30
"""What is added to a score to hide its column."""


def describe(name: str) -> None:
    """Tell torch the shape of what the operator of a library gives, so that it can be traced."""

    def attend_one(query: Any, _key: Any, value: Any, *_more: Any) -> Any:
        return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))

    def attend_many(query: Any, _key: Any, value: Any, *_more: Any) -> Any:
        return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))

    torch.library.register_fake(f"{name}::attend_one", attend_one)
    if hasattr(getattr(torch.ops, name), "attend_many"):  # which needs products in bfloat16
        torch.library.register_fake(f"{name}::attend_many", attend_many)


def check(operators: Any) -> None:
    """Compare the kernel with attention in float64, on odd shapes.

    Raises:
        NoKernelsError: It is wrong.
    """
    draws = torch.Generator().manual_seed(0)
    shapes = ((3, 3, 6, 2, 200, 64, 64), (6, 2, 5, 5, 33, 40, 7), (1, 1, 9, 3, 300, 8, 24))
    for shape, dtype, masked in itertools.product(shapes, TOLERANCE, (False, True)):
        rows, sources, heads, groups, columns, size, value_size = shape
        query = torch.randn(rows, heads, 1, size, generator=draws).to(dtype)
        key, value = (
            torch.randn(sources, groups, columns + 5, each, generator=draws).to(dtype)[:, :, 2:-3]
            for each in (size, value_size)
        )
        seen = (torch.rand(sources, 1, 1, columns, generator=draws) > 0.5).repeat_interleave(rows // sources, 0)  # noqa: PLR2004
        seen[: rows // sources] = False
        bias = torch.randn(1, heads, 1, columns, generator=draws).to(dtype)
        sinks = torch.randn(heads, generator=draws)
        more = (seen, bias, None, 0.2, 3.0) if masked else (None, None, sinks, 0.2, 0.0)
        found = operators.attend_one(query, key, value, *more).double()
        expected = exactly(query, key, value, *more)
        off = float((found - expected).abs().max() / expected.abs().max())
        if not off < TOLERANCE[dtype]:
            raise NoKernelsError(f"what was compiled attends wrongly: {str(dtype)[6:]}, off by {off:.2g}")


def exactly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attend in float64. *Shape:* of all as the operator takes and gives it."""
    rows, heads = query.shape[:2]
    repeats = rows // len(key), heads // key.shape[1]
    key, value = (part.double().repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, HIDDEN) if mask.dtype is torch.bool else scores + mask
    scores = scores.clamp(min=HIDDEN)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(rows, -1, 1, 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)
