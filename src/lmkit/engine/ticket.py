"""What a caller holds of the engine: its requests, and the news of them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from lmkit._interrupts import surely
from lmkit.engine.request import Caller, Outcome, Update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.row import Row
    from lmkit.engine.stream_text import Marks
    from lmkit.errors import EngineError


class Ticket:
    """Requests of one caller. The engine's lock guards everything in it but `cancelled`.

    An interrupt may come between any two instructions of whoever runs the engine: `begin_again` then makes everything
    else anew out of the rows whose end was not told, and what was told stands in one place, `news`.

    Attributes:
        stream: Whether news of text are wanted, not only of ends.
        lazy: Whether requests may follow.
        waiting: Rows that are not in a batch, those that need the most work at the end.
        news: What the caller has not read yet.
        running: How many rows are in batches.
        ready: Tells the caller that there are news, or that it may run the engine.
        cancelled: Ends all rows at their next step when set, from any thread.
        error: Why the ticket ended before its requests, if it did.
        left: Whether its caller is gone.
        added: How many requests it was given.
    """

    def __init__(self, lock: Any, caller: Caller) -> None:
        """Begin with no requests."""
        self.stream, self.lazy, self.cancelled = caller.stream, caller.lazy, caller.cancelled
        self.waiting: list[Row] = []
        self.news: deque[Update[Outcome]] = deque()
        self.running = 0
        self.ready = threading.Condition(lock)
        self.error: EngineError | None = None
        self.left = False
        self.added = 0
        self._untold: dict[int, list[Row]] = {}

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        return len(self._untold)

    def add(self, rows: Sequence[Row]) -> None:
        """Take in the rows of requests."""
        for row in rows:
            self._untold.setdefault(row.index, []).append(row)
        self.added += len({row.index for row in rows})
        self._wait([*self.waiting, *rows])

    def look(self, row: Row) -> None:
        """Report a row's new text, and its request's end once all its copies have ended."""
        copies = self._untold.get(row.index, [])
        ends = bool(copies) and all(copy.done for copy in copies)
        text, upto = row.unreleased() if row.streams else ("", 0)
        if not ends and not text:
            return
        marks = row.marks(text, upto) if row.streams and row.request.named else ()
        update: Update[Outcome] = _end(copies, text, marks) if ends else Update(row.index, text, marks=marks)

        def told() -> None:
            if self.news and self.news[-1] is update:
                row.release(upto)
                if ends:
                    self._untold.pop(row.index, None)

        surely(lambda: self.news.append(update), told)

    def begin_again(self) -> None:
        """Let all rows wait that have not ended, and tell of those that have."""
        rows = [row for copies in self._untold.values() for row in copies]
        self.running = 0
        for row in rows:
            row.settle()
        self._wait([row for row in rows if not row.done])
        for row in rows:
            self.look(row)

    def forget(self) -> None:
        """Give up what has not begun or not ended; what was told stays."""
        self.waiting.clear()
        self._untold.clear()

    def _wait(self, rows: list[Row]) -> None:
        self.waiting = sorted(rows, key=lambda row: len(row.request.input_ids) + row.remaining)


def _end(copies: list[Row], text: str, marks: Marks) -> Update[Outcome]:
    first = copies[0]
    failed = next((row.error for row in copies if row.error is not None), None)
    if failed is not None:
        return Update(first.index, text, error=failed, marks=marks)
    ordered = sorted(copies, key=lambda row: row.copy)
    slowest = max((row.timing() for row in copies), key=lambda timing: timing.seconds)
    completions = tuple(completion for row in ordered for completion in row.completions())
    told = tuple(told for row in ordered for told in row.all_marks) if first.request.named else ()
    return Update(first.index, text, Outcome(completions, slowest, told), marks=marks)
