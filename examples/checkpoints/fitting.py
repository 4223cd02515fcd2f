"""One training loop for every checkpoint: AdamW on a one-cycle schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


def fit(model: PreTrainedModel, batches: Iterable[Batch], *, steps: int, peak_learning_rate: float) -> None:
    """Train `model` in place on the first `steps` batches; each must carry `labels`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_learning_rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}", flush=True)
