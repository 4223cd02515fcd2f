"""Prefixes that were read already: keys and values of recent prompts and answers, within a budget of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.cache import Prefix

SHORTEST = 32
"""How many tokens a prefix has at the least: reading fewer again is cheaper than copying them."""

FEWEST = 8
"""The same where rows of a call wait for one of them to read what all begin with."""

SAVED = 64
"""How many tokens that has to save them in all: as many take as long to read as the pass that one of them makes alone.
With SmolLM2 on 2 cores that is 18 ms, a token in a batch of prompts 0.4."""


@dataclass(frozen=True, slots=True)
class _Entry:
    token_ids: np.ndarray
    side: bool
    prefix: Prefix
    nbytes: int


class PrefixStore:
    """Keeps what was read last and drops what was not used for longest."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` bytes."""
        self.limit = limit
        self._entries: list[_Entry] = []  # what was used last is the last

    @property
    def nbytes(self) -> int:
        """How many bytes are held."""
        return sum(entry.nbytes for entry in self._entries)

    def find(
        self,
        token_ids: Sequence[int],
        side: bool | None = False,  # noqa: FBT001, FBT002
        least: int = SHORTEST,
    ) -> tuple[Prefix | None, int]:
        """Return the keys and values that begin like `token_ids`, and for how many tokens; one is left to read.

        Only those that were kept with the same `side` are of use, and with None none are; nor is less than `least`.
        """
        wanted = np.asarray(token_ids[:-1])
        common = [shared(entry.token_ids, wanted) if entry.side is side else 0 for entry in self._entries]
        if (length := max(common, default=0)) < least:
            return None, 0
        best = self._entries.pop(common.index(length))
        self._entries.append(best)
        return best.prefix, length

    def holds(self, token_ids: Sequence[int], side: bool = False) -> bool:  # noqa: FBT001, FBT002
        """Say whether all of these tokens are here."""
        wanted = np.asarray(token_ids)
        return any(entry.side is side and shared(entry.token_ids, wanted) == len(wanted) for entry in self._entries)

    def put(self, token_ids: Sequence[int], prefix: Prefix, side: bool = False) -> None:  # noqa: FBT001, FBT002
        """Keep what was read; beginnings of it that were kept before are let go."""
        nbytes = sum(keys.nbytes + values.nbytes for keys, values in prefix)
        if nbytes > self.limit:
            return
        new = np.asarray(token_ids)
        self._entries = [
            entry
            for entry in self._entries
            if entry.side is not side or shared(entry.token_ids, new) < len(entry.token_ids)
        ]
        self._entries.append(_Entry(new, side, prefix, nbytes))
        while self.nbytes > self.limit:
            del self._entries[0]

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens with which both begin."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length
