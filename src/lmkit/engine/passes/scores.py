"""Forward passes that score given tokens: how likely a causal model or a decoder finds each behind those before it."""

from __future__ import annotations

import copy
import functools
import inspect
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lmkit._borrowed import cache_name
from lmkit.engine.body_and_head import Reader, alike, with_states
from lmkit.engine.inputs import fetched, padded, sent
from lmkit.engine.passes.base import Runner
from lmkit.engine.request import Reading, Scored
from lmkit.errors import EngineError, OptionError
from lmkit.kernels import rotary
from lmkit.kernels.logits import logprobs
from lmkit.kernels.rotary import read_as
from lmkit.planning.running import pads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lmkit._interrupts import Flag

PLACES = 128
"""At how many places the head runs at a time."""

WORTH_SHARING = 16
"""Beginnings of fewer tokens are read again for each row."""


Group: TypeAlias = "tuple[int, Mapping[int, Reading]]"
"""How many first tokens rows share, 0 where they share a source or nothing; and the rows by their numbers."""

Before: TypeAlias = "tuple[int, Callable[[list[int], int], dict[str, Any]]]"
"""What groups have before their rows: how many columns, and what the model is given of it, by the group of each row and
by the width of the rows."""


class Scorer(Runner["Group", Scored]):
    """Scores tokens with a causal model or an encoder-decoder.

    Short rows are filled on the right, where no scored token sees it.
    """

    def __init__(self, model: Any, pad: int, *, own: bool = True) -> None:
        """Serve `model`, filling short rows with the token `pad`; `own` says whether it runs on lmkit's own loop."""
        super().__init__(model, pad)
        self._own = own
        self._encodes = bool(model.config.is_encoder_decoder)
        self._scaling = rotary.scaling(model)
        self._accepted = inspect.signature(model.forward).parameters
        self._shares = False
        self._reads: dict[str, Any] = {}

    def score(
        self,
        rows: Sequence[Reading],
        cancelled: Flag | None = None,
        ended: Callable[[object], None] = lambda _row: None,
    ) -> list[Scored | EngineError]:
        """Score rows in batches of similar lengths; a row that fails is its error.

        What several rows begin with is read once: their source, or their tokens but for the last that is not scored.

        Args:
            rows: What is scored.
            cancelled: Once set, what is left is not read.
            ended: What is called with each row's scores or error.

        Raises:
            OptionError: The model is not a causal one: tokens see those behind them.
        """
        self._ready()
        found = self._answers(self._batches(rows), cancelled, ended)
        return [found[place] for place in range(len(rows))]

    def _tried(self, sample: Any) -> Reader:
        """Find out whether the model is causal, what its body is, and whether rows can share what they begin with."""
        del sample  # tokens of its own
        rows = [self._probe(4, last, source=self._encodes) for last in (5, 6)]
        before = self._before([(0, dict(enumerate(rows)))])
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
            raise OptionError(
                f"a model of the type {self._model.config.model_type!r} sees what follows a token: it cannot score."
            )
        seen = self._model(**short | self._reads, return_dict=True).logits
        self._pads = pads(self._model) and alike(seen, reader.expected[:, :3])
        self._reader = reader  # which is read with from here on
        self._shares = self._own and not self._encodes and self._continues()
        return reader

    def _continues(self) -> bool:
        """Say whether rows behind shared tokens are scored as rows that are read from the beginning."""
        rows = list(enumerate(self._probe(many, last) for many in (6, 3) for last in (8, 9)))
        try:
            shared = self._scores([(6, dict(rows[:2])), (3, dict(rows[2:]))])
            alone = self._scores([(0, {place: row}) for place, row in rows])
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
        assert self._reader is not None  # noqa: S101 - _ready comes first
        return self._reader

    def _batches(self, rows: Sequence[Reading]) -> list[list[Group]]:
        """Group rows by what they share, and batch groups by its length, or by the lengths of their only rows."""
        together: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            start = row.token_ids[: row.start - 1]
            shares = self._shares and len(start) >= WORTH_SHARING
            alike = (self._scaling.of(len(row.token_ids)), start)
            together.setdefault((alike if shares else place) if row.source is None else row.source, []).append(place)
        kinds: tuple[list[tuple[int, Group]], ...] = ([], [])
        for key, places in together.items():
            row, group = rows[places[0]], {place: rows[place] for place in places}
            alone = row.source is None and len(places) == 1
            shared = 0 if row.source is not None or alone else row.start - 1
            length = len(row.token_ids) - 1 if alone else shared or len(key)
            kinds[alone].append((length, (shared, group)))
        return [
            [kind[number][1] for number in batch]
            for kind in kinds
            for batch in self._cut([length for length, _ in kind])
        ]

    def _numbers(self, batch: Sequence[Group]) -> Sequence[int]:
        return [place for _, group in batch for place in group]

    def _parts(self, item: Group) -> Sequence[Group]:
        shared, rows = item[0], list(item[1].items())
        middle = len(rows) // 2
        return [(shared, dict(part)) for part in (rows[:middle], rows[middle:]) if part]

    def _run(self, batch: Sequence[Group]) -> dict[int, Scored | EngineError]:
        """Read what each group shares, then its rows, and score these."""
        return {place: _checked(scored) for place, scored in self._scores(batch).items()}

    def _scores(self, groups: Sequence[Group]) -> dict[int, Scored]:
        found: dict[int, Scored] = {}
        before = self._before(groups)
        members = [(n, row, shared, place) for n, (shared, rows) in enumerate(groups) for place, row in rows.items()]
        for batch in self._cut([len(row.token_ids) - 1 - shared for _, row, shared, _ in members], before[0]):
            owners, some, shares, places = zip(*(members[number] for number in batch), strict=True)
            rests = [row.token_ids[shared:-1] for row, shared in zip(some, shares, strict=True)]
            inputs = self._inputs(rests, list(owners), before)
            read = read_as([len(row.token_ids) for row in some], functools.partial(self._opened.read, inputs))
            size = min(PLACES, self._places)
            found |= dict(zip(places, _scored(some, shares, *read, size), strict=True))
        return found

    def _inputs(self, rests: Sequence[Sequence[int]], owners: list[int], before: Before) -> dict[str, Any]:
        """Lay out rows, padded on the right, behind what they share."""
        token_ids, _ = padded(rests, self._pad, self._device, left=False)
        inputs = {"decoder_input_ids" if self._encodes else "input_ids": token_ids, **self._reads}
        return inputs | before[1](owners, token_ids.shape[1])

    def _before(self, groups: Sequence[Group]) -> Before:
        """Read what the rows of each group share: a source, or their first tokens."""
        firsts = [(shared, next(iter(rows.values()))) for shared, rows in groups]
        if self._encodes:
            return self._encoded([row.source or () for _, row in firsts])
        if groups[0][0]:
            prompts = [row.token_ids[:shared] for shared, row in firsts]
            return read_as([len(row.token_ids) for _, row in firsts], lambda: self._prefilled(prompts))
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
        name = cache_name(self._model) or ""
        cached: dict[str, Any] = {name: cache, "use_cache": True}
        self._opened.read({"input_ids": token_ids} | cached | self._columns(pad, 0, width))

        def inputs(owners: list[int], columns: int) -> dict[str, Any]:
            own = copy.copy(cache)
            own.layers = [copy.copy(layer) for layer in cache.layers]
            own.batch_select_indices(sent(owners, self._device))
            return cached | {name: own} | self._columns(pad[owners], width, width + columns)

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
    every = sent(places, hidden.device).T
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, column, target in zip(*(torch.split(one, size) for one in every), strict=True):
        scores = head(hidden[number, column])
        chosen = target.to(scores.device)[:, None]
        parts.append((logprobs(scores, chosen)[:, 0], scores.gather(-1, chosen)[:, 0] >= scores.amax(-1)))
    found, likeliest = fetched(*(torch.cat(kind) for kind in zip(*parts, strict=True)))
    values, firsts = iter(found.tolist()), iter(likeliest.tolist())
    return [Scored(tuple(islice(values, n)), all(list(islice(firsts, n)))) for n in lengths]
