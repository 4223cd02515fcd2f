"""What holds at the end of a call however it ends: Ctrl-C may come between any two instructions, and in `finally` too.

A `with` block lets go in one instruction more, and one `finally` in several: an interrupt that comes there leaves a
lock held and every other thread waiting. What is undone twice is undone, as long as undoing can be repeated: an
interrupt that cuts the first one short has come, and the second one is whole.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")


class Flag:
    """What any thread may set and none waits for; `threading.Event` takes a lock that an interrupt can leave held."""

    def __init__(self) -> None:
        """Begin unset."""
        self._set = False

    def set(self) -> None:
        """Set it, for good."""
        self._set = True

    def is_set(self) -> bool:
        """Say whether it is set."""
        return self._set


def surely(do: Callable[[], ResultT], undo: Callable[[], object]) -> ResultT:
    """Call `do`, and `undo` behind it whatever happens in either; `undo` is called twice."""
    try:
        try:
            return do()
        finally:
            undo()
    finally:
        undo()


def holding(lock: Any, do: Callable[[], ResultT]) -> ResultT:
    """Call `do` while this thread holds `lock`, a `threading.RLock`, and let go of it unless it was held before."""
    if owns(lock):
        return do()

    def held() -> ResultT:
        lock.acquire()
        return do()

    return surely(held, lambda: let_go(lock))


def owns(lock: Any) -> bool:
    """Say whether this thread holds a `threading.RLock`; `threading.Condition` asks it the same."""
    return bool(lock._is_owned())  # noqa: SLF001


def let_go(lock: Any) -> None:
    """Release a lock if this thread holds it, as often as it was acquired."""
    while owns(lock):
        lock.release()


def locked(method: Callable[Given, ResultT]) -> Callable[Given, ResultT]:
    """Have a method run while this thread holds the `_lock` of its object."""

    @functools.wraps(method)
    def call(*given: Given.args, **options: Given.kwargs) -> ResultT:
        owner: Any = given[0]
        return holding(owner._lock, lambda: method(*given, **options))  # noqa: SLF001 - its own

    return call
