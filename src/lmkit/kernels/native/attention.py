"""What the kernels of `attention.cpp` and `prompts.cpp` give, and how they are tried."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch

from lmkit.kernels.native.build import NoKernelsError

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""How far attended values may be from float64's, as a share of the largest."""

SCALE: Final = 0.2

HIDDEN: Final = -1e30
"""What is added to a score to hide its column."""


def describe(name: str) -> None:
    """Tell torch the shape of what the operators of a library give, so that they can be traced."""

    def attend_one(query: Any, _key: Any, value: Any, *_more: Any) -> Any:
        return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))

    def attend_many(query: Any, _key: Any, value: Any, *_more: Any) -> Any:
        return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))

    torch.library.register_fake(f"{name}::attend_one", attend_one)
    if hasattr(getattr(torch.ops, name), "attend_many"):  # which needs products in bfloat16
        torch.library.register_fake(f"{name}::attend_many", attend_many)


def check(operators: Any, _isa: str) -> None:
    """Compare the kernels with attention in float64, on odd shapes.

    Raises:
        NoKernelsError: One is wrong.
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
        added: tuple[Any, Any, Any] = (seen, bias, None) if masked else (None, None, sinks)
        cap = 3.0 if masked else 0.0
        found = operators.attend_one(query, key, value, *added, SCALE, cap)
        _compare(found, exactly((query, key, value), *added, cap))
        if rows == sources and dtype is torch.bfloat16 and hasattr(operators, "attend_many"):
            query = torch.randn(rows, heads, columns, size, generator=draws).to(dtype)
            before = torch.ones(columns, columns, dtype=torch.bool).tril()[None, None]
            if masked:
                before = before & (torch.rand(rows, 1, columns, columns, generator=draws) > 0.5)  # noqa: PLR2004
                before[..., 0] = True
            found = operators.attend_many(query, key, value, before if masked else None, bias, not masked, SCALE)
            _compare(found, exactly((query, key, value), before, bias, None, 0.0))


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    off = float((found.double() - expected).abs().max() / expected.abs().max())
    if not off < TOLERANCE[found.dtype]:
        raise NoKernelsError(f"what was compiled attends wrongly: {str(found.dtype)[6:]}, off by {off:.2g}")


def exactly(
    states: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """Attend in float64, with scores times `SCALE`. *Shape:* of all as the operators take and give it."""
    query, key, value = states
    rows, heads = query.shape[:2]
    repeats = rows // len(key), heads // key.shape[1]
    key, value = (
        part.double().repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1) for part in (key, value)
    )
    scores = query.double() @ key.transpose(2, 3) * SCALE
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, HIDDEN) if mask.dtype is torch.bool else scores + mask
    scores = scores.clamp(min=HIDDEN)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(rows, -1, 1, 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)
