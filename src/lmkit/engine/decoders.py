"""The forward passes of a batch: lmkit's own, and generate's for families lmkit cannot drive.

Both keep a batch's inputs and cache and answer with scores for the next token, so the loop above does not
know which one it steps.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lmkit._quiet import without_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.row import Row

__all__ = [
    "CachedDecoder",
    "Decoder",
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


class Decoder(Protocol):
    """A batch whose rows advance together, a token each."""

    def prefill(self) -> torch.Tensor:
        """Read the inputs; return scores in float32. *Shape:* `(rows, vocabulary)`."""
        ...

    def step(self, token_ids: list[int]) -> torch.Tensor:
        """Append one token per row; return scores as `prefill` does."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, given by their places in the batch."""
        ...


def pads(model: Any) -> bool:
    """Say whether rows of different lengths may share a batch of this model."""
    return bool(model.config.is_encoder_decoder or model.config.model_type not in PADDING_SENSITIVE)


def drives(model: Any) -> bool:
    """Say whether `CachedDecoder` can run the model: it takes a cache of plain and sliding layers."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not (takes_cache and pads(model) and model._supports_default_dynamic_cache()):  # noqa: SLF001
        return False
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in known for layer in _cache(model).layers)


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def input_device(model: Any) -> torch.device:
    """Return where a model's inputs belong; a fully offloaded one sits on `meta` and computes elsewhere."""
    placed = getattr(model, "hf_device_map", None) or {}
    for where in placed.values():
        if where != "disk":
            return torch.device(where)
    return torch.device("cpu") if model.device.type == "meta" else model.device


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool
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


class CachedDecoder:
    """lmkit's own batch: plain `forward` calls over a cache that lmkit holds."""

    def __init__(self, model: Any, rows: Sequence[Row], pad: int, decoder_start: int | None) -> None:
        """Lay out the rows: prompts padded on the left, an encoder's sources on the right."""
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted and decoder_start is None
        self._kept = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = _cache(model)
        self._encoded: Any = None
        device = input_device(model)
        sources = [row.request.input_ids for row in rows]
        self._token_ids, self._mask = padded(sources, pad, device, left=decoder_start is None)
        if decoder_start is not None:
            self._start_encoder(decoder_start)

    def _start_encoder(self, decoder_start: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._encoded = self._model.get_encoder()(
            input_ids=self._token_ids, attention_mask=self._mask, return_dict=True
        )
        self._cache = EncoderDecoderCache(self._cache, DynamicCache())
        self._token_ids = torch.full_like(self._token_ids[:, :1], decoder_start)

    def prefill(self) -> torch.Tensor:
        """Read the prompts, or an encoder-decoder's first token."""
        return self._forward(self._token_ids)

    def step(self, token_ids: list[int]) -> torch.Tensor:
        """Append one token per row."""
        if self._encoded is None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(torch.tensor(token_ids, device=self._token_ids.device)[:, None])

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows from the cache, the mask and the encoder's output."""
        chosen = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]
        if self._encoded is not None:
            self._encoded.last_hidden_state = self._encoded.last_hidden_state[chosen]

    def _forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._encoded is not None:
            inputs = {
                "encoder_outputs": self._encoded,
                "attention_mask": self._mask,
                "decoder_input_ids": token_ids,
            }
        else:
            # Without padding generate() passes no mask, which takes a faster attention: the same here.
            inputs = {
                "input_ids": token_ids,
                "attention_mask": None if self._mask.all() else self._mask,
            }
            if self._positions:
                places = (self._mask.cumsum(-1) - 1).masked_fill(self._mask == 0, 0)
                inputs["position_ids"] = places[:, -token_ids.shape[1] :]
        outputs = self._model(**inputs, **self._kept, past_key_values=self._cache, use_cache=True, return_dict=True)
        scores: torch.Tensor = outputs.logits[:, -1].float()
        return scores


class PreparedDecoder:
    """A batch of a family with a cache of its own: generate() prepares every forward.

    Rows that ended stay in the batch and are fed padding, as in generate().
    """

    def __init__(self, model: Any, rows: Sequence[Row], pad: int) -> None:
        """Have generate() prepare the batch; it hands back instead of decoding."""
        token_ids, mask = padded(
            [row.request.input_ids for row in rows],
            pad,
            input_device(model),
            left=not model.config.is_encoder_decoder,
        )
        self._model = model
        self._pad = pad
        self._alive = list(range(len(rows)))
        with without_warnings():
            self._token_ids, self._kwargs = model.generate(
                inputs=token_ids,
                attention_mask=mask,
                max_new_tokens=max(row.request.config.max_new_tokens or 1 for row in rows),
                num_beams=1,
                num_return_sequences=1,
                do_sample=False,
                custom_generate=_hand_back,
            )

    def prefill(self) -> torch.Tensor:
        """Read the prompts, or an encoder-decoder's first token."""
        return self._forward(None)

    def step(self, token_ids: list[int]) -> torch.Tensor:
        """Append one token per row that still runs."""
        column = torch.full_like(self._token_ids[:, :1], self._pad)
        column[self._alive, 0] = torch.tensor(token_ids, device=column.device)
        self._token_ids = torch.cat([self._token_ids, column], dim=1)
        return self._forward(1 if self._kwargs["use_cache"] else None)

    def keep(self, rows: list[int]) -> None:
        """Answer for these rows only; the others go on as padding."""
        self._alive = [self._alive[row] for row in rows]

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
        scores: torch.Tensor = outputs.logits[self._alive, -1].float()
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
