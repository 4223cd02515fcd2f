"""Prefixes that were read already: keys and values of recent prompts and answers, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.cache import Prefix

__all__ = ["SHORTEST", "PrefixStore", "shared"]

SHORTEST = 32
"""How many tokens a prefix has at the least: reading fewer again is cheaper than copying them."""


@dataclass(frozen=True, slots=True)
class _Entry:
    token_ids: np.ndarray
    prefix: Prefix
    nbytes: int


class PrefixStore:
    """Keeps what was read last and drops what was not used for longest."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` bytes."""
        self.limit = limit
        self.nbytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._number = 0

    def find(self, token_ids: Sequence[int]) -> tuple[Prefix | None, int]:
        """Return the keys and values that begin like `token_ids`, and for how many tokens; one is left to read."""
        best, length = None, SHORTEST - 1
        wanted = np.asarray(token_ids[:-1])
        for number, entry in self._entries.items():
            if (common := shared(entry.token_ids, wanted)) > length:
                best, length = number, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best].prefix, length

    def holds(self, token_ids: Sequence[int]) -> bool:
        """Say whether all of these tokens are here."""
        wanted = np.asarray(token_ids)
        return any(shared(entry.token_ids, wanted) == len(wanted) for entry in self._entries.values())

    def put(self, token_ids: Sequence[int], prefix: Prefix) -> None:
        """Keep what was read; beginnings of it that were kept before are let go."""
        nbytes = sum(keys.nbytes + values.nbytes for keys, values in prefix)
        if nbytes > self.limit:
            return
        new = np.asarray(token_ids)
        for number, entry in list(self._entries.items()):
            if shared(entry.token_ids, new) == len(entry.token_ids):
                self._drop(number)
        while self.nbytes + nbytes > self.limit:
            self._drop(next(iter(self._entries)))
        self._number += 1
        self._entries[self._number] = _Entry(new, prefix, nbytes)
        self.nbytes += nbytes

    def clear(self) -> None:
        """Let go of everything."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens with which both begin."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length
