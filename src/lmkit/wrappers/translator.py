"""`Translator`: texts turned into texts by an encoder-decoder."""

# pyright: reportOverlappingOverload=false
# A str is an iterable of str too: its overload comes first.

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from lmkit.documents import Piece, Size, Span, Split, between, kept, pieces
from lmkit.errors import OptionError
from lmkit.languages import Languages, Prepared, languages_of, script
from lmkit.options.option import check_word, choice, declared
from lmkit.options.per_row import split as per_row
from lmkit.options.signatures import spelled_out
from lmkit.options.tasks import PairOptions, TranslationCall, TranslationOptions
from lmkit.results import Ranking, Score, TextChunk, Timing, Translation
from lmkit.text.windows import fit
from lmkit.wrappers.asynchronous import alternately, asynchronous
from lmkit.wrappers.base import Loaded, OnError, rows_of, text_of
from lmkit.wrappers.scoring import (
    Item,
    Normalize,
    choices_of,
    first_score,
    made,
    pairs,
    prepared,
    ranked,
    scored,
    target,
    texts_of,
)
from lmkit.wrappers.translation import (
    PIECE_TOKENS,
    TranslationJob,
    from_preset,
    handling,
    of_piece,
    together,
    translation,
    warn_of,
)
from lmkit.wrappers.writer import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

    from typing_extensions import Unpack

    from lmkit.engine import Outcome, Request
    from lmkit.errors import LmkitError
    from lmkit.options.generation import RowOptions
    from lmkit.structured.outputs import Kind, ValueT


_RANKED = {**declared(PairOptions), "normalize": choice(get_args(Normalize), "How choices are made comparable")}


@spelled_out
class Translator(Writer[Translation]):
    """An encoder-decoder: translates, summarizes, or does what else its checkpoint was trained for.

    ```python
    translator = lmkit.load("seq2seq", "facebook/m2m100_418M")
    translator("How are you?", source="en", target="de").text
    ```

    All options are those of `TranslationOptions`.
    """

    _accepted = TranslationCall
    _verbs = {"translate": None, "score": "translation", "rank": "translations"}  # noqa: RUF012
    _pair = tuple(declared(PairOptions))

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
    def __call__(
        self, texts: str, *, output: Kind[ValueT], **options: Unpack[TranslationOptions]
    ) -> Translation[ValueT]: ...
    @overload
    def __call__(
        self, texts: Iterable[str], *, output: Kind[ValueT], **options: Unpack[TranslationOptions]
    ) -> list[Translation[ValueT]]: ...
    @overload
    def __call__(self, texts: str, *, output: object = None, **options: Unpack[TranslationOptions]) -> Translation: ...
    @overload
    def __call__(
        self, texts: Iterable[str], *, output: object = None, **options: Unpack[TranslationOptions]
    ) -> list[Translation]: ...
    def __call__(
        self, texts: str | Iterable[str], *, output: object = None, **options: Unpack[TranslationOptions]
    ) -> Any:
        """Translate one text, or each of a list of texts.

        Args:
            texts: A text, or an iterable of texts.
            output: What the answer must be, which is then the result's `value`; see `Generator`.
            **options: See `TranslationOptions`; each is one value, or a list with one per text, as `output` is.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            LanguageError: A language is missing, not one the checkpoint speaks, or not to be detected.
            OptionError: An option is unknown, not accepted, or contradicts another.
            InputTooLongError: A text that is not split is longer than the encoder takes, and `truncate` is not given.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        return self._call(rows_of(texts), {**options, "output": output})

    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["raise"] = "raise",
        output: Kind[ValueT],
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation[ValueT]]: ...
    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["return"],
        output: Kind[ValueT],
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation[ValueT] | LmkitError]: ...
    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["raise"] = "raise",
        output: object = None,
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation]: ...
    @overload
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: Literal["return"],
        output: object = None,
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Translation | LmkitError]: ...
    def map(
        self,
        texts: Iterable[str],
        *,
        on_error: OnError = "raise",
        output: object = None,
        **options: Unpack[TranslationOptions],
    ) -> Iterator[Any]:
        """Translate texts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            texts: Any iterable, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            output: As for a call.
            **options: See `TranslationOptions`; one value each, for all texts.
        """
        return self._map(texts, {**options, "output": output}, on_error)

    def stream(
        self,
        texts: str | Iterable[str],
        *,
        output: object = None,
        partial: bool = False,
        **options: Unpack[TranslationOptions],
    ) -> Iterator[TextChunk]:
        """Translate texts and yield the translations while they grow.

        A row's chunks joined are its whole text; its last chunk has a `finish_reason`. A beam search
        knows its text only at the end, so it comes in one chunk. Leaving the loop ends the rows.
        """
        return self._stream(rows_of(texts)[0], {**options, "output": output}, partial=partial)

    acall = asynchronous(__call__)
    """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""

    def astream(
        self,
        texts: str | Iterable[str],
        *,
        output: object = None,
        partial: bool = False,
        **options: Unpack[TranslationOptions],
    ) -> AsyncIterator[TextChunk]:
        """Do as `stream` does, for asyncio."""
        return alternately(self.stream(texts, output=output, partial=partial, **options))

    def _check(self, options: dict[str, Any]) -> None:
        handling(options)
        self._told(None, options)

    def _answer_ids(self, text: str) -> list[int]:
        if self._languages.scheme == "codes":
            return super()._answer_ids(text)
        return self._codec.encode_target(text, special=False)

    def _told(self, given: str | None, options: dict[str, Any]) -> tuple[Prepared, RowOptions]:
        """Write a text as the family wants it, and check the options beside the languages; None only checks."""
        prepared = self._languages.prepare(given, **{name: options.pop(name, None) for name in declared(PairOptions)})
        warn_of(prepared.preset, self._warned)
        return prepared, self._options(from_preset(prepared.preset, options) | options)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> TranslationJob:
        given = text_of(given, row)
        split, keep = handling(options)
        prepared, chosen = self._told(given, options)
        usual = self._usual_split(prepared)
        if chosen.output is not None and split not in (None, "none"):
            raise OptionError(f"split={split!r} and output contradict: an answer is to a whole text.")
        split = split or ("none" if chosen.truncate or chosen.output is not None else usual)
        start = len(given) - len(prepared.text) + len(prepared.prefix)  # behind a tag
        if not given[start:].strip():
            split = "paragraph"  # of no pieces: a model would make something up
        start = 0 if split == "none" else start
        spans = kept(given, keep, start)
        if split == "none":
            requests, cut = self._undivided(prepared, chosen, row)
            found = [self._noted(Piece(0, len(given)), requests[0].input_ids, given, spans)]
        else:
            bounded = "max_new_tokens" in options or bool(prepared.preset.get("max_length"))
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
            script=script(prepared.target) if usual == "sentence" else None,
            unknown=self._codec.unknown,
            keep=keep,
            kept=tuple(spans),
            copies=chosen.num_return_sequences,
            seed=chosen.seed,
            output=chosen.output,
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

    def _usual_split(self, prepared: Prepared) -> Split:
        """Return what a text is split into by default: sentences if it goes from one language to another."""
        model_type = self._opened.model.config.model_type
        if model_type == "plbart":
            return "paragraph"  # a program has no sentences
        named = prepared.source is not None or prepared.target is not None
        return "sentence" if named or model_type == "marian" else "none"

    def _undivided(self, prepared: Prepared, chosen: RowOptions, row: int) -> tuple[tuple[Request, ...], bool]:
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
        return Size(lambda piece: len(encode(piece)), most, together(most, budget))

    def _asked(self, prepared: Prepared, chosen: RowOptions, token_ids: Sequence[int]) -> Request:
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
        return [*prepared.before, *body, *prepared.after], (len(prepared.before), len(prepared.after))

    def _result(self, job: TranslationJob, outcomes: Sequence[Outcome], timing: Timing) -> Translation:
        return translation(job, outcomes, timing)

    @overload
    def score(
        self, text: str, translation: str, *, progress: bool | None = None, **told: Unpack[PairOptions]
    ) -> Score: ...
    @overload
    def score(
        self,
        text: str | Iterable[str],
        translation: str | Iterable[str],
        *,
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> list[Score]: ...
    @overload
    def score(
        self,
        text: str | Iterable[str],
        translation: str | Iterable[str],
        *,
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> list[Score | LmkitError]: ...
    def score(
        self,
        text: str | Iterable[str],
        translation: str | Iterable[str],
        *,
        on_error: OnError = "raise",
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> Any:
        """Say how likely the model finds a translation of a text, or another answer to it.

        The end token behind the translation is scored, as in training: without it a translation of half of the text
        would be the likelier one. What the decoder is told is not: its start token, and the language, or another token
        that all its answers are forced to begin with. The text is taken as it is, not by sentences.

        Args:
            text: A text, or an iterable of texts, as a call takes them.
            translation: What is scored, one for each text, or one for all. Several may have one text.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.
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
        words = per_row(told, len(given), declared(PairOptions))
        rows = [(before, [answer], words[row]) for row, (before, answer) in enumerate(given)]
        scores = scored(
            prepared(self._answers, rows, on_error), self._scores.run, first_score, on_error=on_error, progress=progress
        )
        return scores[0] if single else scores

    ascore = asynchronous(score)
    """Do as `score` does, for asyncio; cancelling the task ends it at its next forward pass."""

    @overload
    def rank(
        self,
        text: str,
        translations: Iterable[str],
        *,
        normalize: Normalize = "none",
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        text: Iterable[str],
        translations: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> list[Ranking]: ...
    @overload
    def rank(
        self,
        text: Iterable[str],
        translations: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> list[Ranking | LmkitError]: ...
    def rank(
        self,
        text: str | Iterable[str],
        translations: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        on_error: OnError = "raise",
        progress: bool | None = None,
        **told: Unpack[PairOptions],
    ) -> Any:
        """Put translations of a text in the order in which the model finds them likely.

        The encoder reads the text once for all of them; for what is scored, see `score`.

        Args:
            text: A text, or an iterable of texts.
            translations: For several texts a list for each, or one list for all.
            normalize: How log-probabilities are made comparable: `"none"`, per token (`"tokens"`), per UTF-8 byte
                (`"bytes"`), or less what the translation has as one of an empty text (`"prior"`).
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.
            **told: `source`, `target` and `preset` as for a call; each is one value, or a list with one per text.

        Raises:
            OptionError: `normalize` is another word, there are no translations, or not as many lists as texts.
            LanguageError: A language is missing, or not one the checkpoint speaks.
            InputTooLongError: A text or a translation is longer than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        check_word("normalize", normalize, get_args(Normalize))
        rows, single = rows_of(text)
        lists = choices_of(translations, len(rows), single=single)
        words = per_row(told, len(rows), _RANKED)
        items = prepared(self._choices, zip(rows, lists, words, itertools.repeat(normalize)), on_error)
        rankings = scored(items, self._scores.run, ranked(normalize), on_error=on_error, progress=progress)
        return rankings[0] if single else rankings

    arank = asynchronous(rank)
    """Do as `rank` does, for asyncio; cancelling the task ends it at its next forward pass."""

    def _choices(self, text: Any, choices: Any, told: Mapping[str, Any], normalize: Normalize, row: int) -> list[Item]:
        """Make what is scored of a row's choices as answers to its text, and for `"prior"` to an empty one."""
        texts = texts_of(choices, row)
        items = self._answers(text, texts, told, row)
        return items + self._answers(text, texts, told, row, empty=True) if normalize == "prior" else items

    def _answers(
        self, text: Any, answers: Sequence[str], told: Mapping[str, Any], row: int, *, empty: bool = False
    ) -> list[Item]:
        """Make what is scored of answers to a text, or of the same answers to an empty one."""
        prepared = self._languages.prepare(text_of(text, row), **{**dict.fromkeys(declared(PairOptions)), **told})
        prepared = replace(prepared, text=prepared.prefix) if empty else prepared
        limit = self._plan.context_length
        source, _ = fit(self._encode(prepared)[0], limit, row=row, advice="shorten it, or score parts of it")
        forced, coded = prepared.forced_bos_token_id, prepared.before is not None
        forced = self._checkpoint_config.forced_bos_token_id if forced is None else forced
        assert self._start is not None  # noqa: S101 - of causal models alone
        found = [target(self._codec, text_of(one, row), self._start, forced, coded=coded) for one in answers]
        self._check_rows([*source, *(token_id for token_ids, _ in found for token_id in token_ids)])
        return [
            made(one, *tokens, row=row, limit=limit, source=source) for one, tokens in zip(answers, found, strict=True)
        ]
