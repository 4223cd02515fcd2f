"""What `Generator` and `Translator` share: rows that the engine continues token by token."""

from __future__ import annotations

import copy
import itertools
import time
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit._interrupts import surely
from lmkit.engine import Caller, Outcome, Request, Update
from lmkit.errors import EngineError, LmkitError, WeightsError
from lmkit.options.generation import REPLACED, RowOptions, Sample, build_config
from lmkit.results import Completion, EngineStats, Generation, Timing
from lmkit.text.words import Words
from lmkit.wrappers.base import Loaded, Wrapper
from lmkit.wrappers.scoring import Scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lmkit.engine import Engine
    from lmkit.engine.stream_text import Marks
    from lmkit.replies.scanner import Scanner
    from lmkit.structured.outputs import Output


ResultT = TypeVar("ResultT", bound=Generation)


@dataclass(frozen=True, slots=True)
class Job:
    """A row on its way to the engine, with what its result will say.

    Attributes:
        requests: What the engine is asked for: one request, or one for each piece of a document, or none.
        text: What the model reads, as text.
        truncated: Whether the text was cut.
        row: Its number in the call.
        between: What stands in the answer before, between and behind what the requests give.
        output: What the answer must be, if anything.
        scanner: What tells the parts of a chat's answer apart.
        reasoning_name: What the chat template calls the reasoning of a message.
    """

    requests: tuple[Request, ...]
    text: str
    truncated: bool
    row: int = 0
    between: tuple[str, ...] = ("", "")
    output: Output[Any] | None = None
    scanner: Callable[[], Scanner] | None = None
    reasoning_name: str = ""

    @property
    def grows(self) -> bool:
        """Whether an answer can be shown while it grows."""
        return True

    def shown(self, number: int, text: str) -> str:
        """Return what of a request's answer is shown once it has ended."""
        del number
        return text

    def behind(self, number: int, text: str) -> str:
        """Return what stands behind a request's answer."""
        del text
        return self.between[number + 1]


class Parts:
    """A row while its requests run: they end in any order, and its text comes out in order.

    Attributes:
        job: The row.
        index: Its number in the run.
        outcomes: What its requests ended with.
        failed: Whether one of them failed, so that the row has been reported.
        lazy: Whether nothing is told of it before its end.
        scanner: What tells the parts of a chat's answer apart, if it streams.
    """

    def __init__(self, job: Job, index: int, caller: Caller) -> None:
        """Begin with what stands before the first answer; of a caller that does not stream, no text is told of."""
        self.job = job
        self.index = index
        self.outcomes: list[Outcome | None] = [None] * len(job.requests)
        self.failed = False
        self.lazy = caller.lazy
        self.scanner = job.scanner() if caller.stream and job.scanner else None
        self._texts = [*[""] * len(job.requests), ""]
        self._texts[0] = job.between[0] if caller.stream else ""
        self._stream = caller.stream
        self._first = 0
        self._ends = [0.0] * len(job.requests)

    def take(self, number: int, update: Update[Outcome]) -> str:
        """Take in news of a request, and return what can be shown of the row by now."""
        outcome = self.outcomes[number] = update.outcome
        if outcome is not None:
            self._ends[number] = time.perf_counter()
        if self._stream and self.job.grows:
            self._texts[number] += update.text
        elif self._stream and outcome is not None:
            self._texts[number] += self.job.shown(number, outcome.completions[0].text)
        if self._stream and outcome is not None:
            self._texts[number + 1] = self.job.behind(number, outcome.completions[0].text) + self._texts[number + 1]
        return self.release()

    def release(self) -> str:
        """Return the text up to the first request that runs, as far as it was not returned before."""
        first, last = self._first, len(self.outcomes)
        self._first = next((n for n in range(first, last) if self.outcomes[n] is None), last)
        text = "".join(self._texts[first : self._first + 1])
        self._texts[first : self._first + 1] = [""] * (self._first + 1 - first)
        return text

    @property
    def ended(self) -> list[Outcome] | None:
        """What all requests ended with; None while one of them runs."""
        if self._first < len(self.outcomes):
            return None
        return [outcome for outcome in self.outcomes if outcome is not None]

    def timing(self) -> Timing:
        """Say what the row took: of several requests, from the first one's start to the last one's end."""
        timings = [outcome.timing for outcome in self.outcomes if outcome is not None]
        if len(timings) == 1:
            return timings[0]
        starts = [end - timing.seconds for end, timing in zip(self._ends, timings, strict=True)]
        start = min(starts, default=0.0)
        seconds = max(self._ends, default=0.0) - start
        first = min(
            (at + timing.seconds_to_first_token for at, timing in zip(starts, timings, strict=True)), default=start
        )
        tokens = sum(timing.seconds * timing.tokens_per_second for timing in timings)
        return Timing(seconds, first - start, tokens / seconds if seconds else 0.0)


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
        outputs = getattr(model.get_output_embeddings(), "out_features", None)
        self._words = Words(self._codec, self._answer_ids, outputs or self._rows or len(loaded.tokenizer))
        self._start = decoder_start(model) if model.config.is_encoder_decoder else None
        self._scores = Scores(loaded.scorer(self._codec), self._codec)
        self._grammars = loaded.grammars(self._codec, self._start)
        self._engine: Engine | None = loaded.engine(self._codec, self._start)

    def close(self) -> None:
        """Give the memory back; work in flight ends with an `EngineError` at its next step."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._scores.close()
        super().close()

    def _request(
        self,
        options: RowOptions,
        token_ids: Sequence[int],
        *,
        room: int,
        forced_bos_token_id: int | None = None,
        ends: Sequence[int] = (),
        before: str = "",
        processors: tuple[Callable[..., Any], ...] = (),
        marked: bool = False,
    ) -> Request:
        """Make the request of a row whose answer may take at most `room` tokens.

        `ends` are more that end it, what may stand `before` an output is a rule of Lark, `processors` reshape its
        scores, and where it is `marked` its special tokens are told.
        """
        self._check_rows(token_ids)
        if options.suppress_unknown and (unknown := self._codec.unknown) is not None:
            own, asked = self._checkpoint_config.suppress_tokens, options.suppress_tokens
            options = replace(options, suppress_tokens=(*((own or ()) if asked is None else asked), unknown))
        config = build_config(
            options,
            self._checkpoint_config,
            prefix_tokens=len(token_ids) if self._start is None else 1,
            max_new_tokens=min(options.max_new_tokens, room),
            forced_bos_token_id=forced_bos_token_id,
            ends=ends,
            biases=self._words.biases(options.logit_bias or {}),
            forbidden=self._words.forbidden(options.bad_words),
        )
        sampled = isinstance(options.mode, Sample)
        stop = options.stop or tuple(self._checkpoint_config.stop_strings or ())
        grammar = None
        if options.output is not None:  # a whole answer ends by itself
            stop, grammar = (), self._grammars.of(options.output, before, config.forced_bos_token_id)
        return Request(
            input_ids=tuple(token_ids),
            config=config,
            copies=options.num_return_sequences if sampled else 1,
            stop=stop,
            named=self._codec.names if marked else self._codec.named(stop),
            stop_token_ids=options.stop_token_ids,
            special=not options.skip_special_tokens,
            context=self._codec.visible(token_ids) if self._start is None else (),
            seed=options.seed if sampled else None,
            logprobs=options.logprobs,
            lookup=options.lookup,
            processors=(*processors, *options.processors),
            grammar=grammar,
        )

    def _answer_ids(self, text: str) -> list[int]:
        """Return the tokens of a part of an answer."""
        return self._codec.encode(text, special=False)

    def _options(self, given: Mapping[str, Any]) -> RowOptions:
        return RowOptions.of(given, self._checkpoint_config).with_seed()

    def _check(self, options: dict[str, Any]) -> None:
        self._options(options)

    def _run(self, jobs: Iterable[Job | None], caller: Caller) -> Iterator[Update[ResultT] | None]:
        taken: dict[int, tuple[Parts, int]] = {}
        empty: deque[Parts] = deque()

        def requests() -> Iterator[Request | None]:
            numbers, rows = itertools.count(), itertools.count()
            for job in jobs:
                if job is None:
                    yield None
                    continue
                parts = Parts(job, next(rows), caller)
                if not job.requests:
                    empty.append(parts)
                for part, request in enumerate(job.requests):
                    taken[next(numbers)] = parts, part
                    yield request

        run = self._opened_engine.run(requests(), caller)
        try:
            for update in itertools.chain(run, [None]):
                while empty:
                    yield self._told_of(parts := empty.popleft(), parts.release())
                yield None if update is None else self._news(update, taken)
        finally:
            surely(run.close, run.close)  # type: ignore[attr-defined]  # a generator

    def _news(self, update: Update[Outcome], taken: dict[int, tuple[Parts, int]]) -> Update[ResultT] | None:
        """Tell of the row that an update belongs to, if there is something to tell."""
        ended = update.outcome is not None or update.error is not None
        parts, number = taken.pop(update.index) if ended else taken[update.index]
        if parts.failed:
            return None
        if update.error is not None:
            parts.failed = True
            error = failure(update.error, parts.job.row)
            return self._news_of(parts, update.text, update.marks, error=error)
        told = self._told_of(parts, parts.take(number, update), update.marks)
        return Update(parts.index) if told is None and ended and not parts.lazy else told  # a bar counts it

    def _told_of(self, parts: Parts, text: str, marks: Marks = ()) -> Update[ResultT] | None:
        if (outcomes := parts.ended) is not None:
            result = self._result(parts.job, outcomes, parts.timing())
            if (output := parts.job.output) is not None:
                first = " " if self._start is not None and not output.spaced else ""  # which a text may begin with
                asked = bool(parts.job.requests)
                answers = (answer(one, output, first, asked=asked) for one in result.completions)
                result = replace(result, completions=tuple(answers))
            return self._news_of(parts, text, marks, result)
        return self._news_of(parts, text, marks) if text or marks else None

    def _news_of(
        self, parts: Parts, text: str, marks: Marks, result: ResultT | None = None, error: LmkitError | None = None
    ) -> Update[ResultT]:
        if parts.scanner is None:
            return Update(parts.index, text, result, error)
        pieces = parts.scanner.feed(text, marks)
        if result is not None or error is not None:
            pieces += parts.scanner.finish()
        return Update(parts.index, "", result, error, pieces=tuple(pieces))

    @property
    def _opened_engine(self) -> Engine:
        if self._engine is None:
            self._opened  # noqa: B018 - raises: the wrapper was closed
        assert self._engine is not None  # noqa: S101 - closing takes both away together
        return self._engine

    @property
    def stats(self) -> EngineStats:
        """What the engine holds at the moment, and what it has done so far; `score` and `rank` are not counted."""
        return self._opened_engine.stats()

    @abstractmethod
    def _result(self, job: Any, outcomes: Sequence[Outcome], timing: Timing) -> ResultT:
        """Describe a row whose requests have all ended."""


def answer(completion: Completion, output: Output[Any], first: str, *, asked: bool) -> Completion:
    """Give a completion its value, or the reason why it has none; `first` is no part of it."""
    if not asked:
        return replace(completion, _value_error="the text is blank, so the model was not asked")
    if completion.finish_reason != "eos":
        return replace(completion, _value_error=f"it was cut, with finish_reason={completion.finish_reason!r}")
    try:
        return replace(completion, _value=output.read(completion.content.removeprefix(first)), _value_error=None)
    except Exception as error:  # noqa: BLE001 - of pydantic, or of the caller's own type: of this row alone
        return replace(
            completion, _value_error=f"it is not what output= asked for ({' '.join(str(error).split())[:500]})"
        )


def decoder_start(model: Any) -> int:
    """Return the token that an encoder-decoder's answers begin with.

    Raises:
        WeightsError: Its generation config names none, or one per row.
    """
    config = model.generation_config
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if not isinstance(start, int):
        raise WeightsError(
            f"the checkpoint's decoder_start_token_id is {start!r}, so there is no telling how an answer begins: "
            "set one token id in its generation_config.json."
        )
    return start


def failure(error: LmkitError, row: int) -> EngineError:
    """Say in the message which row of the call failed."""
    named = EngineError(f"row {row}: {error}")
    named.__cause__ = error.__cause__
    return named
