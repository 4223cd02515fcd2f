import itertools
import random
from collections.abc import Iterator

import pytest

from lmkit.errors import LmkitError
from lmkit.wrappers.ordered_map import READ_AHEAD, ReadAhead


def prepare(given: int, row: int) -> int | LmkitError:
    """Refuse numbers below zero; a job is the number of its row."""
    return LmkitError(f"row {row}") if given < 0 else row


def test_results_come_in_the_order_of_the_inputs() -> None:
    """Whatever order jobs end in, results are given in the order of their inputs, each as soon as it can be."""
    order = random.Random(1)  # noqa: S311 - the same every time
    rows: ReadAhead[int, str] = ReadAhead(iter(range(50)), prepare)
    jobs = list(rows.jobs())
    order.shuffle(jobs)
    found: list[object] = []
    ended: set[int] = set()
    for job in jobs:
        assert job is not None
        rows.end(job, f"result {job}")
        ended.add(job)
        found += rows.ended()
        assert len(found) == next(number for number in itertools.count() if number not in ended)
    assert found == [f"result {number}" for number in range(50)]


def test_a_row_that_is_refused_is_an_error_in_its_place() -> None:
    """A row that makes no job is its error, and the jobs behind it are counted without it."""
    rows: ReadAhead[int, str] = ReadAhead(iter([5, -1, 5, -1, 5]), prepare)
    assert list(rows.jobs()) == [0, 2, 4]
    for number in (2, 0, 1):
        rows.end(number, f"job {number}")
    assert [str(result) for result in rows.ended()] == ["job 0", "row 1", "job 1", "row 3", "job 2"]


def test_reading_ahead_is_bounded() -> None:
    """No more inputs are read than so many beyond the results that were given; None says to come again."""
    read: list[int] = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    rows: ReadAhead[int, str] = ReadAhead(endless(), prepare)
    jobs = rows.jobs()
    assert [next(jobs) for _ in range(READ_AHEAD)] == list(range(READ_AHEAD))
    assert [next(jobs), next(jobs)] == [None, None]
    rows.end(1, "second")
    assert list(rows.ended()) == []
    assert next(jobs) is None
    rows.end(0, "first")
    assert list(rows.ended()) == ["first", "second"]
    assert [next(jobs), next(jobs), next(jobs)] == [READ_AHEAD, READ_AHEAD + 1, None]
    assert len(read) == READ_AHEAD + 2


def test_what_the_source_raises_is_kept_for_the_end() -> None:
    """An error of the inputs ends the jobs; the rows read before it still give their results."""

    def broken() -> Iterator[int]:
        yield 3
        msg = "no more"
        raise OSError(msg)

    rows: ReadAhead[int, str] = ReadAhead(broken(), prepare)
    assert list(rows.jobs()) == [0]
    rows.end(0, "first")
    assert list(rows.ended()) == ["first"]
    with pytest.raises(OSError, match="no more"):
        raise rows.broken or AssertionError
