"""Loads take turns, silently, and leave no setting of the process behind."""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit._forks import renew, share
from lmkit._interrupts import holding, surely
from lmkit._quiet import quiet, without_warnings
from lmkit.planning.machine import accelerator

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ResultT = TypeVar("ResultT")


class _OneAtATime:
    """transformers builds a model with torch's default dtype set to the model's: a setting of the whole process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        share(self)

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        return renew(self._lock)

    def __call__(self, do: Callable[[], ResultT]) -> ResultT:
        """Call `do` when it is this thread's turn, in silence; what a load sets does not outlast it."""
        return holding(self._lock, lambda: silently(lambda: _settings_kept(do)))


def silently(do: Callable[[], ResultT]) -> ResultT:
    """Call `do` while the libraries below say nothing."""
    return without_warnings(lambda: quiet(do))  # imports for the silence warn, too


def _settings_kept(do: Callable[[], ResultT]) -> ResultT:
    """Put torch's settings back: some models draw numbers for what they then compute or load."""
    import torch

    dtype, grad, states = torch.get_default_dtype(), torch.is_grad_enabled(), _random_states()
    overrides: Any = torch.overrides
    stack = overrides._get_current_function_mode_stack  # noqa: SLF001 - there is no public one
    modes = stack()  # such as a default device

    def undo() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        while (now := stack()) != modes[: len(now)]:
            overrides._pop_mode()  # noqa: SLF001
        for mode in modes[len(stack()) :]:
            overrides._push_mode(mode)  # noqa: SLF001
        for put, state in states:
            put(state)

    return surely(do, undo)


def without_pool(do: Callable[[], ResultT]) -> ResultT:
    """Have transformers read tensors in this thread: Ctrl-C inside its pool's locks would keep Python from exiting.

    On a CPU its threads save nothing: what is read is mapped, and torch converts with all cores.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    if name in os.environ:
        return do()

    def alone() -> ResultT:
        os.environ[name] = "1"
        return do()

    return surely(alone, lambda: os.environ.pop(name, None))


def _random_states() -> list[tuple[Callable[[torch.Tensor], None], torch.Tensor]]:
    import torch

    found: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    if kind := accelerator():
        module = torch.get_device_module(kind)
        for number in range(torch.accelerator.device_count()):
            put = functools.partial(module.set_rng_state, device=number)
            found.append((put, module.get_rng_state(number)))
    return found


in_turn = _OneAtATime()
