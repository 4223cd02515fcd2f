"""lmkit's own batch of an encoder-decoder: sources are read once, and answers have one length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmkit._borrowed import cache_name
from lmkit.engine.cache import KeyValues
from lmkit.engine.decoders.base import Decoder
from lmkit.engine.inputs import input_device, padded, sent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.engine.compiled import CompiledDecoderStep
    from lmkit.engine.row import Row

WORTH_A_PASS = {"cpu": 128}
"""How many tokens of padding are worth another pass of the encoder: on 2 cores a pass through 6 layers costs as much
as it takes to read them. 64 sentences of 12 to 80 tokens took 0.66 s together, a third of the whole translation, and
0.28 s in passes of similar lengths."""

WORTH_ELSEWHERE = 4096


class Seq2SeqDecoder(Decoder):
    """lmkit's own batch of an encoder-decoder: rows that start together, and answers of one length.

    Attributes:
        width: How many answers a row has, side by side.
        shares: Whether these share the source's keys and values.
    """

    width = 1
    shares = True

    def __init__(
        self, model: Any, rows: Sequence[Row], pad: int, start: int, compiled: CompiledDecoderStep | None = None
    ) -> None:
        """Lay out the sources, padded on the right; answers begin with the token `start`."""
        from transformers import EncoderDecoderCache

        super().__init__(rows)
        self._model = model
        self._device = input_device(model)
        self._cached = cache_name(model) or ""
        self._start = start
        self._compiled = compiled
        self._token_ids, self._mask = padded([row.request.input_ids for row in rows], pad, self._device, left=False)
        # On a CPU a mask that hides nothing is found out to do so; elsewhere to ask would be to wait.
        self._padded = self._device.type == "cpu" or len({len(row.request.input_ids) for row in rows}) > 1
        self._encoded: Any = None
        self._own = KeyValues(model.config.get_text_config(decoder=True))
        self._own.expect(max(row.remaining for row in rows))
        for layer in self._own.layers:
            layer.margin = 0  # rows begin together: a column is the place in the answer, by which biases go
        self._across = KeyValues()
        self._cache: Any = EncoderDecoderCache(self._own.cache, self._across.cache)

    @property
    def nbytes(self) -> int:
        """How many bytes the keys and values hold, those of the sources too."""
        return self._own.nbytes + self._across.nbytes

    def fill(self, columns: int) -> torch.Tensor | None:  # noqa: ARG002 - an encoder reads a source at once
        """Encode the sources and read the beginnings of the answers."""
        self._encoded = self._encode()
        logits = self._forward([[self._start, *row.token_ids] for row in self.rows])
        self._forget()
        for layer in self._across.filled:
            # As the model leaves them, a product of matrices would copy them at every step.
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
        return logits

    def _forget(self) -> None:
        """Keep only the shape of the encoder's states, which is all that is asked of them once their keys are there."""
        states = self._encoded.last_hidden_state
        self._encoded.last_hidden_state = states[:1].expand(len(self._mask), -1, -1)

    def step(self) -> torch.Tensor:
        """Read the newest tokens."""
        return self._advance([row.token_ids[-1:] for row in self.rows])

    def _advance(self, token_ids: list[list[int]]) -> torch.Tensor:
        """Read a token of each answer; return its scores, if the step is compiled, else what `_read` does."""
        read = self._own.cache.get_seq_length()
        if self._compiled is None or not self._compiled.fits(len(token_ids), read):
            return self._forward(token_ids)
        own = [layer.opened() for layer in self._own.layers]
        across = [(layer.keys, layer.values) for layer in self._across.filled]
        scores = self._compiled(torch.tensor(token_ids, device=self._device), own, across, self._mask, read)
        return self._scored(scores)

    def _scored(self, scores: torch.Tensor) -> torch.Tensor:
        """Return what `choose` takes."""
        return scores

    def keep(self) -> None:
        """Let go of the rows that ended."""
        count = len(self.rows)
        holes, movers = self._leave()
        rows = len(self.rows)
        if rows in (0, count):
            return
        once = holes, movers, rows
        each = self._spread(holes), self._spread(movers), rows * self.width
        self._own.keep(*each)
        self._across.keep(*(once if self.shares else each))
        if holes:
            self._mask[each[0]] = self._mask[each[1]]
        self._mask = self._mask[: each[2]]
        self._forget()

    def _spread(self, rows: Sequence[int]) -> list[int]:
        """Return the places of all answers of some rows."""
        return [row * self.width + answer for row in rows for answer in range(self.width)]

    def _encode(self) -> Any:
        """Read the sources, in passes of similar lengths; return what the encoder does, padded."""
        encoder = self._model.get_encoder()
        lengths = [len(row.request.input_ids) for row in self.rows]
        passes = similar(lengths, WORTH_A_PASS.get(self._device.type, WORTH_ELSEWHERE))
        if len(passes) == 1:
            mask = self._mask if self._padded else None
            return encoder(input_ids=self._token_ids, attention_mask=mask, return_dict=True)
        whole: Any = None
        for rows in passes:
            width = lengths[rows[0]]
            part = encoder(
                input_ids=self._token_ids[rows, :width], attention_mask=self._mask[rows, :width], return_dict=True
            )
            states = part.last_hidden_state
            if whole is None:
                whole = type(part)(last_hidden_state=states.new_zeros(*self._token_ids.shape, states.shape[-1]))
            whole.last_hidden_state[rows, : states.shape[1]] = states
        return whole

    def _forward(self, token_ids: list[list[int]]) -> torch.Tensor:
        inputs = {
            "encoder_outputs": self._encoded,
            "attention_mask": self._mask if self._padded else None,
            "decoder_input_ids": sent(token_ids, self._device),
            self._cached: self._cache,
            "use_cache": True,
        }
        return self._read(inputs)[:, -1]

    def _read(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Run the model. *Shape:* `(rows, tokens, vocabulary)`."""
        logits: torch.Tensor = self._model(**inputs, return_dict=True).logits
        return logits


def similar(lengths: Sequence[int], worth: int) -> list[list[int]]:
    """Divide rows into groups of similar lengths, the longest row of each first.

    Args:
        lengths: Of the rows, in tokens.
        worth: How many tokens of padding are worth a group of their own.
    """
    groups: list[list[int]] = []
    wasted = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        wasted += lengths[groups[-1][0]] - lengths[row] if groups else worth + 1
        if wasted > worth:
            groups.append([])
            wasted = 0
        groups[-1].append(row)
    return groups
