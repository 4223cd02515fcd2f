"""Processes that are forked from one where threads use models: they go on if nobody was at work, else are told so."""

from __future__ import annotations

import os
from typing import Any, Final, Protocol
from weakref import WeakSet

from lmkit.errors import EngineError


class Shared(Protocol):
    """What threads share, and a process that is forked gets a copy of."""

    def forked(self) -> bool:
        """Make the copy usable in the new process; say whether another thread was at work with it."""
        ...


FORKED: Final = (
    "this process was forked while another thread of its parent ran or loaded a model, and what that thread held "
    "cannot be had any more: start processes with multiprocessing's 'spawn' or 'forkserver' method and load the model "
    "in them, or fork while no call runs."
)

_shared: WeakSet[Shared] = WeakSet()
_lost = False


def share(thing: Shared) -> None:
    """Have `thing.forked()` called in each process that is forked from this one, as long as it lives."""
    _shared.add(thing)


def renew(lock: Any) -> bool:
    """Free a `threading.RLock` whose holder is not in this process; say whether it was held."""
    held = not lock.acquire(blocking=False)
    if held:
        lock._at_fork_reinit()  # noqa: SLF001 - what Python's own locks are made ready with
    else:
        lock.release()
    return held


def check_fork() -> None:
    """Refuse in a process that was forked while another thread was at work.

    Raises:
        EngineError: It was; waiting for that thread would take for ever.
    """
    if _lost:
        raise EngineError(FORKED)


def _in_child() -> None:
    global _lost  # noqa: PLW0603 - it is the whole process that is told
    _lost |= any([thing.forked() for thing in list(_shared)])  # noqa: C419 - of all, not up to the first


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_in_child)
