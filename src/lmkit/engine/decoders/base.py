"""The interface of all batches whose rows advance together: what the loop above asks, whichever one it steps.

Each keeps its rows, their inputs and a cache, and answers with scores for the next tokens. `causal` and `seq2seq` are
lmkit's own, `beam` is what searches of encoder-decoders share, and `fallback` is what `generate` runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmkit.engine.cache import Prefix
    from lmkit.engine.choice import Chooser
    from lmkit.engine.row import Row


class Decoder(ABC):
    """A batch whose rows advance together, a token each.

    Attributes:
        rows: The rows, in the order of the scores.
        reused: How many tokens of prompts need not be read, since their keys and values were kept.
    """

    reused = 0

    def __init__(self, rows: Sequence[Row]) -> None:
        """Take the rows in; nothing is computed yet."""
        self.rows = list(rows)

    @abstractmethod
    def fill(self, columns: int) -> torch.Tensor | None:
        """Read up to `columns` more tokens of each row's input.

        Returns:
            None if there is more to read; else what `choose` takes, such as the scores that follow. *Shape:*
            `(rows, vocabulary)`.
        """

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Read each row's newest token; return what `fill` does."""

    @abstractmethod
    def keep(self) -> None:
        """Let go of the rows that ended."""

    @property
    def nbytes(self) -> int:
        """How many bytes the cache holds; 0 where only `generate` knows."""
        return 0

    def choose(self, chooser: Chooser, logits: torch.Tensor) -> int:
        """Give each row its next token, or its error; return how many tokens there are more."""
        chooser.choose(self.rows, logits)
        return len(self.rows)

    @property
    def outgrown(self) -> list[Row]:
        """The rows whose keys and values do not hold any more, so that they have to be read anew."""
        return []

    def join(self, other: Decoder, coming: int = 0) -> bool:  # noqa: ARG002 - most batches take none in
        """Take in the rows of a batch that has read its prompts, if both can do that; `coming` more are to follow."""
        return False

    def verify(self, guesses: Sequence[int]) -> torch.Tensor | None:  # noqa: ARG002
        """Read the newest token of the only row and a guess at the next ones; None where that cannot be taken back.

        Returns:
            The scores that follow each of them. *Shape:* `(1 + guesses, vocabulary)`.
        """
        return None

    def crop(self, tokens: int) -> None:  # noqa: B027 - there is nothing to forget where nothing is verified
        """Forget the last tokens that were verified."""

    def read(self, place: int) -> tuple[int, ...]:  # noqa: ARG002
        """Return the tokens of a row whose keys and values `take` would copy; none where it cannot."""
        return ()

    def take(self, place: int) -> Prefix:
        """Copy the keys and values of a row's tokens, for other batches to begin with."""
        raise NotImplementedError

    def _leave(self) -> tuple[list[int], list[int]]:
        """Take rows that ended or leave off the list: which rows at its end move into which places."""
        leaves = [row.done or row.anew for row in self.rows]
        kept = leaves.count(False)
        holes = [place for place, left in enumerate(leaves[:kept]) if left]
        movers = [kept + place for place, left in enumerate(leaves[kept:]) if not left]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[kept:]
        return holes, movers
