"""lmkit's own batch of a causal model: rows that join and leave, over a cache that grows in place."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from lmkit.engine.cache import KeyValues
from lmkit.engine.decoders import Decoder, input_device, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.cache import Prefix
    from lmkit.engine.compiled import CompiledStep
    from lmkit.engine.row import Row

__all__ = ["CachedDecoder"]


class CachedDecoder(Decoder):
    """lmkit's own batch of a causal model: plain `forward` calls over a cache that lmkit holds.

    Rows end in the same column, so that a batch can take in the rows of another one.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        pad: int,
        prefixes: Sequence[tuple[Prefix | None, int]],
        compiled: CompiledStep | None = None,
    ) -> None:
        """Lay out the rows; `prefixes` are what is known of each row's first tokens, and how many they are."""
        super().__init__(rows)
        self._model = model
        self._compiled = compiled
        self._device = input_device(model)
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted
        self._cache = KeyValues(model.config.get_text_config(decoder=True))
        lengths = [len(row.input_ids) for row in rows]
        # All rows read the same number of columns: one that knows more of its prefix reads part of it again.
        rest = max(length - known for length, (_, known) in zip(lengths, prefixes, strict=True))
        used = [max(length - rest, 0) for length in lengths]
        self.width = max(lengths) - rest
        self.reused = sum(used)
        self._pads = [max(lengths) - length for length in lengths]
        self._cache.expect(rest + max(row.remaining for row in rows))
        self._known: tuple[list[Prefix | None], list[int]] = [prefix for prefix, _ in prefixes], used
        self._unread, _ = padded(
            [row.input_ids[skip:] for row, skip in zip(rows, used, strict=True)], pad, self._device
        )

    @property
    def nbytes(self) -> int:
        """How many bytes the keys and values hold."""
        return self._cache.nbytes

    def fill(self, columns: int) -> torch.Tensor | None:
        """Read the next columns of the prompts."""
        if self.width and self._known[0]:
            self._cache.begin(*self._known)
        self._known = [], []
        chunk, self._unread = self._unread[:, :columns], self._unread[:, columns:]
        logits = self._forward(chunk, 1)
        return None if self._unread.shape[1] else logits[:, -1]

    def step(self) -> torch.Tensor:
        """Read the newest tokens."""
        if self._compiled is not None and len(self.rows) <= self._compiled.most_rows:
            return self._compiled_step(self._compiled)
        token_ids = torch.tensor([row.token_ids[-1:] for row in self.rows], device=self._device)
        return self._forward(token_ids, 1)[:, -1]

    def _compiled_step(self, compiled: CompiledStep) -> torch.Tensor:
        """Read the newest tokens: the step computes with all columns reserved, and a mask hides the rest."""
        buffers = [layer.opened() for layer in self._cache.layers]
        layer, device = self._cache.layers[0], self._device
        pads = torch.tensor(self._pads, device=device)[:, None]
        columns = torch.arange(buffers[0][0].shape[-2], device=device)
        seen = (columns >= layer.start + pads) & (columns < layer.end)
        token_ids = torch.tensor([row.token_ids[-1:] for row in self.rows], device=device)
        slot = torch.tensor([layer.end - 1], device=device)
        scores = compiled(token_ids, self.width - pads, seen[:, None, None], slot, buffers)
        self.width += 1
        return scores

    def verify(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Read the newest token of the only row and a guess at the next ones.

        Returns:
            The scores that follow each of them. *Shape:* `(1 + guesses, vocabulary)`.
        """
        read = torch.tensor([[self.rows[0].token_ids[-1], *token_ids]], device=self._device)
        return self._forward(read, len(token_ids) + 1)[0]

    def crop(self, tokens: int) -> None:
        """Forget the last tokens that were read."""
        self._cache.crop(tokens)
        self.width -= tokens

    def keep(self) -> None:
        """Let go of the rows that ended, and of columns that no row needs any more."""
        count = len(self.rows)
        holes, movers = self._leave()
        if len(self.rows) in (0, count):
            return
        for hole, mover in zip(holes, movers, strict=True):
            self._pads[hole] = self._pads[mover]
        del self._pads[len(self.rows) :]
        self._cache.keep(holes, movers, len(self.rows))
        if (spare := min(self._pads)) > 0:
            self._cache.drop(spare)
            self.width -= spare
            self._pads = [pad - spare for pad in self._pads]

    def absorb(self, other: CachedDecoder) -> None:
        """Take in the rows of a batch that has read its prompts."""
        if other.width > self.width:
            self._pad(other.width - self.width)
        other._pads = [pad + self.width - other.width for pad in other._pads]
        self._cache.expect(max(row.remaining for row in (*self.rows, *other.rows)))
        self._cache.absorb(other._cache)
        self.rows += other.rows
        self._pads += other._pads

    @property
    def plain(self) -> bool:
        """Whether parts of the cache can be taken out and put back."""
        return self._cache.plain

    def padding(self, place: int) -> int:
        """Count the columns on the left of a row."""
        return self._pads[place]

    def taken(self, place: int) -> Prefix | None:
        """Copy what a row has read, if it can be put into another batch."""
        return self._cache.taken(place, self.width - self._pads[place]) if self._cache.plain else None

    def _pad(self, columns: int) -> None:
        self._cache.pad(columns)
        self.width += columns
        self._pads = [pad + columns for pad in self._pads]

    def _forward(self, token_ids: torch.Tensor, kept: int) -> torch.Tensor:
        """Read a column of tokens per row, or several; return the last `kept` scores of each row."""
        before, after = self.width, self.width + token_ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": None}
        pads = torch.tensor(self._pads, device=self._device)[:, None]
        if any(self._pads):
            inputs["attention_mask"] = (torch.arange(after, device=self._device) >= pads).long()
        if self._positions:
            inputs["position_ids"] = (torch.arange(before, after, device=self._device) - pads).clamp(min=0)
        if self._keeps:
            inputs["logits_to_keep"] = kept
        outputs = self._model(**inputs, past_key_values=self._cache.cache, use_cache=True, return_dict=True)
        self.width = after
        logits: torch.Tensor = outputs.logits[:, -kept:]
        return logits
