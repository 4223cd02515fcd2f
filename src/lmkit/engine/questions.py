"""Questions about places of texts, asked in rounds: what fills masks asks them, and a masked model answers."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from lmkit.errors import EngineError, LmkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lmkit.options.generation import Sample
    from lmkit.text.codec import Typed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to be drawn: how the distribution is reshaped, and a number in [0, 1)."""

    mode: Sample
    uniform: float


Want: TypeAlias = int | tuple[int, ...] | Draw
"""How many of the likeliest tokens, or which tokens, or one that is drawn."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question about one place of a text.

    Attributes:
        tokens: What the model reads, special tokens included, each with its type.
        place: Which of them is asked about.
        want: What is to be known of it.
    """

    tokens: tuple[Typed, ...]
    place: int
    want: Want


Found: TypeAlias = list[tuple[int, float]]
"""The answer: tokens and their natural log-probabilities, the likeliest first, or in the order they were asked for."""

Asking: TypeAlias = Generator[list[Query], list[Found], T]
"""What asks in rounds, each knowing the answers of the one before, and returns what it made of them."""


def parallel(askings: Iterable[Asking[T]]) -> Asking[list[T]]:
    """Let several ask side by side: the questions of a round go together."""
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Asking[T], int]] = {}

    def ask(number: int, asking: Asking[T], found: list[Found] | None) -> list[Query]:
        try:
            queries = asking.send(found)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as end:
            waiting.pop(number, None)
            results[number] = end.value
            return []
        waiting[number] = asking, len(queries)
        return queries

    queries = [query for number, asking in enumerate(askings) for query in ask(number, asking, None)]
    while waiting:
        found = iter((yield queries))
        asked = list(waiting.items())
        queries = [q for number, (asking, n) in asked for q in ask(number, asking, list(islice(found, n)))]
    return [results[number] for number in sorted(results)]


def answered(
    askings: Iterable[Asking[T]], answer: Callable[[Sequence[Query]], list[Found | EngineError]]
) -> list[T | LmkitError]:
    """Answer all who ask, round by round; one whose question fails ends with its error, and the others go on."""
    guarded: Any = (_guarded(asking) for asking in askings)  # what these are sent may be errors
    together: Any = parallel(guarded)
    found: Any = None
    while True:
        try:
            queries = together.send(found)
        except StopIteration as end:
            results: list[T | LmkitError] = end.value
            return results
        found = answer(queries)


def _guarded(asking: Asking[T]) -> Generator[list[Query], list[Found | EngineError], T | LmkitError]:
    """End with the error where an answer is one."""
    found: Any = None
    while True:
        try:
            queries = asking.send(found)
        except StopIteration as end:
            result: T = end.value
            return result
        except LmkitError as error:
            return error
        found = yield queries
        if (failed := next((one for one in found if isinstance(one, EngineError)), None)) is not None:
            asking.close()
            return failed
