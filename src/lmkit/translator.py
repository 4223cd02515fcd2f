"""`Translator`: texts turned into texts by an encoder-decoder."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, overload

from lmkit.documents import Piece, Size, between, kept, pieces
from lmkit.encoding import fit
from lmkit.generation import GENERATION_OPTIONS, GenerationOptions
from lmkit.languages import Languages, Prepared, languages_of
from lmkit.results import Translation
from lmkit.rows import split as per_row
from lmkit.scoring import check_normalize, choices_of, made, pairs, target
from lmkit.translating import (
    PIECE_TOKENS,
    TranslationJob,
    from_preset,
    handling,
    of_piece,
    packed,
    translation,
    warn_of,
)
from lmkit.wrapper import Loaded, rows_of, text_of
from lmkit.writing import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from typing_extensions import Unpack

    from lmkit.documents import Span, Split
    from lmkit.engine import Outcome, Request
    from lmkit.errors import LmkitError
    from lmkit.generation import Options
    from lmkit.results import Ranking, Score, TextChunk, Timing
    from lmkit.rows import PerRow
    from lmkit.scoring import Item, Normalize

__all__ = ["TranslationOptions", "Translator"]


class TranslationOptions(GenerationOptions, total=False):
    """The options of every call that translates: those of generation, which languages, and how to treat a document.

    `source` and `target` are languages: a code, as the checkpoint writes it (see `Translator.languages`) or any other,
    or a name. `source="detect"` finds the source, by the extra `detect`.
    `preset` is a name from `Translator.presets`, such as `"summarization"`. `split` says what is translated by itself:
    each `"sentence"`, each `"paragraph"` as far as it fits, or the text as it is (`"none"`); left out, it is
    `"paragraph"` where a text goes from one language to another, else `"none"`. `keep` is a list of regular
    expressions, and of the names `"urls"`, `"emails"`, `"tags"`, `"printf"` and `"icu"`: what matches comes out as it
    went in.
    """

    source: str | Sequence[str]
    target: str | Sequence[str]
    preset: str | Sequence[str]
    split: PerRow[Split]
    keep: str | Sequence[str] | Sequence[Sequence[str] | None]


class Told(TypedDict, total=False):
    """What `score` and `rank` take to say what a translation is one of: see `TranslationOptions`."""

    source: str | Sequence[str]
    target: str | Sequence[str]
    preset: str | Sequence[str]


_TOLD = frozenset(Told.__annotations__)


class Translator(Writer[Translation]):
    """An encoder-decoder: translates, summarizes, or does what else its checkpoint was trained for.

    ```python
    translator = lmkit.load("seq2seq", "facebook/m2m100_418M")
    translator("How are you?", source="en", target="de").text
    ```

    All options are those of `TranslationOptions`.
    """

    _accepted: ClassVar[frozenset[str]] = GENERATION_OPTIONS | {"source", "target", "preset", "split", "keep"}

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model; `lmkit.load` calls this."""
        super().__init__(loaded)
        model = loaded.model
        self._warned: set[str] = set()
        self._languages: Languages = languages_of(loaded.tokenizer, model.config, model.generation_config)

    @property
    def languages(self) -> Mapping[str, str]:
        """The languages the checkpoint speaks: its codes, each with its English name; empty where it has none.

        Of a Marian checkpoint with several targets, these are the targets. Reading a name needs the extra `translate`.
        """
        return self._languages.names

    @property
    def presets(self) -> tuple[str, ...]:
        """The names that `preset=` takes: what the checkpoint's `task_specific_params` hold."""
        return tuple(self._languages.presets)

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, texts: str, **options: Unpack[TranslationOptions]
    ) -> Translation: ...
    @overload
    def __call__(self, texts: Iterable[str], **options: Unpack[TranslationOptions]) -> list[Translation]: ...
    def __call__(
        self, texts: str | Iterable[str], **options: Unpack[TranslationOptions]
    ) -> Translation | list[Translation]:
        """Translate one text, or each of a list of texts.

        Args:
            texts: A text, or an iterable of texts.
            **options: See `TranslationOptions`; each is one value, or a list with one per text.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            LanguageError: A language is missing, not one the checkpoint speaks, or not to be detected.
            OptionError: An option is unknown, not accepted, or contradicts another.
            InputTooLongError: A text is longer than the encoder takes and `truncate` is not given.
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
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation]: ...
    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["return"],
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation | LmkitError]: ...
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Any]:
        """Translate texts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            texts: Any iterable, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            **options: See `TranslationOptions`; one value each, for all texts.
        """
        return self._map(texts, options, on_error)

    def stream(self, texts: str | Iterable[str], **options: Unpack[TranslationOptions]) -> Iterator[TextChunk]:
        """Translate texts and yield the translations while they grow.

        A row's chunks joined are its whole text; its last chunk has a `finish_reason`. A beam search
        knows its text only at the end, so it comes in one chunk. Leaving the loop ends the rows.
        """
        return self._stream(rows_of(texts)[0], options)

    @overload
    async def acall(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, texts: str, **options: Unpack[TranslationOptions]
    ) -> Translation: ...
    @overload
    async def acall(self, texts: Iterable[str], **options: Unpack[TranslationOptions]) -> list[Translation]: ...
    async def acall(
        self, texts: str | Iterable[str], **options: Unpack[TranslationOptions]
    ) -> Translation | list[Translation]:
        """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""
        rows, single = rows_of(texts)
        results = await self._acall(rows, options)
        return results[0] if single else results

    def astream(self, texts: str | Iterable[str], **options: Unpack[TranslationOptions]) -> AsyncIterator[TextChunk]:
        """Do as `stream` does, for asyncio."""
        return self._astream(rows_of(texts)[0], options)

    def _check(self, options: dict[str, Any]) -> None:
        handling(options)
        self._told(None, options)

    def _told(self, given: str | None, options: dict[str, Any]) -> tuple[Prepared, Options]:
        """Write a text as the family wants it, and check the options beside the languages; None only checks."""
        options = {name: value for name, value in options.items() if value is not None}
        words = {name: options.pop(name, None) for name in ("source", "target", "preset")}
        prepared = self._languages.prepare(given, **words)
        warn_of(prepared.preset, self._warned)
        return prepared, self._options(from_preset(prepared.preset, options) | options)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> TranslationJob:
        given = text_of(given, row)
        split, keep = handling(options)
        prepared, chosen = self._told(given, options)
        if split is None:
            split = "paragraph" if self._translates(prepared) and chosen.truncate is None else "none"
        start = 0 if split == "none" else len(given) - len(prepared.text) + len(prepared.prefix)  # behind a tag
        spans = kept(given, keep, start)
        if split == "none":
            requests, cut = self._undivided(prepared, chosen, row)
            found = [self._noted(Piece(0, len(given)), requests[0].input_ids, given, spans)]
        else:
            bounded = options.get("max_new_tokens") is not None or bool(prepared.preset.get("max_length"))
            encode = functools.cache(lambda piece: self._encode(replace(prepared, text=prepared.prefix + piece))[0])
            size = self._size(encode, chosen.max_new_tokens if bounded else None)
            found = pieces(given, size, split=split, language=prepared.source, kept=spans, start=start)
            sources = [encode(given[piece.start : piece.end]) for piece in found]
            found = [self._noted(piece, ids, given, spans) for piece, ids in zip(found, sources, strict=True)]
            each = [of_piece(chosen, number, 0 if bounded else len(ids)) for number, ids in enumerate(sources)]
            requests, cut = tuple(map(functools.partial(self._asked, prepared), each, sources)), False
        return TranslationJob(
            requests=requests,
            text=prepared.text,
            truncated=cut,
            row=row,
            between=between(given, found, start),
            source=given,
            languages=(prepared.source, prepared.target),
            pieces=tuple(found),
            start=start,
            keep=keep,
            kept=tuple(spans),
            copies=chosen.num_return_sequences,
            seed=chosen.seed,
        )

    def _noted(self, piece: Piece, token_ids: Sequence[int], text: str, spans: Sequence[Span]) -> Piece:
        """Note on a piece that the vocabulary lacks something of it; what is kept need not be in it."""
        if (unknown := self._codec.unknown) is None or unknown not in token_ids:
            return piece
        if inside := [span for span in spans if piece.start <= span[0] and span[1] <= piece.end]:
            edges = [piece.start, *(edge for span in inside for edge in span), piece.end]
            rest = " ".join(text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))
            if unknown not in self._codec.encode(rest, special=False):
                return piece
        return replace(piece, notes=(*piece.notes, "unknown"))

    def _translates(self, prepared: Prepared) -> bool:
        """Whether a row goes from one language to another, so that its parts can be translated by themselves."""
        named = prepared.source is not None or prepared.target is not None
        return named or self._opened.model.config.model_type == "marian"

    def _undivided(self, prepared: Prepared, chosen: Options, row: int) -> tuple[tuple[Request, ...], bool]:
        """Make the request of a text that is taken as it is, and say whether it was cut."""
        token_ids, around = self._encode(prepared)
        token_ids, cut = fit(token_ids, self._plan.context_length, around=around, truncate=chosen.truncate, row=row)
        return (self._asked(prepared, chosen, token_ids),), cut

    def _size(self, encode: Callable[[str], list[int]], max_new_tokens: int | None) -> Size:
        """Say how long a piece may be: what the encoder takes, and what leaves the answer room."""
        room = None if self._plan.context_length is None else self._plan.context_length - 1
        budget = min((number for number in (max_new_tokens, room) if number is not None), default=None)
        # A sentence as long as the encoder takes would leave an answer of its length no place for an end token.
        most = PIECE_TOKENS if room is None else room
        return Size(lambda piece: len(encode(piece)), most, packed(most, budget))

    def _asked(self, prepared: Prepared, chosen: Options, token_ids: Sequence[int]) -> Request:
        context = self._plan.context_length
        # The decoder has as many places as the encoder; its start token takes one.
        room = chosen.max_new_tokens if context is None else context - 1
        return self._request(chosen, token_ids, room=room, forced_bos_token_id=prepared.forced_bos_token_id)

    def _encode(self, prepared: Prepared) -> tuple[list[int], tuple[int, int]]:
        """Encode a text, and say how many special tokens stand around it."""
        if prepared.blank:
            raise self._languages.undetected(prepared.text)
        if prepared.before is None:
            return self._codec.encode(prepared.text), self._codec.around
        body = self._codec.encode(prepared.text, special=False)
        return [*prepared.before, *body, *prepared.after], (
            len(prepared.before),
            len(prepared.after),
        )

    def _result(self, job: TranslationJob, outcomes: Sequence[Outcome], timing: Timing) -> Translation:
        return translation(job, outcomes, timing)

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, text: str, translation: str, **told: Unpack[Told]
    ) -> Score: ...
    @overload
    def score(
        self, text: str | Iterable[str], translation: str | Iterable[str], **told: Unpack[Told]
    ) -> list[Score]: ...
    def score(
        self, text: str | Iterable[str], translation: str | Iterable[str], **told: Unpack[Told]
    ) -> Score | list[Score]:
        """Say how likely the model finds a translation of a text, or another answer to it.

        The end token behind the translation is scored, as in training: without it a translation of half of the text
        would be the likelier one. What the decoder is told is not: its start token, and the language, or another token
        that all its answers are forced to begin with. The text is taken as it is, not by sentences.

        Args:
            text: A text, or an iterable of texts, as a call takes them.
            translation: What is scored, one for each text, or one for all. Several may have one text.
            **told: `source`, `target` and `preset` as for a call; each is one value, or a list with one per pair.

        Returns:
            One score for a pair, a list of the same length and order for lists.

        Raises:
            LanguageError: A language is missing, or not one the checkpoint speaks.
            OptionError: There are not as many translations as texts.
            InputTooLongError: A text or a translation is longer than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        rows, one = rows_of(text)
        given, single = pairs(rows, translation, single=one)
        words = per_row(told, len(given), _TOLD)
        items = [self._answers(before, [answer], words[row], row)[0] for row, (before, answer) in enumerate(given)]
        scores = self._scores.score(items)
        return scores[0] if single else scores

    @overload
    def rank(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, text: str, translations: Iterable[str], *, normalize: Normalize = "none", **told: Unpack[Told]
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        text: Iterable[str],
        translations: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        **told: Unpack[Told],
    ) -> list[Ranking]: ...
    def rank(
        self,
        text: str | Iterable[str],
        translations: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        **told: Unpack[Told],
    ) -> Ranking | list[Ranking]:
        """Put translations of a text in the order in which the model finds them likely.

        The encoder reads the text once for all of them; for what is scored, see `score`.

        Args:
            text: A text, or an iterable of texts.
            translations: For several texts a list for each, or one list for all.
            normalize: How log-probabilities are made comparable: `"none"`, per token (`"tokens"`), per UTF-8 byte
                (`"bytes"`), or less what the translation has as one of an empty text (`"prior"`).
            **told: `source`, `target` and `preset` as for a call; each is one value, or a list with one per text.

        Raises:
            OptionError: `normalize` is another word, there are no translations, or not as many lists as texts.
            LanguageError: A language is missing, or not one the checkpoint speaks.
            InputTooLongError: A text or a translation is longer than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        check_normalize(normalize)
        rows, single = rows_of(text)
        lists = choices_of(translations, len(rows), single=single)
        words = per_row(told, len(rows), _TOLD | {"normalize"})
        given = list(zip(rows, lists, words, strict=True))
        items = [self._answers(*one, row) for row, one in enumerate(given)]
        given = given if normalize == "prior" else []
        priors = [self._answers(*one, row, empty=True) for row, one in enumerate(given)]
        rankings = self._scores.rank(items, normalize, priors)
        return rankings[0] if single else rankings

    def _answers(
        self, text: Any, answers: Sequence[str], told: Mapping[str, Any], row: int, *, empty: bool = False
    ) -> list[Item]:
        """Make what is scored of answers to a text, or of the same answers to an empty one."""
        prepared = self._languages.prepare(text_of(text, row), **{name: told.get(name) for name in _TOLD})
        prepared = replace(prepared, text=prepared.prefix) if empty else prepared
        limit = self._plan.context_length
        source, _ = fit(self._encode(prepared)[0], limit, row=row, advice="shorten it, or score parts of it")
        forced, coded = prepared.forced_bos_token_id, prepared.before is not None
        forced = self._checkpoint_config.forced_bos_token_id if forced is None else forced
        assert self._start is not None  # noqa: S101 - of causal models alone
        found = [target(self._codec, text_of(one, row), self._start, forced, coded=coded) for one in answers]
        return [
            made(one, *tokens, row=row, limit=limit, source=source) for one, tokens in zip(answers, found, strict=True)
        ]
