"""A step on CUDA that is recorded once and replayed: the launches of hundreds of kernels become one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger("lmkit.engine")

REPLAYED_ON, FEWEST = ("cuda",), 2
"""Where steps are replayed, and how many are run as they are before one is recorded: what needs memory once has it."""


class Replay:
    """Runs a step, and replays it for as long as what it reads and writes in place stays where it is.

    A record holds no inputs but copies of small ones: buffers that are let go are free.
    """

    def __init__(self) -> None:
        """Begin without a record."""
        self._key: object = None
        self._seen = 0
        self._recorded: tuple[Callable[[], None], dict[int, torch.Tensor], torch.Tensor] | None = None
        self._refused = False

    def __call__(self, run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], kept: range) -> torch.Tensor:
        """Run or replay the step `run` on `inputs`, of which those at the places `kept` are never copied."""
        key = [(one.data_ptr() if place in kept else 0, one.shape, one.stride()) for place, one in enumerate(inputs)]
        if key != self._key:
            self._key, self._seen, self._recorded = key, 0, None
        self._seen += 1
        if self._recorded is None and self._seen > FEWEST and not self._refused:
            self._record(run, inputs, kept)
        if self._recorded is None:
            return run(*inputs)
        replay, copies, found = self._recorded
        for place, copy in copies.items():
            copy.copy_(inputs[place], non_blocking=True)
        replay()
        return found.clone()  # the next replay writes it

    def _record(self, run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], kept: range) -> None:
        """Record the step, or take note that it cannot be."""
        copies = {place: one.clone() for place, one in enumerate(inputs) if place not in kept}
        fixed = [copies.get(place, one) for place, one in enumerate(inputs)]
        try:
            replay, found = recorded(lambda: run(*fixed), inputs[0].device)
        except Exception as error:  # noqa: BLE001 - whatever cannot be recorded runs as it is
            self._refused = True
            logger.warning("compiled steps are not replayed as CUDA graphs but launch kernel by kernel: %s", error)
        else:
            self._recorded = replay, copies, found


def recorded(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Record what `run` asks of CUDA, which computes nothing; return what replays it, and where its result will be.

    Not by `torch.cuda.graph`, which first gives all of the process's cached memory back.
    """
    cuda: Any = torch.cuda
    graph, stream = cuda.CUDAGraph(), cuda.Stream(device)
    stream.wait_stream(cuda.current_stream(device))
    with cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # others' threads may use the card meanwhile
        try:
            found = run()
        finally:
            graph.capture_end()
    cuda.current_stream(device).wait_stream(stream)
    return graph.replay, found
