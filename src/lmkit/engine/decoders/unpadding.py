"""Whether a causal model reads prompts without the padding between them: found by trying both ways."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lmkit.engine.body_and_head import alike
from lmkit.engine.cache import KeyValues
from lmkit.engine.decoders.causal import CausalDecoder
from lmkit.engine.failures import out_of_memory
from lmkit.kernels import attention, rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("lmkit")

TRIAL = 256
"""How many tokens could have been saved before it is tried, which takes as long as to read as many."""

LENGTHS = (9, 24, 3)
"""How many tokens the rows have that it is tried with."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What a batch asks of a row while it reads its prompt."""

    input_ids: tuple[int, ...]
    remaining: int = 1
    request: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "request", self)

    @property
    def length(self) -> int:
        return len(self.input_ids)


def unpads(model: Any, pad: int) -> bool:
    """Say whether `model` finds the same scores where prompts are read without padding, and behind them.

    Only some can (`_cannot`); of these one whose mask says more than what is seen, or that looks at tokens beside each
    other outside of attention, does not. What is found is logged.

    Raises:
        Exception: Memory is short, so that it could not be tried.
    """
    why = _cannot(model)
    try:
        ways = [] if why else [_read(model, pad, unpads=way) for way in (False, True)]
    except Exception as error:
        if out_of_memory(error):
            raise
        why, ways = f"a trial failed ({type(error).__name__}: {error})", []
    if not all(alike(found, expected) for expected, found in zip(*ways, strict=True)):
        why = "without it the model's scores are others"
    logger.info("prompts are read with%s", f" padding, since {why}" if why else "out padding")
    return why is None


def _cannot(model: Any) -> str | None:
    """Say why a model is not tried at all."""
    if not attention.is_on(model):
        return "it does not attend by lmkit's function"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no positions"
    if not KeyValues(model.config.get_text_config(decoder=True)).plain:
        return "it keeps windows"
    return f"its positions are {kind}" if (kind := rotary.scaling(model).kind) else None


def _read(model: Any, pad: int, *, unpads: bool) -> Sequence[torch.Tensor]:
    """Read ordinary tokens, in two parts if without padding, and one more behind each row; return both scores."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    middle = vocabulary // 2
    texts = [range(middle + many, middle + 2 * many) for many in LENGTHS]
    rows: list[Any] = [_Row(tuple(token % vocabulary for token in text)) for text in texts]
    none = [(None, 0)] * len(rows)
    decoder = CausalDecoder(model, rows, pad, none, scaling=rotary.Scaling(), unpads=lambda _saved: unpads)
    first = None
    while first is None:
        first = decoder.fill(max(LENGTHS) // 3 if unpads else max(LENGTHS))
    return first, decoder.step(torch.full((len(rows), 1), middle, device=first.device))
