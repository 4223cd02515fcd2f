"""Forward passes of masked models: scores at chosen places of many texts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from lmkit._openmp import release_pool
from lmkit._quiet import quiet
from lmkit.engine.decoders import input_device, padded
from lmkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MaskScorer"]

PADDING_SENSITIVE = frozenset({"convbert", "fnet", "funnel", "nystromformer", "yoso"})
"""Masked model types whose result padding on the right changes: these run in groups of equal length."""

ROWS_PER_BATCH = 32


class MaskScorer:
    """Scores the vocabulary at given positions. Threads may share it; they take turns."""

    def __init__(self, model: Any, pad: int) -> None:
        """Serve `model`, filling short rows with the token `pad`, which the mask hides."""
        self._model = model
        self._pad = pad
        self._pads = model.config.model_type not in PADDING_SENSITIVE
        self._turn = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Refuse further work."""
        self._closed = True

    def score(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return, per row, natural log-probabilities in float32 at its positions.

        Args:
            rows: Token ids, special tokens included.
            positions: Places in each row.

        Returns:
            A tensor per row. *Shape:* `(positions, vocabulary)`.

        Raises:
            EngineError: The model was closed, or gave scores that are not finite.
        """
        found: dict[int, torch.Tensor] = {}
        try:
            for batch in self._batches(rows):
                logits = self._forward([rows[place] for place in batch])
                for number, place in enumerate(batch):
                    scores = logits[number, list(positions[place])].float().cpu().log_softmax(-1)
                    if not torch.isfinite(scores).any(-1).all():
                        msg = "the model gave no finite score at a mask: load with precision='float32' or 'bfloat16'."
                        raise EngineError(msg)
                    found[place] = scores
        finally:
            release_pool()
        return [found[place] for place in range(len(rows))]

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        ordered = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        batches: list[list[int]] = []
        for place in ordered:
            last = batches[-1] if batches else []
            fits = last and (self._pads or len(rows[last[0]]) == len(rows[place]))
            if fits and len(last) < ROWS_PER_BATCH:
                last.append(place)
            else:
                batches.append([place])
        return batches

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        token_ids, mask = padded(rows, self._pad, input_device(self._model), left=False)
        with self._turn, torch.no_grad(), quiet():
            if self._closed:
                msg = "the model was closed: load it again to go on."
                raise EngineError(msg)
            logits: torch.Tensor = self._model(input_ids=token_ids, attention_mask=mask).logits
        return logits
