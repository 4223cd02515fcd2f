"""`Unmasker`: masks in a text filled in by a masked language model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, get_args, overload

from lmkit.engine import MaskScorer
from lmkit.errors import LmkitError, OptionError, listed
from lmkit.filling import Order, fill
from lmkit.generation import Beam, Mode, Options, Sample
from lmkit.masked import Job, MaskedTexts
from lmkit.pseudo import Metric, check_metric, hidden, pseudo
from lmkit.results import Ranking, Score, Unmasking
from lmkit.scoring import check_normalize, choices_of, ranking, whole
from lmkit.wrapper import Loaded, News, Wrapper, rows_of, text_of

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Iterable, Iterator

    from typing_extensions import Unpack

    from lmkit.rows import PerRow

__all__ = ["UnmaskOptions", "Unmasker"]


class UnmaskOptions(TypedDict, total=False):
    """The options of every call that fills masks; each takes one value, or a list with one per row.

    `top_k` is how many candidates to give (5, or as many as there are targets); `targets` are the only words to
    consider, one list for all rows or a list of lists.

    The rest is for how several masks are filled together. `order` is `"left_to_right"`, or `"most_certain"` for the
    mask first where the model is surest of a token, or `"independent"`: none knows the others, in a single pass, as in
    `masks`. `mode` is a `Greedy`, `Sample` or `Beam`, and its values may be
    written as keywords; left out, the `top_k` best ways are followed from mask to mask. `num_beams` follows as many,
    however many are given. `temperature`, `top_p`, `min_p` or `sample=True` draw `top_k` ways, with a `seed` or a
    fresh one, which the result records. `normalize="tokens"` compares ways by their mean log-probability per token.

    `progress` is for a call or a `map` as a whole: whether to draw a bar; left out, there is one in a terminal or a
    notebook when it takes long.
    """

    top_k: PerRow[int]
    targets: Sequence[str] | Sequence[Sequence[str]]
    order: PerRow[Order]
    normalize: PerRow[Literal["none", "tokens"]]
    mode: PerRow[Mode]
    num_beams: PerRow[int]
    sample: PerRow[bool]
    temperature: PerRow[float]
    top_p: PerRow[float]
    min_p: PerRow[float]
    seed: PerRow[int]
    progress: bool


_MODE = frozenset({"mode", "num_beams", "sample", "temperature", "top_p", "min_p", "seed"})
"""The options that the builder of all wrappers checks."""

ROWS, ROWS_AHEAD, TEXTS = 512, 128, 64
"""How many texts run together: of a call, of an iterable that is read ahead, and to be scored token by token."""


class Unmasker(Wrapper[Job, Unmasking]):
    """A masked language model: fills in what a text leaves out.

    ```python
    unmasker = lmkit.load("masked", "google-bert/bert-base-uncased")
    unmasker("I love [MASK].").candidates[0].token
    ```

    A mask may be written as the checkpoint's own mask token, or as `[MASK]` or `<mask>` for any checkpoint.
    All options are those of `UnmaskOptions`.
    """

    _accepted: ClassVar[frozenset[str]] = frozenset(UnmaskOptions.__annotations__)

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model; `lmkit.load` calls this."""
        super().__init__(loaded)
        self._texts = MaskedTexts(self._codec, self._plan.context_length, self.name)
        self._scorer: MaskScorer | None = MaskScorer(loaded.model, self._codec.tokenizer.pad_token_id or 0)

    def close(self) -> None:
        """Give the memory back."""
        if self._scorer is not None:
            self._scorer.close()
        self._scorer = None
        super().close()

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, texts: str, **options: Unpack[UnmaskOptions]
    ) -> Unmasking: ...
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
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        rows, single = rows_of(texts)
        results = self._call(rows, options)
        return results[0] if single else results

    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[UnmaskOptions],
    ) -> Iterator[Unmasking]: ...
    @overload
    def map(
        self, texts: Iterable[str], *, on_error: Literal["return"], **options: Unpack[UnmaskOptions]
    ) -> Iterator[Unmasking | LmkitError]: ...
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[UnmaskOptions],
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

    def _results(self, jobs: list[Job]) -> Iterator[Unmasking]:
        for news in filter(None, self._run(jobs, stream=True)):
            if news.error is not None:
                raise news.error
            if news.result is not None:
                yield news.result

    @overload
    async def acall(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, texts: str, **options: Unpack[UnmaskOptions]
    ) -> Unmasking: ...
    @overload
    async def acall(self, texts: Iterable[str], **options: Unpack[UnmaskOptions]) -> list[Unmasking]: ...
    async def acall(self, texts: str | Iterable[str], **options: Unpack[UnmaskOptions]) -> Unmasking | list[Unmasking]:
        """Do as a call does, for asyncio."""
        rows, single = rows_of(texts)
        results = await self._acall(rows, options)
        return results[0] if single else results

    def astream(self, texts: str | Iterable[str], **options: Unpack[UnmaskOptions]) -> AsyncIterator[Unmasking]:
        """Do as `stream` does, for asyncio."""
        return self._alternate(self.stream(texts, **options))

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, texts: str, *, metric: Metric = "original"
    ) -> Score: ...
    @overload
    def score(self, texts: Iterable[str], *, metric: Metric = "original") -> list[Score]: ...
    def score(self, texts: str | Iterable[str], *, metric: Metric = "original") -> Score | list[Score]:
        """Say how likely the model finds each token of a text, the others given; the sum is its pseudo-log-likelihood.

        Each token is masked in turn (Salazar et al., "Masked Language Model Scoring", 2020). With
        `metric="within_word_l2r"` the later tokens of the same word are masked with it, for else a word of several
        tokens is too easy to tell from its own pieces (Kauf and Ivanova, "A Better Way to Do Masked Language Model
        Scoring", 2023). Special tokens are read but not scored. In a text longer than the model takes, each token is
        scored with as much of the text on both sides as fits.

        Args:
            texts: A text without masks, or an iterable of such texts.
            metric: What is masked.

        Returns:
            One score for a text, a list of the same length and order for a list.

        Raises:
            OptionError: A text has a mask, or no token to score, or `metric` is another word.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        check_metric(metric)
        self._opened  # noqa: B018 - a closed wrapper refuses here
        rows, single = rows_of(texts)
        scores = whole(self._scored([text_of(text, row) for row, text in enumerate(rows)], metric))
        return scores[0] if single else scores

    @overload
    def rank(  # type: ignore[overload-overlap]  # a str is a sequence of str too: texts come first
        self,
        texts: Sequence[str],
        *,
        normalize: Literal["none", "tokens", "bytes"] = "none",
        metric: Metric = "original",
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        texts: Iterable[Sequence[str]],
        *,
        normalize: Literal["none", "tokens", "bytes"] = "none",
        metric: Metric = "original",
    ) -> list[Ranking]: ...
    def rank(
        self,
        texts: Iterable[str] | Iterable[Sequence[str]],
        *,
        normalize: Literal["none", "tokens", "bytes"] = "none",
        metric: Metric = "original",
    ) -> Ranking | list[Ranking]:
        """Put texts in the order in which the model finds them likely, by their pseudo-log-likelihood.

        Args:
            texts: The texts to compare, or several lists of them.
            normalize: How their log-probabilities are made comparable: `"none"`, per token (`"tokens"`), or per UTF-8
                byte (`"bytes"`).
            metric: What is masked; see `score`.

        Raises:
            OptionError: As `score` does; or there is nothing to rank, or `normalize` is another word.
            EngineError: The model was closed, or a row failed.
        """
        check_metric(metric)
        check_normalize(normalize, ("none", "tokens", "bytes"))
        self._opened  # noqa: B018 - a closed wrapper refuses here
        given, alone = rows_of(texts)
        single = alone or not given or isinstance(given[0], str)
        lists = choices_of(texts if alone else given, 1 if single else len(given), single=single)
        names = [f"row {row}, choice {number}" for row, some in enumerate(lists) for number in range(len(some))]
        scores = iter(self._scored([text for some in lists for text in some], metric, names))
        rankings: list[Ranking | LmkitError] = []
        for some in lists:
            found = list(itertools.islice(scores, len(some)))
            failed = next((score for score in found if isinstance(score, LmkitError)), None)
            rankings.append(failed or ranking(some, whole(found), normalize))
        return whole(rankings)[0] if single else whole(rankings)

    def _scored(
        self, texts: Sequence[str], metric: Metric, names: Sequence[str] | None = None
    ) -> list[Score | LmkitError]:
        """Score texts; messages call each by its name, or by its row."""
        named = list(zip(names or [f"row {row}" for row in range(len(texts))], texts, strict=True))
        for name, text in named:
            if (mask := self._texts.pattern.search(text)) is not None:
                msg = f"{name} has a mask, {mask[0]!r}, and score takes whole texts: fill it first, or call the model."
                raise OptionError(msg)
        given = [hidden(self._codec, text, metric, name) for name, text in named]
        found: list[Score | LmkitError] = []
        for start in range(0, len(given), TEXTS):
            askings = (pseudo(self._codec, one, self._plan.context_length) for one in given[start : start + TEXTS])
            found += self._running.run(askings)
        return found

    @property
    def _running(self) -> MaskScorer:
        if self._scorer is None:
            self._opened  # noqa: B018 - raises: the wrapper was closed
        assert self._scorer is not None  # noqa: S101 - narrows the type
        return self._scorer

    def _check(self, options: dict[str, Any]) -> None:
        self._how(options)

    def _how(self, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a row, and return what `Blanks` is told of the search."""
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            if name in _ACCEPTED and not _ACCEPTED[name][1](value):
                msg = f"{name}={value!r} is not accepted: {name} takes {_ACCEPTED[name][0]}."
                raise OptionError(msg)
        modes = {name: given[name] for name in _MODE & given.keys()}
        chosen = Options.of(modes).with_seed()
        mode = chosen.mode
        if isinstance(mode, Beam) and (mode.length_penalty, mode.early_stopping) != (None, None):
            msg = f"{mode} is not accepted: all ways of filling a text fill the same masks, so give num_beams alone."
            raise OptionError(msg)
        top_k = given.get("top_k") or len(given.get("targets", range(5)))
        width = top_k if modes.keys() <= {"sample", "seed"} else 1
        return {
            "top_k": top_k,
            "width": mode.num_beams if isinstance(mode, Beam) else width,
            "order": given.get("order", "left_to_right"),
            "per_token": given.get("normalize") == "tokens",
            "sample": mode if isinstance(mode, Sample) else None,
            "seed": chosen.seed if isinstance(mode, Sample) else None,
        }

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Job:
        text = text_of(given, row)
        how = self._how(options)
        return self._texts.job(text, options.get("targets"), row, **how)

    def _run(
        self,
        jobs: Iterable[Job | None],
        *,
        stream: bool = False,
        lazy: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Iterator[News[Unmasking] | None]:
        source, number = iter(jobs), 0
        while window := list(itertools.islice(source, 1 if stream else ROWS_AHEAD if lazy else ROWS)):
            running = self._running
            if cancelled is not None and cancelled.is_set():
                return
            ready = [job for job in window if job is not None]
            for job, found in zip(ready, running.run((fill(job.blanks) for job in ready), cancelled), strict=True):
                if isinstance(found, LmkitError):
                    yield News(number, error=found)
                else:
                    yield News(number, result=self._texts.result(job, *found))
                number += 1
            yield None


def _is_words(value: object) -> bool:
    listed_value = isinstance(value, Sequence) and not isinstance(value, str) and bool(value)
    return listed_value and all(isinstance(word, str) and word.strip() for word in value)  # type: ignore[attr-defined]


_ORDERS, _NORMALIZE = get_args(Order), ("none", "tokens")
_ACCEPTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "top_k": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "targets": ("a list of words, at least one, none empty", _is_words),
    "order": (listed(_ORDERS), lambda value: value in _ORDERS),
    "normalize": (listed(_NORMALIZE), lambda value: value in _NORMALIZE),
}
"""What each of the options of masks alone takes, in words and as a test."""
