"""What a chat template may do: a bounded time, and bounded texts and values, then an error."""

from __future__ import annotations

import re
import time
import types
import weakref
from typing import TYPE_CHECKING, Any, Final

from lmkit.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

SECONDS: Final = 3.0
"""How long a template may compute for a short chat, whatever other threads do meanwhile."""
LARGEST: Final = 2**20
"""How many characters it may write for a short chat, and hold in one value."""

_VIEWS: Final[tuple[type[Any], ...]] = tuple(map(type, ({}.keys(), {}.values(), {}.items())))
_HOLDING: Final[tuple[type[Any], ...]] = (list, tuple, dict, set, frozenset, *_VIEWS)
LAZY: Final[tuple[type[Any], ...]] = (types.GeneratorType, range, *_VIEWS)
"""What is read into a list before it is measured."""
_DEEPEST = 100  # of lists in lists: Python hashes and frees deep ones without a look at its stack
_MOST_LAZY = 500  # generators at a time: a chain of them is as deep
MOST_BITS: Final = 2**14
"""How large a number may be; Python prints smaller ones only."""
_WIDEST = 9999  # of a place that `%` fills
_NUMBERS = re.compile(r"[%)][-+ #0]*(?:\d*\.)?(?:\d{5,}|\*)")  # a width or precision beyond reason, or from a value


class Meter:
    """What the template of one chat may still do, in seconds and in characters.

    Attributes:
        largest: How many characters one value may have.
        out: Whether it wanted more.
    """

    def __init__(self, given: int = 0) -> None:
        """Begin with as much as `given` characters of messages and tools allow."""
        self.out = False
        self.largest = LARGEST + 16 * given
        self._seconds = self._more = SECONDS + given / 10_000
        self.start()

    def start(self) -> None:
        """Begin with a run: sizes are counted anew, time goes on."""
        self._until = time.thread_time() + self._more
        self._asked = time.monotonic() + self._more
        self._left = 16 * self.largest
        self._lazy: weakref.WeakSet[Any] = weakref.WeakSet()

    def stop(self) -> None:
        """End a run."""
        self._more = self._until - time.thread_time()

    def tick(self) -> None:
        """Ask for the time: the clock first, and where it says so, the time that this thread computed."""
        if time.monotonic() > self._asked:
            left = self._until - time.thread_time()
            if left <= 0:
                self.out = True
                raise OptionError(
                    f"the checkpoint's chat template computed for more than {self._seconds:.0f} seconds: {_ADVICE}"
                )
            self._asked = time.monotonic() + left

    def spend(self, characters: int) -> None:
        """Count what is made."""
        self._left -= characters
        if self._left < 0:
            raise self.too_much()
        self.tick()

    def at_most(self, characters: int, most: int | None = None) -> None:
        """Refuse one text or value that is, or would be, too large."""
        if characters > (self.largest if most is None else most):
            raise self.too_much()

    def too_much(self) -> OptionError:
        """Return the error that says so."""
        self.out = True
        return OptionError(
            f"the checkpoint's chat template makes texts, lists or numbers that are too large, of more than "
            f"{self.largest} characters or {MOST_BITS} bits: {_ADVICE}"
        )

    def weigh(self, value: Any) -> int:
        """Return how large a value is, each thing in it as often as it is there."""
        if isinstance(value, str):
            return len(value)
        total, depth, layer = 0, 0, [value]
        while layer:
            total += sum(map(_size, layer))
            depth += 1
            self.at_most(total)
            self.at_most(depth, _DEEPEST)
            layer = [one for held in layer if isinstance(held, _HOLDING) for one in _inside(held)]
        return total

    def checked(self, value: Any) -> Any:
        """Return what a template has made, if it is not too large."""
        if isinstance(value, (str, bytes)):
            size = len(value)
            self._left -= size
            if size > self.largest or self._left < 0:
                raise self.too_much()
        elif isinstance(value, _HOLDING):
            self.weigh(value)
            self.spend(64 * len(value))
        elif isinstance(value, int):
            self.at_most(value.bit_length(), MOST_BITS)
        elif isinstance(value, types.GeneratorType):
            self._lazy.add(value)
            self.at_most(len(self._lazy), _MOST_LAZY)
        return value

    def before(self, name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Refuse a call or filter that would make much of little."""
        given = [*args, *(named[key] for key in sorted(named, reverse=True))]  # "old" before "new", as replace has them
        self.at_most(GROWTHS[name](self, value, given), 16 * self.largest)


_ADVICE = "pass another one with template={'chat_template': …}, or shorten the messages."


def _size(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, _HOLDING) else 8


def _inside(value: Any) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value


def _amount(meter: Meter, values: Sequence[Any]) -> int:
    return sum(abs(one) if isinstance(one, int) else meter.weigh(one) for one in values)


def _product(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    return (1 + meter.weigh(value)) * (1 + _amount(meter, args))


def _square(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    """Measure what takes the square of its length in time."""
    return (1 + meter.weigh(value)) * _product(meter, value, args)


def _digits(meter: Meter, _: Any, args: Sequence[Any]) -> int:
    return 8 * _amount(meter, args) ** 2


def _encoded(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    return 0 if all(one in ("utf-8", "utf8", "ascii") for one in args) else _square(meter, value, args)


def _replaced(_: Meter, value: Any, args: Sequence[Any]) -> int:
    text, old, new = (one if isinstance(one, (str, bytes)) else str(one) for one in (value, *args[:1], *args[1:2]))
    return text.count(old) * len(new)  # type: ignore[arg-type]  # of texts, or of bytes


def _joined(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    """Measure what is joined, by the filter of the parts or the method of what is put between."""
    parts, between = (value, args) if isinstance(value, _HOLDING) else (args[0], [value])
    return meter.weigh(parts) + len(parts) * _amount(meter, between)


def _summed(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    return len(value) * meter.weigh(value) if any(isinstance(one, _HOLDING) for one in args) else 0


def _printed(meter: Meter, value: Any, args: Sequence[Any]) -> int:
    """Measure what `%` makes of a text: each of its places may be as wide as a number of four digits says."""
    widths = _NUMBERS.findall(value) if isinstance(value, str) else ["bytes"]
    given = any(isinstance(one, int) and abs(one) > _WIDEST for one in args)
    if any(given or not one.endswith("*") for one in widths):
        raise meter.too_much()
    wide = _WIDEST * value.count("%") if re.search(r"[%)][-+ #0]*\.?[\d*]", value) else 0
    return wide + _product(meter, value, args)


GROWTHS: Final[Mapping[str, Callable[[Meter, Any, Sequence[Any]], int]]] = {
    **dict.fromkeys("batch center expandtabs indent ljust rjust slice tojson to_bytes".split(), _product),
    **dict.fromkeys("translate zfill".split(), _product),
    **dict.fromkeys("pprint striptags strftime_now urlize wordwrap xmlattr".split(), _square),
    "%": _printed,
    "decode": _encoded,
    "encode": _encoded,
    "format": _printed,
    "generate_lorem_ipsum": _digits,
    "join": _joined,
    "replace": _replaced,
    "round": _digits,
    "sum": _summed,
}
"""How many characters, or steps, the filters and methods make that can make more than they are given."""
