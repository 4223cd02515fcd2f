"""Silence for the libraries below, for the duration of a call, and for nobody else afterwards."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit._forks import renew, share
from lmkit._interrupts import holding, let_go, owns, surely

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ResultT = TypeVar("ResultT")

LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "huggingface_hub", "peft")

_hushed: ContextVar[bool] = ContextVar("the libraries below lmkit are silent", default=False)


def _passes(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR or not _hushed.get():
        return True
    return record.name.partition(".")[0] not in LIBRARIES  # a handler may be others' too


def _listen() -> None:
    """Have the libraries' loggers and their own handlers ask whether the calling context is silent; others do not."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in LIBRARIES and isinstance(logger, logging.Logger):
            logger.addFilter(_passes)  # once: it is not added again
            for handler in logger.handlers:  # those see what loggers say that come later
                handler.addFilter(_passes)


_LOGGERS = [logging.root, *map(logging.getLogger, (*LIBRARIES, "lmkit"))]
"""Looked up once: it takes a lock that all threads share."""

for _logger in _LOGGERS[1:-1]:
    _logger.addFilter(_passes)


def hushed(do: Callable[[], ResultT]) -> ResultT:
    """Call `do` while the libraries below lmkit log nothing below ERROR in this context.

    Nothing that threads share is touched. An interrupt in the middle of logging leaves none of its locks held.
    """
    before = _hushed.get()
    free = [lock for lock in _logging_locks() if not owns(lock)]

    def silent() -> ResultT:
        _hushed.set(True)
        return do()

    def undo() -> None:
        _hushed.set(before)
        for lock in free:
            let_go(lock)

    return surely(silent, undo)


def _logging_locks() -> Iterator[Any]:
    yield logging._lock  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way to it
    for logger in _LOGGERS:
        yield from (handler.lock for handler in logger.handlers if handler.lock is not None)


class _Shared:
    """One silence for all who want it: the first one in sets it, the last one out puts back what was there."""

    def __init__(self, silence: Callable[[], tuple[Callable[[], None], Callable[[], None]]]) -> None:
        """Take what says how to set a silence and how to undo it, without doing either; undoing can be repeated."""
        self._silence = silence
        self._lock = threading.RLock()
        self._inside: set[object] = set()
        self._undo: Callable[[], None] | None = None
        share(self)

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        renew(self._lock)
        self._inside.clear()  # the threads that were inside are not here
        self._leave(None)
        return False

    def __call__(self, do: Callable[[], ResultT]) -> ResultT:
        """Call `do` in silence."""
        mark = object()

        def silent() -> ResultT:
            holding(self._lock, lambda: self._enter(mark))
            return do()

        return surely(silent, lambda: holding(self._lock, lambda: self._leave(mark)))

    def _enter(self, mark: object) -> None:
        if self._undo is None:
            begin, self._undo = self._silence()
            begin()
        self._inside.add(mark)

    def _leave(self, mark: object) -> None:
        self._inside.discard(mark)
        if not self._inside and self._undo is not None:
            self._undo()
            self._undo = None


def _bars() -> tuple[Callable[[], None], Callable[[], None]]:
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    own: Any = transformers_logging  # neither module is typed
    hub: Any = utils
    shown, hub_hidden = own.is_progress_bar_enabled(), hub.are_progress_bars_disabled()

    def undo() -> None:
        if shown:
            own.enable_progress_bar()  # the Hub's as well
        (hub.disable_progress_bars if hub_hidden else hub.enable_progress_bars)()

    return own.disable_progress_bar, undo  # the Hub's as well


_without_bars = _Shared(_bars)


def quiet(do: Callable[[], ResultT]) -> ResultT:
    """Call `do` while the libraries below lmkit neither log, but for errors, nor draw bars: for loads."""

    def listened() -> ResultT:
        _listen()
        return hushed(do)

    return _without_bars(listened)


def _no_warnings() -> tuple[Callable[[], None], Callable[[], None]]:
    before = warnings.filters
    held = [*before]

    def begin() -> None:
        warnings.filters = held
        warnings.simplefilter("ignore")

    def undo() -> None:
        if warnings.filters is held:  # else somebody has set them meanwhile, and means it
            warnings.filters = before

    return begin, undo


without_warnings = _Shared(_no_warnings)
"""Ignores Python's warnings while something is called: for a load and for calls of generate(), not for every step.

To begin with it makes Python forget which warnings it has shown once already, wherever they came from. Concurrent uses
share one silence.
"""

_silent: ContextVar[bool] = ContextVar("what is printed here is dropped", default=False)


class _Unprinted:
    """Standard output, but for what contexts write that are to be silent."""

    def __init__(self, out: Any) -> None:
        self._out = out

    def write(self, text: str) -> int:
        return len(text) if _silent.get() else int(self._out.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def _no_prints() -> tuple[Callable[[], None], Callable[[], None]]:
    before, held = sys.stdout, _Unprinted(sys.stdout)

    def begin() -> None:
        sys.stdout = held if before is not None else before  # it has what print() needs

    def undo() -> None:
        if sys.stdout is held:  # else somebody has set it meanwhile, and means it
            sys.stdout = before

    return begin, undo


_unprinted = _Shared(_no_prints)


def without_prints(do: Callable[[], ResultT]) -> ResultT:
    """Call `do`, and drop what this context prints: some families print where they prepare inputs. Not nested."""

    def silent() -> ResultT:
        _silent.set(True)
        return do()

    return _unprinted(lambda: surely(silent, lambda: _silent.set(False)))
