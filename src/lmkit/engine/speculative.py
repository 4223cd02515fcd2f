"""Guesses at what comes next, from what a row has read and written: its own text often repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmkit.engine.row import Row

GRAMS = (4, 3, 2)
"""How many last tokens are looked up, the surest first."""

GUESSES = 12
"""How many tokens are guessed at once: on a CPU, reading a dozen costs about as much as reading four."""


def guess(row: Row) -> list[int]:
    """Return the tokens that followed the last time the row's last tokens were there; none if they never were.

    The way of prompt lookup decoding (Saxena, 2023): the model then verifies the guess in one forward pass.
    """
    text = row.input_ids
    most = min(GUESSES, row.remaining - 1)
    for size in GRAMS:
        last = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == last:
                return list(text[start + size : start + size + most])
    return []
