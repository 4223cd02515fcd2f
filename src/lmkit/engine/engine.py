"""The engine: requests in, completions out, one running batch for all callers.

Threading contract. Any thread may call. There is no thread of the engine's own: of the callers that wait, one
leads, running forward passes for all of them, until it has what it waits for; then another leads. (On an accelerator
the passes themselves have a thread, which does what the leader asks for while that one waits.) So a stream that
nobody reads costs nothing, and what a caller's thread has to suffer (Ctrl-C, an exception) ends its own rows only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from lmkit._forks import check_fork, renew, share
from lmkit._interrupts import let_go, locked, owns, surely
from lmkit._tracebacks import frameless
from lmkit.engine.batches import Batches
from lmkit.engine.compiled import CompiledDecoderStep, CompiledStep
from lmkit.engine.computing import Lane
from lmkit.engine.failures import INSIDE
from lmkit.engine.inputs import input_device
from lmkit.engine.request import Caller
from lmkit.engine.ticket import Ticket
from lmkit.errors import EngineError
from lmkit.kernels.openmp import release_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lmkit.engine.request import Outcome, Request, Update
    from lmkit.planning.plan import LoadPlan
    from lmkit.results import EngineStats
    from lmkit.text.codec import Codec

PULLING_SECONDS = 0.02
"""How long a run reads its source before it goes on with what is there."""


class Engine:
    """Runs requests on one model, for any number of callers at a time."""

    def __init__(self, model: Any, codec: Codec, plan: LoadPlan, start: int | None) -> None:
        """Serve `model`.

        Args:
            model: The transformers model, in evaluation mode.
            codec: Its tokenizer.
            plan: How rows run, whether steps are compiled, what rows take of memory, and what is kept of prompts.
            start: The token an encoder-decoder's answer begins with; None for a causal model.

        Raises:
            EngineError: The step could not be compiled.
        """
        graph = CompiledStep if start is None else CompiledDecoderStep
        compiled = graph(model) if plan.compiled else None
        self._lock = threading.RLock()
        self._lane = Lane(input_device(model))
        self._batches = Batches(model, codec, plan, start, self._lock, lane=self._lane, compiled=compiled)
        self._leader: Ticket | None = None
        self._leads: int | None = None  # the leader's thread, while it runs steps
        self._waiters: list[Ticket] = []
        share(self)

    def run(self, requests: Iterable[Request | None], caller: Caller) -> Iterator[Update[Outcome] | None]:
        """Run requests and tell what happens to each, as it happens. Closing the iterator ends its rows.

        Args:
            requests: The rows.
            caller: How they are read, and what is told of them.

        Raises:
            EngineError: If the engine was closed, a hook of the model calls from inside a step, or the process was
                forked during one. What fails for one row alone is in its `Update`.
        """
        check_fork()
        if self._leads == threading.get_ident():
            raise EngineError(INSIDE)
        ticket = Ticket(self._lock, caller)
        source = iter(requests)
        try:
            try:
                more = self._pull(ticket, source)
                while (update := self._next(ticket, hold=not (caller.lazy or caller.stream))) is not None or more:
                    yield update
                    if more:
                        more = self._pull(ticket, source)
            finally:
                self._abandon(ticket)
        except BaseException:
            self._abandon(ticket)  # an interrupt may have cut the first one short
            raise

    def close(self) -> None:
        """Refuse further work; runs in flight end with an `EngineError`, at once or at their next step."""
        self._batches.close()
        self._clean(Ticket(self._lock, Caller()))

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        led, self._leader, self._leads = self._leader is not None, None, None
        return renew(self._lock) or led

    def stats(self) -> EngineStats:
        """Say what the engine holds and has done."""
        return self._batches.stats()

    def _pull(self, ticket: Ticket, source: Iterator[Request | None]) -> bool:
        """Take requests from their source; False if it has no more."""
        deadline = time.perf_counter() + PULLING_SECONDS
        found: list[Request] = []
        more = True
        while not ticket.lazy or time.perf_counter() < deadline:
            try:
                request = next(source)
            except StopIteration:
                more = False
                break
            if request is None:
                break
            found.append(request)
        self._add(ticket, found)
        return more

    @locked
    def _add(self, ticket: Ticket, requests: list[Request]) -> None:
        self._batches.add(ticket, requests)

    def _next(self, ticket: Ticket, *, hold: bool) -> Update[Outcome] | None:
        """Return the ticket's next news, leading or waiting for them; None when all its requests have ended."""
        try:
            while not (found := self._told(ticket)):
                self._lead(ticket)
            return found[0]
        finally:
            if not (hold and ticket.unfinished and self._leader is ticket):
                self._hand_on(ticket)

    @locked
    def _told(self, ticket: Ticket) -> tuple[Update[Outcome] | None] | tuple[()]:
        """Wait for the ticket's next news and return them, None at its end; nothing if it is to lead."""
        while not ticket.news:
            if ticket.error is None and self._batches.closed:
                raise EngineError(self._batches.ended)
            if ticket.error is not None:
                raise ticket.error
            if not ticket.unfinished:
                return (None,)
            if self._leader in (None, ticket):
                self._leader = ticket
                return ()
            try:
                self._waiters.append(ticket)
                ticket.ready.wait()
            finally:
                self._wait_no_longer(ticket)
        return (ticket.news.popleft(),)

    def _wait_no_longer(self, ticket: Ticket) -> None:
        with contextlib.suppress(ValueError):  # it is not there
            self._waiters.remove(ticket)

    def _abandon(self, ticket: Ticket) -> None:
        """Let go of a caller's rows, now or at the next step."""
        ticket.left = True
        ticket.cancelled.set()
        self._wait_no_longer(ticket)
        # The garbage collector may close an iterator in the middle of anything, even where this thread has the lock.
        if owns(self._lock) or not surely(lambda: self._remove(ticket), lambda: let_go(self._lock)):
            return
        self._hand_on(ticket)
        self._clean(ticket)
        release_pool()

    def _remove(self, ticket: Ticket) -> bool:
        if has := self._lock.acquire(timeout=1):
            self._batches.remove(ticket)
        return has

    def _hand_on(self, ticket: Ticket) -> None:
        """Stop leading, if `ticket` leads, and let another that waits lead."""
        if self._leader is ticket and self._waiters:
            release_pool()  # the next one computes in a thread of its own
        self._give_up_lead(ticket)

    @locked
    def _give_up_lead(self, ticket: Ticket) -> None:
        if self._leader is ticket:
            self._leader = None
        if self._leader is None and self._waiters:
            self._waiters[0].ready.notify()

    def _clean(self, broom: Ticket) -> None:
        """Take out rows that nobody waits for, unless somebody leads, who does it at the next step."""
        try:
            if self._leads_now(broom):
                self._run(self._batches.sweep)
        finally:
            self._hand_on(broom)

    @locked
    def _leads_now(self, ticket: Ticket) -> bool:
        """Let a ticket lead if nobody does; say whether it leads now."""
        if free := self._leader is None:
            self._leader = ticket
        return free

    def _lead(self, ticket: Ticket) -> None:
        """Run steps until the ticket has news."""

        def steps() -> None:
            self._leads = threading.get_ident()
            while not (ticket.news or self._lane.halted) and ticket.unfinished and ticket.error is None:
                self._batches.advance()

        def over() -> None:
            self._leads = None

        self._run(lambda: surely(steps, over))

    def _run(self, work: Callable[[], None]) -> None:
        """Do work of who leads; of what is interrupted nothing is kept."""
        try:
            with frameless:
                self._lane(work)
        except BaseException:
            self._batches.begin_again()
            raise
