"""What every forward pass runs in: no gradients, and silence; both end with it whatever interrupts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from lmkit._interrupts import surely
from lmkit._quiet import hushed

if TYPE_CHECKING:
    from collections.abc import Callable

ResultT = TypeVar("ResultT")


def computed(do: Callable[[], ResultT]) -> ResultT:
    """Call `do` without gradients, while the libraries below are silent in this thread."""
    before = torch.is_grad_enabled()

    def run() -> ResultT:
        torch.set_grad_enabled(False)
        return hushed(do)

    return surely(run, lambda: torch.set_grad_enabled(before))
