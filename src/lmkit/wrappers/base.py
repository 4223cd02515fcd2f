"""What `Generator`, `Translator` and `Unmasker` share: the verbs, the attributes, and how to close."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeAlias, TypeVar, get_args

from lmkit._interrupts import surely
from lmkit.engine import Caller, Update
from lmkit.errors import EngineError, LmkitError, OptionError, shown
from lmkit.options.option import check_word, declared
from lmkit.options.per_row import split
from lmkit.planning.layout import ModulePlan, embedded_rows
from lmkit.planning.machine import give_back
from lmkit.results import ChunkKind, Generation, Results, TextChunk
from lmkit.structured.grammars import Grammars
from lmkit.structured.outputs import begun_json
from lmkit.text.codec import Codec, checked
from lmkit.wrappers.asynchronous import cancelled
from lmkit.wrappers.file_jobs import FileJobs
from lmkit.wrappers.letting_go import let_go, letting_go
from lmkit.wrappers.ordered_map import ReadAhead
from lmkit.wrappers.progress import bar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmkit.engine import Engine, MaskScorer, Scorer
    from lmkit.planning.plan import LoadPlan

VERBS = {"__call__", "chat", "map", "stream", "score", "rank"}
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")
OnError: TypeAlias = Literal["raise", "return"]
"""What `map` does with a row that fails: raise its error in its place, or return it in its place."""
Rows: TypeAlias = tuple[list[Any], bool]
"""The rows of a call, and whether it was a single one, whose result is no list."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer, the plan they were loaded by, and how to load them again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: LoadPlan
    reload: Callable[[], object]

    def engine(self, codec: Codec, start: int | None) -> Engine:
        """Start what writes rows; answers of an encoder-decoder begin with the token `start`."""
        from lmkit.engine import Engine

        return Engine(self.model, codec, self.plan, start)

    def grammars(self, codec: Codec, start: int | None) -> Grammars:
        """Return what answers are held to."""
        own: Any = self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else own or ()
        return Grammars(codec, [*ends, *self.plan.end_token_ids], encodes=start is not None)

    def scorer(self, codec: Codec) -> Scorer:
        """Start what scores texts, for a model that writes."""
        from lmkit.engine import Scorer
        from lmkit.engine.inputs import filler

        return Scorer(self.model, filler(self.model, codec.tokenizer.pad_token_id), own=self.plan.engine == "lmkit")

    def mask_scorer(self) -> MaskScorer:
        """Start what fills masks, and scores texts by them."""
        from lmkit.engine import MaskScorer
        from lmkit.engine.inputs import filler

        # Short rows are filled with the model's own token, by which some (mBART) find the ends of rows.
        known = getattr(self.model.config, "pad_token_id", None), self.tokenizer.pad_token_id
        return MaskScorer(self.model, filler(self.model, *known), compiled=self.plan.compiled)


class Wrapper(FileJobs, ABC, Generic[JobT, ResultT]):
    """A loaded model with verbs. Subclasses say what a row is and how rows are run."""

    def __init_subclass__(cls) -> None:
        """Have errors of the verbs hold no wrapper: who keeps one would keep the model."""
        super().__init_subclass__()
        for name in VERBS & vars(cls).keys():
            setattr(cls, name, letting_go(vars(cls)[name]))

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model; `lmkit.load` calls this."""
        given: object = loaded
        if not isinstance(given, Loaded):
            kind = type(self).__name__
            raise OptionError(f"{kind}({given!r}) loads nothing: call lmkit.load(task, name), which returns a {kind}.")
        self._loaded: Loaded | None = loaded
        self._reload = loaded.reload
        self._plan = loaded.plan
        self._codec = Codec(loaded.tokenizer)
        self._rows = embedded_rows(loaded.model)

    def _check_rows(self, token_ids: Iterable[int]) -> None:
        """Refuse tokens of a tokenizer that has more than the model: no kernel may see them.

        Raises:
            OptionError: One has no row in the embeddings.
        """
        beyond = max(token_ids, default=0)
        if self._rows is not None and beyond >= self._rows:
            raise OptionError(
                f"the text has the token {self._codec.token(beyond)!r} (number {beyond}), for which the model has no "
                f"embedding: it has {self._rows}. Leave it out, or load a tokenizer that was made for this model."
            )

    @abstractmethod
    def _job(self, given: Any, options: dict[str, Any], row: int) -> JobT:
        """Check one row and prepare it; raise an `LmkitError` if it cannot be run."""

    @abstractmethod
    def _check(self, options: dict[str, Any]) -> None:
        """Check the options that `map` uses for all rows; raise an `LmkitError` before any is read."""

    @abstractmethod
    def _run(self, jobs: Iterable[JobT | None], caller: Caller) -> Iterator[Update[ResultT] | None]:
        """Run prepared rows and tell what happens to each."""

    @property
    def name(self) -> str:
        """The name the model was loaded by."""
        return self._plan.name

    @property
    def plan(self) -> LoadPlan:
        """What was decided before the weights were read, with reasons."""
        return self._plan

    @property
    def precision(self) -> str:
        """The precision the weights are held in, as a word."""
        return self._plan.precision.name

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; no call changes it."""
        return self._opened.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer; no call changes it."""
        return self._opened.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        from lmkit.engine.inputs import input_device

        return input_device(self.model)

    @property
    def modules(self) -> tuple[ModulePlan, ...]:
        """What each part of the loaded model really holds, and where: as `plan.modules`, but measured."""
        from lmkit.planning.skeleton import held

        return tuple(
            ModulePlan(part.name, device, ", ".join(part.dtypes), part.bytes) for part, device in held(self.model)
        )

    @property
    def memory_bytes(self) -> int:
        """How many bytes the weights and buffers hold, scales of quantized ones included."""
        return sum(module.bytes for module in self.modules)

    @property
    def _opened(self) -> Loaded:
        if self._loaded is None:
            raise EngineError(f"{self.name} was closed and its memory given back: call lmkit.load(…) to open it again.")
        return self._loaded

    def close(self) -> None:
        """Give the memory back; work in flight ends with an `EngineError` at its next step, and holds it until then."""
        if self._loaded is not None:
            self._loaded = None
            give_back()

    def __enter__(self) -> Self:
        """Return the wrapper; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the wrapper."""
        self.close()

    def __repr__(self) -> str:
        """Show the class, the name, the precision and where the model is."""
        state = "closed" if self._loaded is None else f"{self.precision} on {self.device}"
        return f"<lmkit.{type(self).__name__} {self.name!r}, {state}>"

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        """Pickle how the model was loaded, not its weights: unpickling loads it again."""
        return self._reload, ()

    def _jobs(self, inputs: Sequence[Any], options: Mapping[str, Any], first: int = 0) -> list[JobT | LmkitError]:
        """Prepare rows, the first of them number `first` of its call; a row that cannot be run is its error."""
        rows = split(options, len(inputs), declared(self._accepted))
        self._opened  # noqa: B018 - a closed wrapper refuses here, before any row is read
        jobs: list[JobT | LmkitError] = []
        for number, (given, row) in enumerate(zip(inputs, rows, strict=True), first):
            try:
                jobs.append(self._job(given, row, number))
            except LmkitError as error:
                let_go(error)
                jobs.append(error)
        return jobs

    def _valid(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> list[JobT]:
        """Prepare every row; the first that cannot be run raises, before any of them ran."""
        jobs: list[JobT] = []
        for job in self._jobs(inputs, options):
            if isinstance(job, LmkitError):
                raise job
            jobs.append(job)
        return jobs

    def _call(self, rows: Rows, options: Mapping[str, Any]) -> ResultT | list[ResultT]:
        """Run all rows; an error of one is raised after the others ended, and carries their results."""
        inputs, single = rows
        options = dict(options)
        progress = options.pop("progress", None)
        jobs = self._valid(inputs, options)
        results: list[ResultT | None] = [None] * len(jobs)
        failed: LmkitError | None = None
        run = self._run(jobs, Caller(cancelled=cancelled()))

        def read() -> None:
            nonlocal failed
            pieces = sum(len(getattr(job, "requests", ())) or 1 for job in jobs)
            with bar(progress, pieces, unit="rows" if pieces == len(jobs) else "pieces") as ended:
                for news in filter(None, run):
                    failed = failed or news.error
                    results[news.index] = news.outcome
                    ended(news.outcome)

        try:
            surely(read, run.close)  # type: ignore[attr-defined]  # a generator
        except LmkitError as error:
            failed = error  # the model was closed: what had ended by then is kept
        if failed is not None:
            failed.results = results
            raise failed
        ended_well = Results(result for result in results if result is not None)
        return ended_well[0] if single else ended_well

    def _map(
        self, inputs: Iterable[Any], options: Mapping[str, Any], on_error: OnError
    ) -> Iterator[ResultT | LmkitError]:
        """Check the options now; read and run the inputs when asked for results."""
        check_word("on_error", on_error, get_args(OnError))
        if _single(inputs):
            raise OptionError(
                f"map takes an iterable of rows, not the one row {shown(inputs)}: call the model, or pass a list."
            )
        options = dict(options)
        progress = bar(options.pop("progress", None), len(inputs) if isinstance(inputs, Sized) else None)
        self._check(split(options, None, declared(self._accepted))[0])
        self._opened  # noqa: B018 - a closed wrapper refuses now
        return self._mapped(iter(inputs), options, on_error, progress)

    def _mapped(
        self,
        inputs: Iterator[Any],
        options: Mapping[str, Any],
        on_error: OnError,
        progress: AbstractContextManager[Callable[[object], None]],
    ) -> Iterator[ResultT | LmkitError]:
        rows: ReadAhead[JobT, ResultT] = ReadAhead(inputs, lambda given, row: self._jobs([given], options, row)[0])
        run = self._run(rows.jobs(), Caller(lazy=True))
        try:
            with progress as ended:
                for news in itertools.chain(run, [None]):
                    if news is not None:
                        rows.end(news.index, news.error or news.outcome)
                    for result in rows.ended():
                        ended(result)
                        if isinstance(result, LmkitError) and on_error == "raise":
                            raise result
                        yield result
        finally:
            surely(run.close, run.close)  # type: ignore[attr-defined]  # a generator
        if rows.broken is not None:
            raise rows.broken

    def _stream(self, inputs: Sequence[Any], options: Mapping[str, Any], *, partial: bool) -> Iterator[TextChunk]:
        """Check all rows now; compute when asked for chunks."""
        for row in split(options, len(inputs), declared(self._accepted)):
            if (copies := row.get("num_return_sequences", 1)) != 1:
                raise OptionError(f"num_return_sequences={copies!r} cannot be streamed: call the model, or stream one.")
        if partial and options.get("output") is None:
            raise OptionError("partial=True shows what output= asks for while it grows: pass output= too.")
        chunks = self._streamed(self._valid(inputs, options))
        return growing(chunks) if partial else chunks

    def _streamed(self, jobs: list[JobT]) -> Iterator[TextChunk]:
        failed: LmkitError | None = None
        run = self._run(jobs, Caller(stream=True, cancelled=cancelled()))
        try:
            for news in filter(None, run):
                failed = failed or news.error
                result = news.outcome if isinstance(news.outcome, Generation) else None
                pieces: list[tuple[ChunkKind, str]] = [*news.pieces]
                if not pieces and (news.text or result):
                    pieces = [("content", news.text)]
                for kind, text in pieces[:-1]:
                    yield TextChunk(text, news.index, kind=kind)
                for kind, text in pieces[-1:]:
                    yield TextChunk(text, news.index, result.finish_reason if result else None, result, kind)
        finally:
            surely(run.close, run.close)  # type: ignore[attr-defined]  # a generator
        if failed is not None:
            raise failed


Wrapper.run_job = letting_go(Wrapper.run_job)  # type: ignore[method-assign]


def growing(chunks: Iterator[TextChunk]) -> Iterator[TextChunk]:
    """Give chunks the data that their rows' answers have so far."""
    texts = defaultdict[int, str](str)
    try:
        for chunk in chunks:
            texts[chunk.index] += chunk.text if chunk.kind == "content" else ""
            yield replace(chunk, partial=begun_json(texts[chunk.index]))
    finally:
        chunks.close()  # type: ignore[attr-defined]  # a generator


def rows_of(inputs: Any) -> Rows:
    """Return the rows of a call; each is checked when its turn comes."""
    return ([inputs], True) if _single(inputs) else (list(inputs), False)


def _single(inputs: object) -> bool:
    kind = isinstance(inputs, (str, bytes, Mapping)) or not isinstance(inputs, Iterable)
    return kind or getattr(inputs, "shape", None) == ()  # an array of no dimension cannot be gone through


def text_of(given: Any, row: int, what: str = "a text") -> str:
    """Return a row that is a text.

    Raises:
        OptionError: It is something else, or has a lone surrogate.
    """
    if isinstance(given, str):
        return checked(given, f"row {row}")
    raise OptionError(f"row {row} is {shown(given, LONGEST_SHOWN)}, not {what}: pass {what}, or a list of them.")


LONGEST_SHOWN = 60
"""How many characters of a wrong input a message repeats."""
