"""Weights in 8 and 4 bits in the order that the kernels of `linear.cpp` read, and how these are tried."""

from __future__ import annotations

from typing import Any, Final

import torch

from lmkit.kernels.native.build import NoKernelsError

BLOCK: Final = 32
"""How many outputs lie side by side."""

GROUP: Final = 32
"""How many inputs share a scale; rows of weights are padded to whole groups."""

TINY: Final = 1e-36
"""Groups whose largest magnitude is no more than this are zeros."""

TOLERANCE: Final = 1e-5
"""How far a product may be from float64's, as a share of the largest, when it is tried in float32."""


def pack8(numbers: torch.Tensor) -> torch.Tensor:
    """Bring whole numbers of -128 to 127 into the kernel's order. *Shape:* `(outputs, inputs)` to `(blocks, …)`."""
    padded = _padded(numbers, GROUP)
    return (padded.view(len(padded) // BLOCK, BLOCK, -1, 4).transpose(1, 2) ^ -128).contiguous()


def unpack8(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """Return the numbers that `pack8` was given, or those of some blocks. *Shape:* `(outputs, inputs)`."""
    return (packed.transpose(1, 2) ^ -128).reshape(len(packed) * BLOCK, -1)[:outputs, :inputs]


def pack4(levels: torch.Tensor) -> torch.Tensor:
    """Bring levels of 0 to 15 into the kernel's order. *Shape:* `(outputs, inputs)` to `(blocks, …)`, two in a byte."""
    padded = _padded(levels, GROUP)
    quads = padded.view(len(padded) // BLOCK, BLOCK, -1, 2, 4).transpose(1, 2)
    return (quads[:, :, :, 0] | quads[:, :, :, 1] << 4).contiguous()


def unpack4(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return the levels that `pack4` was given, or those of some blocks. *Shape:* `(outputs, inputs)`."""
    quads = torch.stack((packed & 15, packed >> 4), 3).transpose(1, 2)
    return quads.reshape(len(packed) * BLOCK, -1)[:outputs]


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Bring scales and offsets in 4 bits into the kernel's order.

    *Shape:* `(groups, outputs, 2)` to `(blocks, groups, 32, 2)`.
    """
    padded = _padded(scales.transpose(0, 1).flatten(1), 1)
    return padded.view(len(padded) // BLOCK, BLOCK, -1, 2).transpose(1, 2).contiguous()


def unpack_scales(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return the scales that `pack_scales` was given. *Shape:* `(groups, outputs, 2)`."""
    return packed.transpose(0, 1).flatten(1, 2)[:, :outputs].contiguous()


def _padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Pad rows to whole blocks, and their length to a multiple of `width`, with zeros."""
    more = (0, -rows.shape[1] % width, 0, -len(rows) % BLOCK)
    return torch.nn.functional.pad(rows, more) if any(more) else rows.contiguous()


def describe(name: str) -> None:
    """Tell torch the shape of what the operators of a library give, so that they can be traced."""

    def linear(input: Any, _weight: Any, _scales: Any, _bias: Any, _bits: int, outputs: int) -> Any:  # noqa: A002
        return input.new_empty((*input.shape[:-1], outputs))

    torch.library.register_fake(f"{name}::linear", linear)


def check(operators: Any) -> None:
    """Compare the kernels with products in float64, on odd shapes.

    Raises:
        NoKernelsError: One is wrong.
    """
    draws = torch.Generator().manual_seed(0)
    for outputs, inputs, rows in ((1, 1, 1), (33, 100, 7), (70, 64, 3), (32, 160, 13)):
        for dtype in (torch.float32, torch.bfloat16):
            given = torch.randn(rows, inputs, generator=draws).to(dtype)
            bias = torch.randn(outputs, generator=draws).to(dtype)
            numbers = torch.randint(-128, 128, (outputs, inputs), generator=draws).to(torch.int8)
            scales = torch.rand(outputs, generator=draws).to(dtype)
            found = operators.linear(given, pack8(numbers), scales, bias, 8, outputs)
            _compare(found, rounded(given) @ (numbers.double() * scales.double()[:, None]).T + bias.double(), 8)
            if inputs % GROUP:
                continue
            levels = torch.randint(0, 16, (outputs, inputs), generator=draws).to(torch.uint8)
            pairs = torch.randn(inputs // GROUP, outputs, 2, generator=draws).to(dtype)
            found = operators.linear(given, pack4(levels), pack_scales(pairs), None, 4, outputs)
            wide = widened4(levels, pairs)
            _compare(found, rounded(given) @ wide.T, 4)


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Round rows as the kernels do, in float64: to 127 steps between 0 and the largest magnitude of each group."""
    padded = torch.nn.functional.pad(rows.float(), (0, -rows.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    most = padded.abs().amax(-1, keepdim=True)
    numbers = torch.where(most > TINY, padded * (127 / most), 0).round()
    return (numbers.double() * (most / 127).double()).flatten(-2)[..., : rows.shape[-1]]


def widened4(levels: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Return weights of 4 bits in float64. *Shape:* `(outputs, inputs)`."""
    scale, offset = pairs.double().transpose(0, 1).unbind(-1)
    groups = levels.double().unflatten(1, (-1, GROUP)) - 8
    return (groups * scale[..., None] + offset[..., None]).flatten(1)


def _compare(found: torch.Tensor, expected: torch.Tensor, bits: int) -> None:
    tolerance = TOLERANCE if found.dtype is torch.float32 else 2**-8
    off = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not off < tolerance:
        raise NoKernelsError(f"what was compiled multiplies wrongly: {bits} bits, off by {off:.2g}")
