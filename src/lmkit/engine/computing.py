"""What every forward pass runs in: no gradients, silence, and one thread on an accelerator, whatever interrupts it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lmkit._interrupts import surely
from lmkit._quiet import hushed

if TYPE_CHECKING:
    from collections.abc import Callable

ResultT = TypeVar("ResultT")


def one_token(device: torch.device, do: Callable[[], ResultT]) -> ResultT:
    """Call `do`, which reads a token of each row, without cuDNN's attention: it makes a plan for every new length.

    That takes tens of milliseconds (docs/performance.md). The setting is the process's: others get torch's own kernels
    meanwhile.
    """
    cuda: Any = torch.backends.cuda
    if device.type != "cuda" or not cuda.cudnn_sdp_enabled():
        return do()

    def run() -> ResultT:
        cuda.enable_cudnn_sdp(False)  # noqa: FBT003
        return do()

    return surely(run, lambda: cuda.enable_cudnn_sdp(True))  # noqa: FBT003


def computed(do: Callable[[], ResultT]) -> ResultT:
    """Call `do` without gradients, while the libraries below are silent in this thread."""
    before = torch.is_grad_enabled()

    def run() -> ResultT:
        torch.set_grad_enabled(False)
        return hushed(do)

    return surely(run, lambda: torch.set_grad_enabled(before))


class Lane:
    """Where forward passes run: on a CPU in the thread that asks for them, else in one thread for all that ask.

    On an accelerator streams, which callers may set, handles of libraries and plans of kernels are a thread's own.

    Attributes:
        halted: Whether who asked was interrupted, so that the pass is to be the last.
    """

    def __init__(self, device: torch.device) -> None:
        """Run passes on `device`."""

        def begin() -> None:
            if device.index is not None:
                torch.accelerator.set_device_index(device.index)

        self._pool = None if device.type == "cpu" else ThreadPoolExecutor(1, "lmkit", begin)
        self.halted = False

    def __call__(self, do: Callable[[], ResultT]) -> ResultT:
        """Call `do`, and return when it has ended, whatever comes meanwhile."""
        if self._pool is None:
            return computed(do)
        try:
            running = self._pool.submit(lambda: computed(do))
        except RuntimeError:  # the interpreter ends, and lets no thread begin anything
            return computed(do)

        def over() -> None:
            self.halted = True
            wait([running])
            self.halted = False

        return surely(running.result, over)
