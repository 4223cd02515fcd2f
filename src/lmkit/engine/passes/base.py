"""The runner of forward passes over given tokens: batches of like lengths, turns between threads, retries in halves."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from lmkit._forks import check_fork, renew, share
from lmkit._interrupts import holding, surely
from lmkit._tracebacks import frameless
from lmkit.engine.computing import Lane
from lmkit.engine.failures import CLOSED, DEAD, INSIDE, dead, out_of_memory, step_failed
from lmkit.engine.inputs import input_device
from lmkit.errors import EngineError, LmkitError
from lmkit.kernels.openmp import release_pool
from lmkit.planning.machine import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lmkit._interrupts import Flag
    from lmkit.engine.body_and_head import Reader
    from lmkit.engine.compiled import CompiledPass

TOKENS: Final = {"cpu": 2048}
"""How many tokens a pass reads at most, padding included; a row that is longer has a pass of its own."""

TOKENS_ELSEWHERE: Final = 16384

WHOLE: Final = 2**26
"""How many scores a pass of a model may give that runs with its head at all places: 256 MiB in float32."""

FLOATS: Final = 2**24
"""How many scores in float32 are computed at a time: 64 MiB."""

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")
ResultT = TypeVar("ResultT")


class Runner(ABC, Generic[ItemT, FoundT]):
    """Answers by forward passes over given tokens. Threads may share one; they take turns."""

    def __init__(self, model: Any, pad: int) -> None:
        """Serve `model`, filling short rows with the token `pad`."""
        self._model: Any = model
        self._pad = pad
        self._device = input_device(model)
        self._lane = Lane(self._device)
        self._turn = threading.RLock()
        self._runs: int | None = None  # the thread whose turn it is
        self._closed = False
        self._ended = CLOSED  # why it is
        self._reader: Reader | None = None  # known once the model was tried
        self._compiled: CompiledPass | None = None  # what reads in its place
        self._pads = True
        self._most = TOKENS.get(self._device.type, TOKENS_ELSEWHERE)
        # At how many places scores of the whole vocabulary may be held at a time.
        self._places = max(FLOATS // int(model.config.get_text_config(decoder=True).vocab_size), 1)
        share(self)

    def close(self) -> None:
        """Refuse further work, and let go of the model; calls in flight end at their next pass."""
        self._closed = True
        if self._turn.acquire(blocking=False):  # else whose turn it is closes once it has ended
            self._model = self._reader = self._compiled = None
            self._turn.release()

    @abstractmethod
    def _tried(self, sample: Any) -> Reader | None:
        """Try the model on a few tokens; return how its body and head are read apart, if it runs."""

    @abstractmethod
    def _run(self, batch: Sequence[ItemT]) -> Mapping[int, FoundT | EngineError]:
        """Read a batch, and answer for the rows in it by their numbers."""

    @abstractmethod
    def _numbers(self, batch: Sequence[ItemT]) -> Sequence[int]:
        """Return the numbers of the rows in a batch."""

    def _parts(self, item: ItemT) -> Sequence[ItemT]:
        """Divide what is one in a batch, if it can be read in several passes."""
        return [item]

    def _in_turn(self, do: Callable[[], ResultT]) -> ResultT:
        """Call `do`, which runs the model, when it is this thread's turn."""
        check_fork()
        if self._runs == threading.get_ident():
            raise EngineError(INSIDE)

        def run() -> ResultT:
            self._runs = threading.get_ident()
            return do()

        def mine() -> ResultT:
            with frameless:
                return self._lane(run)

        def over() -> None:
            self._runs = None

        try:
            return holding(self._turn, lambda: surely(mine, over))
        finally:
            if self._closed:
                self.close()

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        self._runs = None
        return renew(self._turn)

    def _ready(self, sample: Any = None) -> None:
        """Try the model, once; what it raises is an `EngineError`."""

        def ready() -> None:
            if self._reader is None and not self._closed:
                self._reader = self._tried(sample)
                if self._reader is not None and self._reader.body is None:
                    self._most = min(self._most, WHOLE // self._reader.expected.shape[-1])

        try:
            self._in_turn(ready)
        except LmkitError:
            raise
        except Exception as error:
            raise step_failed(error) from error

    def _answers(
        self,
        batches: Iterable[Sequence[ItemT]],
        cancelled: Flag | None = None,
        ended: Callable[[object], None] = lambda _row: None,
    ) -> dict[int, FoundT | EngineError]:
        """Run batches one after the other, and tell `ended` of each row; stop once `cancelled` is set."""
        found: dict[int, FoundT | EngineError] = {}
        try:
            for batch in batches:
                answers = self._attempt(batch, cancelled)
                for one in answers.values():
                    ended(one)
                found |= answers
        finally:
            release_pool()
        return found

    def _attempt(self, batch: Sequence[ItemT], cancelled: Flag | None) -> Mapping[int, FoundT | EngineError]:
        """Run a batch; if that fails, each half of it, so that one row does not take others down."""

        def run() -> Mapping[int, FoundT | EngineError]:
            over = self._closed or (cancelled is not None and cancelled.is_set())
            return dict.fromkeys(self._numbers(batch), EngineError(self._ended)) if over else self._run(batch)

        try:
            return self._in_turn(run)
        except Exception as error:  # noqa: BLE001 - what a pass raises ends its own rows only
            if dead(error, self._device):
                self._closed, self._ended = True, DEAD.format(error=error)
                return dict.fromkeys(self._numbers(batch), EngineError(self._ended))
            if out_of_memory(error):
                give_back()
            parts = batch if len(batch) > 1 else self._parts(batch[0])
            if middle := len(parts) // 2:
                halves = [self._attempt(half, cancelled) for half in (parts[:middle], parts[middle:])]
                return {**halves[0], **halves[1]}
            failed = step_failed(error)
        return dict.fromkeys(self._numbers(batch), failed)

    def _cut(self, lengths: Sequence[int], before: int = 0, scored: Sequence[int] | None = None) -> list[list[int]]:
        """Cut rows into batches of like lengths, the longest first.

        Args:
            lengths: How many tokens each row reads.
            before: How many columns stand before them that were read already.
            scored: At how many places of each row there are scores to hold, if these bound a batch.
        """
        batches: list[list[int]] = []
        places = 0
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            width = lengths[batches[-1][0]] if batches else 0
            rows = len(batches[-1]) + 1 if batches else 0
            places += scored[number] if scored else 0
            fits = rows and rows * width <= self._most and rows * (before + width) <= 2 * self._most
            if fits and places <= self._places and (self._pads or lengths[number] == width):
                batches[-1].append(number)
            else:
                batches.append([number])
                places = scored[number] if scored else 0
        return batches
