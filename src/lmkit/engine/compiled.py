"""Compiled graphs of models: decode steps of causal models and encoder-decoders, and passes of masked models."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lmkit._borrowed import cache_name
from lmkit.engine.body_and_head import Reader
from lmkit.engine.cache import KeyValues, WindowLayer
from lmkit.engine.graph import LARGEST, Graph, Taken
from lmkit.kernels import attention
from lmkit.kernels.quantized import runs_torch_kernels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.engine.cache import GrowingLayer

ROWS, WIDTH, WINDOW = 64, 256, 192
"""The rows and the columns of a step that are traced, plain and in windows: a graph takes any, but for `most_rows`."""

COLUMNS, READ, BEAMS = 40, 24, 4
"""The same of a source, of what is read of its answers, and of answers to one source."""

TEXTS, TOKENS, PLACES = 16, 48, 32
"""The texts, their tokens and the scored places of a pass that are traced: fewer tokens than any model takes."""

VERIFIED = 32
"""How many rows are compared with the model's own after compilation."""


class _Slot(DynamicLayer):
    """Buffers of one layer, of which so many columns are `read`; a step writes the column `slot`."""

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor, read: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._slot, self._read = keys, values, slot, read
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; return all of them."""
        assert self.keys is not None  # noqa: S101 - for the type checkers
        assert self.values is not None  # noqa: S101
        self.keys.index_copy_(2, self._slot, key_states)
        self.values.index_copy_(2, self._slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return how many columns are read; 0 where positions are given."""
        return self._read


class _Source(DynamicLayer):
    """Keys and values of a source, which stay as they are."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True


class CompiledStep(Graph):
    """The compiled step of a causal model; only the thread that leads its engine calls it.

    Attributes:
        most_rows: How many rows it takes. Models on torch's quantized kernels are traced for one: with more, their
            layers are no faster compiled, and one row that is known to be one is a tenth faster.
    """

    def __init__(self, model: Any) -> None:
        """Load or compile the step of `model`."""
        self.most_rows = 1 if runs_torch_kernels(model) else sys.maxsize
        self._cached = cache_name(model) or ""
        super().__init__(model)

    def fits(self, rows: int, layers: Sequence[GrowingLayer]) -> bool:
        """Say whether it takes so many rows of these layers: on a card kernels count a tensor's numbers in 32 bits."""
        if self._device.type == "cpu" or rows > self.most_rows:
            return rows <= self.most_rows
        heads = getattr(self._model.config.get_text_config(decoder=True), "num_attention_heads", 1)
        columns = 2 * max(layer.columns for layer in layers)  # a step may have them grow by half
        keys = self._sample.layers[0].keys
        return bool(rows * columns * max(heads, keys.shape[1]) * keys.shape[3] <= LARGEST)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        columns: Sequence[tuple[torch.Tensor, torch.Tensor]],
        buffers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Read a token per row.

        Args:
            token_ids: *Shape:* `(rows, 1)`.
            positions: Their places in the texts. *Shape:* `(rows, 1)`.
            columns: Of each layer in `firsts` the column to write (*shape:* `(1,)`), and which ones each row sees, its
                own among them (*shape:* `(rows, 1, 1, width)`, bool).
            buffers: Keys and values of each layer, contiguous, written in place. *Shape:* `(rows, heads, width, size)`.

        Returns:
            The scores that follow. *Shape:* `(rows, vocabulary)`.
        """
        keys, values = [pair[0] for pair in buffers], [pair[1] for pair in buffers]
        slots, masks = zip(*columns, strict=True)
        first = 2 + len(slots)
        kept = range(first, first + len(keys) + len(values))
        return self._replayed([token_ids, positions, *slots, *keys, *values, *masks], kept)

    @functools.cached_property
    def _sample(self) -> KeyValues:
        """Run the model on one token per row, to see the shapes of its keys and values."""
        cache = KeyValues(self._model.config.get_text_config(decoder=True))
        self._model(input_ids=self._some_tokens(1), use_cache=True, **{self._cached: cache.cache})
        return cache

    @functools.cached_property
    def _kinds(self) -> list[str]:
        """What kind of attention each layer has, in transformers' words."""
        windows = (isinstance(layer, WindowLayer) for layer in self._sample.layers)
        return ["sliding_attention" if window else "full_attention" for window in windows]

    @property
    def firsts(self) -> list[int]:
        """The first layer of each kind: others of that kind have the same columns."""
        return [self._kinds.index(kind) for kind in dict.fromkeys(self._kinds)]

    def _some_tokens(self, seed: int) -> torch.Tensor:
        return self._tokens(min(VERIFIED, self.most_rows), 1, seed)

    @property
    def _sizes(self) -> Mapping[str, int]:
        traced = {"full_attention": WIDTH, "sliding_attention": WINDOW}
        return {"rows": min(ROWS, self.most_rows)} | {kind: traced[kind] for kind in dict.fromkeys(self._kinds)}

    @property
    def _takes(self) -> Sequence[Taken]:
        kinds, layers = [*dict.fromkeys(self._kinds)], self._sample.layers
        one: Taken = (("rows", 1), torch.long)
        buffers: list[Taken] = [
            (("rows", part.shape[1], kind, part.shape[3]), part.dtype)
            for side in ("keys", "values")
            for kind, part in zip(self._kinds, (getattr(layer, side) for layer in layers), strict=True)
        ]
        slots: list[Taken] = [((1,), torch.long) for _ in kinds]
        return [one, one, *slots, *buffers, *((("rows", 1, 1, kind), torch.bool) for kind in kinds)]

    def _traced(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the model's forward."""
        count, layers = len(self.firsts), len(self._kinds)
        token_ids, positions, *rest = inputs
        keys, values = rest[count : count + layers], rest[count + layers : -count]
        # Without asserts of sizes, inductor of torch 2.14 knows only those that the graph itself asks for, and not of a
        # bool tensor: the width is that of the first keys.
        slots = [slot.clamp(max=keys[first].shape[2] - 1) for slot, first in zip(rest, self.firsts, strict=False)]
        names = [self._kinds[first] for first in self.firsts]
        written: list[Any] = [
            _Slot(key, value, slots[names.index(kind)])
            for key, value, kind in zip(keys, values, self._kinds, strict=True)
        ]
        outputs: Any = self._model(
            input_ids=token_ids,
            attention_mask=rest[-1] if count == 1 else dict(zip(names, rest[-count:], strict=True)),
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{self._cached: Cache(layers=written)},
        )
        scores: torch.Tensor = outputs.logits[:, -1]
        return scores

    def _tried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one step behind that of the sample."""
        token_ids = self._some_tokens(2)
        positions = torch.ones_like(token_ids)
        seen = torch.arange(WIDTH, device=self._device) < 2  # noqa: PLR2004 - a token before, and its own
        room = functools.partial(torch.nn.functional.pad, pad=(0, 0, 0, WIDTH - 1))
        buffers = [(room(layer.keys), room(layer.values)) for layer in self._sample.layers]
        slot = torch.ones(1, dtype=torch.long, device=self._device)
        columns = slot, seen.expand(len(token_ids), 1, 1, -1).contiguous()
        found = self(token_ids, positions, [columns for _ in self.firsts], buffers)
        before = {self._cached: self._sample.cache}
        return found, self._model(input_ids=token_ids, position_ids=positions, use_cache=True, **before).logits[:, -1]


class CompiledDecoderStep(Graph):
    """The compiled step of an encoder-decoder, whose answers have one length; only its engine's leader calls it.

    Attributes:
        most_rows: How many answers it takes; see `CompiledStep`.
    """

    def __init__(self, model: Any) -> None:
        """Load or compile the step of `model`."""
        self.most_rows = 1 if runs_torch_kernels(model) else sys.maxsize
        self._cached = cache_name(model) or ""
        self._beams = BEAMS if attention.is_on(model) and self.most_rows > 1 else 1
        super().__init__(model)

    def fits(self, answers: int, read: int) -> bool:
        """Say whether it takes so many answers, of so many tokens."""
        return answers <= self.most_rows and read < self.most_positions

    def __call__(
        self,
        token_ids: torch.Tensor,
        own: Sequence[tuple[torch.Tensor, torch.Tensor]],
        across: Sequence[tuple[torch.Tensor, torch.Tensor]],
        mask: torch.Tensor,
        read: int,
    ) -> torch.Tensor:
        """Read a token per answer.

        Args:
            token_ids: *Shape:* `(answers, 1)`.
            own: Keys and values of each layer, contiguous, written in place. *Shape:* `(answers, heads, width, size)`.
            across: Those of the sources, which answers side by side may share. *Shape:* the same, with `sources` rows.
            mask: Which columns of its source each answer sees. *Shape:* `(answers, source columns)`.
            read: How many tokens of each answer were read: the column to write.

        Returns:
            The scores that follow. *Shape:* `(answers, vocabulary)`.
        """
        states = [part for pairs in (own, across) for side in zip(*pairs, strict=True) for part in side]
        return self._compute(token_ids, token_ids.new_empty(read), *states, mask.bool()[:, None, None])

    @functools.cached_property
    def _sample(self) -> tuple[Any, Any, torch.Tensor, dict[str, Any]]:
        """Read a source and the first token of an answer; return both caches, the mask and what the model is given."""
        rows = min(VERIFIED, self.most_rows)
        token_ids = self._tokens(rows // self._beams, 5, 1).repeat_interleave(self._beams, 0)
        mask = torch.ones_like(token_ids)
        mask[: self._beams, 3:] = 0
        own, across = KeyValues(self._model.config.get_text_config(decoder=True)), KeyValues()
        encoded = self._model.get_encoder()(input_ids=token_ids, attention_mask=mask, return_dict=True)
        cache = EncoderDecoderCache(own.cache, across.cache)
        inputs = {"encoder_outputs": encoded, "attention_mask": mask, self._cached: cache, "use_cache": True}
        self._model(**inputs, decoder_input_ids=self._tokens(rows, 1, 2))
        return own, across, mask, inputs

    @property
    def _sizes(self) -> Mapping[str, int]:
        rows = min(ROWS, self.most_rows)
        sources = {"sources": rows // self._beams} if self._beams > 1 else {}
        return {"rows": rows, "width": WIDTH, "columns": COLUMNS, "read": READ, **sources}

    @property
    def _takes(self) -> Sequence[Taken]:
        own, across, *_ = self._sample
        sources = "sources" if self._beams > 1 else "rows"
        states: list[Taken] = [
            ((rows, part.shape[1], columns, part.shape[3]), part.dtype)
            for rows, columns, cache in (("rows", "width", own), (sources, "columns", across))
            for side in ("keys", "values")
            for part in (getattr(layer, side) for layer in cache.filled)
        ]
        one: list[Taken] = [(("rows", 1), torch.long), (("read",), torch.long)]
        return [*one, *states, (("rows", 1, 1, "columns"), torch.bool)]

    def _traced(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the model's decoder."""
        token_ids, so_far, *states, mask = inputs
        own, across = states[: len(states) // 2], states[len(states) // 2 :]
        layers, width, read = len(own) // 2, own[0].shape[2], so_far.shape[0]
        slot = torch.full((1,), read, device=self._device).clamp(max=width - 1)
        slots: list[Any] = [_Slot(*pair, slot, read) for pair in zip(own[:layers], own[layers:], strict=True)]
        sources: list[Any] = [_Source(*pair) for pair in zip(across[:layers], across[layers:], strict=True)]
        seen = torch.arange(width, device=self._device) <= slot
        size = self._sample[3]["encoder_outputs"].last_hidden_state.shape[2]
        mask = mask.expand(-1, -1, -1, across[0].shape[2])  # as in `CompiledStep._traced`
        hidden = states[0].new_zeros(token_ids.shape[0], mask.shape[3], size)  # only its shape is asked for
        outputs: Any = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            decoder_input_ids=token_ids,
            decoder_attention_mask=seen.expand(token_ids.shape[0], 1, 1, -1),
            use_cache=True,
            return_dict=True,
            **{self._cached: EncoderDecoderCache(Cache(layers=slots), Cache(layers=sources))},
        )
        scores: torch.Tensor = outputs.logits[:, -1]
        return scores

    def _tried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one step behind that of the sample."""
        own, across, mask, inputs = self._sample
        token_ids = self._tokens(len(mask), 1, 3)
        room = functools.partial(torch.nn.functional.pad, pad=(0, 0, 0, WIDTH - 1))
        buffers = [(room(layer.keys), room(layer.values)) for layer in own.layers]
        once = [tuple(part[:: self._beams].contiguous() for part in (one.keys, one.values)) for one in across.layers]
        found = self(token_ids, buffers, once, mask, 1)
        return found, self._model(**inputs, decoder_input_ids=token_ids).logits[:, -1]


class CompiledPass(Graph):
    """The compiled pass of a masked model over whole texts, with scores at chosen places."""

    def __init__(self, model: Any, probe: Mapping[str, Any], *, typed: bool) -> None:
        """Load or compile the pass of `model`.

        Args:
            model: The model.
            probe: What it can be tried on, to find its head.
            typed: Whether it is told the types of tokens.
        """
        self._typed = typed
        with torch.no_grad():
            self._reader = Reader(model, probe)
            self._reader.body  # noqa: B018 - it is found by trying, not while tracing
        super().__init__(model)

    def __call__(self, inputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        """Read texts, and score the vocabulary at some places, as `Reader.at` does."""
        token_ids = inputs["input_ids"]
        mask, types = (inputs.get(name) for name in ("attention_mask", "token_type_ids"))
        mask = torch.ones_like(token_ids) if mask is None else mask
        kinds = [torch.zeros_like(token_ids) if types is None else types] if self._typed else []
        return self._compute(token_ids, mask, *kinds, places)

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {"rows": TEXTS, "tokens": TOKENS, "places": PLACES}

    @property
    def _takes(self) -> Sequence[Taken]:
        whole: Taken = (("rows", "tokens"), torch.long)
        return [*[whole] * (3 if self._typed else 2), ((2, "places"), torch.long)]

    def _traced(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Run the model's body, and its head at the places."""
        *whole, places = inputs
        names = ("input_ids", "attention_mask", "token_type_ids")
        return self._reader.at(dict(zip(names, whole, strict=False)), places)

    def _tried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows of which one is padded."""
        token_ids = self._tokens(4, 24, 1)
        mask = torch.ones_like(token_ids)
        mask[0, 16:] = 0
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        places = torch.stack([torch.arange(16, device=self._device) % most for most in (4, 16)])
        return self(inputs, places), self._reader.at(inputs, places)
