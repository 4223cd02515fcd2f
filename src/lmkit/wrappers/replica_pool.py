"""The processes of replicas: rows go where there is room, and news of them to who asked.

One thread, the pool's own, knows which rows are where; all others put what
it has to do into its inbox, so that nothing is locked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lmkit._forks import FORKED
from lmkit._interrupts import surely
from lmkit.engine import CLOSED, Caller, Update
from lmkit.errors import EngineError, LmkitError, OptionError
from lmkit.wrappers.replica_worker import answer, asked, error_of, work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lmkit._interrupts import Flag
    from lmkit.results import EngineStats
    from lmkit.text.codec import Codec

logger = logging.getLogger("lmkit")

WINDOW = {"cpu": 64}
"""How many rows a replica has at most: enough for a batch, and no more, since answers differ in length."""

WINDOW_ELSEWHERE = 512

PULLING_SECONDS = 0.02
"""How long a run reads its source before it goes on with what is there, as the engine does."""

LOOKING_SECONDS = 0.05
"""How often a caller that waits looks whether it was cancelled."""

GUARD = (
    'Processes are started by multiprocessing\'s "spawn", which imports the script that runs: what loads a model has '
    'to stand under `if __name__ == "__main__":` there, or in a function that is called under it.'
)


def check_start() -> None:
    """Refuse to start processes in one that imports the script of its parent.

    Raises:
        EngineError: It does, since the script has no guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineError(GUARD)


@dataclass(slots=True)
class Row:
    """A row on its way: its number in the run, and what is asked, written."""

    index: int
    asked: bytes
    tried: bool = False
    shown: bool = False


@dataclass(eq=False, slots=True)
class Ticket:
    """What one caller asks, and the news of it."""

    kind: str
    stream: bool = False
    left: bool = False
    waiting: deque[Row] = field(default_factory=deque)
    news: queue.SimpleQueue[Update[Any]] = field(default_factory=queue.SimpleQueue)

    def fail(self, rows: Iterable[Row], error: LmkitError) -> None:
        """Tell the caller that rows have failed."""
        for row in rows:
            self.news.put(Update(row.index, error=error))


@dataclass(eq=False, slots=True)
class Replica:
    """One process: where it computes, and which rows it has, by the numbers of their chunks."""

    device: str
    process: Any
    pipe: Any
    chunks: dict[int, tuple[Ticket, dict[int, Row]]] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """How many it may have."""
        return WINDOW.get(self.device, WINDOW_ELSEWHERE)

    @property
    def room(self) -> int:
        """How many more it may have."""
        return self.window - sum(len(rows) for _, rows in self.chunks.values())


class Pool:
    """The processes of one model."""

    def __init__(self, devices: Sequence[str], loads: Sequence[Callable[[], Any]], threads: int | None) -> None:
        """Start a process for each device, and wait until all have loaded.

        Raises:
            LmkitError: One could not load, or not even begin.
        """
        self.closed = False
        self.facts: list[dict[str, Any]] = []
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._numbers = itertools.count()
        self._replicas: list[Replica] = []
        try:
            for device, load in zip(devices, loads, strict=True):
                self._replicas.append(_started(device, load, threads if device == "cpu" else None))
            self.facts = [_facts(replica) for replica in self._replicas]
        except BaseException:
            self.close()
            raise
        self._alive = list(self._replicas)
        for replica in self._replicas:
            threading.Thread(target=self._listen, args=(replica,), name="lmkit replica", daemon=True).start()
        threading.Thread(target=self._serve, name="lmkit replicas", daemon=True).start()

    def close(self) -> None:
        """End the processes; calls that wait for them end with an `EngineError`."""
        self.closed = True
        if self._pid != os.getpid():
            return  # a fork of the parent: they are not its own
        for replica in self._replicas:
            replica.process.kill()
        for replica in self._replicas:
            replica.process.join()
        self._inbox.put(lambda: None)

    def run(
        self, kind: str, items: Iterable[Any | None], caller: Caller, codec: Codec | None = None
    ) -> Iterator[Update[Any] | None]:
        """Have items answered and tell what happens to each, as `Engine.run` does."""
        if self._pid != os.getpid():
            raise EngineError(FORKED)
        ticket = Ticket(kind, caller.stream)
        pulled = _pulled(items, codec, lazy=caller.lazy)
        try:
            unfinished, more = 0, True
            while more or unfinished:
                rows = next(pulled, None) if more else []
                more = rows is not None and more
                if rows:
                    unfinished += len(rows)
                    self._inbox.put(functools.partial(self._take, ticket, rows))
                update = self._news(ticket, caller.cancelled) if unfinished else None
                if unfinished and update is None:
                    return
                if update is not None:
                    unfinished -= update.outcome is not None or update.error is not None
                if more or update is not None:
                    yield update
        finally:
            surely(lambda: None, lambda: self._inbox.put(functools.partial(self._leave, ticket)))

    def stats(self) -> list[EngineStats]:
        """Ask all processes what they hold and have done."""
        ticket = Ticket("stats")
        told: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._inbox.put(functools.partial(self._ask_each, ticket, told.put))
        while not self.closed:
            with contextlib.suppress(queue.Empty):
                found = [self._news(ticket) for _ in range(told.get(timeout=LOOKING_SECONDS))]
                return [one.outcome for one in found if one is not None and one.outcome is not None]
        raise EngineError(CLOSED)

    def _news(self, ticket: Ticket, cancelled: Flag | None = None) -> Update[Any] | None:
        """Wait for news of a caller's rows; None once it was cancelled."""
        while True:
            if self.closed:
                raise EngineError(CLOSED)
            if cancelled is not None and cancelled.is_set():
                return None
            with contextlib.suppress(queue.Empty):
                return ticket.news.get(timeout=LOOKING_SECONDS)

    # What follows runs in the threads of the pool: `_listen` in one for each process, the rest in one for all.

    def _listen(self, replica: Replica) -> None:
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._inbox.put(functools.partial(self._hear, replica, *answer(replica.pipe.recv_bytes())))
        finally:
            self._inbox.put(functools.partial(self._lose, replica))

    def _serve(self) -> None:
        try:
            while not self.closed:
                self._inbox.get()()
                self._feed()
        finally:
            self.closed = True

    def _take(self, ticket: Ticket, rows: list[Row]) -> None:
        ticket.waiting.extend(rows)
        if rows and ticket not in self._waiting:
            self._waiting.append(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Forget a caller's rows that are not sent, and have the others end at their next step."""
        ticket.left = True
        ticket.waiting.clear()
        for replica in self._alive:
            for number, (whose, _) in replica.chunks.items():
                if whose is ticket:
                    _send(replica, number, "leave")

    def _feed(self) -> None:
        """Deal rows to replicas that have room for half of what they may have, or for all; callers by turns."""
        while self._waiting:
            ticket = self._waiting.popleft()
            if not self._alive:
                ticket.fail(ticket.waiting, EngineError("all replicas have ended: load the model again to go on."))
                ticket.waiting.clear()
            free = [one for one in self._alive if one.room >= min(one.window // 2, len(ticket.waiting))]
            if not free and ticket.waiting:
                self._waiting.appendleft(ticket)
                return
            dealt: dict[Replica, list[Row]] = {one: [] for one in free}
            while ticket.waiting:
                least = max(free, key=lambda one: one.room - len(dealt[one]))
                if least.room <= len(dealt[least]):
                    self._waiting.append(ticket)
                    break
                dealt[least].append(ticket.waiting.popleft())
            for replica, rows in dealt.items():
                if rows:
                    self._ask(replica, ticket, rows)

    def _ask(self, replica: Replica, ticket: Ticket, rows: list[Row]) -> None:
        number = next(self._numbers)
        replica.chunks[number] = ticket, dict(enumerate(rows))
        _send(replica, number, ticket.kind, ticket.stream, [row.asked for row in rows])

    def _ask_each(self, ticket: Ticket, tell: Callable[[int], None]) -> None:
        tell(len(self._alive))
        for number, replica in enumerate(self._alive):
            self._ask(replica, ticket, [Row(number, written(None), tried=True)])

    def _hear(self, replica: Replica, number: int, update: Update[Any] | None, failed: Any) -> None:
        """Pass on what a replica tells of a row, or that a chunk has ended."""
        ticket, rows = replica.chunks[number]
        error = error_of(*failed) if failed else None
        if update is None:
            del replica.chunks[number]
            ticket.fail(rows.values(), error or EngineError(CLOSED))  # of callers that have left there may be some
            return
        row = rows[update.index]
        row.shown = True
        if error is not None or update.outcome is not None:
            del rows[update.index]
        ticket.news.put(replace(update, index=row.index, error=error))

    def _lose(self, replica: Replica) -> None:
        """Give the rows of a process that has ended to others, but those that were told of or given away before."""
        if self.closed:
            return
        self._alive.remove(replica)
        replica.process.kill()  # it may have sent what is no result
        replica.process.join()
        lost = f"the replica on {replica.device} (process {replica.process.pid}) has ended with exit code "
        lost += f"{replica.process.exitcode}"
        logger.warning(
            "%s: its %d rows go to others, %d of which are left.", lost, replica.window - replica.room, len(self._alive)
        )
        for ticket, rows in replica.chunks.values():
            again = [row for row in rows.values() if self._alive and not (row.tried or row.shown or ticket.left)]
            for row in again:
                row.tried = True
            lone = [row for row in rows.values() if row not in again]
            ticket.fail(lone, EngineError(f"{lost}, and the row with it."))
            self._take(ticket, again)


def _pulled(items: Iterable[Any | None], codec: Codec | None, *, lazy: bool) -> Iterator[list[Row]]:
    """Read items, and give those that are there by now."""
    found: list[Row] = []
    index, deadline = itertools.count(), time.perf_counter() + PULLING_SECONDS
    for item in items:
        if item is not None:
            found.append(Row(next(index), written(item, codec)))
        if item is None or (lazy and time.perf_counter() > deadline):
            yield found
            found, deadline = [], time.perf_counter() + PULLING_SECONDS
    yield found


def written(item: object, codec: Codec | None = None) -> bytes:
    """Write what a replica is asked.

    Raises:
        OptionError: Something in it cannot be sent.
    """
    try:
        return asked(item, codec)
    except Exception as error:  # what is pickled may raise anything
        raise OptionError(f"an option cannot be sent to the process of a replica, as pickle says: {error}") from error


def _send(replica: Replica, number: int, kind: str, stream: bool = False, rows: Sequence[bytes] = ()) -> None:  # noqa: FBT001, FBT002
    with contextlib.suppress(OSError):  # it has ended, of which its listener will tell
        replica.pipe.send((number, kind, stream, rows))


def _started(device: str, load: Callable[[], Any], threads: int | None) -> Replica:
    """Start a process, in which Ctrl-C is ignored from its first instruction on."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=work, args=(other, load, threads), name=f"lmkit on {device}", daemon=True)
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
    else:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    other.close()
    return Replica(device, process, pipe)


def _facts(replica: Replica) -> dict[str, Any]:
    """Wait until a process has loaded, and return what it says of the model."""
    told: list[Any] = []
    with contextlib.suppress(EOFError, OSError):
        while len(told) < 2:  # noqa: PLR2004 - that it has begun, and what it has loaded
            told.append(answer(replica.pipe.recv_bytes()))
    if len(told) < 2:  # noqa: PLR2004
        replica.process.join()
        ended = f"the process of the replica on {replica.device} has ended with exit code {replica.process.exitcode}"
        raise EngineError(f"{ended} while it loaded." if told else f"{ended} before it could load. {GUARD}")
    if isinstance(told[1], dict):
        return told[1]
    raise error_of(*told[1])
