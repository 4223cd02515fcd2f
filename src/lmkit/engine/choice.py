"""From scores to tokens: transformers' own processors, then the likeliest token or a draw, per row."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lmkit.engine.inputs import arriving, fetched, input_device, sent
from lmkit.engine.processors import more
from lmkit.errors import EngineError
from lmkit.kernels.logits import forbidding, highest, logprobs, sampled, sums, top
from lmkit.results import TokenLogprob
from lmkit.structured.grammars import masks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import LogitsProcessorList

    from lmkit.engine.row import Row
    from lmkit.text.codec import Codec

READS_NO_ORDER = frozenset(
    [
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    ]
)
"""transformers' processors that look at no token ids, or only at which there are: a row may be padded with a token of
its own, so that rows of any length go through them together."""

READS_NOTHING = READS_NO_ORDER - {"RepetitionPenaltyLogitsProcessor"}
"""Those that look at no token ids."""

FORBIDS: Mapping[str, Callable[[Any], Iterable[int]]] = {
    "MinLengthLogitsProcessor": lambda one: one.eos_token_id.tolist(),
    "MinNewTokensLengthLogitsProcessor": lambda one: one.eos_token_id.tolist(),
    "NoBadWordsLogitsProcessor": lambda one: (word[-1] for word in one.bad_word_ids),
    "SuppressTokensAtBeginLogitsProcessor": lambda one: one.begin_suppress_tokens.tolist(),
    "SuppressTokensLogitsProcessor": lambda one: one.suppress_tokens.tolist(),
}
"""transformers' processors that do nothing but forbid tokens at some steps, and which ones at the most."""

FORCES: Mapping[str, Callable[[Any], tuple[int, int]]] = {
    "ForcedBOSTokenLogitsProcessor": lambda one: (1, int(one.bos_token_id))
}
"""Those that put a token of their own: behind how many tokens they do, and which. A forced end is not among them: the
row is given it beside its own choice, which says whether the text was cut."""

MOST_KNOWN = 64
"""How many different configs' processors are kept."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What reshapes a row's scores.

    Attributes:
        processors: transformers' own, in its order, lmkit's among them, and the caller's behind them.
        key: What rows have in common that may go through one of their processors together.
        ordered: Whether they must have equally many tokens for that.
        reads: Whether the processors look at the tokens so far.
        sampled: Whether the token is drawn.
        forbidden: The tokens that a greedy row may not take at some steps, if its processors only forbid and force.
        forced: Behind how many tokens they force one, and which.
    """

    processors: LogitsProcessorList
    key: object
    ordered: bool
    reads: bool
    sampled: bool
    forbidden: frozenset[int] | None
    forced: Mapping[int, int]

    def leaves(self, token_ids: Iterable[int]) -> bool:
        """Say whether the scores of these tokens stand, where none is forced."""
        return self.forbidden is not None and self.forbidden.isdisjoint(token_ids)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the one to take."""
        return not self.processors and not self.sampled

    def settled(self, likeliest: int | None, length: int) -> int | None:
        """Return the choice after `length` tokens, if the likeliest token, or none at all, is enough to tell it."""
        token_id = self.forced.get(length, likeliest)
        return token_id if self.forbidden is not None and token_id not in self.forbidden else None


class Chooser:
    """Chooses the next token of each row of a batch.

    A row goes through the processors of its own config, on its own unpadded tokens: a repetition penalty never sees
    another row's padding, so a row of a batch equals its single run. Rows whose processors say the same
    go through them together; rows without processors, the common case, share one maximum. All of it is computed where
    the scores are, and one copy for all rows tells what was chosen.

    Attributes:
        device: Where that is.
    """

    def __init__(self, model: Any, codec: Codec, decoder_start: int | None) -> None:
        """Serve rows of `model`; an encoder-decoder's rows begin with the token `decoder_start`."""
        self._model = model
        self._codec = codec
        self._start = decoder_start
        self.device = input_device(model)
        self._known: dict[object, Steering] = {}

    def choose(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Give each row its next token, or its error.

        Args:
            rows: The rows that still run.
            logits: The model's scores. *Shape:* `(rows, vocabulary)`.
        """
        raw = logits = logits.to(self.device)
        # One pass serves three questions: NaN and inf show in the maximum, and the place is the greedy choice.
        best = highest(logits)
        logits, greatest, likeliest = _within(rows, self._to_mask(rows, best[1]), logits, best)
        fixed, groups = self._divided(rows, logits, greatest, likeliest)
        chosen = likeliest
        for places in groups:
            index = sent(places, self.device)
            some = logits if len(places) == len(rows) else logits.index_select(0, index)
            token_ids = self._steered([rows[place] for place in places], some)
            chosen = chosen.index_copy(0, index, token_ids)
        forced = {place: row.forced_end(len(row.token_ids) + 1) for place, row in enumerate(rows)}
        ends: dict[int, int] = {place: end for place, end in forced.items() if end is not None}
        scored = self._scored(rows, raw, chosen, fixed | ends)
        chosen, greatest, *parts = fetched(chosen, greatest, *(part for _, *pair in scored for part in pair))
        told = _by_place([places for places, *_ in scored], parts)
        for place, (row, score, token_id) in enumerate(zip(rows, greatest.tolist(), chosen.tolist(), strict=True)):
            step = len(row.token_ids) + 1
            own = fixed[place] if place in fixed else int(token_id)
            if not _usable(score, logits, place) or (row.matcher and row.matcher.error):
                row.error = EngineError(_unusable(row, raw[place], step))
            elif (last := ends.get(place, own)) < 0:
                row.error = row.error or EngineError(NO_CHOICE.format(step=step))
            else:
                row.accept(last, self._logprob(row, told.get(place)), own if own >= 0 else None)

    def greedy(self, row: Row) -> bool:
        """Say whether a row takes the likeliest token at every step, and is told nothing else about it."""
        asked = row.request
        told = asked.logprobs is not None or asked.grammar is not None or asked.config.forced_eos_token_id is not None
        return self.steering(row).plain and not told

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, Callable[[Sequence[Row]], int]]:
        """Take the likeliest tokens, before the host knows them.

        Args:
            logits: The scores of rows that are `greedy`. *Shape:* `(rows, vocabulary)`.

        Returns:
            The tokens, where the scores are (*shape:* `(rows,)`), and what waits for them, gives each row that has not
            ended meanwhile its own, or its error, and says how many were given.
        """
        greatest, likeliest = highest(logits.to(self.device))
        arrived = arriving(likeliest, greatest)

        def give(rows: Sequence[Row]) -> int:
            token_ids, scores = (part.tolist() for part in arrived())
            running = [place for place, row in enumerate(rows) if not row.done]
            for place in running:
                row, token_id = rows[place], token_ids[place]
                if _usable(scores[place], logits, place):
                    row.accept(token_id, None, token_id)
                else:
                    row.error = EngineError(_unusable(row, logits[place], len(row.token_ids) + 1))
            return len(running)

        return likeliest, give

    def _divided(
        self, rows: Sequence[Row], logits: torch.Tensor, greatest: torch.Tensor, likeliest: torch.Tensor
    ) -> tuple[dict[int, int], list[list[int]]]:
        """Tell which rows' tokens are settled, and which go through processors together; others take the likeliest.

        On a CPU the likeliest tokens are known here, most of which stand; elsewhere to ask for them is a copy more.
        """
        here = self.device.type == "cpu"
        known = list(zip(greatest.tolist(), likeliest.tolist(), strict=True)) if here else [(0.0, None)] * len(rows)
        fixed: dict[int, int] = {}
        groups: dict[object, list[int]] = {}
        for place, (row, (score, token_id)) in enumerate(zip(rows, known, strict=True)):
            steering = self.steering(row)
            if steering.plain or not _usable(score, logits, place):
                continue
            if (settled := steering.settled(token_id, self._length(row))) is not None:
                fixed[place] = settled
            else:
                length = len(row.token_ids) if steering.ordered else 0
                groups.setdefault((steering.key, length), []).append(place)
        return fixed, list(groups.values())

    def _to_mask(self, rows: Sequence[Row], likeliest: torch.Tensor) -> list[int]:
        """Find the rows whose grammar has to be asked for all tokens: not where it lets a known greedy choice come."""
        matchers = {place: matcher for place, row in enumerate(rows) if (matcher := row.matcher) is not None}
        best = likeliest.tolist() if matchers and likeliest.device.type == "cpu" else []
        for place, matcher in matchers.items():
            matcher.read(rows[place].token_ids)
        greedy = {place for place in matchers if best and self.steering(rows[place]).plain}
        return [place for place, one in matchers.items() if place not in greedy or not one.fitting([best[place]])]

    def steering(self, row: Row) -> Steering:
        """Return what reshapes the row's scores, built as `generate` does, from the row's resolved config."""
        if row.steering is None:
            # Not of to_diff_dict(), which copies all values: 2% of a translation.
            key = repr(sorted((vars(row.request.config) | {"max_new_tokens": 0, "max_length": 0}).items()))
            known = None if row.request.processors else self._known.get(key)
            row.steering = known or self._new_steering(row, key)
        return row.steering

    def _new_steering(self, row: Row, key: object) -> Steering:
        """Build what reshapes a row's scores; what serves all rows of an equal config is kept."""
        processors, config = self._build(row), row.request.config
        names = [type(one).__name__ for one in processors]
        ordered = not READS_NO_ORDER.issuperset(names)
        named = list(zip(names, processors, strict=True))
        forbidden = None
        if not config.do_sample and all(name in FORBIDS or name in FORCES for name in names):
            forbidden = frozenset(t for name, one in named if name in FORBIDS for t in FORBIDS[name](one))
        forced = dict(FORCES[name](one) for name, one in named if name in FORCES)
        shared = self._start is not None or not ordered
        if row.request.processors or any(name.startswith("Encoder") for name in names):
            key, shared = id(row), False  # these hold the row's own source, or are asked for one row at a time
        elif not shared:
            key = key, len(row.request.input_ids)  # some begin to count at the prompt's end
        reads = not READS_NOTHING.issuperset(names)
        steering = Steering(processors, key, ordered, reads, config.do_sample, forbidden, forced)
        if shared:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = steering
        return steering

    def _length(self, row: Row) -> int:
        """Count the tokens that processors are given: of the prompt, or the token that begins an answer."""
        return (len(row.request.input_ids) if self._start is None else 1) + len(row.token_ids)

    def _build(self, row: Row) -> LogitsProcessorList:
        model, request = self._model, row.request
        # generate() fills these in on a copy of the config, and its builder reads them from there.
        config = copy.copy(request.config)
        config.forced_eos_token_id = None
        model._prepare_special_tokens(config, True, device=self.device, batch_size=1)  # noqa: SLF001, FBT003
        source = sent([request.input_ids], self.device)
        start = 1 if model.config.is_encoder_decoder else len(request.input_ids)
        penalties, own = more(row, start)
        processors: LogitsProcessorList = model._get_logits_processor(  # noqa: SLF001 - the only builder there is
            generation_config=config,
            input_ids_seq_length=start,
            encoder_input_ids=source,
            logits_processor=penalties,  # which come before temperature and what cuts off
            device=self.device,
            model_kwargs={},
        )
        processors += own
        return processors

    def _steered(self, rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor:
        """Choose among the scores that the rows' options leave; -1 if they leave a row none to draw from."""
        steering = self.steering(rows[0])
        token_ids = self._sofar(rows) if steering.reads else sent([[]] * len(rows), self.device, torch.int64)
        # Processors write into the scores they are given, and `logits` is still needed for logprobs.
        own = logits.to(torch.float32, copy=True)
        scores: torch.Tensor = steering.processors(token_ids, own)  # type: ignore[arg-type]
        if steering.sampled:
            return sampled(scores, sent([row.uniform() for row in rows], self.device, sums(self.device)))
        best, places = scores.max(-1)
        return places.masked_fill_(best == -torch.inf, -1)

    def _sofar(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the tokens of rows: those of the step before and the newest ones, if the rows are the same."""
        these, lengths = [weakref.ref(row) for row in rows], [len(row.token_ids) for row in rows]
        known = rows[0].sofar
        if known is not None and known[0] == these and [length + 1 for length in known[1]] == lengths:
            token_ids = torch.cat([known[2], sent([row.token_ids[-1:] for row in rows], self.device)], 1)
        else:
            before = ((*(row.request.input_ids if self._start is None else ()), *row.token_ids) for row in rows)
            token_ids = self._side_by_side(list(before))
        rows[0].sofar = these, lengths, token_ids
        return token_ids

    def _side_by_side(self, sofar: Sequence[Sequence[int]]) -> torch.Tensor:
        """Lay out tokens, without those that begin an answer; a shorter row repeats its first one before them."""
        rows = [[*(() if self._start is None else (self._start,)), *token_ids] for token_ids in sofar]
        width = max(map(len, rows))
        return sent([[row[0]] * (width - len(row)) + row for row in rows], self.device)

    def processed(self, row: Row, sofar: Sequence[Sequence[int]], scores: torch.Tensor) -> torch.Tensor:
        """Put scores through a row's processors, which may write into them.

        Args:
            row: One of those the scores belong to.
            sofar: The tokens before each, without the one that begins an answer.
            scores: *Shape:* `(len(sofar), vocabulary)`, float32.
        """
        token_ids: Any = self._side_by_side(sofar)
        return self.steering(row).processors(token_ids, scores)

    def _scored(
        self, rows: Sequence[Row], logits: torch.Tensor, token_ids: torch.Tensor, fixed: Mapping[int, int]
    ) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Score the tokens that were chosen and the likeliest beside them, of the rows that ask for as many of these.

        Args:
            rows: All rows.
            logits: *Shape:* `(rows, vocabulary)`.
            token_ids: What was chosen. *Shape:* `(rows,)`.
            fixed: What some rows get instead.

        Returns:
            Which rows, their tokens, and log-probabilities. *Shape:* `(some rows, 1 + likeliest)`, both.
        """
        counts: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if row.request.logprobs is not None:
                counts.setdefault(min(row.request.logprobs, logits.shape[-1]), []).append(place)
        if counts and fixed:
            into, tokens = sent(list(fixed), self.device), sent(list(fixed.values()), self.device)
            token_ids = token_ids.index_copy(0, into, tokens)
        found = []
        for count, places in counts.items():
            index = sent(places, self.device)
            some = logits.index_select(0, index)
            chosen = token_ids.index_select(0, index).clamp_(min=0)[:, None]
            every = torch.cat([chosen, top(some, count)], 1)
            found.append((places, every, logprobs(some, every)))
        return found

    def _logprob(self, row: Row, pairs: Sequence[tuple[int, float]] | None) -> TokenLogprob | None:
        if pairs is None:
            return None
        first = not row.begun
        chosen, *others = (TokenLogprob(self._codec.shown(one, first=first), one, value) for one, value in pairs)
        return replace(chosen, top=tuple(others))


def _by_place(places: Sequence[Sequence[int]], parts: Sequence[torch.Tensor]) -> dict[int, list[tuple[int, float]]]:
    """Return tokens and their log-probabilities by the rows' places; `parts` has two tensors for each list of these."""
    lists = (
        zip(some, *(part.tolist() for part in pair), strict=True)
        for some, *pair in zip(places, parts[::2], parts[1::2], strict=True)
    )
    return {place: list(zip(*pair, strict=True)) for rows in lists for place, *pair in rows}


def _usable(score: float, logits: torch.Tensor, place: int) -> bool:
    """Say whether there is something to choose from in a row, by the greatest of its scores."""
    return score > -math.inf and (score < math.inf or bool(torch.isfinite(logits[place]).any()))


def _within(
    rows: Sequence[Row], places: Sequence[int], logits: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take away the scores of tokens that the grammars of the rows at some places do not let come next.

    Args:
        rows: All rows.
        places: Which of them.
        logits: *Shape:* `(rows, vocabulary)`.
        best: Their greatest scores, and where those are. *Shape:* `(rows,)`, both.

    Returns:
        The scores that are left, the greatest ones, and where those are.
    """
    if not places:
        return logits, *best
    matchers = [matcher for place in places if (matcher := rows[place].matcher) is not None]
    forbidden = forbidding(sent(masks(matchers), logits.device), logits.shape[-1], logits.dtype)
    index = sent(places, logits.device)
    left = forbidden.add_(logits if len(places) == len(rows) else logits.index_select(0, index))
    greatest, likeliest = (old.index_copy(0, index, new) for old, new in zip(best, highest(left), strict=True))
    return left if len(places) == len(rows) else logits.index_copy(0, index, left), greatest, likeliest


def _unusable(row: Row, logits: torch.Tensor, step: int) -> str:
    """Say why there is nothing to choose from."""
    if row.matcher is None or not bool(torch.isfinite(logits).any()):
        return NO_SCORES.format(step=step)
    return NO_ANSWER.format(step=step, why=row.matcher.error or "no token fits")


NO_ANSWER = (
    "output= leaves no token to choose at token {step}: {why}. Ask for something simpler, or for what the vocabulary "
    "has all characters of."
)

NO_CHOICE = (
    "the options leave no token to draw at token {step}: suppress fewer tokens, or drop one of the "
    "options that forbid them."
)

NO_SCORES = (
    "the model gave no finite score at token {step}, so there is nothing to choose from. "
    "This is usual where half precision overflows: load with precision='float32' or 'bfloat16'."
)
