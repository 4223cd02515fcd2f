"""`Translator`: texts turned into texts by an encoder-decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from lmkit.encoding import fit
from lmkit.generation import GENERATION_OPTIONS, GenerationOptions
from lmkit.languages import Languages, Prepared, languages_of
from lmkit.results import Segment, Translation
from lmkit.wrapper import Loaded, rows_of, text_of
from lmkit.writing import Job, Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from typing_extensions import Unpack

    from lmkit.engine import Outcome
    from lmkit.errors import LmkitError
    from lmkit.generation import Options
    from lmkit.results import TextChunk

__all__ = ["TranslationOptions", "Translator"]


class TranslationOptions(GenerationOptions, total=False):
    """The options of every call that translates: those of generation, and which languages.

    `source` and `target` are languages as the checkpoint writes them (see `Translator.languages`);
    `preset` is a name from `Translator.presets`, such as `"summarization"`.
    """

    source: str | Sequence[str]
    target: str | Sequence[str]
    preset: str | Sequence[str]


class Translator(Writer[Translation]):
    """An encoder-decoder: translates, summarizes, or does what else its checkpoint was trained for.

    ```python
    translator = lmkit.load("seq2seq", "facebook/m2m100_418M")
    translator("How are you?", source="en", target="de").text
    ```

    All options are those of `TranslationOptions`.
    """

    _accepted: ClassVar[frozenset[str]] = GENERATION_OPTIONS | {"source", "target", "preset"}

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model; `lmkit.load` calls this."""
        super().__init__(loaded)
        self._languages: Languages = languages_of(loaded.tokenizer, loaded.model.config)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages the checkpoint speaks, as it writes them; empty where it is not told any."""
        return tuple(self._languages.codes)

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
            LanguageError: A language is missing or not one the checkpoint speaks.
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
        self._told("", options)

    def _told(self, given: str, options: dict[str, Any]) -> tuple[Prepared, Options]:
        """Write a text as the family wants it, and check the options beside the languages."""
        options = {name: value for name, value in options.items() if value is not None}
        words = {name: options.pop(name, None) for name in ("source", "target", "preset")}
        prepared = self._languages.prepare(given, **words)
        return prepared, self._options(from_preset(prepared, options) | options)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Job:
        given = text_of(given, row)
        prepared, chosen = self._told(given, options)
        token_ids, around = self._encode(prepared)
        context = self._plan.context_length
        token_ids, cut = fit(token_ids, context, around=around, truncate=chosen.truncate, row=row)
        # The decoder has as many places as the encoder; its start token takes one.
        room = chosen.max_new_tokens if context is None else context - 1
        request = self._request(chosen, token_ids, room=room, forced_bos_token_id=prepared.forced_bos_token_id)
        return Job(request, prepared.text, cut, row, given, prepared.source, prepared.target)

    def _encode(self, prepared: Prepared) -> tuple[list[int], tuple[int, int]]:
        """Encode a text, and say how many special tokens stand around it."""
        if prepared.before is None:
            return self._codec.encode(prepared.text), self._codec.around
        body = self._codec.encode(prepared.text, special=False)
        return [*prepared.before, *body, *prepared.after], (
            len(prepared.before),
            len(prepared.after),
        )

    def _result(self, job: Job, outcome: Outcome) -> Translation:
        best = outcome.completions[0].text
        return Translation(
            prompt=job.text,
            completions=outcome.completions,
            prompt_tokens=len(job.request.input_ids),
            seed=job.request.seed,
            truncated=job.truncated,
            timing=outcome.timing,
            source=job.source,
            source_language=job.source_language,
            target_language=job.target_language,
            segments=(Segment(0, len(job.source), 0, len(best)),),
        )


def from_preset(prepared: Prepared, given: dict[str, Any]) -> dict[str, Any]:
    """Read the options a preset asks for; what the caller gives for the mode or the length wins.

    A preset's `max_length` and `min_length` count the decoder's start token.
    """
    preset = prepared.preset
    options: dict[str, Any] = {}
    if preset.get("max_length") and "max_new_tokens" not in given:
        options["max_new_tokens"] = max(int(preset["max_length"]) - 1, 1)
    if preset.get("min_length") and not {"max_new_tokens", "min_new_tokens"} & given.keys():
        options["min_new_tokens"] = max(int(preset["min_length"]) - 1, 0)
    if preset.get("no_repeat_ngram_size"):
        options["no_repeat_ngram_size"] = preset["no_repeat_ngram_size"]
    chosen = {"mode", "sample", "temperature", "top_p", "top_k", "min_p", "num_beams"}
    if (preset.get("num_beams") or 1) > 1 and not chosen & given.keys():
        beams = ("num_beams", "length_penalty", "early_stopping")
        options |= {name: preset[name] for name in beams if preset.get(name) is not None}
    return options
