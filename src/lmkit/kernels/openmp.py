"""torch's pools of OpenMP threads: one for each thread that has computed, kept as long as that thread lives.

libgomp lets the members of all pools wait less eagerly once there are more of them than cores. In another thread than
the first, an operation of 16 microseconds then takes 58 (2 cores): a step of a small model takes twice as long.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SOFT = 1
"""OpenMP's own word: settings stay, and the next operation makes a new pool, in 0.1 milliseconds."""


def release_pool() -> None:
    """Give back the pool of the calling thread, so that it slows down nobody else's; where torch uses libgomp."""
    _pause()(SOFT)


@functools.cache
def _pause() -> Callable[[int], object]:
    import torch

    # By its path: another library's OpenMP may be loaded too.
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            function: Callable[[int], object] = ctypes.CDLL(str(path)).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        return function
    return lambda _kind: None


if hasattr(os, "register_at_fork"):
    # A forked process has one thread, and would wait for those of the pool that it takes itself to have.
    os.register_at_fork(before=release_pool)
