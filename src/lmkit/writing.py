"""What `Generator` and `Translator` share: rows that the engine continues token by token."""

from __future__ import annotations

import contextlib
import copy
import itertools
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit.engine import Engine, Request
from lmkit.errors import EngineError, WeightsError
from lmkit.generation import REPLACED, Options, Sample, build_config
from lmkit.results import Generation
from lmkit.wrapper import Loaded, News, Wrapper

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lmkit.engine import Outcome, Update
    from lmkit.results import EngineStats

__all__ = ["Job", "Writer"]

ResultT = TypeVar("ResultT", bound=Generation)


@dataclass(frozen=True, slots=True)
class Job:
    """A row on its way to the engine, with what its result will say.

    Attributes:
        request: What the engine is asked for.
        text: What the model reads, as text.
        truncated: Whether the text was cut.
        row: Its number in the call.
        source: A translation's text as given.
        source_language: A translation's source, as the checkpoint's code.
        target_language: A translation's target, as the checkpoint's code.
    """

    request: Request
    text: str
    truncated: bool
    row: int = 0
    source: str = ""
    source_language: str | None = None
    target_language: str | None = None


class Writer(Wrapper[Job, ResultT]):
    """A wrapper whose rows are written by the engine."""

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model and start an engine for it."""
        super().__init__(loaded)
        model: Any = loaded.model
        self._checkpoint_config = copy.deepcopy(model.generation_config)
        for name in REPLACED:
            # generate() fills what a config leaves open from the model's own, so it has to be gone from there.
            setattr(model.generation_config, name, None)
        self._start = decoder_start(model) if model.config.is_encoder_decoder else None
        self._engine: Engine | None = Engine(
            model,
            self._codec,
            self._start,
            prefix_bytes=loaded.prefix_cache_bytes,
            compile_folder=loaded.compile_folder,
        )

    def close(self) -> None:
        """Give the memory back; work in flight ends with an `EngineError` at its next step."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        super().close()

    def _request(
        self,
        options: Options,
        token_ids: Sequence[int],
        *,
        room: int,
        forced_bos_token_id: int | None = None,
    ) -> Request:
        """Make the request of a row whose answer may take at most `room` tokens."""
        config = build_config(
            options,
            self._checkpoint_config,
            prefix_tokens=len(token_ids) if self._start is None else 1,
            max_new_tokens=min(options.max_new_tokens, room),
            forced_bos_token_id=forced_bos_token_id,
        )
        sampled = isinstance(options.mode, Sample)
        return Request(
            input_ids=tuple(token_ids),
            config=config,
            copies=options.num_return_sequences if sampled else 1,
            stop=options.stop or tuple(self._checkpoint_config.stop_strings or ()),
            seed=options.seed if sampled else None,
            logprobs=options.logprobs,
            lookup=options.lookup,
        )

    def _options(self, given: Mapping[str, Any]) -> Options:
        return Options.of(given, self._checkpoint_config).with_seed()

    def _check(self, options: dict[str, Any]) -> None:
        self._options(options)

    def _run(
        self,
        jobs: Iterable[Job | None],
        *,
        stream: bool = False,
        lazy: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Iterator[News[ResultT] | None]:
        taken: dict[int, Job] = {}

        def requests() -> Iterator[Request | None]:
            numbers = itertools.count()
            for job in jobs:
                if job is not None:
                    taken[next(numbers)] = job
                yield None if job is None else job.request

        run = self._opened_engine.run(requests(), stream=stream, lazy=lazy, cancelled=cancelled)
        with contextlib.closing(run):  # type: ignore[type-var]  # a generator
            for update in run:
                yield None if update is None else self._news(update, taken)

    def _news(self, update: Update, taken: dict[int, Job]) -> News[ResultT]:
        if update.outcome is None and update.error is None:
            return News(update.index, update.text)
        job = taken.pop(update.index)
        result = None if update.outcome is None else self._result(job, update.outcome)
        error = None if update.error is None else failure(update.error, job.row)
        return News(update.index, update.text, result, error)

    @property
    def _opened_engine(self) -> Engine:
        if self._engine is None:
            self._opened  # noqa: B018 - raises: the wrapper was closed
        assert self._engine is not None  # noqa: S101 - closing takes both away together
        return self._engine

    @property
    def stats(self) -> EngineStats:
        """What the engine holds at the moment, and what it has done so far."""
        return self._opened_engine.stats()

    @abstractmethod
    def _result(self, job: Job, outcome: Outcome) -> ResultT:
        """Describe a row that ended."""


def decoder_start(model: Any) -> int:
    """Return the token that an encoder-decoder's answers begin with.

    Raises:
        WeightsError: Its generation config names none, or one per row.
    """
    config = model.generation_config
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if not isinstance(start, int):
        msg = (
            f"the checkpoint's decoder_start_token_id is {start!r}, so there is no telling how an answer begins: "
            "set one token id in its generation_config.json."
        )
        raise WeightsError(msg)
    return start


def failure(error: EngineError, row: int) -> EngineError:
    """Say in the message which row of the call failed."""
    named = EngineError(f"row {row}: {error}")
    named.__cause__ = error.__cause__
    return named
