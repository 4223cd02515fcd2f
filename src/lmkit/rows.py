"""Options per row: one value for all rows of a call, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

from lmkit.errors import OptionError, UnknownOptionError, listed, nearest

__all__ = ["LISTS", "PerRow", "split"]

T = TypeVar("T")
PerRow: TypeAlias = T | Sequence[T | None]
"""One value for all rows of a call, or a sequence with one per row, where None means not given."""

LISTS = frozenset({"keep", "stop", "suppress_tokens", "targets"})
"""The options that are lists themselves: one list for all rows, or a list of lists."""

_ELSEWHERE = {
    "do_sample": "sample",
    "max_length": "max_new_tokens, and counts new tokens only",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens, and counts new tokens only",
    "stop_strings": "stop",
    "n": "num_return_sequences",
    "src_lang": "source",
    "tgt_lang": "target",
}
"""Names that transformers and other libraries have for an option."""


def split(given: Mapping[str, object], rows: int | None, known: frozenset[str]) -> list[dict[str, object]]:
    """Give each row of a call its own options.

    Args:
        given: The call's options: one value for all rows, or a list with one per row; for an option
            that is itself a list (`stop`, `targets`, …) one list, or a list of lists.
        rows: How many rows the call has; None where nobody knows, and options take one value for all.
        known: The names the call accepts.

    Raises:
        UnknownOptionError: A name that is not in `known`.
        OptionError: A list of another length than `rows`.
    """
    for name in given:
        if name not in known:
            hint = f" lmkit calls it {_ELSEWHERE[name]}." if name in _ELSEWHERE else nearest(name, known)
            msg = f"unknown option {name!r}.{hint} Accepted: {listed(sorted(known))}."
            raise UnknownOptionError(msg)
    columns = {name: _column(name, value, rows) for name, value in given.items()}
    return [{name: column[row] for name, column in columns.items()} for row in range(1 if rows is None else rows)]


def _column(name: str, value: object, rows: int | None) -> Sequence[object]:
    listed_value = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed_value or (name in LISTS and not _nested(value)):
        return [value] * (1 if rows is None else rows)
    assert isinstance(value, Sequence)  # noqa: S101 - narrows for the type checkers what was tested above
    if rows is None:
        msg = (
            f"{name} has {len(value)} values, and map takes one for all rows: pass one, or call the model with a list."
        )
        raise OptionError(msg)
    if len(value) != rows:
        msg = f"{name} has {len(value)} values for {rows} rows: pass one value, or one per row."
        raise OptionError(msg)
    return value


def _nested(value: object) -> bool:
    return isinstance(value, Sequence) and any(
        item is None or (isinstance(item, Sequence) and not isinstance(item, str)) for item in value
    )
