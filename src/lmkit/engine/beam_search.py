"""Beam search of encoder-decoders: the hypotheses of transformers' `_beam_search`, row by row.

A row's beams lie in slots. The first child of a beam stays in its slot, so that keys and values are copied only
where a beam has several children.
"""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch

from lmkit.engine.choice import NO_CHOICE, NO_SCORES, Chooser
from lmkit.engine.inputs import fetched, sent
from lmkit.engine.row import Row
from lmkit.errors import EngineError
from lmkit.kernels.logits import logprobs, top
from lmkit.results import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from lmkit.engine.request import Request
    from lmkit.engine.stream_text import Marks
    from lmkit.engine.ticket import Ticket
    from lmkit.text.codec import Codec

    Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

UNBORN = -1e9
"""The score of beams that only repeat the first one, until its continuations take their places."""

BEAMS_AT_A_TIME = 128
"""How many beams' scores are computed together. Those of 256 with a vocabulary of 58,000 take 30 MB, which a processor
does not hold: a search takes a quarter longer with all at once, and 4% longer with 64, whose products are slower."""

STEERED_AT_A_TIME = 16
"""How many searches' scores go through processors together, as float32."""


class Search(Row):
    """A row that follows several continuations at a time, of which the best win.

    Attributes:
        width: How many continuations, `num_beams`.
        candidates: How many of the next ones are looked at, so that enough are left that have not ended.
        beams: The tokens of each slot's continuation.
        scores: Their log-probabilities.
        moves: Which slots' keys and values are to be copied into which, `(to, from)`, before the next step.
    """

    def __init__(self, request: Request, ticket: Ticket, index: int, codec: Codec) -> None:
        """Prepare the search; nothing is computed yet."""
        super().__init__(request, ticket, index, 0, codec)
        config = request.config
        self.width = int(config.num_beams)
        self.candidates = max(2, 1 + len(self._ends)) * self.width
        self._penalty = 1.0 if config.length_penalty is None else float(config.length_penalty)
        self._budget = int(config.max_new_tokens or 1)
        self.begin()

    def begin(self) -> None:
        """Forget all steps: they are made again when a batch is."""
        self.beams: list[list[int]] = [[] for _ in range(self.width)]
        self.scores = [0.0, *[UNBORN] * (self.width - 1)]
        self.moves: list[tuple[int, int]] = []
        self._finished: list[tuple[float, list[int], bool]] = []

    def force(self, token_id: int, scores: torch.Tensor) -> None:
        """End all beams with a token; those whose own likeliest next one is no end are cut.

        Args:
            token_id: The token.
            scores: Of the next tokens. *Shape:* `(width, vocabulary)`.
        """
        cut = {slot for slot, own in enumerate(scores.argmax(-1).tolist()) if own not in self._ends}
        self.advance(self.followed_by(token_id), cut)

    def followed_by(self, token_id: int) -> list[tuple[float, int, int]]:
        """Return the candidates of a token that is forced: a processor gives it a log-probability of 0."""
        return sorted(((score, slot, token_id) for slot, score in enumerate(self.scores)), reverse=True)

    def advance(self, candidates: Sequence[tuple[float, int, int]], cut: Collection[int] = ()) -> None:
        """Take the likeliest next continuations, and decide whether the search has ended.

        Args:
            candidates: The log-probability of each, its slot and its new token; the best first.
            cut: The slots of those whose end is not their own.
        """
        length = len(self.beams[0]) + 1
        over = length >= self._budget
        going = [one for one in candidates if not over and one[2] not in self._ends][: self.width]
        for score, slot, token_id in candidates[: self.width]:  # the others are there only to go on with
            if over or token_id in self._ends:
                self._finished.append((score / length**self._penalty, [*self.beams[slot], token_id], slot in cut))
        self._finished = sorted(self._finished, key=lambda one: -one[0])[: self.width]
        self._last = self._first = time.perf_counter() - self._started
        if over or not self._improves(going[0][0] if going else UNBORN, length):
            self._end()
        else:
            self._place(going)

    def finish(self, found: Sequence[tuple[float, list[int], int | None]]) -> None:
        """End with what another search has found, the best first; end tokens may be padded.

        Args:
            found: Scores, tokens, and the likeliest token where another was forced to end them at the budget.
        """
        ends = (next((n for n, t in enumerate(ids, start=1) if t in self._ends), len(ids)) for _, ids, _ in found)
        self._finished = [
            (score, ids[:end], own is not None and own not in self._ends)
            for (score, ids, own), end in zip(found, ends, strict=True)
        ]
        self._last = self._first = time.perf_counter() - self._started
        self._end()

    @cached_property
    def settings(self) -> str:
        """All that the search was given beside its tokens."""
        own = id(self) if self.request.processors else ""  # which are asked for one row at a time
        return f"{self.request.config.to_json_string(use_diff=False)}{own}"

    def _improves(self, best: float, length: int) -> bool:
        """Say whether a running beam could still be among the best, as transformers guesses it."""
        # Ends of beams that were never born are none, though they are kept until better ones push them out.
        finished = [score for score, _, _ in self._finished if score > UNBORN]
        if len(finished) < self.width:
            return best > UNBORN
        stopping = self.request.config.early_stopping
        longest = self._budget if stopping == "never" and self._penalty > 0 else length
        return stopping is not True and best / longest**self._penalty > finished[-1]

    def _place(self, going: Sequence[tuple[float, int, int]]) -> None:
        """Give each continuation a slot: its parent's, if no better one has it."""
        placed: dict[int, tuple[float, int, int]] = {}
        later = [one for one in going if placed.setdefault(one[1], one) is not one]
        holes = [slot for slot in range(self.width) if slot not in placed]
        self.moves = [(hole, one[1]) for hole, one in zip(holes, later, strict=False)]
        placed |= dict(zip(holes, later, strict=False))
        filled = [placed.get(slot, (UNBORN, slot, going[0][2])) for slot in range(self.width)]
        self.scores = [score for score, _, _ in filled]
        self.beams = [[*self.beams[slot], token_id] for _, slot, token_id in filled]

    def _end(self) -> None:
        _, self.token_ids, cut = self._finished[0]
        self.finish_reason = "eos" if self.token_ids[-1] in self._ends and not cut else "length"

    def cancel(self) -> None:
        """End the search where it is, with the best that was found."""
        if not self.done:
            length = max(len(self.beams[0]), 1)
            running = [
                (score / length**self._penalty, beam, False)
                for score, beam in zip(self.scores, self.beams, strict=True)
                if score > UNBORN
            ]
            self._finished = sorted([*self._finished, *running], key=lambda one: -one[0])[: self.width]
            self.token_ids, self.finish_reason = self._finished[0][1], "cancelled"

    def settle(self) -> None:
        """Undo what an interruption has cut short: a search that has not ended is made anew."""
        if not self.done:
            self.token_ids = []

    def unreleased(self) -> tuple[str, int]:
        """Return the text once it is known, which is at the end."""
        return (self.completions()[0].text if self.done and self.error is None else ""), 0

    def marks(self, text: str, upto: int) -> Marks:  # noqa: ARG002 - all of it is told at the end
        """Return the special tokens in the best text."""
        return self.all_marks[0] if text else ()

    @property
    def all_marks(self) -> tuple[Marks, ...]:
        """The special tokens in the text of each continuation."""
        return tuple(marks for _, marks in self._described())

    def completions(self) -> tuple[Completion, ...]:
        """Describe the best continuations, as many as were asked for."""
        return tuple(completion for completion, _ in self._described())

    def _described(self) -> list[tuple[Completion, Marks]]:
        wanted = self._finished[: self.request.config.num_return_sequences or 1]
        return [self._completion(*one) for one in wanted]

    def _completion(self, score: float, token_ids: list[int], cut: bool) -> tuple[Completion, Marks]:  # noqa: FBT001
        """Cut a beam at its end token, which may not be its own (`cut`), and its text before a stop string."""
        length = next((n for n, token_id in enumerate(token_ids) if token_id in self._ends), None)
        last = token_ids[length : length + 1] if length is not None else []
        reason: FinishReason = "cancelled" if self.finish_reason == "cancelled" else "length"
        if cut:
            reason = "length"
        elif last:
            reason = "stop" if last[0] in self.request.stop_token_ids else "eos"
        visible = token_ids[:length]
        feed = self._new_feed()
        feed.read(visible, final=True, end=last[0] if last else None)
        completion = Completion(
            text=feed.text,
            content=feed.text,
            token_ids=tuple(visible),
            score=score,
            finish_reason="stop" if feed.stop_reason is not None else reason,
            stop_reason=self._stopped_by(feed, last[0] if last and not cut else None),
            logprobs=None,
            generated_tokens=len(visible) + (length is not None),
        )
        return completion, feed.all_marks


def choose(chooser: Chooser, rows: Sequence[Search], hidden: torch.Tensor, head: Head) -> None:
    """Give each search its next continuations, or its error.

    Args:
        chooser: What builds processors.
        rows: Searches of one width and number of candidates, at the same step.
        hidden: What the model has read. *Shape:* `(rows * width, size)`.
        head: What turns some of it into scores of the vocabulary.
    """
    width, step = rows[0].width, len(rows[0].beams[0]) + 1
    states = hidden.view(len(rows), width, -1)
    scored = []
    for place, row in enumerate(rows):
        if (token_id := row.forced_end(step)) is not None:
            row.force(token_id, chooser.processed(row, row.beams, _normalized(chooser, head(states[place]))))
        elif (token_id := chooser.steering(row).settled(None, step)) is None:
            scored.append(place)
        else:
            row.advance(row.followed_by(token_id))
    if scored:
        some = states if len(scored) == len(rows) else states[scored]
        _extend(chooser, [rows[place] for place in scored], some, head)


def _extend(chooser: Chooser, rows: Sequence[Search], hidden: torch.Tensor, head: Head) -> None:
    """Choose by the model's scores. *Shape:* of what it has read: `(rows, width, size)`."""
    width, step = rows[0].width, len(rows[0].beams[0]) + 1
    device, count = chooser.device, rows[0].candidates
    running = sent([row.scores for row in rows], device, torch.float32)
    # The likeliest of each beam are enough, if no processor has a say in them: nothing else is normalized or sorted.
    parts = [_likeliest(head(part).to(device), count) for part in torch.split(hidden.flatten(0, 1), BEAMS_AT_A_TIME)]
    logprobs, token_ids = (torch.cat(kind).view(len(rows), width, -1) for kind in zip(*parts, strict=True))
    best = _best(logprobs, running, count, token_ids)
    found, (worst, every) = _listed(*best, logprobs[..., 0].amin(-1), token_ids.flatten(1))
    usable = [score > -math.inf for score in worst.tolist()]  # which NaN is not
    steered: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        steering = chooser.steering(row)
        if not usable[place]:
            row.error = EngineError(NO_SCORES.format(step=step))
        elif steering.plain or (step not in steering.forced and steering.leaves(every[place].tolist())):
            row.advance(found[place])
        else:
            steered.setdefault(steering.key, []).append(place)
    for places in steered.values():
        for start in range(0, len(places), STEERED_AT_A_TIME):
            part = places[start : start + STEERED_AT_A_TIME]
            index = sent(part, device)
            states = hidden.index_select(0, index.to(hidden.device)).flatten(0, 1)
            _steer(chooser, [rows[place] for place in part], head(states), running.index_select(0, index))


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the likeliest tokens of each row: their log-probabilities in float32, and which they are."""
    token_ids = top(logits, min(count, logits.shape[-1]))
    return logprobs(logits, token_ids), token_ids


def _steer(chooser: Chooser, rows: Sequence[Search], logits: torch.Tensor, running: torch.Tensor) -> None:
    """Choose among all continuations, as the rows' processors leave them."""
    scores = chooser.processed(rows[0], [beam for row in rows for beam in row.beams], _normalized(chooser, logits))
    shaped = scores.view(len(rows), -1, scores.shape[-1])
    found, _ = _listed(*_best(shaped, running, rows[0].candidates))
    for row, candidates in zip(rows, found, strict=True):
        if candidates[0][0] == -torch.inf:
            row.error = row.error or EngineError(NO_CHOICE.format(step=len(row.beams[0]) + 1))
        else:
            row.advance(candidates)


def _normalized(chooser: Chooser, logits: torch.Tensor) -> torch.Tensor:
    return logits.to(chooser.device, torch.float32).log_softmax(-1)


def _best(
    logprobs: torch.Tensor, running: torch.Tensor, count: int, token_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the best continuations of each row: their log-probability, their slot, their token.

    Args:
        logprobs: *Shape:* `(rows, width, some)`.
        running: Of the beams so far. *Shape:* `(rows, width)`.
        count: How many.
        token_ids: Which tokens these are, of the same shape; by default all of the vocabulary.
    """
    every = (logprobs + running[..., None]).flatten(1)
    best, places = every.topk(min(count, every.shape[-1]))
    tokens = places % logprobs.shape[-1] if token_ids is None else token_ids.flatten(1).gather(1, places)
    slots = places // logprobs.shape[-1]
    return best, slots, tokens


def _listed(*parts: torch.Tensor) -> tuple[list[list[tuple[float, int, int]]], Sequence[torch.Tensor]]:
    """Copy what `_best` has found to the CPU, as a list for each row, and other tensors with it."""
    best, slots, tokens, *others = fetched(*parts)
    columns = zip(best.tolist(), slots.tolist(), tokens.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in columns], others
