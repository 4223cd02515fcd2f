"""Which part of a text a model is given where it takes fewer tokens: around a place, or what is left of a cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

from lmkit.errors import InputTooLongError

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
SHORTEN = "shorten or split the text, or pass truncate='left' or truncate='right' to cut that end of it"
"""What to do where an input is too long."""


def window(length: int, start: int, end: int, limit: int | None, around: tuple[int, int]) -> tuple[int, int]:
    """Choose what a model sees of a text: all, or as much on both sides of a part of it as fits.

    Args:
        length: How many tokens the text has, special tokens included.
        start: The part's first token.
        end: One past its last.
        limit: The most tokens the model takes; None is no limit.
        around: How many special tokens at each end it sees in any case.

    Returns:
        The first token between those at the ends that it sees, and one past the last.
    """
    before, last = around[0], length - around[1]
    if limit is None or length <= limit:
        return before, last
    room = limit - sum(around)
    first = min(max(start - (room - (end - start)) // 2, before), last - room)
    return first, first + room


def seen(
    row: Sequence[T], start: int, end: int, limit: int | None, around: tuple[int, int]
) -> tuple[tuple[T, ...], int]:
    """Return what a model sees of a row around one of its parts, and where the part begins in that: see `window`."""
    first, last = window(len(row), start, end, limit, around)
    before, after = around
    return (*row[:before], *row[first:last], *row[len(row) - after :]), start - first + before


def fit(
    token_ids: Sequence[int],
    limit: int | None,
    *,
    keep: int | None = None,
    around: tuple[int, int] = (0, 0),
    truncate: Literal["left", "right"] | None = None,
    row: int = 0,
    advice: str = SHORTEN,
) -> tuple[list[int], bool]:
    """Check that an input fits the model, or cut it where the caller said so.

    Args:
        token_ids: The input, special tokens included.
        limit: The most tokens the model takes; None is no limit.
        keep: How many to keep when cutting; by default `limit`.
        around: How many special tokens at each end are kept when cutting.
        truncate: The side to cut, or None to refuse.
        row: The row's number, for the message.
        advice: What to do, for the message.

    Returns:
        The ids, and whether they were cut.

    Raises:
        InputTooLongError: The input is longer than `limit` and `truncate` is None.
    """
    if limit is None or len(token_ids) <= limit:
        return list(token_ids), False
    if truncate is None:
        raise InputTooLongError(f"row {row} has {len(token_ids)} tokens, the model takes {limit}: {advice}.")
    before, after = around
    body = list(token_ids[before : len(token_ids) - after])
    room = max((keep or limit) - before - after, 1)
    body = body[-room:] if truncate == "left" else body[:room]
    return [*token_ids[:before], *body, *token_ids[len(token_ids) - after :]], True
