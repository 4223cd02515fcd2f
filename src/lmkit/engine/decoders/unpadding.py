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
from lmkit.kernels import attention, rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("lmkit")

TRIAL = 256
"""How many tokens are to be saved before it is tried, which takes as long as to read half as many."""

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

    Only one that attends by lmkit's function, keeps plain keys and values, and takes positions can; one whose mask says
    more than what is seen, or that looks at tokens beside each other outside of attention, does not.
    """
    takes = "position_ids" in inspect.signature(model.forward).parameters
    plain = KeyValues(model.config.get_text_config(decoder=True)).plain
    if not (attention.is_on(model) and takes and plain) or rotary.scaling(model).kind:
        return False
    try:
        ways = [_read(model, pad, unpads=way) for way in (False, True)]
    except Exception as error:  # noqa: BLE001 - what cannot be tried is not relied on
        logger.info("prompts are read with padding, for without it the model fails: %s", error)
        return False
    same = all(alike(found, expected) for expected, found in zip(*ways, strict=True))
    if not same:
        logger.info("prompts are read with padding, for without it the model's scores are others")
    return same


def _read(model: Any, pad: int, *, unpads: bool) -> Sequence[torch.Tensor]:
    """Read ordinary tokens, and one more behind each row; return the scores behind both."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    middle = vocabulary // 2
    texts = [range(middle + many, middle + 2 * many) for many in LENGTHS]
    rows: list[Any] = [_Row(tuple(token % vocabulary for token in text)) for text in texts]
    none = [(None, 0)] * len(rows)
    decoder = CausalDecoder(model, rows, pad, none, scaling=rotary.Scaling(), unpads=lambda _saved: unpads)
    first = decoder.fill(max(LENGTHS))
    assert first is not None  # noqa: S101 - all columns were read
    return first, decoder.step(torch.full((len(rows), 1), middle, device=first.device))
