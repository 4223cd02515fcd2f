"""Beam search of encoder-decoders: the hypotheses of transformers' `_beam_search`, row by row.

A row's beams lie in slots. The first child of a beam stays in its slot, so that keys and values are copied only
where a beam has several children.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lmkit.engine.choice import NO_CHOICE, NO_SCORES
from lmkit.engine.logits import logprobs, top
from lmkit.engine.row import Row, end_tokens, timing
from lmkit.engine.text import TextFeed
from lmkit.errors import EngineError
from lmkit.results import Completion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from lmkit.encoding import Codec
    from lmkit.engine.choice import Chooser
    from lmkit.engine.request import Request
    from lmkit.engine.ticket import Ticket
    from lmkit.results import FinishReason, Timing

    Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["Search", "choose", "described"]

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
        self._codec = codec
        self._penalty = 1.0 if config.length_penalty is None else float(config.length_penalty)
        self._budget = int(config.max_new_tokens or 1)
        self.begin()

    def begin(self) -> None:
        """Forget all steps: they are made again when a batch is."""
        self.beams: list[list[int]] = [[] for _ in range(self.width)]
        self.scores = [0.0, *[UNBORN] * (self.width - 1)]
        self.moves: list[tuple[int, int]] = []
        self._finished: list[tuple[float, list[int]]] = []

    def advance(self, candidates: Sequence[tuple[float, int, int]]) -> None:
        """Take the likeliest next continuations, and decide whether the search has ended.

        Args:
            candidates: The log-probability of each, its slot and its new token; the best first.
        """
        length = len(self.beams[0]) + 1
        over = length >= self._budget
        going = [one for one in candidates if not over and one[2] not in self._ends][: self.width]
        for score, slot, token_id in candidates[: self.width]:  # the others are there only to go on with
            if over or token_id in self._ends:
                self._finished.append((score / length**self._penalty, [*self.beams[slot], token_id]))
        self._finished = sorted(self._finished, key=lambda one: -one[0])[: self.width]
        self._last = self._first = time.perf_counter() - self._started
        if over or not self._improves(going[0][0] if going else UNBORN, length):
            self._end()
        else:
            self._place(going)

    def _improves(self, best: float, length: int) -> bool:
        """Say whether a running beam could still be among the best, as transformers guesses it."""
        # Ends of beams that were never born are none, though they are kept until better ones push them out.
        finished = [score for score, _ in self._finished if score > UNBORN]
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
        best = self._finished[0][1]
        self.token_ids = best
        self.finish_reason = "eos" if best[-1] in self._ends else "length"

    def cancel(self) -> None:
        """End the search where it is, with the best that was found."""
        if not self.done:
            length = max(len(self.beams[0]), 1)
            running = [
                (score / length**self._penalty, beam)
                for score, beam in zip(self.scores, self.beams, strict=True)
                if score > UNBORN
            ]
            self._finished = sorted([*self._finished, *running], key=lambda one: -one[0])[: self.width]
            self.token_ids, self.finish_reason = self._finished[0][1], "cancelled"

    def release(self) -> str:
        """Return the text once it is known, which is at the end."""
        return self.completions()[0].text if self.done and self.error is None else ""

    def completions(self) -> tuple[Completion, ...]:
        """Describe the best continuations, as many as were asked for."""
        wanted = self._finished[: self.request.config.num_return_sequences or 1]
        cancelled = self.finish_reason == "cancelled"
        return tuple(
            described(self.request, token_ids, score, self._codec, cancelled=cancelled) for score, token_ids in wanted
        )

    def timing(self) -> Timing:
        """Say what the row took."""
        return timing(self._last, self._first, len(self.token_ids))


def described(
    request: Request, token_ids: list[int], score: float, codec: Codec, *, cancelled: bool = False
) -> Completion:
    """Cut a beam at its end token, and its text before a stop string."""
    ends = end_tokens(request)
    length = next((n for n, token_id in enumerate(token_ids) if token_id in ends), None)
    reason: FinishReason = "length" if length is None else "eos"
    if cancelled and length is None:
        reason = "cancelled"
    visible = token_ids[:length]
    feed = TextFeed(codec, request.stop)
    feed.read(visible, final=True)
    return Completion(
        text=feed.text,
        token_ids=tuple(visible),
        score=score,
        finish_reason="stop" if feed.stop_reason is not None else reason,
        stop_reason=feed.stop_reason,
        logprobs=None,
        generated_tokens=len(visible) + (length is not None),
    )


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
        if (token_id := chooser.steering(row).forces(step)) is None:
            scored.append(place)
        else:
            # A processor that forces a token gives it a log-probability of 0.
            row.advance(sorted(((score, slot, token_id) for slot, score in enumerate(row.scores)), reverse=True))
    if scored:
        some = states if len(scored) == len(rows) else states[scored]
        _extend(chooser, [rows[place] for place in scored], some, head)


def _extend(chooser: Chooser, rows: Sequence[Search], hidden: torch.Tensor, head: Head) -> None:
    """Choose by the model's scores. *Shape:* of what it has read: `(rows, width, size)`."""
    width, step = rows[0].width, len(rows[0].beams[0]) + 1
    running = torch.tensor([row.scores for row in rows], dtype=torch.float32)
    # The likeliest of each beam are enough, if no processor has a say in them: nothing else is normalized or sorted.
    parts = [_likeliest(head(part), rows[0].candidates) for part in torch.split(hidden.flatten(0, 1), BEAMS_AT_A_TIME)]
    logprobs, token_ids = (torch.cat(kind).view(len(rows), width, -1) for kind in zip(*parts, strict=True))
    usable = (logprobs[..., 0] > -torch.inf).all(-1).tolist()
    found = _best(logprobs, running, rows[0].candidates, token_ids)
    steered: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        steering = chooser.steering(row)
        if not usable[place]:
            row.error = EngineError(NO_SCORES.format(step=step))
        elif steering.plain or (step not in steering.forced and steering.leaves(token_ids[place].flatten().tolist())):
            row.advance(found[place])
        else:
            steered.setdefault(steering.key, []).append(place)
    for places in steered.values():
        for start in range(0, len(places), STEERED_AT_A_TIME):
            part = places[start : start + STEERED_AT_A_TIME]
            _steer(chooser, [rows[place] for place in part], head(hidden[part].flatten(0, 1)), running[part])


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the likeliest tokens of each row: their log-probabilities in float32, and which they are, on the CPU."""
    token_ids = top(logits, min(count, logits.shape[-1]))
    return logprobs(logits, token_ids).cpu(), token_ids.cpu()


def _steer(chooser: Chooser, rows: Sequence[Search], logits: torch.Tensor, running: torch.Tensor) -> None:
    """Choose among all continuations, as the rows' processors leave them."""
    scores = logits.to("cpu", torch.float32).log_softmax(-1)
    scores = chooser.processed(rows[0], [beam for row in rows for beam in row.beams], scores)
    shaped = scores.view(len(rows), -1, scores.shape[-1])
    for row, candidates in zip(rows, _best(shaped, running, rows[0].candidates), strict=True):
        if candidates[0][0] == -torch.inf:
            row.error = EngineError(NO_CHOICE.format(step=len(row.beams[0]) + 1))
        else:
            row.advance(candidates)


def _best(
    logprobs: torch.Tensor, running: torch.Tensor, count: int, token_ids: torch.Tensor | None = None
) -> list[list[tuple[float, int, int]]]:
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
    return [list(zip(*row, strict=True)) for row in zip(best.tolist(), slots.tolist(), tokens.tolist(), strict=True)]
