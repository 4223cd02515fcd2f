"""The forward passes of a batch: lmkit's own, and generate's for families lmkit cannot drive.

Each keeps a batch's rows, inputs and cache and answers with scores for the next token, so the loop above does
not know which one it steps.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lmkit._quiet import without_warnings
from lmkit.engine.cache import KeyValues, shrink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.cache import Prefix
    from lmkit.engine.compiled import CompiledStep
    from lmkit.engine.row import Row

__all__ = [
    "CachedDecoder",
    "Decoder",
    "EncodedDecoder",
    "PreparedDecoder",
    "drives",
    "input_device",
    "padded",
    "pads",
]

PADDING_SENSITIVE = frozenset(
    [
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "blt",
        "cpmant",
        "deepseek_v4",
        "git",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "recurrent_gemma",
        "reformer",
        "roformer",
        "rwkv",
        "trocr",
        "whisper",
        "xlm",
        "xlnet",
        "xlstm",
    ]
)
"""Causal model types whose result left padding changes: found by running tiny checkpoints of all types."""


def pads(model: Any) -> bool:
    """Say whether rows of different lengths may share a batch of this model."""
    return bool(model.config.is_encoder_decoder or model.config.model_type not in PADDING_SENSITIVE)


def drives(model: Any) -> bool:
    """Say whether `CachedDecoder` can run the model: it takes a cache of plain and sliding layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not (takes_cache and pads(model) and model._supports_default_dynamic_cache()):  # noqa: SLF001
        return False
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) in known for layer in layers)


def input_device(model: Any) -> torch.device:
    """Return where a model's inputs belong; a fully offloaded one sits on `meta` and computes elsewhere."""
    placed = getattr(model, "hf_device_map", None) or {}
    for where in placed.values():
        if where != "disk":
            return torch.device(where)
    return torch.device("cpu") if model.device.type == "meta" else model.device


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write rows of token ids as one matrix and its mask. *Shape:* `(rows, longest)`, both int64."""
    width = max(map(len, rows))
    token_ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(token_ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        token_ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return token_ids.to(device), mask.to(device)


class Decoder(ABC):
    """A batch whose rows advance together, a token each.

    Attributes:
        rows: The rows, in the order of the scores.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """Take the rows in; nothing is computed yet."""
        self.rows = list(rows)

    @abstractmethod
    def fill(self, columns: int) -> torch.Tensor | None:
        """Read up to `columns` more tokens of each row's input.

        Returns:
            None if there is more to read; else the scores that follow. *Shape:* `(rows, vocabulary)`.
        """

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Read each row's newest token; return scores as `fill` does."""

    @abstractmethod
    def keep(self) -> None:
        """Let go of the rows that ended."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """How many bytes the cache holds."""

    def _leave(self) -> tuple[list[int], list[int]]:
        """Take ended rows off the list: which rows at its end move into which places."""
        kept = sum(not row.done for row in self.rows)
        holes = [place for place, row in enumerate(self.rows[:kept]) if row.done]
        movers = [kept + place for place, row in enumerate(self.rows[kept:]) if not row.done]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[kept:]
        return holes, movers


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
        if self._compiled is not None:
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


class EncodedDecoder(Decoder):
    """lmkit's own batch of an encoder-decoder: rows that start together, and answers of one length."""

    def __init__(self, model: Any, rows: Sequence[Row], pad: int, start: int) -> None:
        """Lay out the sources, padded on the right; answers begin with the token `start`."""
        from transformers import DynamicCache, EncoderDecoderCache

        super().__init__(rows)
        self._model = model
        self._device = input_device(model)
        self._start = start
        self._token_ids, self._mask = padded([row.request.input_ids for row in rows], pad, self._device, left=False)
        self._encoded: Any = None
        self._own = KeyValues(model.config.get_text_config(decoder=True))
        self._own.expect(max(row.remaining for row in rows))
        self._cache: Any = EncoderDecoderCache(self._own.cache, DynamicCache())

    @property
    def nbytes(self) -> int:
        """How many bytes the keys and values hold, those of the sources too."""
        across = [layer for layer in self._cache.cross_attention_cache.layers if layer.is_initialized]
        return self._own.nbytes + sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in across)

    def fill(self, columns: int) -> torch.Tensor | None:  # noqa: ARG002 - an encoder reads a source at once
        """Encode the sources and read the beginnings of the answers."""
        self._encoded = self._model.get_encoder()(
            input_ids=self._token_ids, attention_mask=self._mask, return_dict=True
        )
        return self._forward([[self._start, *row.token_ids] for row in self.rows])

    def step(self) -> torch.Tensor:
        """Read the newest tokens."""
        return self._forward([row.token_ids[-1:] for row in self.rows])

    def keep(self) -> None:
        """Let go of the rows that ended."""
        count = len(self.rows)
        holes, movers = self._leave()
        rows = len(self.rows)
        if rows in (0, count):
            return
        self._own.keep(holes, movers, rows)
        for layer in self._cache.cross_attention_cache.layers:
            if layer.is_initialized:
                shrink(layer, holes, movers, rows)
        for part in (self._mask, self._encoded.last_hidden_state):
            if holes:
                part[holes] = part[movers]
        self._mask = self._mask[:rows]
        self._encoded.last_hidden_state = self._encoded.last_hidden_state[:rows]

    def _forward(self, token_ids: list[list[int]]) -> torch.Tensor:
        outputs = self._model(
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            decoder_input_ids=torch.tensor(token_ids, device=self._device),
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits


class PreparedDecoder(Decoder):
    """A batch of a family with a cache of its own: generate() prepares every forward.

    Rows that ended stay in the batch and are fed padding, as in generate().
    """

    def __init__(self, model: Any, rows: Sequence[Row], pad: int, start: int | None) -> None:
        """Take the rows in; an encoder-decoder's answers begin with the token `start`."""
        super().__init__(rows)
        self._model = model
        self._pad = pad
        self._start = start
        self._alive = list(range(len(rows)))
        self._token_ids = torch.empty(0)
        self._kwargs: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """How many bytes a cache of unknown make holds: not known, 0."""
        return 0

    def fill(self, columns: int) -> torch.Tensor | None:  # noqa: ARG002 - generate() prepares whole inputs
        """Have generate() prepare the batch, which it hands back instead of decoding; then read it."""
        device = input_device(self._model)
        causal = self._start is None
        token_ids, mask = padded(
            [row.input_ids if causal else row.request.input_ids for row in self.rows], self._pad, device, left=causal
        )
        begun = (
            {}
            if causal
            else {
                "decoder_input_ids": torch.tensor([[self._start, *row.token_ids] for row in self.rows], device=device)
            }
        )
        with without_warnings():
            self._token_ids, self._kwargs = self._model.generate(
                inputs=token_ids,
                attention_mask=mask,
                max_new_tokens=max(row.remaining for row in self.rows),
                num_beams=1,
                num_return_sequences=1,
                do_sample=False,
                custom_generate=_hand_back,
                **begun,
            )
        return self._forward(None)

    def step(self) -> torch.Tensor:
        """Append one token per row that still runs."""
        column = torch.full_like(self._token_ids[:, :1], self._pad)
        column[self._alive, 0] = torch.tensor([row.token_ids[-1] for row in self.rows], device=column.device)
        self._token_ids = torch.cat([self._token_ids, column], dim=1)
        return self._forward(1 if self._kwargs["use_cache"] else None)

    def keep(self) -> None:
        """Answer for the rows that still run; the others go on as padding."""
        self._alive = [place for place, row in zip(self._alive, self.rows, strict=True) if not row.done]
        self.rows = [row for row in self.rows if not row.done]

    def _forward(self, new: int | None) -> torch.Tensor:
        model = self._model
        inputs = model.prepare_inputs_for_generation(
            self._token_ids,
            next_sequence_length=new,
            is_first_iteration=new is None,
            **self._kwargs,
        )
        outputs = model(**inputs, return_dict=True)
        self._kwargs = model._update_model_kwargs_for_generation(  # noqa: SLF001 - what generate() calls
            outputs, self._kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        scores: torch.Tensor = outputs.logits[self._alive, -1]
        return scores


def _hand_back(
    model: Any,  # noqa: ARG001 - generate() decides the signature
    input_ids: torch.Tensor,
    logits_processor: object,  # noqa: ARG001
    stopping_criteria: object,  # noqa: ARG001
    generation_config: object,  # noqa: ARG001
    **model_kwargs: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return what generate() prepared, in place of a decoding loop."""
    return input_ids, model_kwargs
