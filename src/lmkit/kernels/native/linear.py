"""Weights in the order that lmkit's own kernels multiply them in, and how these are tried."""

from __future__ import annotations

from typing import Any, Final

import torch

from lmkit.kernels.native.build import NoKernelsError

BLOCK: Final = 32
"""How many outputs lie side by side."""

GROUP: Final = 32
"""How many inputs of a weight in 4 bits share a scale; rows of every weight are padded to whole groups."""

PAIRS: Final = 32
"""To how many inputs rows of a weight in bfloat16 are padded."""

SHARE: Final = {8: 32, 4: 16}
"""How many numbers of a row share a scale when they are rounded to 8 bits, for weights of so many bits: by perplexity,
with which `"int4"` has to stay within 0.3% of what it is with wide rows (docs/performance.md)."""

LONGEST: Final = 2**16
"""With AMX, rows of up to so many numbers are rounded to 16 bits before weights in 8 bits, and share one scale."""

ALL: Final = slice(None)

MANY: Final = 8
"""With AMX, before so many rows in bfloat16 weights in 4 bits are widened to it block by block; no row is rounded."""

TINY: Final = {8: 1e-36, 16: 1e-34}
"""Numbers whose largest magnitude is no more than this are zeros, when they are rounded to so many bits."""

TOLERANCE: Final = 1e-5
"""How far a product may be from float64's, as a share of the largest, when it is tried in float32."""


def pack8(numbers: torch.Tensor) -> torch.Tensor:
    """Bring whole numbers of -128 to 127 into the kernel's order. *Shape:* `(outputs, inputs)`, padded."""
    padded = _padded(numbers, GROUP)
    return (padded.view(-1, BLOCK, padded.shape[1] // 4, 4).transpose(1, 2) ^ -128).reshape(padded.shape).contiguous()


def unpack8(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers that `pack8` was given, or those of some blocks. *Shape:* the same, still padded."""
    return (packed.view(-1, packed.shape[1] // 4, BLOCK, 4).transpose(1, 2) ^ -128).reshape(packed.shape)


def rows8(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of what `pack8` was given. *Shape:* that of `rows`, and `inputs`, still padded."""
    blocks = packed.view(-1, packed.shape[1] // 4, BLOCK, 4)
    return (blocks[rows // BLOCK, :, rows % BLOCK] ^ -128).flatten(-2)


def pack4(levels: torch.Tensor) -> torch.Tensor:
    """Bring levels of 0 to 15, two in a byte, into the kernel's order. *Shape:* `(outputs, inputs / 2)`, padded."""
    padded = _padded(levels, GROUP // 2)
    eights = torch.stack((padded & 15, padded >> 4), -1).view(-1, BLOCK, padded.shape[1] // 4, 2, 4).transpose(1, 2)
    return (eights[:, :, :, 0] | eights[:, :, :, 1] << 4).reshape(padded.shape).contiguous()


def unpack4(packed: torch.Tensor) -> torch.Tensor:
    """Return what `pack4` was given, or that of some blocks. *Shape:* the same, still padded."""
    quads = packed.view(-1, packed.shape[1] // 4, BLOCK, 4)
    levels = torch.stack((quads & 15, quads >> 4), 3).transpose(1, 2)
    return (levels[..., ::2] | levels[..., 1::2] << 4).reshape(packed.shape)


def pack16(weight: torch.Tensor) -> torch.Tensor:
    """Bring bfloat16 into the order of `packed.cpp`, pairs of inputs side by side. *Shape:* the same, padded."""
    padded = _padded(weight, PAIRS)
    return padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2).reshape(padded.shape).contiguous()


def unpack16(packed: torch.Tensor) -> torch.Tensor:
    """Return the weight that `pack16` was given. *Shape:* the same, still padded."""
    return packed.view(-1, packed.shape[1] // 2, BLOCK, 2).transpose(1, 2).reshape(packed.shape)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """Bring scales and offsets in 4 bits into the kernel's order. *Shape:* `(groups, outputs, 2)`, padded."""
    padded = _padded(scales.transpose(0, 1).flatten(1), 1)
    blocks = padded.view(-1, BLOCK, len(scales), 2).transpose(1, 2)
    return blocks.reshape(len(scales), -1, 2).contiguous()


def unpack_scales(packed: torch.Tensor, blocks: slice = ALL) -> torch.Tensor:
    """Return what `pack_scales` was given, or that of some blocks. *Shape:* `(groups, outputs, 2)`, still padded."""
    return packed.view(-1, len(packed), BLOCK, 2)[blocks].transpose(0, 1).reshape(len(packed), -1, 2).contiguous()


def _padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Pad rows to whole blocks, and their length to a multiple of `width`, with zeros."""
    more = (0, -rows.shape[1] % width, 0, -len(rows) % BLOCK)
    return torch.nn.functional.pad(rows, more) if any(more) else rows.contiguous()


def describe(name: str) -> None:
    """Tell torch the shape of what the operators of a library give, so that they can be traced."""

    def linear(input: Any, _weight: Any, _scales: Any, _bias: Any, _bits: int, outputs: int) -> Any:  # noqa: A002
        return input.new_empty((*input.shape[:-1], outputs))

    def packed_linear(input: Any, _weight: Any, _bias: Any, outputs: int) -> Any:  # noqa: A002
        return input.new_empty((*input.shape[:-1], outputs))

    torch.library.register_fake(f"{name}::linear", linear)
    if hasattr(getattr(torch.ops, name), "packed_linear"):  # which needs AMX
        torch.library.register_fake(f"{name}::packed_linear", packed_linear)


def rounding(isa: str) -> str:
    """Say how the kernels for a set of instructions round rows."""
    fine = f"8 bits, with a scale for {SHARE[8]} numbers, and for {SHARE[4]} before weights in 4 bits"
    wide = f"16 bits with a scale for each; before weights in 4 bits to 8 bits, with a scale for {SHARE[4]} numbers"
    wide += f", and {MANY} rows and more in bfloat16 not at all"
    return f"rows are rounded to {wide if isa == 'amx' else fine}"


def widens(rows: torch.Tensor, isa: str) -> bool:
    """Say whether weights in 4 bits are widened to bfloat16 before they multiply rows. *Shape:* `(…, inputs)`."""
    many = rows.shape[:-1].numel() >= MANY
    return isa == "amx" and rows.dtype is torch.bfloat16 and many


def check(operators: Any, isa: str) -> None:
    """Compare the kernels for a set of instructions with products in float64, on odd shapes.

    Raises:
        NoKernelsError: One is wrong.
    """
    draws = torch.Generator().manual_seed(0)
    for outputs, inputs, rows in ((1, 1, 1), (33, 100, 7), (70, 64, 3), (32, 160, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            given = torch.randn(rows, inputs, generator=draws).to(dtype)
            bias = torch.randn(outputs, generator=draws).to(dtype)
            if dtype is torch.bfloat16 and hasattr(operators, "packed_linear"):
                weight = torch.randn(outputs, inputs, generator=draws).to(dtype)
                found = operators.packed_linear(given, pack16(weight), bias, outputs)
                _compare(found, given.double() @ weight.double().T + bias.double(), 16)
            numbers = torch.randint(-128, 128, (outputs, inputs), generator=draws).to(torch.int8)
            scales = torch.rand(outputs, generator=draws).to(dtype)
            found = operators.linear(given, pack8(numbers), scales, bias, 8, outputs)
            _compare(found, rounded(given, 8, isa) @ (numbers.double() * scales.double()[:, None]).T + bias.double(), 8)
            if inputs % GROUP:
                continue
            levels = torch.randint(0, 16, (outputs, inputs), generator=draws).to(torch.uint8)
            pairs = torch.randn(inputs // GROUP, outputs, 2, generator=draws).to(dtype)
            packed = pack4(levels[:, ::2] | levels[:, 1::2] << 4)
            found = operators.linear(given, packed, pack_scales(pairs), None, 4, outputs)
            scale, offset = pairs.double().transpose(0, 1)[..., None].unbind(2)
            wide = ((levels.double().view(outputs, -1, GROUP) - 8) * scale + offset).flatten(1)
            near, wide = (
                (given.double(), wide.to(dtype).double()) if widens(given, isa) else (rounded(given, 4, isa), wide)
            )
            _compare(found, near @ wide.T, 4)


def rounded(rows: torch.Tensor, bits: int, isa: str) -> torch.Tensor:
    """Round rows in float64 as the kernels do before weights of so many `bits`, in steps of their largest magnitude."""
    whole = isa == "amx" and bits == 8 and rows.shape[-1] <= LONGEST  # noqa: PLR2004
    most, tiny = (127 * 256, TINY[16]) if whole else (127, TINY[8])
    padded = torch.nn.functional.pad(rows.float(), (0, -rows.shape[-1] % GROUP))
    padded = padded.reshape(*rows.shape[:-1], -1, padded.shape[-1] if whole else SHARE[bits])
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, most).div(largest)  # most / largest would multiply with a rounded reciprocal
    numbers = torch.where(largest > tiny, padded * inverse, 0).round()
    wide: torch.Tensor = (numbers.double() * (largest / most).double()).flatten(-2)[..., : rows.shape[-1]]
    return wide


def _compare(found: torch.Tensor, expected: torch.Tensor, bits: int) -> None:
    tolerance = TOLERANCE if found.dtype is torch.float32 else 2**-8
    off = float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not off < tolerance:
        raise NoKernelsError(f"what was compiled multiplies wrongly: {bits} bits, off by {off:.2g}")
