"""One completion on its way: the state that the decode loop advances by a token at a time."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from lmkit.engine.stream_text import TextFeed
from lmkit.results import Completion, FinishReason, Timing, TokenLogprob

if TYPE_CHECKING:
    from weakref import ref

    import torch

    from lmkit.engine.choice import Steering
    from lmkit.engine.request import Request
    from lmkit.engine.stream_text import Marks
    from lmkit.engine.ticket import Ticket
    from lmkit.errors import EngineError
    from lmkit.structured.grammars import Matcher
    from lmkit.text.codec import Codec

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
        sofar: Rows that went through processors with this as their first, how many tokens they had, and all of these.
        matcher: What says which tokens may come next, if not all.
        shared: Whether other rows wait for what it reads first.
        behind: How many tokens it takes over from rows of its call, at the least; 0 if that is not known.
        anew: Whether it leaves its batch, to be read from the beginning.
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
        self._own: int | None = None
        self.steering: Steering | None = None
        self.sofar: tuple[list[ref[Row]], list[int], torch.Tensor] | None = None
        self.matcher = self._new_matcher()
        self.shared = self.anew = False
        self.behind = 0
        self._kept = 0  # how many tokens were wholly accepted
        ends = request.config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self._codec = codec
        self._feed = self._new_feed()
        self.streams = ticket.stream and copy == 0
        self._random: torch.Generator | None = None
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
    def length(self) -> int:
        """How many tokens its text has, the prompt included."""
        return len(self.request.input_ids) + len(self.token_ids)

    @property
    def remaining(self) -> int:
        """How many more tokens the row may take."""
        return max((self.request.config.max_new_tokens or 1) - len(self.token_ids), 1)

    def start_clock(self) -> None:
        """Take now as the start of the row, unless it has begun before."""
        self._started = self._started or time.perf_counter()

    def uniform(self) -> float:
        """Return the number of the row's own stream that belongs to its next token, in [0, 1)."""
        while len(self._drawn) <= len(self.token_ids):
            import torch

            self._random = self._random or _stream_of(self.request.seed, self.copy)
            self._drawn += torch.rand(DRAWS, generator=self._random, dtype=torch.float64, device="cpu").tolist()
        return self._drawn[len(self.token_ids)]

    def forced_end(self, step: int) -> int | None:
        """Return what the config puts at a step, if it is the last of the budget, whatever the model writes there."""
        config = self.request.config
        ends = config.forced_eos_token_id if step == config.max_new_tokens else None
        return min(ends) if isinstance(ends, list) else ends

    def accept(self, token_id: int, logprob: TokenLogprob | None, own: int | None) -> None:
        """Append a token, and decide by the row's own choice, which a forced end replaces, whether it ended the row."""
        self._last = time.perf_counter() - self._started
        self._first = self._first or self._last
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        self._own = own
        whole = self._complete()
        if own in self._ends:
            # An end that the grammar did not allow was put there by a processor, or by the model's config.
            cut = own in self.request.stop_token_ids if self.matcher is None else bool(self.matcher.error)
            self.finish_reason = "stop" if cut else "eos"
        elif whole:
            self.finish_reason = "eos"
        elif len(self.token_ids) >= (self.request.config.max_new_tokens or 0):
            self.finish_reason = "length"
        if self.streams or self.request.stop or self.done:
            self._feed.read(self.visible_ids, final=self.done, end=token_id if self.ended else None)
        if self._feed.stop_reason is not None:
            self.finish_reason = "stop"
        self._kept = len(self.token_ids)

    def settle(self) -> None:
        """Undo what an interruption has cut short, so that the row can go on with the tokens it has."""
        self.anew = False
        self.matcher = self._new_matcher()
        self._random, self._drawn = None, []
        if self._kept != len(self.token_ids):
            del self.token_ids[self._kept :], self.logprobs[self._kept :]
            self.finish_reason = None
        if self.token_ids and not self.done:
            shown = self._feed.released
            self._feed = self._new_feed()
            self._feed.read(self.visible_ids)
            self._feed.released = max(shown, self._feed.released)

    def cancel(self) -> None:
        """End the row where it is, unless it has ended already."""
        if not self.done:
            self._feed.read(self.visible_ids, final=True)
            self.finish_reason = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the last token is one that ends the row."""
        return bool(self.token_ids) and self.token_ids[-1] in self._ends

    @property
    def begun(self) -> bool:
        """Whether there is a text that the next token goes on with."""
        return bool(self.request.context) or not self._codec.special.issuperset(self.token_ids)

    @property
    def visible_ids(self) -> list[int]:
        """The generated tokens without the end token."""
        return self.token_ids[:-1] if self.ended else self.token_ids

    def unreleased(self) -> tuple[str, int]:
        """Return the text that can be shown since the last time, and what to tell `release` then."""
        return self._feed.unreleased(final=self.done)

    def marks(self, text: str, upto: int) -> Marks:
        """Return the special tokens in what can be shown."""
        return self._feed.marks(upto - len(text), upto, final=self.done)

    @property
    def all_marks(self) -> tuple[Marks, ...]:
        """The special tokens in the text of each completion."""
        return (self._feed.all_marks,)

    def release(self, upto: int) -> None:
        """Take note that text was shown."""
        self._feed.released = upto

    def completions(self) -> tuple[Completion, ...]:
        """Describe what an ended row has written."""
        assert self.finish_reason is not None  # noqa: S101 - callers ask only rows that ended
        completion = Completion(
            text=self._feed.text,
            content=self._feed.text,
            token_ids=tuple(self.visible_ids),
            score=None,
            finish_reason=self.finish_reason,
            stop_reason=self._stopped_by(self._feed, self._own if self.finish_reason == "stop" else None),
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            generated_tokens=len(self.token_ids),
        )
        return (completion,)

    def timing(self) -> Timing:
        """Say what the row took; one of no time has no speed."""
        return Timing(self._last, self._first, len(self.token_ids) / self._last if self._last else 0.0)

    def _new_matcher(self) -> Matcher | None:
        return None if self.request.grammar is None else self.request.grammar()

    def _complete(self) -> bool:
        """Say whether nothing but the end fits behind the tokens."""
        if self.matcher is None:
            return False
        self.matcher.read(self.token_ids)
        return self.matcher.complete

    def fitting(self, guesses: list[int]) -> list[int]:
        """Return guesses at the next tokens, as far as the row may take them."""
        if self.matcher is None or not guesses:
            return guesses
        self.matcher.read(self.token_ids)
        return self.matcher.fitting(guesses)

    def _new_feed(self) -> TextFeed:
        ask = self.request
        return TextFeed(self._codec, ask.stop, context=ask.context, named=ask.named, special=ask.special)

    def _stopped_by(self, feed: TextFeed, last: int | None) -> str | None:
        """Return the stop string that ended a text, or the name of the token to stop at that is its own last."""
        if feed.stop_reason is not None or last is None or last not in self.request.stop_token_ids:
            return feed.stop_reason
        return self._codec.token(last)


def _stream_of(seed: int | None, copy: int) -> torch.Generator:
    """Begin the stream of draws that belongs to this seed and completion alone."""
    import torch

    digest = hashlib.sha256(f"{seed}:{copy}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
