"""Errors without frames: who keeps an error would keep, in the frames of its traceback, tensors and the model."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType

HEADER = "Where it came from (most recent call last):"


def without_frames(error: BaseException) -> None:
    """Put the text of a traceback into a note in place of the traceback, for an error and those that led to it.

    Frames cannot be emptied one by one: each also holds the one that called it. An error that somebody further up is
    handling meanwhile is theirs, and keeps its traceback.
    """
    # Not this frame: it would hold itself, and with it all that it is to let go of, until the garbage is collected.
    running = {frame for frame, _ in traceback.walk_stack(getattr(inspect.currentframe(), "f_back", None))}
    errors = [error]
    for one in errors:  # which grows
        if (trace := one.__traceback__) is not None:
            one.with_traceback(None)
            with contextlib.suppress(Exception):  # a class of the caller's may take none
                note = "\n".join([HEADER, *traceback.format_tb(trace)]).rstrip()
                if note not in getattr(one, "__notes__", ()):
                    one.add_note(note)
        behind = [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
        known = [id(other) for other in errors]
        errors += [
            other for other in behind if other is not None and id(other) not in known and not _handled(other, running)
        ]


def _handled(error: BaseException, running: set[FrameType]) -> bool:
    return any(frame in running for frame, _ in traceback.walk_tb(error.__traceback__))


class _Frameless:
    """Takes the frames from errors that leave its block; not a generator, which would put the traceback back."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            without_frames(error)


frameless = _Frameless()
"""Errors that leave a block under it have no frames from inside; see `without_frames`."""
