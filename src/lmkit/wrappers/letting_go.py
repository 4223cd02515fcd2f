"""Errors that leave a verb hold no wrapper: who keeps one would keep the model, before `close()` too."""

from __future__ import annotations

import contextlib
import functools
import traceback
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from lmkit._tracebacks import without_frames
from lmkit.errors import LmkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = str(Path(__file__).parents[1])


def letting_go(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Have the errors of a verb let go: those that it raises, and those among its results."""

    @functools.wraps(verb)
    def call(*given: Any, **options: Any) -> Any:
        try:
            found = verb(*given, **options)
        except BaseException as error:
            let_go(error)
            raise
        finally:
            del given, options  # this frame is in the traceback too
        for one in found if isinstance(found, list) else ():
            let_go(one)
        return _one_by_one(found) if isinstance(found, GeneratorType) else found

    return call


def _one_by_one(found: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from found
    except BaseException as error:
        let_go(error)
        raise
    finally:
        del found


def let_go(error: object) -> None:
    """Take lmkit's frames from an error.

    One of lmkit's own says all in its message; an interrupt keeps its traceback as text. What the caller's code raised
    keeps its frames, and lmkit's among them are emptied.
    """
    if isinstance(error, Exception) and not isinstance(error, LmkitError):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(_HERE):
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
    elif isinstance(error, BaseException):
        without_frames(error.with_traceback(None) if isinstance(error, LmkitError) else error)
