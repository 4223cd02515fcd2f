"""Forward passes that score given tokens: how likely a causal model or a decoder finds each behind those before it."""

from __future__ import annotations

import copy
import inspect
import threading
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lmkit._openmp import release_pool
from lmkit._quiet import quiet
from lmkit.engine.batches import CLOSED
from lmkit.engine.decoders import drives, input_device, padded, pads
from lmkit.engine.failures import step_failed
from lmkit.engine.heads import Reader, alike, with_states
from lmkit.engine.logits import logprobs
from lmkit.errors import EngineError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Reading", "Scored", "Scorer"]

TOKENS = {"cpu": 2048}
"""How many tokens a pass reads at most, padding included; a row that is longer has a pass of its own."""

TOKENS_ELSEWHERE = 16384

WHOLE = 2**26
"""How many scores a pass of a model may give that runs with its head at all places: 256 MiB in float32."""

PLACES, FLOATS = 128, 2**24
"""At how many places the head runs at a time, and how many scores in float32 that may give: 64 MiB."""

WORTH_SHARING = 16
"""Beginnings of fewer tokens are read again for each row."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens of which the last ones are scored.

    Attributes:
        token_ids: What the decoder reads, but for the last one, which is only scored.
        start: The first token that is scored, at least 1.
        source: What the encoder reads, if there is one.
    """

    token_ids: tuple[int, ...]
    start: int
    source: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model finds of the scored tokens of a reading.

    Attributes:
        logprobs: The natural logarithm of the probability of each.
        greedy: Whether each is the likeliest in its place.
    """

    logprobs: tuple[float, ...]
    greedy: bool


Group: TypeAlias = tuple[int, tuple[int, ...]]
"""Which rows share what is read before them, and how many first tokens that is; 0 where it is a source, or nothing."""

Before: TypeAlias = "tuple[int, Callable[[list[int], int], dict[str, Any]]]"
"""What groups have before their rows: how many columns, and what the model is given of it, by the group of each row and
by the width of the rows."""


class Scorer:
    """Scores tokens with a causal model or an encoder-decoder. Threads may share it; they take turns."""

    def __init__(self, model: Any, pad: int) -> None:
        """Serve `model`, filling short rows with the token `pad` on the right, where no scored token sees it."""
        self._model = model
        self._pad = pad
        self._encodes = bool(model.config.is_encoder_decoder)
        self._accepted = inspect.signature(model.forward).parameters
        self._device = input_device(model)
        self._turn = threading.Lock()
        self._closed = False
        self._reader: Reader | None = None
        self._most = TOKENS.get(self._device.type, TOKENS_ELSEWHERE)
        self._pads = self._shares = False
        self._reads: dict[str, Any] = {}

    def close(self) -> None:
        """Refuse further work; calls in flight end at their next pass."""
        self._closed = True

    def score(self, rows: Sequence[Reading]) -> list[Scored | EngineError]:
        """Score rows in batches of similar lengths; a row that fails is its error.

        What several rows begin with is read once: their source, or their tokens but for the last that is not scored.

        Raises:
            OptionError: The model is not a causal one: tokens see those behind them.
        """
        found: dict[int, Scored | EngineError] = {}
        try:
            self._prepare()
            for groups in self._batches(rows):
                found |= self._attempt(rows, groups)
        finally:
            release_pool()
        return [found[place] for place in range(len(rows))]

    def _prepare(self) -> None:
        """Try the model on a few tokens, once: whether it is causal, what its body is, and whether it shares."""
        with self._turn, torch.no_grad(), quiet():
            if self._reader is not None or self._closed:
                return
            rows = [self._probe(4, last, source=self._encodes) for last in (5, 6)]
            before = self._before(rows, [(0, (0, 1))])
            probe, short = (self._inputs([row.token_ids[:end] for row in rows], [0, 0], before) for end in (5, 3))
            reader = Reader(self._model, probe)
            if "use_cache" in self._accepted:
                # A cache that nobody reads is memory. A few families attend in another way without one.
                uncached = Reader(self._model, probe | {"use_cache": False})
                if alike(uncached.expected, reader.expected) or not alike(*reader.expected[:, :-1]):
                    reader, self._reads = uncached, {"use_cache": False}
            if reader.expected.isnan().any():
                raise EngineError(NOT_A_NUMBER)
            if not alike(*reader.expected[:, :-1]):
                msg = (
                    f"a model of the type {self._model.config.model_type!r} sees what follows a token: it cannot score."
                )
                raise OptionError(msg)
            seen = self._model(**short | self._reads, return_dict=True).logits
            self._pads = pads(self._model) and alike(seen, reader.expected[:, :3])
            if reader.body is None:
                self._most = min(self._most, WHOLE // reader.expected.shape[-1])
            self._reader = reader
            self._shares = not self._encodes and drives(self._model) and self._continues()

    def _continues(self) -> bool:
        """Say whether rows behind shared tokens are scored as rows that are read from the beginning."""
        rows = [self._probe(many, last) for many in (6, 3) for last in (8, 9)]
        try:
            shared = self._run(rows, [(6, (0, 1)), (3, (2, 3))])
            alone = self._run(rows, [(0, (place,)) for place in range(len(rows))])
        except Exception:  # noqa: BLE001 - what cannot be tried is not relied on
            return False
        found, expected = (torch.tensor([[*way[place].logprobs] for place in alone]) for way in (shared, alone))
        return alike(found, expected.to(self._opened.expected.dtype))

    def _probe(self, many: int, last: int, *, source: bool = False) -> Reading:
        """Make a row of `many` tokens, one that is read behind them, and one more that is scored: ordinary ones."""
        middle = self._model.config.get_text_config(decoder=True).vocab_size // 2
        token_ids = [middle + n for n in (*range(many), last, 0)]
        return Reading(tuple(token_ids), many + 1, tuple(token_ids[:3]) if source else None)

    @property
    def _opened(self) -> Reader:
        assert self._reader is not None  # noqa: S101 - _prepare comes first
        return self._reader

    def _batches(self, rows: Sequence[Reading]) -> list[list[Group]]:
        """Group rows by what they share, and batch groups by its length, or by the lengths of their only rows."""
        together: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            start = row.token_ids[: row.start - 1]
            shares = self._shares and len(start) >= WORTH_SHARING
            together.setdefault((start if shares else place) if row.source is None else row.source, []).append(place)
        kinds: tuple[list[tuple[int, Group]], ...] = ([], [])
        for key, places in together.items():
            row = rows[places[0]]
            alone = row.source is None and len(places) == 1
            shared = 0 if row.source is not None or alone else len(key)
            kinds[alone].append((len(row.token_ids) - 1 if alone else len(key), (shared, tuple(places))))
        return [
            [kind[number][1] for number in batch]
            for kind in kinds
            for batch in self._cut([length for length, _ in kind])
        ]

    def _cut(self, lengths: Sequence[int], before: int = 0) -> list[list[int]]:
        """Cut rows into batches of similar lengths, by the tokens they read and the columns before them."""
        batches: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            width = lengths[batches[-1][0]] if batches else 0
            rows = len(batches[-1]) + 1 if batches else 0
            fits = rows and rows * width <= self._most and rows * (before + width) <= 2 * self._most
            if fits and (self._pads or lengths[number] == width):
                batches[-1].append(number)
            else:
                batches.append([number])
        return batches

    def _attempt(self, rows: Sequence[Reading], groups: Sequence[Group]) -> dict[int, Scored | EngineError]:
        """Score groups together; if that fails, each half of them, so that one row does not take others down."""
        places = [place for _, group in groups for place in group]
        try:
            with self._turn, torch.no_grad(), quiet():
                if self._closed:
                    return dict.fromkeys(places, EngineError(CLOSED))
                return {place: _checked(scored) for place, scored in self._run(rows, groups).items()}
        except Exception as error:  # noqa: BLE001 - what a pass raises ends its own rows only
            if len(places) == 1:
                return {places[0]: step_failed(error)}
        if len(groups) == 1:
            (shared, group), middle = groups[0], len(places) // 2
            groups = [(shared, group[:middle]), (shared, group[middle:])]
        middle = len(groups) // 2
        return self._attempt(rows, groups[:middle]) | self._attempt(rows, groups[middle:])

    def _run(self, rows: Sequence[Reading], groups: Sequence[Group]) -> dict[int, Scored]:
        """Read what each group shares, then its rows, and score these."""
        found: dict[int, Scored] = {}
        before = self._before(rows, groups)
        members = [(owner, rows[place], shared, place) for owner, (shared, g) in enumerate(groups) for place in g]
        for batch in self._cut([len(row.token_ids) - 1 - shared for _, row, shared, _ in members], before[0]):
            owners, some, shares, places = zip(*(members[number] for number in batch), strict=True)
            rests = [row.token_ids[shared:-1] for row, shared in zip(some, shares, strict=True)]
            read = self._opened.read(self._inputs(rests, list(owners), before))
            size = max(min(PLACES, FLOATS // self._opened.expected.shape[-1]), 1)
            found |= dict(zip(places, _scored(some, shares, *read, size), strict=True))
        return found

    def _inputs(self, rests: Sequence[Sequence[int]], owners: list[int], before: Before) -> dict[str, Any]:
        """Lay out rows, padded on the right, behind what they share."""
        token_ids, _ = padded(rests, self._pad, self._device, left=False)
        inputs = {"decoder_input_ids" if self._encodes else "input_ids": token_ids, **self._reads}
        return inputs | before[1](owners, token_ids.shape[1])

    def _before(self, rows: Sequence[Reading], groups: Sequence[Group]) -> Before:
        """Read what the rows of each group share: a source, or their first tokens."""
        if self._encodes:
            return self._encoded([rows[places[0]].source or () for _, places in groups])
        if groups[0][0]:
            return self._prefilled([rows[places[0]].token_ids[:shared] for shared, places in groups])
        return 0, lambda _owners, _width: {}

    def _encoded(self, sources: Sequence[Sequence[int]]) -> Before:
        token_ids, mask = padded(sources, self._pad, self._device, left=False)
        encoded = self._model.get_encoder()(input_ids=token_ids, attention_mask=mask, return_dict=True)

        def inputs(owners: list[int], _width: int) -> dict[str, Any]:
            states = with_states(encoded, encoded[0][owners])
            # FSMT has causal masks only where it is given the source as well, though it was read.
            return {"encoder_outputs": states, "attention_mask": mask[owners], "input_ids": token_ids[owners]}

        return token_ids.shape[1], inputs

    def _prefilled(self, prompts: Sequence[Sequence[int]]) -> Before:
        """Read prompts, padded on the left, so that rows follow all of them in the same column."""
        from transformers import DynamicCache

        token_ids, mask = padded(prompts, self._pad, self._device)
        width, pad = token_ids.shape[1], (mask == 0).sum(1, keepdim=True)
        cache: Any = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        cached: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        self._opened.read({"input_ids": token_ids} | cached | self._columns(pad, 0, width))

        def inputs(owners: list[int], columns: int) -> dict[str, Any]:
            own = copy.copy(cache)
            own.layers = [copy.copy(layer) for layer in cache.layers]
            own.batch_select_indices(torch.tensor(owners, device=self._device))
            return cached | {"past_key_values": own} | self._columns(pad[owners], width, width + columns)

        return width, inputs

    def _columns(self, pad: torch.Tensor, start: int, end: int) -> dict[str, Any]:
        """Say of columns which are padding, and where in its row each is."""
        columns = torch.arange(end, device=self._device)
        given = {"attention_mask": (columns >= pad).long()} if pad.any() else {}
        if "position_ids" in self._accepted:
            given["position_ids"] = (columns[start:] - pad).clamp(min=0)
        return given


def _checked(scored: Scored) -> Scored | EngineError:
    """Refuse what is not a number."""
    if all(logprob == logprob for logprob in scored.logprobs):  # noqa: PLR0124 - NaN alone differs from itself
        return scored
    return EngineError(NOT_A_NUMBER)


NOT_A_NUMBER = "the model gave a score that is not a number: load with precision='float32' or 'bfloat16'."


def _scored(
    rows: Sequence[Reading],
    shares: Sequence[int],
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    size: int,
) -> list[Scored]:
    """Turn what was read into log-probabilities of the scored tokens, `size` places of all rows at a time."""
    lengths = [len(row.token_ids) - row.start for row in rows]
    places = [
        (number, column - 1 - shared, row.token_ids[column])
        for number, (row, shared) in enumerate(zip(rows, shares, strict=True))
        for column in range(row.start, len(row.token_ids))
    ]
    found: list[float] = []
    likeliest: list[bool] = []
    for first in range(0, len(places), size):
        number, column, target = torch.tensor(places[first : first + size]).T
        scores = head(hidden[number, column])
        chosen = target.to(scores.device)[:, None]
        found += logprobs(scores, chosen)[:, 0].tolist()
        likeliest += (scores.gather(-1, chosen)[:, 0] >= scores.amax(-1)).tolist()
    values, firsts = iter(found), iter(likeliest)
    return [Scored(tuple(islice(values, n)), all(list(islice(firsts, n)))) for n in lengths]
