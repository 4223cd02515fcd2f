"""What is left to `generate`: batches of families whose cache only it knows, and beam searches of causal models."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch

from lmkit._quiet import without_prints, without_warnings
from lmkit.engine.choice import NO_CHOICE, NO_SCORES
from lmkit.engine.decoders.base import Decoder
from lmkit.engine.inputs import input_device, padded
from lmkit.engine.processors import more
from lmkit.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.beam_search import Search
    from lmkit.engine.choice import Chooser
    from lmkit.engine.row import Row


class FallbackDecoder(Decoder):
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

    def fill(self, columns: int) -> torch.Tensor | None:  # noqa: ARG002 - generate() prepares whole inputs
        """Have generate() prepare the batch, which it hands back instead of decoding; then read it."""
        device = input_device(self._model)
        causal = self._start is None
        token_ids, mask = padded(
            [row.input_ids if causal else row.request.input_ids for row in self.rows], self._pad, device, left=causal
        )
        begun: dict[str, Any] = {}
        if not causal:
            answers = [[self._start, *row.token_ids] for row in self.rows]
            begun["decoder_input_ids"] = torch.tensor(answers, device=device)
        prepared = without_warnings(
            lambda: self._model.generate(
                inputs=token_ids,
                attention_mask=mask,
                max_new_tokens=max(row.remaining for row in self.rows),
                num_beams=1,
                num_return_sequences=1,
                do_sample=False,
                custom_generate=_hand_back,
                **begun,
            )
        )
        self._token_ids, self._kwargs = prepared
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
        inputs = without_prints(
            lambda: model.prepare_inputs_for_generation(
                self._token_ids, next_sequence_length=new, is_first_iteration=new is None, **self._kwargs
            )
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


class SearchDecoder(Decoder):
    """Beam searches of one caller, with the same settings, that generate() runs from the first token to the last."""

    def __init__(self, model: Any, rows: Sequence[Search], pad: int) -> None:
        """Take the searches in; `pad` fills short rows, and the mask hides it."""
        super().__init__(rows)
        self._model = model
        self._pad = pad
        self._found: list[tuple[list[int], int | None]] = []

    def fill(self, columns: int) -> torch.Tensor | None:  # noqa: ARG002 - generate() searches in one go
        """Search; return the scores of what was found, the best of each row first."""
        encodes = self._model.config.is_encoder_decoder
        sources = [row.request.input_ids for row in self.rows]
        token_ids, mask = padded(sources, self._pad, input_device(self._model), left=not encodes)
        cancelled = self.rows[0].ticket.cancelled
        first, start = self.rows[0], 1 if encodes else token_ids.shape[1]
        penalties, own = more(first, start)  # with processors of its own it is the only row
        watch = _Watch(len(self.rows), start)
        options: dict[str, Any] = {
            "generation_config": first.request.config,
            "return_dict_in_generate": True,
            "output_scores": True,
            "logits_processor": [*penalties, *own, watch],
            "output_logits": first.request.config.forced_eos_token_id is not None,
            "stopping_criteria": [
                lambda ids, _scores: torch.full_like(
                    ids[:, 0], cancelled.is_set() or bool(first.error), dtype=torch.bool
                )
            ],
        }
        search = functools.partial(self._model.generate, inputs=token_ids, attention_mask=mask, **options)
        found: Any = without_warnings(lambda: without_prints(search))
        sequences = found.sequences[:, 1 if encodes else token_ids.shape[1] :].tolist()
        self._found = [(ids, self._forced_over(found, number)) for number, ids in enumerate(sequences)]
        for row, told in zip(self.rows, watch.failed, strict=True):
            row.error = row.error or (EngineError(told) if told else None)
        scores: torch.Tensor = found.sequences_scores
        return scores

    def _forced_over(self, found: Any, number: int) -> int | None:
        """Return the likeliest token where another was forced on a sequence, at the end of the budget."""
        parents = [parent for parent in found.beam_indices[number].tolist() if parent >= 0]
        if found.logits is None or len(parents) < (self.rows[0].request.config.max_new_tokens or 0):
            return None
        return int(found.logits[len(parents) - 1][parents[-1]].argmax())

    def choose(self, chooser: Chooser, logits: torch.Tensor) -> int:  # noqa: ARG002 - generate() chose
        """End the rows with what was found, unless they are cancelled and leave at the next step."""
        if self.rows[0].ticket.cancelled.is_set():
            return 0
        found = [(score, *one) for score, one in zip(logits.tolist(), self._found, strict=True)]
        count = len(found) // len(self.rows)
        for place, row in enumerate(cast("list[Search]", self.rows)):
            if row.error is None:
                row.finish(found[place * count : (place + 1) * count])
        return sum(len(row.token_ids) for row in self.rows)

    def step(self) -> torch.Tensor:
        """Nothing is left to read once a search has ended."""
        raise NotImplementedError

    def keep(self) -> None:
        """All rows end together."""


class _Watch:
    """Notes rows of a beam search for which there is nothing to choose from; generate() goes on with any token."""

    def __init__(self, rows: int, prompt: int) -> None:
        self.failed = [""] * rows
        self._prompt = prompt

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Of scores that are not finite, log-probabilities are NaN; what the options forbid is -inf.
        rows = scores.view(len(self.failed), -1, scores.shape[-1])
        step = token_ids.shape[1] - self._prompt + 1
        broken, empty = rows.isnan().flatten(1).any(1).tolist(), (rows == -torch.inf).flatten(1).all(1).tolist()
        for row, told in enumerate(self.failed):
            if not told and (broken[row] or empty[row]):
                self.failed[row] = (NO_SCORES if broken[row] else NO_CHOICE).format(step=step)
        return scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf) if any(broken) else scores
