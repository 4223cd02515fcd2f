"""What a failed step is told as, to the rows that it was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmkit.engine.scheduler import bytes_per_token
from lmkit.errors import EngineError

if TYPE_CHECKING:
    from lmkit.engine.row import Row

__all__ = ["no_memory", "out_of_memory", "step_failed"]


def step_failed(error: Exception) -> EngineError:
    """Wrap what a forward pass raised, for a row that it was made for."""
    failed = EngineError(f"a step of the model failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def out_of_memory(error: Exception) -> bool:
    """Recognise an allocation that failed, on an accelerator or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in told or "not enough memory" in told)


def no_memory(row: Row, model: Any, error: Exception) -> EngineError:
    """Say what a row needed that does not fit, alone."""
    tokens = len(row.input_ids) + row.remaining
    needed = tokens * bytes_per_token(model) / 2**20
    failed = EngineError(_NO_MEMORY.format(tokens=tokens, needed=needed, error=error))
    failed.__cause__ = error
    return failed


_NO_MEMORY = (
    "out of memory, with this row alone: its {tokens} tokens, prompt and answer, need about {needed:.0f} MiB of keys "
    "and values. Shorten the prompt or max_new_tokens, or free memory ({error})."
)
