"""From scores to tokens: transformers' own processors, then the likeliest token or a draw, per row."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lmkit.errors import EngineError
from lmkit.results import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LogitsProcessorList

    from lmkit.encoding import Codec
    from lmkit.engine.row import Row

__all__ = ["Chooser"]


class Chooser:
    """Chooses the next token of each row of a batch.

    Each row goes through the processors of its own config, on its own unpadded tokens: a repetition
    penalty never sees another row's padding, so a row of a batch equals its single run. Rows without
    processors, the common case, share one `argmax`.
    """

    def __init__(
        self,
        model: Any,
        codec: Codec,
        decoder_start: int | None,
    ) -> None:
        """Serve rows of `model`; an encoder-decoder's rows begin with the token `decoder_start`."""
        self._model = model
        self._codec = codec
        self._start = decoder_start

    def choose(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Give each row its next token.

        Args:
            rows: The rows that still run.
            logits: The model's scores in float32. *Shape:* `(rows, vocabulary)`.
        """
        likeliest = logits.argmax(-1).tolist()
        usable = (torch.isfinite(logits).any(-1) & ~torch.isnan(logits).any(-1)).tolist()
        for number, row in enumerate(rows):
            if not usable[number]:
                row.error = EngineError(_NO_SCORES.format(step=len(row.token_ids) + 1))
                continue
            if row.processors is None:
                row.processors = self._build(row)
            token_id: int | None = likeliest[number]
            if row.processors or row.request.config.do_sample:
                token_id = self._process(row, row.processors, logits[number])
            if token_id is None:
                row.error = EngineError(_NO_CHOICE.format(step=len(row.token_ids) + 1))
                continue
            row.accept(token_id, self._logprob(row, token_id, logits[number]))

    def _build(self, row: Row) -> LogitsProcessorList:
        """Build the row's processors the way `generate` does, in its order, from its resolved config."""
        model, request = self._model, row.request
        # generate() fills these in on a copy of the config, and its builder reads them from there.
        config = copy.deepcopy(request.config)
        model._prepare_special_tokens(config, True, device="cpu", batch_size=1)  # noqa: SLF001, FBT003
        source = torch.tensor([request.input_ids]) if model.config.is_encoder_decoder else None
        processors: LogitsProcessorList = model._get_logits_processor(  # noqa: SLF001 - the only builder there is
            generation_config=config,
            input_ids_seq_length=1 if source is not None else len(request.input_ids),
            encoder_input_ids=source if source is not None else torch.tensor([request.input_ids]),
            device="cpu",
            model_kwargs={},
        )
        return processors

    def _process(self, row: Row, processors: LogitsProcessorList, logits: torch.Tensor) -> int | None:
        """Choose among the scores that the row's options leave; None if they leave none to draw from."""
        prefix = row.request.input_ids if self._start is None else (self._start,)
        token_ids: Any = torch.tensor([[*prefix, *row.token_ids]])
        # Processors write into the scores they are given, and `logits` is still needed for logprobs.
        scores = processors(token_ids, logits[None].to("cpu", copy=True))[0]
        if not row.request.config.do_sample:
            return int(scores.argmax())
        # Inversion of the cumulative distribution: one number of the row's own stream per token.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        if not torch.isfinite(cumulative[-1]):
            return None
        drawn = torch.searchsorted(cumulative, row.uniform() * cumulative[-1], right=True)
        return int(drawn)

    def _logprob(self, row: Row, token_id: int, logits: torch.Tensor) -> TokenLogprob | None:
        count = row.request.logprobs
        if count is None:
            return None
        values = logits.log_softmax(-1)
        top = values.topk(min(count, len(values)))
        return TokenLogprob(
            *self._named(token_id, values),
            top=tuple(TokenLogprob(*self._named(other, values)) for other in top.indices.tolist()),
        )

    def _named(self, token_id: int, values: torch.Tensor) -> tuple[str, int, float]:
        return self._codec.token(token_id), token_id, float(values[token_id])


_NO_CHOICE = (
    "the options leave no token to draw at token {step}: suppress fewer tokens, or drop one of the "
    "options that forbid them."
)

_NO_SCORES = (
    "the model gave no finite score at token {step}, so there is nothing to choose from. "
    "This is usual where half precision overflows: load with precision='float32' or 'bfloat16'."
)
