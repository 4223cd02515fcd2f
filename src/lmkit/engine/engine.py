"""The engine: requests in, completions out, one running batch for all callers.

Threading contract. Any thread may call. There is no thread of the engine's own: of the callers that wait, one
leads, running forward passes for all of them, until it has what it waits for; then another leads. So a stream that
nobody reads costs nothing, and what a caller's thread has to suffer (Ctrl-C, an exception) ends its own rows only.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from lmkit._openmp import release_pool
from lmkit._quiet import quiet
from lmkit.engine.batches import CLOSED, Batches
from lmkit.engine.beams import Search
from lmkit.engine.compiled import CompiledStep
from lmkit.engine.row import Row
from lmkit.engine.ticket import Ticket
from lmkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lmkit.encoding import Codec
    from lmkit.engine.request import Request, Update
    from lmkit.results import EngineStats

__all__ = ["Engine"]

PULLING_SECONDS = 0.02
"""How long a run reads its source before it goes on with what is there."""


class Engine:
    """Runs requests on one model, for any number of callers at a time."""

    def __init__(
        self,
        model: Any,
        codec: Codec,
        start: int | None,
        *,
        prefix_bytes: int = 0,
        compile_folder: Path | None = None,
    ) -> None:
        """Serve `model`.

        Args:
            model: The transformers model, in evaluation mode.
            codec: Its tokenizer.
            start: The token an encoder-decoder's answer begins with; None for a causal model.
            prefix_bytes: How many bytes of keys and values of recent prompts may be kept.
            compile_folder: Compile the decode step, and keep it in this folder.

        Raises:
            OptionError: `compile_folder` is given, and the model's family has no step that can be compiled.
            EngineError: It could not be compiled.
        """
        compiled = None if compile_folder is None else CompiledStep(model, compile_folder)
        self._codec = codec
        self._lock = threading.Lock()
        self._batches = Batches(model, codec, start, prefix_bytes, self._lock, compiled=compiled)
        self._leader: Ticket | None = None
        self._waiters: list[Ticket] = []

    def run(
        self,
        requests: Iterable[Request | None],
        *,
        stream: bool = False,
        lazy: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Iterator[Update | None]:
        """Run requests and tell what happens to each, as it happens. Closing the iterator ends its rows.

        Args:
            requests: The rows.
            stream: Whether to report new text at every step, not only the end.
            lazy: Read requests between steps. None among them says that there are more, but not now; when all before
                it have ended, the iterator gives None in turn.
            cancelled: Set it from another thread to end all rows at their next step, without further news
                of those that have not begun.

        Raises:
            EngineError: If the engine was closed. What fails for one row alone is in its `Update`.
        """
        ticket = Ticket(self._lock, stream=stream, lazy=lazy, cancelled=cancelled)
        source = iter(requests)
        try:
            more = self._pull(ticket, source, lazy=lazy)
            while (update := self._next(ticket, hold=not (lazy or stream))) is not None or more:
                yield update
                if more:
                    more = self._pull(ticket, source, lazy=lazy)
        finally:
            self._abandon(ticket)

    def close(self) -> None:
        """Refuse further work; runs in flight end with an `EngineError`, at once or at their next step."""
        self._batches.closed = True
        for ticket in list(self._batches.tickets):
            ticket.cancelled.set()  # a beam search looks at nothing else
        self._clean()

    def stats(self) -> EngineStats:
        """Say what the engine holds and has done."""
        return self._batches.stats()

    def _pull(self, ticket: Ticket, source: Iterator[Request | None], *, lazy: bool) -> bool:
        """Take requests from their source; False if it has no more."""
        deadline = time.perf_counter() + PULLING_SECONDS
        found: list[Request] = []
        more = True
        while not lazy or time.perf_counter() < deadline:
            try:
                request = next(source)
            except StopIteration:
                more = False
                break
            if request is None:
                break
            found.append(request)
        with self._lock:
            rows: list[Row] = []
            searches: dict[int, Request] = {}
            for place, request in enumerate(found, ticket.added):
                if request.config.num_beams == 1:
                    rows += [Row(request, ticket, place, copy, self._codec) for copy in range(request.copies)]
                elif self._batches.searches:
                    rows.append(Search(request, ticket, place, self._codec))
                else:
                    searches[place] = request
            ticket.add(rows, searches)
            if ticket not in self._batches.tickets:
                self._batches.tickets.append(ticket)
            self._batches.room = True
        return more

    def _next(self, ticket: Ticket, *, hold: bool) -> Update | None:
        """Return the ticket's next news, leading or waiting for them; None when all its requests have ended."""
        try:
            while True:
                with self._lock:
                    if not ticket.news and ticket.error is None and self._batches.closed:
                        raise EngineError(CLOSED)
                    if ticket.news:
                        return ticket.news.popleft()
                    if ticket.error is not None:
                        raise ticket.error
                    if not ticket.unfinished:
                        return None
                    if self._leader not in (None, ticket):
                        try:
                            self._waiters.append(ticket)
                            ticket.ready.wait()
                        finally:
                            self._waiters = [other for other in self._waiters if other is not ticket]
                        continue
                    self._leader = ticket
                self._lead(ticket)
        finally:
            if not (hold and ticket.unfinished and self._leader is ticket):
                self._hand_on(ticket)

    def _abandon(self, ticket: Ticket) -> None:
        """Let go of a caller's rows, now or at the next step."""
        ticket.left = True
        ticket.cancelled.set()
        # The garbage collector may close an iterator in the middle of anything, even where this thread has the lock.
        has = False
        try:
            if not (has := self._lock.acquire(timeout=1)):
                return
            ticket.forget()
            if ticket in self._batches.tickets:
                self._batches.tickets.remove(ticket)
            if not self._batches.tickets:
                self._batches.scheduler.reset()
        finally:
            if has:
                self._lock.release()
        self._hand_on(ticket)
        self._clean()
        release_pool()

    def _hand_on(self, ticket: Ticket) -> None:
        """Stop leading, if `ticket` leads, and let another that waits lead."""
        if self._leader is ticket and self._waiters:
            release_pool()  # the next one computes in a thread of its own
        with self._lock:
            if self._leader is ticket:
                self._leader = None
            if self._leader is None and self._waiters:
                self._waiters[0].ready.notify()

    def _clean(self) -> None:
        """Take out rows that nobody waits for, unless somebody leads, who does it at the next step."""
        broom = Ticket(self._lock)
        try:
            with self._lock:
                if self._leader is not None:
                    return
                self._leader = broom
            with torch.no_grad():
                self._batches.sweep()
        finally:
            self._hand_on(broom)

    def _lead(self, ticket: Ticket) -> None:
        """Run steps until the ticket has news."""
        try:
            with torch.no_grad(), quiet():
                while not ticket.news and ticket.unfinished and ticket.error is None:
                    self._batches.advance()
        except BaseException:
            self._batches.begin_again()
            raise
