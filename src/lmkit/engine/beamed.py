"""lmkit's own batch of beam searches: a source is read once, and its keys and values are held once, for all beams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lmkit import attention
from lmkit.engine.cache import repeat
from lmkit.engine.encoded import EncodedDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmkit.engine.beams import Search

__all__ = ["BeamDecoder"]


class BeamDecoder(EncodedDecoder):
    """Searches that start together and have equally many beams; a row's beams lie side by side."""

    def __init__(self, model: Any, rows: Sequence[Search], pad: int, start: int) -> None:
        """Lay out the sources; each search begins at its first step."""
        super().__init__(model, rows, pad, start)
        for search in rows:
            search.begin()
        self._beams = rows[0].width
        # Attention of another kind wants as many rows of keys as there are queries.
        self.shares = model.config._attn_implementation == attention.NAME  # noqa: SLF001

    @property
    def searches(self) -> list[Search]:
        """The rows, as what they are."""
        return cast("list[Search]", self.rows)

    def fill(self, columns: int) -> torch.Tensor | None:
        """Encode the sources and read the beginnings of the answers, once for all beams."""
        logits = super().fill(columns)
        assert logits is not None  # noqa: S101 - an encoder reads a source at once
        self.width = self._beams
        self._own.repeat(self.width)
        self._mask = self._mask.repeat_interleave(self.width, 0)
        self._forget()
        if not self.shares:
            for layer in self._across.layers:
                repeat(layer, self.width)
        return logits.repeat_interleave(self.width, 0)

    def step(self) -> torch.Tensor:
        """Read each beam's newest token, behind the keys and values of its parent."""
        moves = [
            (place * self.width + to, place * self.width + parent)
            for place, search in enumerate(self.searches)
            for to, parent in search.moves
        ]
        if moves:
            places, parents = zip(*moves, strict=True)
            self._own.copy(list(places), list(parents))
        return self._forward([beam[-1:] for search in self.searches for beam in search.beams])
