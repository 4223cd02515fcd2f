"""Forward passes of masked models: scores at chosen places of many texts, in rounds of questions."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch

from lmkit.engine.body_and_head import Reader
from lmkit.engine.compiled import CompiledPass
from lmkit.engine.inputs import fetched, padded, sent
from lmkit.engine.passes.base import Runner
from lmkit.engine.questions import Asking, Draw, Found, Query, Want, answered
from lmkit.errors import EngineError, LmkitError
from lmkit.kernels import rotary
from lmkit.kernels.logits import sampled, sums
from lmkit.results import EngineStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lmkit._interrupts import Flag
    from lmkit.options.generation import Sample
    from lmkit.text.codec import Typed

PADDING_SENSITIVE = frozenset({"convbert", "fnet", "funnel", "mobilebert", "nystromformer", "perceiver", "yoso"})
"""Masked model types whose result padding on the right changes: these run in groups of equal length. Found by running
tiny models of all types."""

PROBE = 8
"""How many tokens the model is tried on, to see whether its head runs at chosen places only."""

T = TypeVar("T")


Asked: TypeAlias = "tuple[tuple[Typed, ...], Mapping[int, list[int]], Sequence[Query]]"
"""A row: its tokens, per place in it the numbers of the questions that ask about it, and all questions."""


class MaskScorer(Runner["Asked", Found]):
    """Answers questions about places of texts with a masked model."""

    def __init__(self, model: Any, pad: int, *, compiled: bool = False) -> None:
        """Serve `model`, filling short rows with the token `pad`, by a compiled graph if that is asked for."""
        super().__init__(model, pad)
        self._pads = model.config.model_type not in PADDING_SENSITIVE and not rotary.scaling(model).kind
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._counts = {"forwards": 0, "prompt_tokens": 0}
        if compiled:
            middle = model.config.get_text_config(decoder=True).vocab_size // 2
            probe = self._inputs([[(middle + n, None) for n in range(PROBE)]] * 2)
            self._compiled = CompiledPass(model, probe, typed="token_type_ids" in self._takes)

    def stats(self) -> EngineStats:
        """Say what was read so far; nothing is held between calls."""
        return EngineStats(
            running=0, waiting=0, cache_bytes=0, prefix_bytes=0, reused_tokens=0, generated_tokens=0, **self._counts
        )

    def run(self, askings: Iterable[Asking[T]], cancelled: Flag | None = None) -> list[T | LmkitError]:
        """Answer all who ask, round by round; one whose question fails ends with its error, and the others go on."""
        return answered(askings, lambda queries: self.score(queries, cancelled))

    def score(self, queries: Sequence[Query], cancelled: Flag | None = None) -> list[Found | EngineError]:
        """Answer questions in batches of similar lengths; equal rows are read once, and a row that fails is its error.

        Args:
            queries: What is asked.
            cancelled: Once set, what is left is not read.
        """
        rows: dict[tuple[Typed, ...], dict[int, list[int]]] = {}
        for number, query in enumerate(queries):
            rows.setdefault(query.tokens, {}).setdefault(query.place, []).append(number)
        if rows:
            self._ready(min(rows, key=len))
        each = list(rows.items())
        cut = self._cut([len(tokens) for tokens, _ in each], scored=[len(asked) for _, asked in each])
        found = self._answers(([(*each[n], queries) for n in batch] for batch in cut), cancelled)
        return [found[number] for number in range(len(queries))]

    def _tried(self, sample: tuple[Typed, ...]) -> Reader | None:
        """Find out how the head runs at chosen places only; a model that fails here will fail with its rows."""
        try:
            reader = Reader(self._model, self._inputs([(sample * PROBE)[:PROBE]] * 2))
            return reader if torch.isfinite(reader.expected).all() else None
        except Exception:  # noqa: BLE001 - whatever it is, it is told where the row itself is read
            return None

    def _numbers(self, batch: Sequence[Asked]) -> Sequence[int]:
        return [number for _, asked, _ in batch for numbers in asked.values() for number in numbers]

    def _run(self, batch: Sequence[Asked]) -> dict[int, Found | EngineError]:
        places = [(row, place) for row, (_, asked, _) in enumerate(batch) for place in asked]
        inputs, where = self._inputs([tokens for tokens, _, _ in batch]), sent(places, self._device).T
        self._counts["forwards"] += 1
        self._counts["prompt_tokens"] += inputs["input_ids"].numel()
        if self._compiled is not None and inputs["input_ids"].shape[1] <= self._compiled.most_positions:
            logits = self._compiled(inputs, where.contiguous())
        elif self._reader is None:
            logits = self._model(**inputs, return_dict=True).logits[tuple(where)]
        else:
            logits = self._reader.at(inputs, where)
        asked = [(numbers, queries) for _, asked, queries in batch for numbers in asked.values()]
        wants = [(place, queries[n].want) for place, (numbers, queries) in enumerate(asked) for n in numbers]
        return dict(zip(self._numbers(batch), _taken(logits, wants), strict=True))

    def _inputs(self, rows: Sequence[Sequence[Typed]]) -> dict[str, torch.Tensor]:
        token_ids, mask = padded([[one for one, _ in row] for row in rows], self._pad, self._device, left=False)
        inputs = {"input_ids": token_ids} | ({"attention_mask": mask} if len({*map(len, rows)}) > 1 else {})
        types = [[kind for _, kind in row if kind is not None] for row in rows]
        if all(types):
            inputs["token_type_ids"], _ = padded(types, 0, self._device, left=False)
        return {name: given for name, given in inputs.items() if name in self._takes or name == "input_ids"}


def _taken(logits: torch.Tensor, wants: Sequence[tuple[int, Want]]) -> list[Found | EngineError]:
    """Take what is wanted of scores, as log-probabilities, without a copy of all of these.

    Args:
        logits: *Shape:* `(places, vocabulary)`.
        wants: Places, and what is wanted there.
    """
    scores = logits.float()
    totals = scores.logsumexp(-1)
    wants = _drawn(scores, wants)
    top = scores.topk(min(max((want for _, want in wants if isinstance(want, int)), default=0), scores.shape[-1]))
    named = [(place, token) for place, want in wants if isinstance(want, tuple) for token in want]
    where, tokens = sent(list(zip(*named, strict=True)) or [[], []], scores.device, torch.int64)
    usable, *likeliest, values = fetched(
        totals.isfinite(), top.indices, top.values - totals[:, None], scores[where, tokens] - totals[where]
    )
    columns, others = [part.tolist() for part in likeliest], iter(values.tolist())
    found: list[Found | EngineError] = []
    for place, want in wants:
        if isinstance(want, int):
            taken = list(zip(*(column[place][:want] for column in columns), strict=True))
        else:
            taken = [(token, next(others)) for token in cast("tuple[int, ...]", want)]
        found.append(taken if usable[place] else EngineError(NO_SCORE))
    return found


def _drawn(scores: torch.Tensor, wants: Sequence[tuple[int, Want]]) -> list[tuple[int, Want]]:
    """Put drawn tokens in the places of draws, reshaped by transformers' own processors.

    Args:
        scores: *Shape:* `(places, vocabulary)`.
        wants: Places, and what is wanted there.
    """
    alike: dict[Sample, list[tuple[int, int, float]]] = {}
    for number, (place, want) in enumerate(wants):
        if isinstance(want, Draw):
            alike.setdefault(want.mode, []).append((number, place, want.uniform))
    found = list(wants)
    for mode, draws in alike.items():
        numbers, places, uniform = zip(*draws, strict=True)
        rows = scores.index_select(0, sent(places, scores.device))
        for warper in _warpers(mode):
            rows = warper(None, rows)
        (token_ids,) = fetched(sampled(rows, sent(uniform, scores.device, sums(scores.device))))
        for number, place, token_id in zip(numbers, places, token_ids.tolist(), strict=True):
            found[number] = place, (max(token_id, 0),)
    return found


def drawn(scores: torch.Tensor, draw: Draw) -> int:
    """Draw one token. *Shape:* of its scores `(vocabulary,)`."""
    ((_, want),) = _drawn(scores[None], [(0, draw)])
    return cast("tuple[int]", want)[0]


def _warpers(mode: Sample) -> list[Any]:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(float(mode.temperature))] if mode.temperature != 1 else []
    warpers += [TopKLogitsWarper(mode.top_k)] if mode.top_k else []
    warpers += [TopPLogitsWarper(float(mode.top_p))] if mode.top_p < 1 else []
    warpers += [MinPLogitsWarper(mode.min_p)] if mode.min_p is not None else []
    return warpers


NO_SCORE = "the model gave no finite score at a mask: load with precision='float32' or 'bfloat16'."
