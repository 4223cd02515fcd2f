"""`Unmasker`: masks in a text filled in by a masked language model."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypedDict, overload

from lmkit.encoding import fit
from lmkit.engine import MaskScorer
from lmkit.errors import LmkitError, OptionError
from lmkit.results import Candidate, MaskSlot, Unmasking
from lmkit.wrapper import Loaded, News, Wrapper, rows_of, text_of

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Iterable, Iterator

    import torch
    from typing_extensions import Unpack

    from lmkit.rows import PerRow

__all__ = ["UnmaskOptions", "Unmasker"]

Fill: TypeAlias = tuple[int, str | None]
"""A token for a mask, and the target it stands for, if targets were given."""

Way: TypeAlias = tuple[tuple[Fill, ...], float]
"""Fills for the first masks of a text, and their joint log-probability."""


class UnmaskOptions(TypedDict, total=False):
    """The options of every call that fills masks.

    `top_k` is how many candidates to give (5, or all targets); `targets` are the only words to consider, one list
    for all rows or a list of lists. `progress` is for a call or a `map` as a whole: whether to draw a bar; left out,
    there is one in a terminal or a notebook when it takes long.
    """

    top_k: PerRow[int]
    targets: Sequence[str] | Sequence[Sequence[str]]
    progress: bool


WINDOW = 32
"""How many rows are read before they run together."""


@dataclass(frozen=True, slots=True)
class Job:
    """A text on its way to the model.

    Attributes:
        text: As given.
        spans: Where its masks are, in characters.
        token_ids: What the model reads, masks included.
        positions: Where its masks are, in tokens.
        top_k: How many candidates to give.
        targets: Per mask, the words to consider and their token ids; None considers the vocabulary.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    top_k: int
    targets: tuple[tuple[Fill, ...], ...] | None


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
        tokenizer: Any = loaded.tokenizer
        if tokenizer.mask_token is None:
            msg = f"the tokenizer of {self.name!r} has no mask token, so there is nothing to fill in."
            raise OptionError(msg)
        ways = {str(tokenizer.mask_token), "[MASK]", "<mask>"}
        self._mask = re.compile("|".join(re.escape(way) for way in sorted(ways)))
        self._scorer: MaskScorer | None = MaskScorer(loaded.model, tokenizer.pad_token_id or 0)

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

        Several masks are filled one after the other from the left, each knowing those before it; a way of filling
        them all is scored by the product of the probabilities on the way (the chain rule), and the `top_k` best
        ways are followed.

        Args:
            texts: A text with at least one mask, or an iterable of such texts.
            **options: See `UnmaskOptions`; each is one value, or a list with one per text.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            OptionError: A text has no mask, a target is not one token, or an option is not accepted.
            InputTooLongError: A text is longer than the model takes.
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

    def _check(self, options: dict[str, Any]) -> None:
        top_k, targets = options.get("top_k"), options.get("targets")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            msg = f"top_k={top_k!r} is not accepted: top_k takes a whole number of at least 1."
            raise OptionError(msg)
        words = isinstance(targets, Sequence) and not isinstance(targets, str) and targets
        if targets is not None and not (words and all(isinstance(word, str) for word in targets)):
            msg = f"targets={targets!r} is not accepted: targets takes a list of words, at least one."
            raise OptionError(msg)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Job:
        given = text_of(given, row)
        spans = tuple(match.span() for match in self._mask.finditer(given))
        if not spans:
            msg = f"row {row} has no mask: write [MASK] or <mask> where a word is to be filled in. Given: {given!r}."
            raise OptionError(msg)
        tokenizer: Any = self.tokenizer
        token_ids = self._codec.encode(self._mask.sub(lambda _: tokenizer.mask_token, given))
        token_ids, _ = fit(token_ids, self._plan.context_length, row=row, advice="shorten the text around its masks")
        positions = tuple(n for n, token_id in enumerate(token_ids) if token_id == tokenizer.mask_token_id)
        self._check(options)
        targets = options.get("targets")
        named = None if targets is None else tuple(self._targets(targets, given[:start]) for start, _ in spans)
        return Job(
            given,
            spans,
            tuple(token_ids),
            positions,
            options.get("top_k") or (5 if targets is None else len(targets)),
            named,
        )

    def _targets(self, targets: Sequence[str], left: str) -> tuple[Fill, ...]:
        """Return the token of each target, as it would stand behind the text `left`."""
        spaced = left.endswith((" ", "\t", "\n"))
        return tuple((self._token_of(word, spaced=spaced), word) for word in targets)

    def _token_of(self, word: str, *, spaced: bool) -> int:
        unknown = self.tokenizer.unk_token_id
        ways = [f" {word}", word] if spaced else [word]
        encoded = [self._codec.encode(way, special=False) for way in ways]
        for token_ids in encoded:
            if len(token_ids) == 1 and token_ids[0] != unknown:
                return token_ids[0]
        pieces = self.tokenizer.convert_ids_to_tokens(encoded[0])
        msg = (
            f"the target {word!r} is not one token of this checkpoint's vocabulary, but {pieces}: "
            "choose a word that is, or write one mask per piece and leave out targets."
        )
        raise OptionError(msg)

    def _run(
        self,
        jobs: Iterable[Job | None],
        *,
        stream: bool = False,
        lazy: bool = False,  # noqa: ARG002 - rows are read in windows anyway
        cancelled: threading.Event | None = None,
    ) -> Iterator[News[Unmasking] | None]:
        source, number = iter(jobs), 0
        while window := list(itertools.islice(source, 1 if stream else WINDOW)):
            if self._scorer is None:
                self._opened  # noqa: B018 - raises: the wrapper was closed
            if cancelled is not None and cancelled.is_set():
                return
            for result in self._fill_all([job for job in window if job is not None]):
                if isinstance(result, LmkitError):
                    yield News(number, error=result)
                else:
                    yield News(number, result=result)
                number += 1
            yield None

    def _fill_all(self, jobs: Sequence[Job]) -> list[Unmasking | LmkitError]:
        """Fill texts together; if the batch fails, each alone, so that one does not take others down."""
        assert self._scorer is not None  # noqa: S101 - checked by the caller
        try:
            scores = self._scorer.score([job.token_ids for job in jobs], [job.positions for job in jobs])
            return [self._fill(job, found) for job, found in zip(jobs, scores, strict=True)]
        except LmkitError as error:
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._fill_all([job])]

    def _fill(self, job: Job, scores: torch.Tensor) -> Unmasking:
        slots = []
        for mask, (start, end) in enumerate(job.spans):
            chosen = self._choices(job, mask, scores[mask])
            slots.append(
                MaskSlot(start, end, tuple(self._candidate(job, {mask: fill}, score) for fill, score in chosen))
            )
        ways: list[Way] = [((fill,), score) for fill, score in self._choices(job, 0, scores[0])]
        for mask in range(1, len(job.spans)):
            ways = self._extend(job, mask, ways)
        ways.sort(key=lambda way: -way[1])
        whole = tuple(self._candidate(job, dict(enumerate(fills)), score) for fills, score in ways[: job.top_k])
        return Unmasking(job.text, tuple(slots), whole)

    def _choices(self, job: Job, mask: int, scores: torch.Tensor) -> list[tuple[Fill, float]]:
        """Return fills and log-probabilities for one mask: the targets in their order, or the best."""
        if job.targets is not None:
            return [(fill, float(scores[fill[0]])) for fill in job.targets[mask]]
        best = scores.topk(min(job.top_k, len(scores)))
        fills = [(token_id, None) for token_id in best.indices.tolist()]
        return list(zip(fills, best.values.tolist(), strict=True))

    def _extend(self, job: Job, mask: int, ways: list[Way]) -> list[Way]:
        """Fill one more mask in every way so far, and keep the best `top_k`."""
        assert self._scorer is not None  # noqa: S101 - checked by the caller
        rows = []
        for fills, _ in ways:
            row = list(job.token_ids)
            for position, (token_id, _word) in zip(job.positions, fills, strict=False):
                row[position] = token_id
            rows.append(row)
        scores = self._scorer.score(rows, [[job.positions[mask]]] * len(rows))
        longer = [
            ((*fills, fill), score + more)
            for (fills, score), found in zip(ways, scores, strict=True)
            for fill, more in self._choices(job, mask, found[0])
        ]
        return sorted(longer, key=lambda way: -way[1])[: job.top_k]

    def _candidate(self, job: Job, filled: dict[int, Fill], logprob: float) -> Candidate:
        """Write fills into the text as given, which otherwise stays as it is."""
        text, end = "", 0
        words = []
        for mask, (token_id, target) in filled.items():
            word, glued = self._word(token_id)
            word = word if target is None else target.strip()
            text += job.text[end : job.spans[mask][0]]
            if glued:
                text = text.rstrip(" ")
            elif text[-1:].isalnum() and word[:1].isalnum():
                text += " "  # the token begins a word, and the text before it does not end with a space
            text, end = text + word, job.spans[mask][1]
            words.append(word)
        token_ids = tuple(token_id for token_id, _ in filled.values())
        return Candidate(text + job.text[end:], tuple(words), token_ids, math.exp(logprob))

    def _word(self, token_id: int) -> tuple[str, bool]:
        """Return a token's text, and whether it continues the word before it."""
        raw = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if raw.startswith("##"):
            return raw[2:], True
        starts = raw.startswith(_WORD_STARTS)
        return self._codec.token(token_id).strip(), self._marks_words and not starts and raw.isalnum()

    @property
    def _marks_words(self) -> bool:
        """Whether the tokenizer marks the pieces that begin a word, as byte-level and sentencepiece ones do."""
        pieces = self.tokenizer.convert_ids_to_tokens(self._codec.encode("a a", special=False))
        return any(str(piece).startswith(_WORD_STARTS) for piece in pieces)


_WORD_STARTS = ("Ġ", "▁")
