"""generate's batch, for families whose cache only generate knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmkit._quiet import without_warnings
from lmkit.engine.decoders import Decoder, input_device, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.row import Row

__all__ = ["PreparedDecoder"]


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
