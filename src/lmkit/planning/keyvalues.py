"""What keys and values of one row take, measured on a model without memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from lmkit._borrowed import cache_of

SEEN, ANSWERED = 3, 2
"""How many tokens the model without memory reads, and as an encoder-decoder writes, to see its keys and values."""


@dataclass(frozen=True, slots=True)
class KeyValueBytes:
    """What keys and values of one row take.

    Attributes:
        per_token: For each token, in layers that keep all of them.
        windows: For each token in layers that only keep the newest ones: how many those are at most, and bytes.
        fixed: However many tokens there are: the state of recurrent layers.
        per_source_token: For each token of an encoder-decoder's source.
    """

    per_token: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    fixed: int = 0
    per_source_token: int = 0

    def of(self, tokens: int, source_tokens: int = 0) -> int:
        """Return the bytes of a row with so many tokens."""
        kept = sum(min(tokens, most) * size for most, size in self.windows)
        return self.fixed + tokens * self.per_token + kept + source_tokens * self.per_source_token


def tried(model: Any, *, keeps: bool = True) -> Any:
    """Have a model on the meta device read a few tokens; return its outputs, or None if it does not run without values.

    Its mixtures of experts compute with all of them from then on: which ones are chosen has no value there.
    """
    token_ids = torch.ones(1, SEEN, dtype=torch.long, device="meta")
    more = {"decoder_input_ids": token_ids[:, :ANSWERED]} if model.config.is_encoder_decoder else {}
    kept = {"use_cache": True} if keeps else {}
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config._experts_implementation = "batched_mm"  # noqa: SLF001 - the one that computes all
    with torch.no_grad(), contextlib.suppress(Exception):
        return model(input_ids=token_ids, **kept, **more)
    return None


def key_values(outputs: Any, *, encodes: bool) -> KeyValueBytes | None:
    """Measure the shapes of what a model keeps of the tokens that it was `tried` with; `encodes` if it has two stacks.

    Returns:
        None where it keeps nothing that can be measured.
    """
    with contextlib.suppress(Exception):
        if (cache := cache_of(outputs)) is not None:
            own = getattr(cache, "self_attention_cache", cache)
            across = getattr(cache, "cross_attention_cache", None)
            sources = 0 if across is None else sum(_states(layer) for layer in across.layers) // SEEN
            return _measured(own.layers, ANSWERED if encodes else SEEN, sources)
    return None


def _measured(layers: Any, tokens: int, sources: int) -> KeyValueBytes:
    per_token, fixed = 0, 0
    windows: Counter[int] = Counter()
    for layer in layers:
        size = _states(layer) // tokens
        window = getattr(layer, "sliding_window", None)
        if isinstance(window, int):
            windows[window - 1] += size  # the newest token's own are computed with, then the oldest let go
        else:
            per_token += size
        for states in ("conv_states", "recurrent_states"):
            kept = getattr(layer, states, None) or ()
            parts = kept.values() if isinstance(kept, dict) else kept
            fixed += sum(part.nbytes for part in parts if part is not None)
    return KeyValueBytes(per_token, tuple(sorted(windows.items())), fixed, sources)


def _states(layer: Any) -> int:
    """Count the bytes of a layer's keys and values."""
    parts = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
