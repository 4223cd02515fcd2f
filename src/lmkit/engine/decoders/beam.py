"""lmkit's own batch of beam searches: a source is read once, and its keys and values are held once, for all beams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from lmkit.engine import beam_search
from lmkit.engine.decoders.seq2seq import Seq2SeqDecoder
from lmkit.engine.inputs import input_device
from lmkit.kernels import attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lmkit.engine.beam_search import Search
    from lmkit.engine.body_and_head import Reader
    from lmkit.engine.choice import Chooser
    from lmkit.engine.compiled import CompiledDecoderStep


def probe(model: Any) -> dict[str, torch.Tensor]:
    """Return a few tokens to try an encoder-decoder on, more of the answer than of the source."""
    answer = torch.tensor([[1, 2, 3]], device=input_device(model))
    source = answer[:, :2]
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": answer}


class BeamDecoder(Seq2SeqDecoder):
    """Searches that start together and have equally many beams; a row's beams lie side by side.

    `fill` and `step` return hidden states, which `choose` turns into scores.
    """

    _head: Callable[[torch.Tensor], torch.Tensor]

    def __init__(
        self,
        model: Any,
        rows: Sequence[Search],
        pad: int,
        start: int,
        compiled: CompiledDecoderStep | None = None,
        *,
        reader: Callable[[], Reader],
    ) -> None:
        """Lay out the sources; each search begins at its first step. `reader` makes what reads with the model."""
        super().__init__(model, rows, pad, start, compiled)
        self._reader = reader
        for search in rows:
            search.begin()
        self._beams = rows[0].width
        # Attention of another kind wants as many rows of keys as there are queries.
        self.shares = attention.is_on(model)

    @property
    def _searches(self) -> list[Search]:
        return cast("list[Search]", self.rows)

    def choose(self, chooser: Chooser, logits: torch.Tensor) -> int:
        """Give each search its next continuations; `logits` are hidden states here."""
        beam_search.choose(chooser, self._searches, logits, self._head)
        return len(self.rows)

    def fill(self, columns: int) -> torch.Tensor | None:
        """Encode the sources and read the beginnings of the answers, once for all beams."""
        hidden = super().fill(columns)
        assert hidden is not None  # noqa: S101 - an encoder reads a source at once
        self.width = self._beams
        self._own.repeat(self.width)
        self._mask = self._mask.repeat_interleave(self.width, 0)
        self._forget()
        if not self.shares:
            self._across.repeat(self.width)
        return hidden.repeat_interleave(self.width, 0)

    def step(self) -> torch.Tensor:
        """Read each beam's newest token, behind the keys and values of its parent."""
        moves = [
            (place * self.width + to, place * self.width + parent)
            for place, search in enumerate(self._searches)
            for to, parent in search.moves
        ]
        if moves:
            places, parents = zip(*moves, strict=True)
            self._own.copy(places, parents)
        return self._advance([beam[-1:] for search in self._searches for beam in search.beams])

    def _read(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        hidden, self._head = self._reader().read(inputs)
        return hidden

    def _scored(self, scores: torch.Tensor) -> torch.Tensor:
        self._head = lambda scores: scores
        return scores
