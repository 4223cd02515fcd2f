"""Beam searches that lmkit leaves to generate(): those of causal models, and of families it cannot drive."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from lmkit._quiet import without_warnings
from lmkit.engine.beams import described
from lmkit.engine.decoders import input_device, padded
from lmkit.engine.request import Outcome
from lmkit.engine.row import timing

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, Sequence

    from lmkit.encoding import Codec
    from lmkit.engine.request import Request
    from lmkit.results import Completion

__all__ = ["search", "together"]


BEAMS_PER_CALL = 32
"""How many beams, over all requests, one call of generate() carries."""


def together(searches: Mapping[int, Request], *, any_length: bool) -> list[int]:
    """Choose requests, by their places, that one call of generate() can run together: those like the first.

    Args:
        searches: The requests that wait, by their places.
        any_length: Whether the model takes rows of different lengths.
    """

    def key(request: Request) -> tuple[str, int]:
        return request.config.to_json_string(use_diff=False), 0 if any_length else len(request.input_ids)

    first = next(iter(searches.values()))
    places = [place for place, request in searches.items() if key(request) == key(first)]
    return places[: max(1, BEAMS_PER_CALL // first.config.num_beams)]


def search(
    model: Any,
    requests: Sequence[Request],
    pad: int,
    codec: Codec,
    cancelled: threading.Event,
) -> list[Outcome]:
    """Run requests of one config together and describe what each of them won.

    Args:
        model: The transformers model.
        requests: Requests that may run `together`.
        pad: The token that fills short rows; the mask hides it.
        codec: The model's tokenizer.
        cancelled: Ends the search at its next step when set.
    """
    encodes = model.config.is_encoder_decoder
    started = time.perf_counter()
    sources = [request.input_ids for request in requests]
    token_ids, mask = padded(sources, pad, input_device(model), left=not encodes)
    options: dict[str, Any] = {
        "generation_config": requests[0].config,
        "return_dict_in_generate": True,
        "output_scores": True,
        "stopping_criteria": [
            lambda token_ids, _scores: torch.full_like(token_ids[:, 0], cancelled.is_set(), dtype=torch.bool)
        ],
    }
    with without_warnings():
        found = model.generate(inputs=token_ids, attention_mask=mask, **options)
    seconds = time.perf_counter() - started
    skip = 1 if encodes else token_ids.shape[1]
    count = len(found.sequences) // len(requests)
    completions = [
        described(requests[number // count], sequence.tolist()[skip:], float(score), codec)
        for number, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True))
    ]
    return [_outcome(completions[start : start + count], seconds) for start in range(0, len(completions), count)]


def _outcome(completions: list[Completion], seconds: float) -> Outcome:
    tokens = max(completion.generated_tokens for completion in completions)
    return Outcome(tuple(completions), timing(seconds, seconds, tokens))
