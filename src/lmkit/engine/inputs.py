"""Rows of token ids as tensors, where a model takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmkit.planning.placement import main_device

if TYPE_CHECKING:
    from collections.abc import Sequence


def input_device(model: Any) -> torch.device:
    """Return where a model's inputs belong; a fully offloaded one sits on `meta` and computes elsewhere."""
    placed = {str(where): where for where in (getattr(model, "hf_device_map", None) or {}).values()}
    if placed or model.device.type == "meta":
        main = main_device(placed)
        return torch.device(placed.get(main, main))
    device: torch.device = model.device
    return device


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows of token ids as one matrix and its mask. *Shape:* `(rows, longest)`, both int64."""
    width = max(map(len, rows))
    token_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(token_ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        token_ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return token_ids.to(device), mask.to(device)
