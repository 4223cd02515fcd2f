"""What an option is: declared once, as the metadata of its key in a `TypedDict`, and read from there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from lmkit.errors import OptionError, listed, nearest, shown

LARGEST = 1e6
"""Beyond this, no option that is a number means anything, and powers of it overflow."""


@dataclass(frozen=True, slots=True)
class Option:
    """What an option takes and does.

    Attributes:
        accepts: What it takes, in words that end the sentence "temperature takes …".
        meaning: What it does, without a last full stop.
        test: Whether a value is that, as far as no checkpoint has to be asked.
        default: What it is when left out, in words; empty for nothing at all.
        many: It is a list itself: one list is for all rows, a list of lists has one per row.
        call: It is for a call as a whole, and has no value per row.
    """

    accepts: str
    meaning: str
    test: Callable[[Any], bool]
    default: str = ""
    many: bool = False
    call: bool = False

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not accepted."""
        if not self.test(value):
            raise OptionError(f"{name}={shown(value)} is not accepted: {name} takes {self.accepts}.")


@cache
def declared(options: type) -> Mapping[str, Option]:
    """Return what a `TypedDict` declares, by name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(options, include_extras=True).items()}


def checked(given: Mapping[str, object], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the options of a row that are given, each a value that it takes; None is not given.

    Raises:
        OptionError: A value that is not accepted.
    """
    row = {name: unboxed(value) for name, value in given.items() if value is not None}
    for name, value in row.items():
        options[name].check(name, value)
    return row


def unboxed(value: Any) -> object:
    """Turn a number of numpy or torch into Python's own."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    with contextlib.suppress(RuntimeError):  # torch's, on the meta device, have no value
        return value.item()
    return value


def choice(values: Sequence[object], meaning: str, default: str = "", *, call: bool = False) -> Option:
    """Declare an option that takes one of a few values."""
    *others, last = map(repr, values)

    def test(value: object) -> bool:
        return any(isinstance(value, type(one)) and value == one for one in values)  # 1 is not True here

    return Option(f"{', '.join(others)} or {last}", meaning, test, default, call=call)


def check_word(name: str, given: object, accepted: Sequence[str]) -> None:
    """Raise an `OptionError` for a word that the argument called `name` does not take."""
    if not isinstance(given, str) or given not in accepted:
        hint = nearest(given, accepted) if isinstance(given, str) else ""
        raise OptionError(f"{name}={shown(given)} is not accepted.{hint} Accepted: {listed(accepted)}.")


def whole(low: int, meaning: str, default: str = "", *, high: float = math.inf, note: str = "") -> Option:
    """Declare an option that takes a whole number from `low` to `high`; `note` says what one of them means."""
    least = f"of at least {low}" if high == math.inf else f"from {low} to {high:,}"
    return Option(f"a whole number {least}{note}", meaning, is_whole(low, high), default)


def number(
    low: float, meaning: str, default: str = "", *, high: float = LARGEST, above: bool = False, note: str = ""
) -> Option:
    """Declare an option that takes a number of at least `low`, or above it, and at most `high`."""

    def test(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if above else low <= value) and value <= high

    least = "" if low == -LARGEST else f" {'above' if above else 'of at least' if high == LARGEST else 'from'} {low}"
    most = "" if high == LARGEST else f" {'and at most' if above else 'to'} {high}"
    return Option(f"a number{least}{most}{note}", meaning, test, default)


def is_a(kind: Any) -> Callable[[object], bool]:
    """Test for an object of a type."""
    return lambda value: isinstance(value, kind)


def is_whole(low: int, high: float = math.inf) -> Callable[[object], bool]:
    """Test for a whole number from `low` to `high`."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_strings(value: object) -> bool:
    """Test for a string or a list of strings, none empty."""
    items = [value] if isinstance(value, str) else value
    return isinstance(items, Sequence) and all(isinstance(item, str) and item for item in items)
