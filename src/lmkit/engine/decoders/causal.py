"""lmkit's own batch of a causal model: rows that join and leave, over a cache that grows in place."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

from lmkit._borrowed import cache_name
from lmkit.engine.cache import KeyValues, Prefix
from lmkit.engine.decoders.base import Decoder
from lmkit.engine.inputs import input_device, padded, sent
from lmkit.kernels.attention import to_add
from lmkit.kernels.rotary import read_as
from lmkit.kernels.unpadded import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmkit.engine.cache import GrowingLayer
    from lmkit.engine.compiled import CompiledStep
    from lmkit.engine.row import Row
    from lmkit.kernels.rotary import Scaling

WORTH_UNPADDING = 1 / 16
"""What share of the places of a batch's prompts is padding, or tokens that are known, at the least to be read without.
To spread queries, keys and values and to gather what they attended to takes 4% of a pass of SmolLM2 on 2 cores."""

MOST_SEEN = 2**24
"""A pass without padding is wider than others only while its mask has no more bytes than this."""


class CausalDecoder(Decoder):
    """lmkit's own batch of a causal model: plain `forward` calls over a cache that lmkit holds.

    Rows end in the same column, so that a batch can take in the rows of another one.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        pad: int,
        prefixes: Sequence[tuple[Prefix | None, int]],
        *,
        scaling: Scaling,
        compiled: CompiledStep | None = None,
        unpads: Callable[[int], bool] = lambda _saved: False,
    ) -> None:
        """Lay out the rows.

        Args:
            model: The model.
            rows: What is to be continued.
            pad: The token that fills short rows.
            prefixes: What is known of each row's first tokens, and how many they are.
            scaling: How its positions follow the length of a text.
            compiled: Its compiled step.
            unpads: Says whether to read without padding where that saves so many tokens; asked where it is worth it.
        """
        super().__init__(rows)
        self._model = model
        self._scaling = scaling
        self._compiled = compiled
        self._device = input_device(model)
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted
        self._cached = cache_name(model) or ""
        self._cache = KeyValues(model.config.get_text_config(decoder=True))
        lengths = [row.length for row in rows]
        used = [known for _, known in prefixes]
        left = [length - known for length, known in zip(lengths, used, strict=True)]
        rest = max(left)
        saved = len(rows) * rest - sum(left)
        self._unpads = saved >= WORTH_UNPADDING * len(rows) * rest and saved > 0 and unpads(saved)
        if not self._unpads:  # all read as many columns: one that knows more of its prefix reads part of it again
            used = [max(length - rest, 0) for length in lengths]
        self.width = max(lengths) - rest
        self.reused = sum(used)
        self._pads = [max(lengths) - length for length in lengths]
        self._firsts = [pad + known for pad, known in zip(self._pads, used, strict=True)]  # columns that are read
        self._sent: tuple[list[int], torch.Tensor] = [], torch.empty(0)  # the pads that the device has
        self._cache.expect(rest + max(row.remaining for row in rows))
        self._known: tuple[list[Prefix | None], list[int]] = [prefix for prefix, _ in prefixes], used
        self._unread, _ = padded(
            [row.input_ids[skip:] for row, skip in zip(rows, used, strict=True)], pad, self._device
        )

    @property
    def nbytes(self) -> int:
        """How many bytes the keys and values hold."""
        return self._cache.nbytes

    @property
    def outgrown(self) -> list[Row]:
        """The rows that have just grown past the length up to which their positions have the same factors."""
        return [row for row in self.rows if self._scaling.crosses(row.length)]

    def fill(self, columns: int) -> torch.Tensor | None:
        """Read the next columns of the prompts."""
        rest = self._unread.shape[1]
        if any(self._known[1]):
            self._cache.expect(max(row.remaining for row in self.rows))  # beyond the prompts, all of which are laid out
            self._cache.begin(*self._known, self._pads, self.width + rest, rest)
        self._known = [], []
        if self._unpads and 2 * columns * len(self.rows) * (self.width + rest) <= MOST_SEEN:
            # As many tokens, up to twice as wide: what attends has padding still.
            tokens = self._to_read(min(2 * columns, rest)).sum(0).cumsum(0)
            columns = max(int((tokens <= columns * len(self.rows)).sum()), columns)
        chunk, self._unread = self._unread[:, :columns], self._unread[:, columns:]
        logits = self._without_padding(chunk) if self._unpads else self._forward(chunk, 1)[:, -1]
        return None if self._unread.shape[1] else logits

    def step(self, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Read the newest tokens: those of the rows, or `token_ids`, which only the device knows yet (`(rows, 1)`)."""
        if token_ids is None:
            token_ids = sent([row.token_ids[-1:] for row in self.rows], self._device)
        if self._compiled is not None and self._compiled.fits(len(self.rows), self._cache.layers):
            return self._compiled_step(self._compiled, token_ids)
        return self._forward(token_ids, 1)[:, -1]

    @property
    def waits(self) -> bool:
        """Whether a step has to know how long texts are, their newest tokens included."""
        return bool(self._scaling.kind)

    def _compiled_step(self, compiled: CompiledStep, token_ids: torch.Tensor) -> torch.Tensor:
        """Read the newest tokens: the step computes with all columns reserved, and a mask hides the rest."""
        buffers = [layer.opened() for layer in self._cache.layers]
        pads = self._pads_there()
        columns = [self._columns(self._cache.layers[number], pads) for number in compiled.firsts]
        scores = compiled(token_ids, self.width - pads, columns, buffers)
        self.width += 1
        return scores

    def _columns(self, layer: GrowingLayer, pads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which column of an opened layer is written, and which ones each row sees."""
        columns = torch.arange(layer.columns, device=self._device)
        left = (pads + layer.width - layer.get_seq_length()).clamp(min=0)  # of the padding, in a window
        seen = (columns >= layer.start + left) & (columns < layer.end)
        return sent([layer.end - 1], self._device), seen[:, None, None]

    def verify(self, guesses: Sequence[int]) -> torch.Tensor | None:
        """Read the newest token of the only row and a guess at the next ones; windows cannot be taken back."""
        if not self._cache.plain:
            return None
        read = sent([[self.rows[0].token_ids[-1], *guesses]], self._device)
        return self._forward(read, len(guesses) + 1)[0]

    def crop(self, tokens: int) -> None:
        """Forget the last tokens that were verified."""
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

    def join(self, other: Decoder, coming: int = 0) -> bool:
        """Take in the rows of another batch of this kind, of which nothing is left; `coming` more are to follow."""
        if not isinstance(other, CausalDecoder):
            return False
        if other.width > self.width:
            self._pad(other.width - self.width)
        theirs = other._pads, other._cache  # noqa: SLF001 - one of its own kind
        self._cache.expect(max(row.remaining for row in (*self.rows, *other.rows)))
        self._cache.absorb(theirs[1], coming)
        self.rows += other.rows
        self._pads += [pad + self.width - other.width for pad in theirs[0]]
        return True

    def read(self, place: int) -> tuple[int, ...]:
        """Return the tokens of a row that were read: all but its newest one."""
        return self.rows[place].input_ids[: self.width - self._pads[place]] if self._cache.plain else ()

    def take(self, place: int) -> Prefix:
        """Copy the keys and values of what a row has read."""
        return self._cache.taken(place, self.width - self._pads[place])

    def _pad(self, columns: int) -> None:
        self._cache.pad(columns)
        self.width += columns
        self._pads = [pad + columns for pad in self._pads]

    def _pads_there(self) -> torch.Tensor:
        """Return how many columns of padding each row has, on the device. *Shape:* `(rows, 1)`."""
        if self._sent[0] != self._pads:
            self._sent = list(self._pads), sent(self._pads, self._device)[:, None]
        return self._sent[1]

    def _to_read(self, columns: int) -> torch.Tensor:
        """Say which of the next columns hold a token that is to be read. *Shape:* `(rows, columns)`, on the CPU."""
        numbers = torch.arange(self.width, self.width + columns, device="cpu")
        return numbers >= torch.tensor(self._firsts, device="cpu")[:, None]

    def _without_padding(self, chunk: torch.Tensor) -> torch.Tensor:
        """Read columns of the prompts, their tokens as one row; return the scores behind the last of each row."""
        before, after = self.width, self.width + chunk.shape[1]
        layout = Layout(self._to_read(chunk.shape[1]), functools.partial(sent, device=self._device))
        pads, columns = self._pads_there(), torch.arange(after, device=self._device)
        seen = ((columns >= pads[..., None]) & (columns <= columns[before:, None]))[:, None]
        inputs = {
            "input_ids": chunk[layout.rows, layout.columns][None],
            "attention_mask": seen if self._device.type == "cpu" else to_add(seen, self._model.dtype),
            "position_ids": (layout.columns + before - pads[layout.rows, 0])[None],
        }
        self._cache.lay_out(layout)
        logits = self._read(inputs, layout.last, after)[0]
        self._cache.lay_out(None)  # a pass that fails drops the batch
        return logits if self._keeps else logits[layout.last]

    def _forward(self, token_ids: torch.Tensor, kept: int) -> torch.Tensor:
        """Read a column of tokens per row, or several; return the last `kept` scores of each row."""
        before, after = self.width, self.width + token_ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": None}
        pads = self._pads_there()
        if any(self._pads):
            inputs["attention_mask"] = (torch.arange(after, device=self._device) >= pads).long()
        if self._positions:
            inputs["position_ids"] = (torch.arange(before, after, device=self._device) - pads).clamp(min=0)
        lengths = [self._scaling.read_at(len(row.request.input_ids), row.length) for row in self.rows]
        return read_as(lengths, lambda: self._read(inputs, kept, after))[:, -kept:]

    def _read(self, inputs: dict[str, Any], kept: int | torch.Tensor, after: int) -> torch.Tensor:
        """Run the model, behind which the cache has columns up to `after`; return scores, those `kept` if it can."""
        if self._keeps:
            inputs["logits_to_keep"] = kept
        inputs[self._cached] = self._cache.cache
        logits: torch.Tensor = self._model(**inputs, use_cache=True, return_dict=True).logits
        self.width = after
        return logits
