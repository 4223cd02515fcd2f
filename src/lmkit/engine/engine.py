"""The loop: requests to batches, batches to tokens, tokens to news for the caller."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lmkit._quiet import quiet
from lmkit.engine.beams import alike, search
from lmkit.engine.choice import Chooser
from lmkit.engine.decoders import CachedDecoder, Decoder, PreparedDecoder, drives, pads
from lmkit.engine.request import Outcome, Update
from lmkit.engine.row import Row
from lmkit.errors import EngineError, LmkitError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmkit.encoding import Codec
    from lmkit.engine.request import Request

__all__ = ["Engine"]

ROWS_PER_BATCH = 32
"""How many rows advance together; more would only be faster with a cache that knows its budget."""

BEAMS_PER_BATCH = 32
"""How many beams, over all rows, one call of generate() carries."""


class Engine:
    """Runs requests on one model.

    A run is an iterator: closing it, or no longer asking it for more, ends its rows at once. Several
    threads may run at the same time; they take turns, one forward pass each.
    """

    def __init__(self, model: Any, codec: Codec, start: int | None) -> None:
        """Serve `model`.

        Args:
            model: The transformers model, in evaluation mode.
            codec: Its tokenizer.
            start: The token an encoder-decoder's answer begins with; None for a causal model.
        """
        self._model = model
        self._codec = codec
        self._start = start
        self._chooser = Chooser(model, codec, start)
        self._turn = threading.Lock()
        self._closed = False
        config = model.generation_config
        self._pad = next(
            (i for i in (config.pad_token_id, getattr(model.config, "pad_token_id", None)) if i is not None), 0
        )
        self._drives = drives(model)
        self._pads = pads(model)

    def close(self) -> None:
        """Refuse further work; runs in flight end with an `EngineError` at their next step."""
        self._closed = True

    def run(
        self,
        requests: Sequence[Request],
        *,
        stream: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Iterator[Update]:
        """Run requests and tell what happens to each, as it happens.

        Args:
            requests: The rows.
            stream: Whether to report new text at every step, not only the end.
            cancelled: Set it from another thread to end all rows at their next step, without further news
                of those that have not begun.

        Raises:
            EngineError: If the engine was closed. What fails for one row alone is in its `Update`.
        """
        drawn = [place for place, request in enumerate(requests) if request.config.num_beams == 1]
        rows = [
            Row(requests[place], place, copy, self._codec, stream=stream and copy == 0)
            for place in drawn
            for copy in range(requests[place].copies)
        ]
        ended: dict[int, list[Row]] = {}
        cancelled = cancelled or threading.Event()
        for batch in self._batches(rows):
            if cancelled.is_set():
                return
            yield from self._advance(batch, ended, cancelled)
        searched = [place for place in range(len(requests)) if requests[place].config.num_beams > 1]
        yield from self._search(requests, searched, cancelled)

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Group rows by length, the longest first; copies of a request stay in order."""
        ordered = sorted(rows, key=lambda row: -len(row.request.input_ids))
        while ordered:
            batch = ordered[:ROWS_PER_BATCH]
            if not self._pads:
                length = len(batch[0].request.input_ids)
                batch = [row for row in batch if len(row.request.input_ids) == length]
            del ordered[: len(batch)]
            yield batch

    def _advance(self, rows: list[Row], ended: dict[int, list[Row]], cancelled: threading.Event) -> Iterator[Update]:
        """Step one batch until all its rows have ended; `ended` collects the copies of each request."""
        for row in rows:
            row.start_clock()
        decoder: Decoder | None = None
        while True:
            kept = [place for place, row in enumerate(rows) if not row.done]
            if not kept:
                return
            with self._stepping(rows):
                if decoder is None:
                    decoder = self._decoder(rows)
                    scores = decoder.prefill()
                else:
                    if len(kept) < len(rows):
                        decoder.keep(kept)
                        rows = [rows[place] for place in kept]
                    scores = decoder.step([row.token_ids[-1] for row in rows])
                self._chooser.choose(rows, scores)
            for row in rows:
                if cancelled.is_set():
                    row.cancel()
                yield from self._news(row, ended)

    def _decoder(self, rows: list[Row]) -> Decoder:
        if self._drives:
            return CachedDecoder(self._model, rows, self._pad, self._start)
        return PreparedDecoder(self._model, rows, self._pad)

    def _news(self, row: Row, ended: dict[int, list[Row]]) -> Iterator[Update]:
        """Report a row's new text, and its request's end once all its copies have ended."""
        text = row.release() if row.streams else ""
        if text:
            yield Update(row.index, text)
        if not row.done:
            return
        copies = ended.setdefault(row.index, [])
        copies.append(row)
        if len(copies) == row.request.copies:
            yield _end(copies)

    def _search(self, requests: Sequence[Request], places: list[int], cancelled: threading.Event) -> Iterator[Update]:
        groups: dict[str, list[int]] = {}
        for place in places:
            length = "" if self._pads else len(requests[place].input_ids)
            groups.setdefault(f"{alike(requests[place])}{length}", []).append(place)
        for group in groups.values():
            size = max(1, BEAMS_PER_BATCH // requests[group[0]].config.num_beams)
            for start in range(0, len(group), size):
                if cancelled.is_set():
                    return
                batch = group[start : start + size]
                chosen = [requests[place] for place in batch]
                try:
                    with self._stepping():
                        outcomes = search(self._model, chosen, self._pad, self._codec, cancelled)
                except Exception as error:
                    if isinstance(error, LmkitError):
                        raise
                    yield from (Update(place, error=step_failed(error)) for place in batch)
                    continue
                for place, outcome in zip(batch, outcomes, strict=True):
                    yield Update(place, text=outcome.completions[0].text, outcome=outcome)

    @contextmanager
    def _stepping(self, rows: Sequence[Row] = ()) -> Iterator[None]:
        """Hold the model for one step: nothing of it (lock, grad mode, silence) outlasts a `yield` to the caller.

        What fails in the step fails for `rows` alone, if there are any.
        """
        with self._turn, torch.no_grad(), quiet():
            if self._closed:
                msg = "the model was closed: load it again to go on."
                raise EngineError(msg)
            try:
                yield
            except Exception as error:
                if not rows:
                    raise
                for row in rows:
                    row.error = row.error or step_failed(error)


def step_failed(error: Exception) -> EngineError:
    """Wrap what a forward pass raised, for each of the rows that it was made for."""
    failed = EngineError(f"a step of the model failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _end(copies: list[Row]) -> Update:
    first = copies[0]
    failed = next((row.error for row in copies if row.error is not None), None)
    if failed is not None:
        return Update(first.index, error=failed)
    ordered = sorted(copies, key=lambda row: row.copy)
    slowest = max((row.timing() for row in copies), key=lambda timing: timing.seconds)
    return Update(first.index, outcome=Outcome(tuple(row.completion() for row in ordered), slowest))
