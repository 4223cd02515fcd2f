"""Rows that are read one by one, run out of order, and given back in order, or as they end."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lmkit.errors import LmkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

READ_AHEAD = 256
"""How many inputs are read beyond the results that were given: enough to fill the batches of the engine."""


class ReadAhead(Generic[JobT, ResultT]):
    """The inputs of a `map`: a bounded number of them is on its way.

    Attributes:
        broken: What the source of the inputs raised, to be raised after the rows read before it.
    """

    def __init__(self, inputs: Iterator[Any], prepare: Callable[[Any, int], JobT | LmkitError]) -> None:
        """Read `inputs`, and make a job or an error of each with its number."""
        self._inputs = inputs
        self._prepare = prepare
        self._ended: dict[int, Any] = {}
        self._running: dict[int, int] = {}
        self._given = 0
        self.broken: Exception | None = None

    def jobs(self) -> Iterator[JobT | None]:
        """Give the jobs to run; None while too many results wait to be taken."""
        numbers = itertools.count()
        for row in itertools.count():
            while row - self._given >= READ_AHEAD:
                yield None
            try:
                job = self._prepare(next(self._inputs), row)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - kept for who reads the results
                self.broken = error
                return
            if isinstance(job, LmkitError):
                self._ended[row] = job
            else:
                self._running[next(numbers)] = row
                yield job

    def end(self, number: int, result: ResultT | LmkitError | None) -> None:
        """Take the result or the error of the job that was given as number `number`."""
        self._ended[self._running.pop(number)] = result

    def ended(self) -> Iterator[ResultT | LmkitError]:
        """Give results in the order of the inputs, as far as they are there."""
        while self._given in self._ended:
            result = self._ended.pop(self._given)
            self._given += 1
            yield result

    def ended_early(self) -> Iterator[tuple[int, ResultT | LmkitError]]:
        """Give results with their numbers in whatever order they came; in place of `ended`."""
        while self._ended:
            self._given += 1
            yield self._ended.popitem()
