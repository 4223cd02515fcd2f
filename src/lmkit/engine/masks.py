"""Forward passes of masked models: scores at chosen places of many texts, in rounds of questions."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from lmkit._openmp import release_pool
from lmkit._quiet import quiet
from lmkit.engine.batches import CLOSED
from lmkit.engine.decoders import input_device, padded
from lmkit.engine.failures import step_failed
from lmkit.engine.heads import Reader
from lmkit.engine.scores import FLOATS, TOKENS, TOKENS_ELSEWHERE, WHOLE
from lmkit.errors import EngineError, LmkitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lmkit.generation import Sample

__all__ = ["Asking", "Draw", "Found", "MaskScorer", "Query", "drawn", "parallel"]

PADDING_SENSITIVE = frozenset({"convbert", "fnet", "funnel", "mobilebert", "nystromformer", "perceiver", "yoso"})
"""Masked model types whose result padding on the right changes: these run in groups of equal length. Found by running
tiny models of all types."""

PROBE = 8
"""How many tokens the model is tried on, to see whether its head runs at chosen places only."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn: how the distribution is reshaped, and a number in [0, 1)."""

    mode: Sample
    uniform: float


Want: TypeAlias = int | tuple[int, ...] | Draw
"""How many of the likeliest tokens, or which tokens, or one that is drawn."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question about one place of a text.

    Attributes:
        token_ids: What the model reads, special tokens included.
        place: Which of them is asked about.
        want: What is to be known of it.
    """

    token_ids: tuple[int, ...]
    place: int
    want: Want


Found: TypeAlias = list[tuple[int, float]]
"""The answer: tokens and their natural log-probabilities, the likeliest first, or in the order they were asked for."""

Asking: TypeAlias = Generator[list[Query], list[Found], T]
"""What asks in rounds, each knowing the answers of the one before, and returns what it made of them."""


def parallel(askings: Iterable[Asking[T]]) -> Asking[list[T]]:
    """Let several ask side by side: the questions of a round go together."""
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Asking[T], int]] = {}

    def ask(number: int, asking: Asking[T], found: list[Found] | None) -> list[Query]:
        try:
            queries = asking.send(found)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as end:
            waiting.pop(number, None)
            results[number] = end.value
            return []
        waiting[number] = asking, len(queries)
        return queries

    queries = [query for number, asking in enumerate(askings) for query in ask(number, asking, None)]
    while waiting:
        found = iter((yield queries))
        asked = list(waiting.items())
        queries = [q for number, (asking, n) in asked for q in ask(number, asking, list(islice(found, n)))]
    return [results[number] for number in sorted(results)]


def _guarded(asking: Asking[T]) -> Generator[list[Query], list[Found | EngineError], T | LmkitError]:
    """End with the error where an answer is one."""
    found: Any = None
    while True:
        try:
            queries = asking.send(found)
        except StopIteration as end:
            result: T = end.value
            return result
        except LmkitError as error:
            return error
        found = yield queries
        if (failed := next((one for one in found if isinstance(one, EngineError)), None)) is not None:
            asking.close()
            return failed


class MaskScorer:
    """Scores the vocabulary at chosen places. Threads may share it; they take turns."""

    def __init__(self, model: Any, pad: int) -> None:
        """Serve `model`, filling short rows with the token `pad`, which the mask hides."""
        self._model = model
        self._pad = pad
        self._pads = model.config.model_type not in PADDING_SENSITIVE
        self._masked = "attention_mask" in inspect.signature(model.forward).parameters
        self._vocabulary = model.config.get_text_config().vocab_size
        self._turn = threading.Lock()
        self._closed = False
        self._reader: Reader | None = None

    def close(self) -> None:
        """Refuse further work."""
        self._closed = True

    def run(self, askings: Iterable[Asking[T]], cancelled: threading.Event | None = None) -> list[T | LmkitError]:
        """Answer all who ask, round by round; one whose question fails ends with its error, and the others go on."""
        guarded: Any = (_guarded(asking) for asking in askings)  # what these are sent may be errors
        together: Any = parallel(guarded)
        found: Any = None
        while True:
            try:
                queries = together.send(found)
            except StopIteration as end:
                results: list[T | LmkitError] = end.value
                return results
            found = self.score(queries, cancelled)

    def score(self, queries: Sequence[Query], cancelled: threading.Event | None = None) -> list[Found | EngineError]:
        """Answer questions in batches of similar lengths; equal rows are read once, and a row that fails is its error.

        Args:
            queries: What is asked.
            cancelled: Once set, what is left is not read.
        """
        rows: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for number, query in enumerate(queries):
            rows.setdefault(query.token_ids, {}).setdefault(query.place, []).append(number)
        found: dict[int, Found | EngineError] = {}
        try:
            with quiet():
                self._prepare(min(rows, key=len, default=()))
                for batch in self._batches(rows):
                    found |= self._attempt(queries, rows, batch, cancelled)
        finally:
            release_pool()
        return [found[number] for number in range(len(queries))]

    def _prepare(self, row: tuple[int, ...]) -> None:
        """Find out, once, how the head runs at chosen places only; a model that fails here will fail with its rows."""
        with self._turn, torch.no_grad():
            if self._reader is not None or self._closed or not row:
                return
            try:
                reader = Reader(self._model, self._inputs([(row * PROBE)[:PROBE]] * 2))
                if torch.isfinite(reader.expected).all():
                    reader.body  # noqa: B018 - looked for here, where no other thread runs the model
                    self._reader = reader
            except Exception:  # noqa: BLE001 - whatever it is, it is told where the row itself is read
                return

    def _batches(self, rows: Mapping[tuple[int, ...], Mapping[int, Any]]) -> list[list[tuple[int, ...]]]:
        """Cut rows into batches of similar lengths, by the tokens they read and the scores they give."""
        tokens = TOKENS.get(input_device(self._model).type, TOKENS_ELSEWHERE)
        if self._reader is None or self._reader.body is None:
            tokens = min(tokens, WHOLE // self._vocabulary)
        places = FLOATS // self._vocabulary
        batches: list[list[tuple[int, ...]]] = []
        asked = 0
        for row in sorted(rows, key=len, reverse=True):
            width = len(batches[-1][0]) if batches else 0
            asked += len(rows[row])
            fits = batches and width * (len(batches[-1]) + 1) <= tokens and asked <= places
            if fits and (self._pads or len(row) == width):
                batches[-1].append(row)
            else:
                batches.append([row])
                asked = len(rows[row])
        return batches

    def _attempt(
        self,
        queries: Sequence[Query],
        rows: Mapping[tuple[int, ...], Mapping[int, list[int]]],
        batch: Sequence[tuple[int, ...]],
        cancelled: threading.Event | None,
    ) -> dict[int, Found | EngineError]:
        """Answer what is asked of some rows; if that fails, of each half, so that one does not take others down."""
        try:
            with self._turn, torch.no_grad():
                if not (self._closed or (cancelled is not None and cancelled.is_set())):
                    return self._answers(queries, rows, batch)
            failed = EngineError(CLOSED)
        except Exception as error:  # noqa: BLE001 - what a pass raises ends its own rows only
            if middle := len(batch) // 2:
                return self._attempt(queries, rows, batch[:middle], cancelled) | self._attempt(
                    queries, rows, batch[middle:], cancelled
                )
            failed = step_failed(error)
        return {number: failed for row in batch for numbers in rows[row].values() for number in numbers}

    def _answers(
        self,
        queries: Sequence[Query],
        rows: Mapping[tuple[int, ...], Mapping[int, list[int]]],
        batch: Sequence[tuple[int, ...]],
    ) -> dict[int, Found | EngineError]:
        places = [(row, place) for row, token_ids in enumerate(batch) for place in rows[token_ids]]
        asked = [numbers for row in batch for numbers in rows[row].values()]
        inputs, (which, columns) = self._inputs(batch), zip(*places, strict=True)
        if self._reader is None:
            logits = self._model(**inputs, return_dict=True).logits[list(which), list(columns)]
        else:
            logits = self._reader.at(inputs, which, columns)
        wants = [(place, queries[number].want) for place, numbers in enumerate(asked) for number in numbers]
        return dict(zip((number for numbers in asked for number in numbers), _taken(logits, wants), strict=True))

    def _inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        token_ids, mask = padded(rows, self._pad, input_device(self._model), left=False)
        return {"input_ids": token_ids} | ({"attention_mask": mask} if self._masked and not mask.all() else {})


def _taken(logits: torch.Tensor, wants: Sequence[tuple[int, Want]]) -> list[Found | EngineError]:
    """Take what is wanted of scores, as log-probabilities, without a copy of all of these.

    Args:
        logits: *Shape:* `(places, vocabulary)`.
        wants: Places, and what is wanted there.
    """
    scores = logits.float()
    totals = scores.logsumexp(-1)
    usable = torch.isfinite(totals).tolist()
    most = max((want for _, want in wants if isinstance(want, int)), default=0)
    top = scores.topk(min(most, scores.shape[-1]))
    likeliest = (top.indices.tolist(), (top.values - totals[:, None]).tolist())
    named = [
        (place, want if isinstance(want, tuple) else (drawn(scores[place], want),))
        for place, want in wants
        if usable[place] and not isinstance(want, int)
    ]
    where = [place for place, tokens in named for _ in tokens]
    values = iter((scores[where, [token for _, tokens in named for token in tokens]] - totals[where]).tolist())
    others = iter([[(token, next(values)) for token in tokens] for _, tokens in named])
    found: list[Found | EngineError] = []
    for place, want in wants:
        if not usable[place]:
            found.append(EngineError(NO_SCORE))
        elif isinstance(want, int):
            found.append(list(zip(*(column[place][:want] for column in likeliest), strict=True)))
        else:
            found.append(next(others))
    return found


def drawn(scores: torch.Tensor, draw: Draw) -> int:
    """Draw a token by inversion of the cumulative distribution, reshaped by transformers' own processors.

    Args:
        scores: *Shape:* `(vocabulary)`.
        draw: How it is reshaped, and a number in [0, 1).
    """
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    row, mode = scores.to("cpu", torch.float32)[None], draw.mode
    warpers: list[Any] = [TemperatureLogitsWarper(float(mode.temperature))] if mode.temperature != 1 else []
    warpers += [TopKLogitsWarper(mode.top_k)] if mode.top_k else []
    warpers += [TopPLogitsWarper(float(mode.top_p))] if mode.top_p < 1 else []
    warpers += [MinPLogitsWarper(mode.min_p)] if mode.min_p is not None else []
    for warper in warpers:
        row = warper(None, row)
    cumulative = row[0].double().softmax(-1).cumsum(-1)
    return int(torch.searchsorted(cumulative, draw.uniform * cumulative[-1], right=True))


NO_SCORE = "the model gave no finite score at a mask: load with precision='float32' or 'bfloat16'."
