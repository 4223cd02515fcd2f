"""`Unmasker`: masks in a text filled in by a masked language model."""

# pyright: reportOverlappingOverload=false
# A str is an iterable of str too: its overload comes first.

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from lmkit.engine import Caller, Update
from lmkit.errors import LmkitError, OptionError
from lmkit.masked.fill import fill
from lmkit.masked.score import Hidden, Metric, hidden, pseudo
from lmkit.masked.texts import MaskedText, MaskedTexts
from lmkit.options.generation import Beam, ModeOptions, RowOptions, Sample
from lmkit.options.option import check_word, declared
from lmkit.options.signatures import spelled_out
from lmkit.options.tasks import UnmaskOptions
from lmkit.results import EngineStats, Ranking, Score, Unmasking
from lmkit.wrappers.asynchronous import alternately, asynchronous, cancelled
from lmkit.wrappers.base import Loaded, OnError, Wrapper, rows_of, text_of
from lmkit.wrappers.scoring import Length, choices_of, first_score, prepared, ranked, scored, texts_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from typing_extensions import Unpack

    from lmkit.engine import MaskScorer


ROWS, ROWS_AHEAD, TEXTS = 512, 128, 64
"""How many texts run together: of a call, of an iterable that is read ahead, and to be scored token by token."""


@spelled_out
class Unmasker(Wrapper[MaskedText, Unmasking]):
    """A masked language model: fills in what a text leaves out.

    ```python
    unmasker = lmkit.load("masked", "google-bert/bert-base-uncased")
    unmasker("I love [MASK].").candidates[0].token
    ```

    A mask may be written as the checkpoint's own mask token, or as `[MASK]` or `<mask>` for any checkpoint.
    All options are those of `UnmaskOptions`.
    """

    _accepted = UnmaskOptions
    _verbs = {"fill": None, "score": None, "rank": None}  # noqa: RUF012

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model; `lmkit.load` calls this."""
        super().__init__(loaded)
        self._texts = MaskedTexts(
            self._codec, self._plan.context_length, self.name, getattr(loaded.model.config, "type_vocab_size", None)
        )
        self._scorer: MaskScorer | None = loaded.mask_scorer()

    def close(self) -> None:
        """Give the memory back."""
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None
        super().close()

    @overload
    def __call__(self, texts: str, **options: Unpack[UnmaskOptions]) -> Unmasking: ...
    @overload
    def __call__(self, texts: Iterable[str], **options: Unpack[UnmaskOptions]) -> list[Unmasking]: ...
    def __call__(self, texts: str | Iterable[str], **options: Unpack[UnmaskOptions]) -> Unmasking | list[Unmasking]:
        """Fill the masks of one text, or of each of a list of texts.

        Several masks are filled one after the other, each knowing those before it; a way of filling them all is scored
        by the product of the probabilities on the way (the chain rule), and the `top_k` best ways are followed. A
        target of several tokens is filled in in the same way, into as many masks. In a text longer than the model takes
        each mask is filled with as much of the text on both sides as fits.

        Args:
            texts: A text with at least one mask, or an iterable of such texts.
            **options: See `UnmaskOptions`; each is one value, or a list with one per text.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            OptionError: A text has no mask, the vocabulary cannot express a target, or an option is not accepted.
            InputTooLongError: A text and its `text_pair` have more tokens than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        return self._call(rows_of(texts), options)

    @overload
    def map(
        self, texts: Iterable[str], *, on_error: Literal["raise"] = "raise", **options: Unpack[UnmaskOptions]
    ) -> Iterator[Unmasking]: ...
    @overload
    def map(
        self, texts: Iterable[str], *, on_error: Literal["return"], **options: Unpack[UnmaskOptions]
    ) -> Iterator[Unmasking | LmkitError]: ...
    def map(
        self, texts: Iterable[str], *, on_error: OnError = "raise", **options: Unpack[UnmaskOptions]
    ) -> Iterator[Any]:
        """Fill texts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            texts: Any iterable, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            **options: See `UnmaskOptions`; one value each, for all texts.
        """
        return self._map(texts, options, on_error)

    def stream(self, texts: str | Iterable[str], **options: Unpack[UnmaskOptions]) -> Iterator[Unmasking]:
        """Fill texts and yield each result as soon as it is there, in order.

        A mask is filled in one step, so there are no pieces of a result to show.
        """
        return self._results(self._valid(rows_of(texts)[0], options))

    def _results(self, jobs: list[MaskedText]) -> Iterator[Unmasking]:
        for news in filter(None, self._run(jobs, Caller(stream=True))):
            if news.error is not None:
                raise news.error
            if news.outcome is not None:
                yield news.outcome

    acall = asynchronous(__call__)
    """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""

    def astream(self, texts: str | Iterable[str], **options: Unpack[UnmaskOptions]) -> AsyncIterator[Unmasking]:
        """Do as `stream` does, for asyncio."""
        return alternately(self.stream(texts, **options))

    @overload
    def score(self, texts: str, *, metric: Metric = "original", progress: bool | None = None) -> Score: ...
    @overload
    def score(
        self, texts: Iterable[str], *, metric: Metric = "original", progress: bool | None = None
    ) -> list[Score]: ...
    @overload
    def score(
        self,
        texts: Iterable[str],
        *,
        metric: Metric = "original",
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
    ) -> list[Score | LmkitError]: ...
    def score(
        self,
        texts: str | Iterable[str],
        *,
        metric: Metric = "original",
        on_error: OnError = "raise",
        progress: bool | None = None,
    ) -> Any:
        """Say how likely the model finds each token of a text, the others given; the sum is its pseudo-log-likelihood.

        Each token is masked in turn (Salazar et al., "Masked Language Model Scoring", 2020). With
        `metric="within_word_l2r"` the later tokens of the same word are masked with it, for else a word of several
        tokens is too easy to tell from its own pieces (Kauf and Ivanova, "A Better Way to Do Masked Language Model
        Scoring", 2023). Special tokens are read but not scored. In a text longer than the model takes, each token is
        scored with as much of the text on both sides as fits.

        Args:
            texts: A text without masks, or an iterable of such texts.
            metric: What is masked.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.

        Returns:
            One score for a text, a list of the same length and order for a list.

        Raises:
            OptionError: A text has a mask, or no token to score, or `metric` is another word.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        check_word("metric", metric, get_args(Metric))
        self._opened  # noqa: B018 - a closed wrapper refuses here
        rows, single = rows_of(texts)
        given = prepared(
            lambda text, row: [self._hidden(text_of(text, row), metric, f"row {row}")], zip(rows), on_error
        )
        scores = scored(given, self._scored, first_score, on_error=on_error, progress=progress)
        return scores[0] if single else scores

    ascore = asynchronous(score)
    """Do as `score` does, for asyncio; cancelling the task ends it at its next forward pass."""

    @overload
    def rank(
        self,
        texts: Sequence[str],
        *,
        normalize: Length = "none",
        metric: Metric = "original",
        progress: bool | None = None,
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        texts: Iterable[Sequence[str]],
        *,
        normalize: Length = "none",
        metric: Metric = "original",
        progress: bool | None = None,
    ) -> list[Ranking]: ...
    @overload
    def rank(
        self,
        texts: Iterable[Sequence[str]],
        *,
        normalize: Length = "none",
        metric: Metric = "original",
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
    ) -> list[Ranking | LmkitError]: ...
    def rank(
        self,
        texts: Iterable[str] | Iterable[Sequence[str]],
        *,
        normalize: Length = "none",
        metric: Metric = "original",
        on_error: OnError = "raise",
        progress: bool | None = None,
    ) -> Any:
        """Put texts in the order in which the model finds them likely, by their pseudo-log-likelihood.

        Args:
            texts: The texts to compare, or several lists of them.
            normalize: How their log-probabilities are made comparable: `"none"`, per token (`"tokens"`), or per UTF-8
                byte (`"bytes"`).
            metric: What is masked; see `score`.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.

        Raises:
            OptionError: As `score` does; or there is nothing to rank, or `normalize` is another word.
            EngineError: The model was closed, or a row failed.
        """
        check_word("metric", metric, get_args(Metric))
        check_word("normalize", normalize, get_args(Length))
        self._opened  # noqa: B018 - a closed wrapper refuses here
        given, alone = rows_of(texts)
        single = alone or not given or isinstance(given[0], str)
        lists = choices_of(texts if alone else given, 1 if single else len(given), single=single)
        rankings = scored(
            prepared(lambda some, row: self._choices(some, metric, row), zip(lists), on_error),
            self._scored,
            ranked(normalize),
            on_error=on_error,
            progress=progress,
        )
        return rankings[0] if single else rankings

    arank = asynchronous(rank)
    """Do as `rank` does, for asyncio; cancelling the task ends it at its next forward pass."""

    def _choices(self, choices: Any, metric: Metric, row: int) -> list[Hidden]:
        """Make what is scored of the texts of a row."""
        texts = enumerate(texts_of(choices, row))
        return [self._hidden(text, metric, f"row {row}, choice {number}") for number, text in texts]

    def _hidden(self, text: str, metric: Metric, name: str) -> Hidden:
        """Make what is scored of a text; messages call it by its name."""
        if (mask := self._texts.pattern.search(text)) is not None:
            raise OptionError(
                f"{name} has a mask, {mask[0]!r}, and score takes whole texts: fill it first, or call the model."
            )
        found = hidden(self._codec, text, metric, name)
        self._check_rows(token_id for token_id, _ in found.tokens)
        return found

    def _scored(self, given: Sequence[Hidden], ended: Callable[[object], None]) -> list[Score | LmkitError]:
        """Score texts, a bounded number of them at a time."""
        found: list[Score | LmkitError] = []
        for start in range(0, len(given), TEXTS):
            askings = (pseudo(self._codec, one, self._plan.context_length) for one in given[start : start + TEXTS])
            for score in self._running.run(askings, cancelled()):
                ended(score)
                found.append(score)
        return found

    @property
    def stats(self) -> EngineStats:
        """What the model has read so far: forward passes, and tokens in them, padding and `score` included."""
        return self._running.stats()

    @property
    def _running(self) -> MaskScorer:
        if self._scorer is None:
            self._opened  # noqa: B018 - raises: the wrapper was closed
        assert self._scorer is not None  # noqa: S101 - narrows the type
        return self._scorer

    def _check(self, options: dict[str, Any]) -> None:
        self._how(options)

    def _how(self, options: dict[str, Any]) -> dict[str, Any]:
        """Choose a row's mode, and return what `Blanks` is told of the search."""
        modes = {name: value for name, value in options.items() if name in declared(ModeOptions)}
        chosen = RowOptions.of(modes).with_seed()
        mode = chosen.mode
        if isinstance(mode, Beam) and (mode.length_penalty, mode.early_stopping) != (None, None):
            raise OptionError(
                f"{mode} is not accepted: all ways of filling a text fill the same masks, so give num_beams alone."
            )
        top_k = options.get("top_k") or len(options.get("targets", range(5)))
        width = top_k if modes.keys() <= {"sample", "seed"} else 1
        return {
            "top_k": top_k,
            "width": mode.num_beams if isinstance(mode, Beam) else width,
            "order": options.get("order", "left_to_right"),
            "per_token": options.get("normalize") == "tokens",
            "sample": mode if isinstance(mode, Sample) else None,
            "seed": chosen.seed if isinstance(mode, Sample) else None,
        }

    def _job(self, given: Any, options: dict[str, Any], row: int) -> MaskedText:
        pair = (options["text_pair"],) if "text_pair" in options else ()
        job = self._texts.job(text_of(given, row), *pair, targets=options.get("targets"), row=row, **self._how(options))
        self._check_rows(job.blanks.token_ids)
        return job

    def _run(self, jobs: Iterable[MaskedText | None], caller: Caller) -> Iterator[Update[Unmasking] | None]:
        source, number = iter(jobs), 0
        while window := list(itertools.islice(source, 1 if caller.stream else ROWS_AHEAD if caller.lazy else ROWS)):
            running = self._running
            if caller.cancelled.is_set():
                return
            ready = [job for job in window if job is not None]
            results = running.run((fill(job.blanks) for job in ready), caller.cancelled)
            for job, found in zip(ready, results, strict=True):
                if isinstance(found, LmkitError):
                    yield Update(number, error=found)
                else:
                    yield Update(number, outcome=self._texts.result(job, *found))
                number += 1
            yield None
