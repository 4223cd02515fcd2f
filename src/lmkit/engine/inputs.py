"""What goes to a model's device and comes back: never a copy that waits, but for the one that fetches results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmkit.planning.layout import embedded_rows
from lmkit.planning.placement import main_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def input_device(model: Any) -> torch.device:
    """Return where a model's inputs belong; a fully offloaded one sits on `meta` and computes elsewhere."""
    placed = {str(where): where for where in (getattr(model, "hf_device_map", None) or {}).values()}
    if placed or model.device.type == "meta":
        main = main_device(placed)
        return torch.device(placed.get(main, main))
    device: torch.device = model.device
    return device


def filler(model: Any, *known: Any) -> int:
    """Return the token that fills short rows: the first of those `known` that the model has an embedding for."""
    rows = embedded_rows(model)
    fine = (one for one in known if isinstance(one, int) and one >= 0 and (rows is None or one < rows))
    return next(fine, 0)


def sent(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy numbers to a device, without waiting for what it computes: from pageable memory CUDA would."""
    found = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def fetched(*parts: torch.Tensor) -> Sequence[torch.Tensor]:
    """Copy tensors of one device to the CPU in one go: floating-point ones as float32, others as int32."""
    return arriving(*parts)()


def arriving(*parts: torch.Tensor) -> Callable[[], Sequence[torch.Tensor]]:
    """Begin to copy as `fetched` does; what is returned waits for the copy, and for nothing that is asked for later."""
    device = parts[0].device
    if device.type == "cpu":
        return lambda: parts
    packed = [part.float().view(torch.int32) if part.is_floating_point() else part.int() for part in parts]
    copied = torch.cat([part.flatten() for part in packed]).to("cpu", non_blocking=device.type == "cuda")
    copy = torch.Event(device) if device.type == "cuda" else None
    if copy is not None:
        copy.record()

    def arrived() -> Sequence[torch.Tensor]:
        if copy is not None:
            copy.synchronize()
        here = torch.split(copied, [part.numel() for part in parts])
        return [
            one.view(torch.float32 if part.is_floating_point() else torch.int32).view(part.shape)
            for one, part in zip(here, parts, strict=True)
        ]

    return arrived


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
    return sent(token_ids, device), sent(mask, device)
