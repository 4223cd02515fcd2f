"""What a caller holds of the engine: its requests, and the news of them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from lmkit.engine.request import Outcome, Update

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.engine.request import Request
    from lmkit.engine.row import Row
    from lmkit.errors import EngineError

__all__ = ["Ticket"]


class Ticket:
    """Requests of one caller. The engine's lock guards everything in it but `cancelled`.

    Attributes:
        stream: Whether news of text are wanted, not only of ends.
        lazy: Whether requests may follow.
        waiting: Rows that are not in a batch, those that need the most work at the end.
        searches: Requests for beams that generate() runs, by their places.
        news: What the caller has not read yet.
        running: How many rows are in batches.
        ready: Tells the caller that there are news, or that it may run the engine.
        cancelled: Ends all rows at their next step when set, from any thread.
        error: Why the ticket ended before its requests, if it did.
        left: Whether its caller is gone.
        added: How many requests it was given.
    """

    def __init__(
        self,
        lock: threading.Lock,
        *,
        stream: bool = False,
        lazy: bool = False,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Begin with no requests."""
        self.stream = stream
        self.lazy = lazy
        self.waiting: list[Row] = []
        self.searches: dict[int, Request] = {}
        self.news: deque[Update] = deque()
        self.running = 0
        self.ready = threading.Condition(lock)
        self.cancelled = cancelled or threading.Event()
        self.error: EngineError | None = None
        self.left = False
        self.added = 0
        self._open = 0
        self._ended: dict[int, list[Row]] = {}

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        return self._open

    def add(self, rows: Sequence[Row], searches: Mapping[int, Request]) -> None:
        """Take in requests: the rows of some, and others as searches for generate()."""
        count = len({row.index for row in rows}) + len(searches)
        self.searches |= searches
        self.added += count
        self._open += count
        self.waiting += rows
        self.waiting.sort(key=lambda row: len(row.request.input_ids) + row.remaining)

    def tell(self, update: Update) -> None:
        """Put news where the caller finds them."""
        self._open -= update.outcome is not None or update.error is not None
        self.news.append(update)

    def look(self, row: Row) -> None:
        """Report a row's new text, and its request's end once all its copies have ended."""
        text = row.release() if row.streams else ""
        if text:
            self.tell(Update(row.index, text))
        if not row.done or row.told:
            return
        row.told = True
        copies = self._ended.setdefault(row.index, [])
        copies.append(row)
        if len(copies) == row.request.copies:
            self.tell(_end(self._ended.pop(row.index)))

    def forget(self) -> None:
        """Give up what has not begun or not ended; what was told stays."""
        self.waiting.clear()
        self.searches.clear()
        self._ended.clear()
        self._open = 0


def _end(copies: list[Row]) -> Update:
    first = copies[0]
    failed = next((row.error for row in copies if row.error is not None), None)
    if failed is not None:
        return Update(first.index, error=failed)
    ordered = sorted(copies, key=lambda row: row.copy)
    slowest = max((row.timing() for row in copies), key=lambda timing: timing.seconds)
    completions = tuple(completion for row in ordered for completion in row.completions())
    return Update(first.index, outcome=Outcome(completions, slowest))
