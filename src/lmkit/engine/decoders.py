"""What a batch's forward passes have in common, and which models take which.

`CachedDecoder` and `EncodedDecoder` are lmkit's own, `PreparedDecoder` is generate's for families lmkit cannot drive.
Each keeps a batch's rows, inputs and cache and answers with scores for the next token, so the loop above does
not know which one it steps.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.engine.row import Row

__all__ = ["PADDING_SENSITIVE", "Decoder", "drives", "input_device", "padded", "pads"]

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
