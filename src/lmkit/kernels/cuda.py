"""torch's own kernels for integers on CUDA, and the order in which they want them. Written without a card at hand."""

from __future__ import annotations

import functools
from typing import Final

import torch

TILE: Final = 8, 128
"""Of how many outputs and inputs a tile of weights in 4 bits is: tensor cores read it as one."""

FEW: Final = {8: 16, 4: 128}
"""Up to how many rows the kernels are taken, by bits: in torchao's measurements (A6000) that for 4 bits costs at 128
rows what a product of wide weights does, twice as much at 256. That for 8 bits reads the weight anew for each row."""


def takes4(outputs: int, inputs: int, scales: torch.Tensor) -> bool:
    """Say whether there is a kernel for a weight in 4 bits: of whole tiles, in bfloat16, on compute capability 8."""
    whole = outputs % TILE[0] == 0 and inputs % TILE[1] == 0
    return (
        whole
        and (scales.device.type, scales.dtype) == ("cuda", torch.bfloat16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(scales.device) >= (8, 0)
    )


def pack4(weight: torch.Tensor) -> torch.Tensor:
    """Bring levels into the kernel's order.

    Args:
        weight: Two neighbours of a row in a byte, the first one in the lower half; the kernel wants it in the upper.
            *Shape:* `(outputs, inputs / 2)`, uint8.

    Returns:
        *Shape:* `(outputs / 8, inputs / 128, 32, 4)`, int32.
    """
    swapped = (weight >> 4 | weight << 4).contiguous()
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)  # noqa: SLF001 - no public one
    return packed


def unpack4(packed: torch.Tensor) -> torch.Tensor:
    """Return the levels as they are. *Shape:* as in `pack4`, to `(outputs, inputs)`, uint8."""
    levels = _halves(packed).index_select(-1, _order(packed.device)).to(torch.uint8)
    return levels.view(*levels.shape[:2], *TILE).transpose(1, 2).reshape(len(packed) * TILE[0], -1)


def multiply4(rows: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """Multiply. *Shape:* `(rows, inputs)`; of scales `(groups, outputs, 2)`; to `(rows, outputs)`."""
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(rows, packed, group, scales.contiguous())  # noqa: SLF001
    return product


def multiply8(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply by a weight in 8 bits, on any device that has the kernel; some give float32."""
    product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight, scales)  # noqa: SLF001
    return product.to(rows.dtype)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """Return the half bytes of each tile as they lie in memory. *Shape:* `(…, 1024)`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (packed.flatten(2)[..., None] >> shifts & 15).flatten(2)


@functools.cache
def _order(device: torch.device) -> torch.Tensor:
    """Ask the kernel where in a tile it puts each weight: its numbers are packed, half a byte of them at a time."""
    numbers = torch.arange(TILE[0] * TILE[1], device=device).view(TILE)
    found = torch.zeros(numbers.numel(), dtype=torch.int64, device=device)
    for shift in (0, 4, 8):
        part = (numbers >> shift & 15).to(torch.uint8)
        found += _halves(pack4(part[:, ::2] | part[:, 1::2] << 4)).flatten().long() << shift
    return found.argsort()
