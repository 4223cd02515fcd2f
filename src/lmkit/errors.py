"""The exception tree: every error that lmkit raises on purpose.

```text
LmkitError
├── UnknownTaskError   (ValueError)     a task word, or a checkpoint that does another task
├── ModelNotFoundError (OSError)        a name that is neither here nor reachable
├── PrecisionError     (ValueError)     a precision that the checkpoint or device cannot do
├── PlacementError     (ValueError)     devices that are not there, or too small
├── WeightsError       (OSError)        files that are absent, broken, refused or do not match
├── LanguageError      (ValueError)     a language the checkpoint does not speak
├── OptionError        (ValueError)     an option's value, or two that contradict
│   └── UnknownOptionError (TypeError)  an option's name
├── OutputError        (ValueError)     an answer that is not what output= asked for
├── InputTooLongError  (ValueError)     more tokens than the model takes
├── MissingExtraError  (ImportError)    an optional dependency is not installed
├── VersionError       (ImportError)    a library that lmkit stands on is too old
├── JobError           (RuntimeError)   a job that is another's, or whose journal is not that of its run
└── EngineError        (RuntimeError)   a run that could not go on
```

Each message says what was given, what is accepted and what to do next.
"""

from __future__ import annotations

import difflib
import itertools
import pathlib
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class LmkitError(Exception):
    """The base of every error that lmkit raises on purpose.

    Attributes:
        results: Where one row of a call failed while it ran: the results of all its rows, None in the
            place of those that failed.
    """

    results: Sequence[object] = ()

    def _render_traceback_(self) -> list[str]:
        """Say to IPython what a notebook shows: the message, and where the caller was, without lmkit's own frames."""
        own = str(pathlib.Path(__file__).parent)
        frames = itertools.takewhile(
            lambda one: not one.filename.startswith(own), traceback.extract_tb(self.__traceback__)
        )
        where = traceback.format_list([one for one in frames if "IPython" not in one.filename])
        return [*"".join(where).splitlines(), f"{type(self).__name__}: {self}"]


class UnknownTaskError(LmkitError, ValueError):
    """The task is not a word lmkit knows, or not what the checkpoint was made for."""


class ModelNotFoundError(LmkitError, OSError):
    """The name is no file or folder here, not in the cache, and not to be had from the Hub."""


class PrecisionError(LmkitError, ValueError):
    """The precision is not a word lmkit knows, or not one the device can do."""


class PlacementError(LmkitError, ValueError):
    """The devices are not written as lmkit reads them, not on this machine, or too small for the model."""


class WeightsError(LmkitError, OSError):
    """A file of the checkpoint is absent, broken, refused, or does not match the architecture."""


class LanguageError(LmkitError, ValueError):
    """A source or target language that the checkpoint does not speak, or that is missing."""


class OptionError(LmkitError, ValueError):
    """An option has a value that is not accepted, or contradicts another."""


class OutputError(LmkitError, ValueError):
    """An answer that is not what `output=` asked for, or that was cut, so that it has no value.

    Attributes:
        text: What the model wrote.
        reason: Why that has no value.
    """

    def __init__(self, message: str, text: str = "", reason: str = "") -> None:
        """Say what it is about."""
        super().__init__(message)
        self.text, self.reason = text, reason


class UnknownOptionError(OptionError, TypeError):
    """An option that does not exist; the message names the nearest that does."""


class InputTooLongError(LmkitError, ValueError):
    """The input has more tokens than the model takes."""


class MissingExtraError(LmkitError, ImportError):
    """A package that only some checkpoints need is not installed."""


class VersionError(LmkitError, ImportError):
    """A library that lmkit stands on is older than it can run on."""


class JobError(LmkitError, RuntimeError):
    """A job that another process runs, or whose journal, input or output is not what it began with."""


class EngineError(LmkitError, RuntimeError):
    """A run that could not go on: a closed model, or a step that failed."""

    def _render_traceback_(self) -> list[str]:
        """Say what led to it as well, and where: it may be the caller's own code."""
        return [*"\n".join(getattr(self.__cause__, "__notes__", ())).splitlines(), *super()._render_traceback_()]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or nothing if none is close."""
    choices = list(choices)
    begun = [choice for choice in choices if word and choice.lower().startswith(word.lower())]
    found = begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def shown(given: object, most: int = 200) -> str:
    """Write what somebody gave for a message: at most so much of it, or its type where Python cannot write it."""
    try:
        written = repr(given)
    except (RecursionError, ValueError):  # it goes too deep, or has thousands of digits
        written = f"an object of type {type(given).__name__}"
    return written if len(written) <= most else written[:most] + "…"


def listed(words: Iterable[str]) -> str:
    """Write `words` as a quoted, comma-separated list for a message."""
    return ", ".join(repr(word) for word in words)
