"""What a failed step is told as, to the rows that it was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmkit.errors import EngineError

if TYPE_CHECKING:
    import torch

CLOSED = "the model was closed: load it again to go on."

DEAD = (
    "an error has left the device unusable for this process ({error}): restart the process. What other rows were "
    "asked for is lost with it."
)

MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "allocation_failed",
    "out_of_device_memory",
)
"""What errors say where memory is short and their class does not tell: of CUDA itself, cuBLAS, cuDNN, MPS, XPU."""

INSIDE = (
    "this call comes from inside a forward pass of the same model, as a hook on it does, and would wait for itself: "
    "call the model when the pass has ended, or another one."
)


def step_failed(error: Exception) -> EngineError:
    """Wrap what a forward pass raised, for a row that it was made for."""
    failed = EngineError(f"a step of the model failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def out_of_memory(error: Exception) -> bool:
    """Recognise an allocation that failed, on an accelerator or on a CPU."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY)


def dead(error: Exception, device: torch.device) -> bool:
    """Say whether an error has left a device unusable, as a failed assertion in a kernel of CUDA does: ask it."""
    import torch

    if device.type == "cpu" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError as again:
        return not out_of_memory(again)
    return False


def no_memory(tokens: int, key_values: int, error: Exception) -> EngineError:
    """Say what a row of so many tokens needed, in bytes of keys and values, that does not fit, alone."""
    failed = EngineError(_NO_MEMORY.format(tokens=tokens, needed=key_values / 2**20, error=error))
    failed.__cause__ = error
    return failed


_NO_MEMORY = (
    "out of memory, with this row alone: its {tokens} tokens, prompt and answer, need about {needed:.0f} MiB of keys "
    "and values. Shorten the prompt or max_new_tokens, or free memory ({error})."
)
