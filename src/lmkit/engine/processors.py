"""Processors of scores that transformers does not have: penalties for what was written, and the caller's own."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from lmkit._tracebacks import without_frames
from lmkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmkit.engine.row import Row


class WrittenPenalty:
    """Lowers the scores of tokens that an answer has already, as OpenAI and vLLM do: for each time, and at all."""

    def __init__(self, frequency: float, presence: float, start: int) -> None:
        """Count tokens from place `start` on, where the answer begins."""
        self._frequency, self._presence, self._start = frequency, presence, start

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return lower scores. *Shape:* `(rows, tokens)` and `(rows, vocabulary)`."""
        written = token_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class CallersProcessor:
    """A processor of the caller's: it sees what is documented, and where it fails its row gets the error."""

    def __init__(self, processor: Callable[..., Any], row: Row, start: int) -> None:
        """Take a processor that is called for one row, whose answer begins at place `start`."""
        self._processor, self._start = processor, start
        self._row = weakref.proxy(row)  # which holds this

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the processor's scores; of a row that has failed, those that leave nothing to choose from."""
        if self._row.error is None:
            try:
                # Copies: what it keeps or writes into is nobody else's.
                found = self._processor(token_ids.to("cpu", copy=True), scores.to("cpu", torch.float32, copy=True))
                if not (wrong := _wrong(found, scores)):
                    return found.to(scores)  # type: ignore[no-any-return]  # a tensor
                self._fail(token_ids, f"gave {wrong}, where scores of shape {tuple(scores.shape)} are needed.", None)
            except Exception as error:  # noqa: BLE001 - it may be any program
                without_frames(error)
                self._fail(token_ids, f"failed: {type(error).__name__}: {error}", error)
        return torch.full_like(scores, -torch.inf)

    def _fail(self, token_ids: torch.Tensor, told: str, cause: Exception | None) -> None:
        name = getattr(self._processor, "__name__", type(self._processor).__name__)
        error = EngineError(f"the processor {name} at token {token_ids.shape[1] - self._start + 1} {told}")
        error.__cause__, self._row.error = cause, error


def more(row: Row, start: int) -> tuple[list[WrittenPenalty], list[CallersProcessor]]:
    """Make what transformers does not, for rows with the config and the processors of this one.

    Args:
        row: The row; processors of the caller's are for this one alone.
        start: At which place of its tokens the answer begins.
    """
    config: Any = row.request.config
    asked = config.frequency_penalty, config.presence_penalty
    penalties = [WrittenPenalty(*asked, start)] if any(asked) else []
    return penalties, [CallersProcessor(one, row, start) for one in row.request.processors]


def _wrong(found: Any, scores: torch.Tensor) -> str:
    """Say what is wrong with what a processor gave; nothing if it can be chosen from."""
    if not isinstance(found, torch.Tensor):
        return f"an object of type {type(found).__name__}"
    if found.shape != scores.shape or not found.is_floating_point():
        return f"a tensor of shape {tuple(found.shape)} and type {found.dtype}"
    return "NaN" if bool(found.isnan().any()) else ""
