"""What the commands write: results to standard output, errors in one line to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

from lmkit.errors import LmkitError
from lmkit.results.pictures import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FLAGS = {"devices": "--device"}
"""How the commands call what the library takes by a keyword; filled where their options are declared."""


def as_said(message: str, what: str = "the text") -> str:
    """Write a message about a row as one about the only one there is: `row 0 has` is `the text has`."""
    return re.sub(r"^row \d+(: )?", lambda found: "" if found[1] else what, message)


def as_flags(message: str) -> str:
    """Write the options in a message as they are written here: `source='xx'` is `--source 'xx'`."""

    def flag(found: re.Match[str]) -> str:
        name, value, behind = found.groups()
        written = FLAGS[name].replace("--", "--no-") if value == "False" else FLAGS[name]
        return written if value or behind in ("", *" .,:;)") else f"{written} "

    message = as_said(message)
    names, words = "|".join(FLAGS), "|".join(name for name in FLAGS if "_" in name)
    message = re.sub(rf"(?<![\w'\"-])({names})=(True\b|False\b)?(?=(.?))", flag, message)
    # Without a value it is one for sure where it is no English word, or stands where options do.
    said = (
        rf"(?:^|(?<=: ))(?:{names})(?= (?:takes|has|needs|and \S+ contradict)\b)|(?<= and )(?:{names})(?= contradict)"
    )
    return re.sub(rf"(?<![\w'\"-])(?:{words})(?![\w'\"])|{said}", lambda found: FLAGS[found[0]], message)


def write(text: str, end: str = "\n", *, dimmed: bool = False) -> None:
    """Write to standard output at once; exactly the text, unless it is a terminal."""
    text = visible(text) if sys.stdout.isatty() else text
    sys.stdout.write((_dim(text, sys.stdout) if dimmed else text) + end)
    sys.stdout.flush()


def aside(text: str) -> None:
    """Write what is no answer and no error to standard error, dimmed."""
    sys.stderr.write(_dim(visible(text), sys.stderr) + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """Say in a terminal what takes a while, until it is done."""
    if not steered(sys.stderr):
        yield
        return
    sys.stderr.write(f"\x1b[?7l{visible(doing)} …\x1b[?7h")  # on one line, whatever the width
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _dim(text: str, stream: TextIO) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text and steered(stream) else text


def steered(stream: TextIO) -> bool:
    """Whether a stream is a terminal that takes escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def write_json(content: Mapping[str, Any]) -> None:
    """Write one line of JSON, in ASCII where standard output is not UTF-8."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    write(json.dumps(content, ensure_ascii=encoding != "utf8"))


def note(message: str) -> None:
    """Write one line to standard error."""
    sys.stderr.write(visible(" ".join(f"lmkit: {message}".split())) + "\n")
    sys.stderr.flush()


def complain(error: BaseException, where: str = "") -> None:
    """Say in one line what went wrong."""
    if isinstance(error, LmkitError):
        note(f"error: {where}{as_flags(str(error))}")
    else:
        what = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        note(f"error: {where}{what} (--debug shows where)")


@contextlib.contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn what ends a command early into one line and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        # Who reads has had enough. Python flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except Exception as error:
        if debug:
            raise
        complain(error)
        raise typer.Exit(1) from None
