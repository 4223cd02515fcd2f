"""One completion on its way: the state that the decode loop advances by a token at a time."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import torch

from lmkit.engine.text import TextFeed
from lmkit.results import Completion, FinishReason, Timing, TokenLogprob

if TYPE_CHECKING:
    from lmkit.encoding import Codec
    from lmkit.engine.choice import Steering
    from lmkit.engine.request import Request
    from lmkit.engine.ticket import Ticket
    from lmkit.errors import EngineError

__all__ = ["Row"]

DRAWS = 64
"""How many numbers of its stream a sampled row draws at once."""


class Row:
    """Completion `copy` of request number `index` of a ticket.

    Attributes:
        token_ids: What was generated so far, an end token included.
        finish_reason: Why the row ended; None while it runs.
        streams: Whether its text is shown while it grows.
        error: Why the row failed, if it did.
        steering: What reshapes its scores, once built.
        told: Whether its caller knows that it ended.
        shared: Whether other rows wait for what it reads first.
        width: How many answers it follows at a time.
        candidates: How many next tokens a search of several answers looks at.
    """

    width = 1
    candidates = 1

    def __init__(self, request: Request, ticket: Ticket, index: int, copy: int, codec: Codec) -> None:
        """Prepare the row; nothing is computed yet."""
        self.request = request
        self.ticket = ticket
        self.index = index
        self.copy = copy
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.error: EngineError | None = None
        self.steering: Steering | None = None
        self.shared = self.told = False
        self._ends = end_tokens(request)
        self._feed = TextFeed(codec, request.stop)
        self.streams = ticket.stream and copy == 0
        self._random = _stream_of(request.seed, copy) if request.seed is not None else None
        self._drawn: list[float] = []
        self._started = self._first = self._last = 0.0

    @property
    def done(self) -> bool:
        """Whether the row needs no further step."""
        return self.finish_reason is not None or self.error is not None

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What a causal model has to read: the prompt, and what was generated before the row had to begin anew."""
        return (*self.request.input_ids, *self.token_ids)

    @property
    def remaining(self) -> int:
        """How many more tokens the row may take."""
        return max((self.request.config.max_new_tokens or 1) - len(self.token_ids), 1)

    def start_clock(self) -> None:
        """Take now as the start of the row, unless it has begun before."""
        self._started = self._started or time.perf_counter()

    def uniform(self) -> float:
        """Return the number of the row's own stream that belongs to its next token, in [0, 1)."""
        assert self._random is not None  # noqa: S101 - only sampled rows draw, and those have a seed
        while len(self._drawn) <= len(self.token_ids):
            self._drawn += torch.rand(DRAWS, generator=self._random, dtype=torch.float64, device="cpu").tolist()
        return self._drawn[len(self.token_ids)]

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Append a token and decide whether it ended the row."""
        self._last = time.perf_counter() - self._started
        self._first = self._first or self._last
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self._ends:
            self.finish_reason = "eos"
        elif len(self.token_ids) >= (self.request.config.max_new_tokens or 0):
            self.finish_reason = "length"
        if self.streams or self.request.stop or self.done:
            self._feed.read(self.visible_ids, final=self.done)
        if self._feed.stop_reason is not None:
            self.finish_reason = "stop"

    def cancel(self) -> None:
        """End the row where it is, unless it has ended already."""
        if not self.done:
            self.finish_reason = "cancelled"
            self._feed.read(self.visible_ids, final=True)

    @property
    def visible_ids(self) -> list[int]:
        """The generated tokens without the end token."""
        return self.token_ids[:-1] if self.finish_reason == "eos" else self.token_ids

    def release(self) -> str:
        """Return the text that can be shown since the last time."""
        return self._feed.release(final=self.done)

    def completions(self) -> tuple[Completion, ...]:
        """Describe what an ended row has written."""
        assert self.finish_reason is not None  # noqa: S101 - callers ask only rows that ended
        completion = Completion(
            text=self._feed.text,
            token_ids=tuple(self.visible_ids),
            score=None,
            finish_reason=self.finish_reason,
            stop_reason=self._feed.stop_reason,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            generated_tokens=len(self.token_ids),
        )
        return (completion,)

    def timing(self) -> Timing:
        """Say what the row took."""
        return timing(self._last, self._first, len(self.token_ids))


def timing(seconds: float, first: float, tokens: int) -> Timing:
    """Make a `Timing`; a row of no time has no speed."""
    return Timing(seconds, first, tokens / seconds if seconds else 0.0)


def end_tokens(request: Request) -> frozenset[int]:
    """Return the ids that end a row."""
    ends = request.config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _stream_of(seed: int, copy: int) -> torch.Generator:
    """Begin the stream of draws that belongs to this seed and completion alone."""
    digest = hashlib.sha256(f"{seed}:{copy}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
