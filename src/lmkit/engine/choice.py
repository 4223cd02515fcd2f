"""From scores to tokens: transformers' own processors, then the likeliest token or a draw, per row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lmkit.engine.processors import more
from lmkit.errors import EngineError
from lmkit.kernels.logits import forbidding, highest
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
        sampled: Whether the token is drawn.
        forbidden: The tokens that a greedy row may not take at some steps, if its processors only forbid and force.
        forced: Behind how many tokens they force one, and which.
    """

    processors: LogitsProcessorList
    key: object
    ordered: bool
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
    go through them together; rows without processors, the common case, share one maximum.
    """

    def __init__(self, model: Any, codec: Codec, decoder_start: int | None) -> None:
        """Serve rows of `model`; an encoder-decoder's rows begin with the token `decoder_start`."""
        self._model = model
        self._codec = codec
        self._start = decoder_start
        self._known: dict[object, Steering] = {}

    def choose(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Give each row its next token, or its error.

        Args:
            rows: The rows that still run.
            logits: The model's scores. *Shape:* `(rows, vocabulary)`.
        """
        raw = logits
        # One pass serves three questions: NaN and inf show in the maximum, and the place is the greedy choice.
        best = highest(logits)
        logits, greatest, likeliest = _within(rows, self._to_mask(rows, best[1]), logits, best)
        usable = (greatest > -torch.inf).tolist()
        for place in (greatest == torch.inf).nonzero()[:, 0].tolist():
            usable[place] = bool(torch.isfinite(logits[place]).any())
        usable = [fine and not (row.matcher and row.matcher.error) for fine, row in zip(usable, rows, strict=True)]
        chosen: list[int | None] = likeliest.tolist()
        groups: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            steering = self.steering(row)
            if not usable[place] or steering.plain:
                continue
            if (settled := steering.settled(chosen[place], self._length(row))) is not None:
                chosen[place] = settled
                continue
            length = len(row.token_ids) if steering.ordered else 0
            groups.setdefault((steering.key, length), []).append(place)
        for places in groups.values():
            for place, token_id in zip(places, self._steered([rows[p] for p in places], logits[places]), strict=True):
                chosen[place] = token_id
        for place, row in enumerate(rows):
            step, own = len(row.token_ids) + 1, chosen[place]
            token_id = own if (forced := row.forced_end(step)) is None else forced
            if not usable[place]:
                row.error = EngineError(_unusable(row, raw[place], step))
            elif token_id is None:
                row.error = row.error or EngineError(NO_CHOICE.format(step=step))
            else:
                count = row.request.logprobs
                scored = None if count is None else self._logprob(row, count, token_id, raw[place])
                row.accept(token_id, scored, own)

    def _to_mask(self, rows: Sequence[Row], likeliest: torch.Tensor) -> list[int]:
        """Find the rows whose grammar has to be asked for all tokens: not where it lets a greedy choice come."""
        matchers = {place: matcher for place, row in enumerate(rows) if (matcher := row.matcher) is not None}
        best = likeliest.tolist() if matchers else []
        for place, matcher in matchers.items():
            matcher.read(rows[place].token_ids)
        greedy = {place for place in matchers if self.steering(rows[place]).plain}
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
        steering = Steering(processors, key, ordered, config.do_sample, forbidden, forced)
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
        model._prepare_special_tokens(config, True, device="cpu", batch_size=1)  # noqa: SLF001, FBT003
        source = torch.tensor([request.input_ids], device="cpu")
        start = 1 if model.config.is_encoder_decoder else len(request.input_ids)
        penalties, own = more(row, start)
        processors: LogitsProcessorList = model._get_logits_processor(  # noqa: SLF001 - the only builder there is
            generation_config=config,
            input_ids_seq_length=start,
            encoder_input_ids=source,
            logits_processor=penalties,  # which come before temperature and what cuts off
            device="cpu",
            model_kwargs={},
        )
        processors += own
        return processors

    def _steered(self, rows: Sequence[Row], logits: torch.Tensor) -> list[int | None]:
        """Choose among the scores that the rows' options leave; None if they leave a row none to draw from."""
        steering = self.steering(rows[0])
        sofar = [[*(row.request.input_ids if self._start is None else ()), *row.token_ids] for row in rows]
        # Processors write into the scores they are given, and `logits` is still needed for logprobs.
        scores = self.processed(rows[0], sofar, logits.to("cpu", torch.float32, copy=True))
        if not steering.sampled:
            best, places = scores.max(-1)
            pairs = zip(places.tolist(), (best > -torch.inf).tolist(), strict=True)
            return [token_id if fine else None for token_id, fine in pairs]
        # Inversion of the cumulative distribution: one number of the row's own stream per token.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        uniform = torch.tensor([[row.uniform()] for row in rows], dtype=torch.float64, device="cpu")
        drawn = torch.searchsorted(cumulative, uniform * total, right=True)[:, 0].tolist()
        possible = torch.isfinite(total[:, 0]).tolist()
        return [token_id if fine else None for token_id, fine in zip(drawn, possible, strict=True)]

    def processed(self, row: Row, sofar: Sequence[Sequence[int]], scores: torch.Tensor) -> torch.Tensor:
        """Put scores through a row's processors, which may write into them.

        Args:
            row: One of those the scores belong to.
            sofar: The tokens before each, without the one that begins an answer.
            scores: *Shape:* `(len(sofar), vocabulary)`, float32, on the CPU.
        """
        rows = [[*(() if self._start is None else (self._start,)), *token_ids] for token_ids in sofar]
        width = max(map(len, rows))
        token_ids: Any = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows], device="cpu")
        return self.steering(row).processors(token_ids, scores)

    def _logprob(self, row: Row, count: int, token_id: int, logits: torch.Tensor) -> TokenLogprob:
        values = logits.float().log_softmax(-1)
        top = values.topk(min(count, len(values))).indices.tolist()
        chosen, *others = (
            TokenLogprob(self._codec.shown(one, first=not row.begun), one, float(values[one]))
            for one in [token_id, *top]
        )
        return replace(chosen, top=tuple(others))


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
    forbidden = forbidding(masks(matchers).to(logits.device), logits.shape[-1], logits.dtype)
    index = torch.tensor(places, device=logits.device)
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
