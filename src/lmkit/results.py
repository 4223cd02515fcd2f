"""The frozen dataclasses that every call returns.

The same shape whatever the input's: `str(result)` is the text, `to_dict()` plain JSON types, and in a
notebook a result draws itself with everything escaped, because model output is untrusted text.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = [
    "Candidate",
    "Choice",
    "Completion",
    "EngineStats",
    "FinishReason",
    "Generation",
    "MaskSlot",
    "Ranking",
    "Score",
    "Segment",
    "SegmentNote",
    "TextChunk",
    "Timing",
    "TokenLogprob",
    "Translation",
    "Unmasking",
]

FinishReason: TypeAlias = Literal["eos", "stop", "length", "cancelled"]
"""Why a row ended: its end token, a stop string, its budget of tokens, or its caller."""

SegmentNote: TypeAlias = Literal[
    "copied", "inserted", "length", "prefix", "removed", "repaired", "split", "unknown", "unmatched"
]
"""What there is to know of a segment.

- `"copied"`: not translated but taken over: white space, line ends, list markers, parts without letters or digits.
- `"prefix"`: a tag at the beginning of the source, which told the model its language and is not in the text.
- `"split"`: less than a sentence, since the sentence is longer than the model takes.
- `"unknown"`: it has characters that the vocabulary lacks, which the model does not see: they may be missing.
- `"length"`: the model ran out of `max_new_tokens`, so the end may be missing.
- `"repaired"`, `"inserted"`, `"removed"`: something to `keep` had been changed, was missing and has been put in where
  it is likely to belong, or had come too often.
- `"unmatched"`: the patterns to `keep` do not match in the text what they match in the source.
"""


class Result:
    """What all results share: `to_dict` and the notebook's picture."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON types; a float that JSON cannot write becomes None."""
        plain = _plain(self)
        assert isinstance(plain, dict)  # noqa: S101 - narrows the type; a dataclass is a dict here
        return plain

    def _repr_html_(self) -> str:
        """Draw the result as a table for a notebook, every cell escaped."""
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(_cell(value))}</pre></td></tr>"
            for name, value in self._shown().items()
        )
        return f"<table>{rows}</table>"

    def _shown(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names if not name.startswith("_")}


@dataclass(frozen=True, slots=True)
class TokenLogprob(Result):
    """How likely the model found one generated token, before any option reshaped its scores.

    Attributes:
        token: The token's text.
        token_id: Its place in the vocabulary.
        logprob: Natural logarithm of the model's own probability.
        top: The most likely tokens at this place, as many as `logprobs=` asked for.
    """

    token: str
    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing(Result):
    """What a row took on the clock, shared work of its batch included.

    Attributes:
        seconds: From the start of its batch to its last token.
        seconds_to_first_token: From the start of its batch to its first token.
        tokens_per_second: Generated tokens over `seconds`.
    """

    seconds: float
    seconds_to_first_token: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Completion(Result):
    """One continuation of a prompt.

    Attributes:
        text: The new text only, cut before a stop string.
        token_ids: The new tokens, the end-of-sequence token left out.
        score: A beam's length-normalised log-probability; None for other modes.
        finish_reason: Why it ended.
        stop_reason: The stop string that ended it, if one did.
        logprobs: One entry per generated token, if `logprobs=` asked for them.
        generated_tokens: How many tokens the model produced, the end token included.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float | None
    finish_reason: FinishReason
    stop_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    generated_tokens: int

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True, slots=True)
class Generation(Result):
    """What a prompt was continued with; the fields of its first completion can be read directly.

    Attributes:
        prompt: The text that was continued; of a chat, its messages as the template wrote them.
        completions: `num_return_sequences` of them, a beam search's best first.
        prompt_tokens: How many tokens the model read.
        seed: What reproduces the row, if it was sampled.
        truncated: True if `truncate=` cut the prompt.
        timing: What the row took.
    """

    prompt: str
    completions: tuple[Completion, ...]
    prompt_tokens: int
    seed: int | None
    truncated: bool
    timing: Timing

    def __str__(self) -> str:
        """Return the first completion's text."""
        return self.text

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's new tokens."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first completion ended."""
        return self.completions[0].finish_reason

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the first completion, if one did."""
        return self.completions[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The first completion's log-probabilities, if asked for."""
        return self.completions[0].logprobs

    @property
    def generated_tokens(self) -> int:
        """How many tokens the model produced for the first completion."""
        return self.completions[0].generated_tokens

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"prompt": self.prompt}
        for number, completion in enumerate(self.completions, start=1):
            name = "text" if len(self.completions) == 1 else f"text {number}"
            shown[name] = completion.text
        reason = self.finish_reason + (f" ({self.stop_reason!r})" if self.stop_reason else "")
        shown["finish_reason"] = reason
        shown["tokens"] = f"{self.prompt_tokens} read, {self.generated_tokens} generated"
        shown["speed"] = f"{self.timing.tokens_per_second:.1f} tokens/s"
        return shown


@dataclass(frozen=True, slots=True)
class EngineStats(Result):
    """What an engine holds at the moment, and what it has done since the model was loaded.

    Attributes:
        running: Rows in batches.
        waiting: Rows and beam searches that have not begun.
        cache_bytes: Keys and values of running rows, as far as lmkit holds them itself.
        prefix_bytes: Keys and values kept of recent prompts.
        forwards: Forward passes, but for beam searches that generate() runs.
        prompt_tokens: Prompt tokens read.
        reused_tokens: Prompt tokens that were not read again, since they were kept.
        generated_tokens: New tokens.
    """

    running: int
    waiting: int
    cache_bytes: int
    prefix_bytes: int
    forwards: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Segment(Result):
    """A piece of a document and of its translation, in characters, ends exclusive.

    The segments of a result cover every character of the source and of the text once, in order.

    Attributes:
        source_start: Where the piece begins in the source.
        source_end: Where it ends in the source.
        start: Where its translation begins in `text`.
        end: Where its translation ends in `text`.
        notes: What there is to know of it; mostly nothing.
    """

    source_start: int
    source_end: int
    start: int
    end: int
    notes: tuple[SegmentNote, ...] = ()


@dataclass(frozen=True, slots=True)
class Translation(Generation):
    """What a text was translated to, or turned into by a preset.

    Attributes:
        source: The text as given.
        source_language: The checkpoint's code of the source language, where it has one.
        target_language: The checkpoint's code of the target language, where it has one.
        segments: Which part of the source became which part of the text (of the first completion).
    """

    source: str
    source_language: str | None
    target_language: str | None
    segments: tuple[Segment, ...]

    def _shown(self) -> dict[str, Any]:
        shown = Generation._shown(self)  # noqa: SLF001 - zero-argument super() fails under slots
        languages = f"{self.source_language or '?'} → {self.target_language or '?'}"
        return {"source": self.source, "languages": languages} | {
            name: value for name, value in shown.items() if name != "prompt"
        }


@dataclass(frozen=True, slots=True)
class TextChunk(Result):
    """A piece of a streamed text.

    Attributes:
        text: The new characters; joined in order they are the row's whole text.
        index: Which row of the call the piece belongs to.
        finish_reason: Why the row ended, on its last chunk only.
        result: The whole result with its timing, on its last chunk only.
    """

    text: str
    index: int
    finish_reason: FinishReason | None = None
    result: Generation | None = None

    def __str__(self) -> str:
        """Return the piece of text."""
        return self.text


@dataclass(frozen=True, slots=True)
class Candidate(Result):
    """A way of filling the masks: all of them, or one.

    Attributes:
        text: The whole text, filled.
        fills: What each mask was filled with: the text of its token, or the target as given.
        tokens: The text of each filled-in token, in order of the text; more than `fills` where targets have several.
        token_ids: Their places in the vocabulary.
        token_logprobs: Natural logarithm of the model's probability of each, given the text and the tokens filled in
            before it.
        order: In which order the tokens were filled in, as indices into `tokens`.
    """

    text: str
    fills: tuple[str, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    order: tuple[int, ...]

    def __str__(self) -> str:
        """Return the filled text."""
        return self.text

    @property
    def token(self) -> str:
        """What the first mask was filled with."""
        return self.fills[0]

    @property
    def token_id(self) -> int:
        """Where the first mask's (first) token is in the vocabulary."""
        return self.token_ids[0]

    @property
    def logprob(self) -> float:
        """The sum of `token_logprobs`: by the chain rule, the logarithm of the tokens' joint probability."""
        return math.fsum(self.token_logprobs)

    @property
    def logprob_per_token(self) -> float:
        """The mean of `token_logprobs`, which does not favour fills of few tokens."""
        return self.logprob / len(self.token_logprobs)

    @property
    def score(self) -> float:
        """The tokens' probability (joint, by the chain rule, where there are several)."""
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class MaskSlot(Result):
    """One mask of the text and the independent guesses for it.

    Attributes:
        start: Where the mask begins in the text as given, in characters.
        end: Where it ends, exclusive.
        candidates: Guesses for this mask alone, the others left masked; best first, or in the
            order of `targets`.
        seen_start: Where the part of the text begins that the model saw to fill it, in characters: 0, unless the text
            is longer than the model takes.
        seen_end: Where that part ends, exclusive.
    """

    start: int
    end: int
    candidates: tuple[Candidate, ...]
    seen_start: int
    seen_end: int


@dataclass(frozen=True, slots=True)
class Unmasking(Result):
    """What a text's masks were filled with.

    Attributes:
        text: The text as given.
        masks: Its masks, each with independent guesses.
        candidates: Ways of filling the whole text, best first; draws in the order in which they were drawn.
        seed: What reproduces the draws, if the ways were drawn.
    """

    text: str
    masks: tuple[MaskSlot, ...]
    candidates: tuple[Candidate, ...]
    seed: int | None = None

    def __str__(self) -> str:
        """Return the text filled in the best way."""
        return self.candidates[0].text

    def _shown(self) -> dict[str, Any]:
        ways = {f"way {n}": f"{way.score:.3f}  {way.text}" for n, way in enumerate(self.candidates, start=1)}
        return {"text": self.text} | ways


@dataclass(frozen=True, slots=True)
class Score(Result):
    """How likely the model finds a text, or a continuation of one.

    Attributes:
        text: What was scored.
        tokens: The text of each scored token, in order.
        token_ids: Their places in the vocabulary.
        token_logprobs: Natural logarithm of the model's probability of each.
        greedy: Whether each is the likeliest in its place, so that greedy decoding would write them; None of a
            masked model's score.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    greedy: bool | None = None

    @property
    def logprob(self) -> float:
        """The sum of `token_logprobs`."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean of `-token_logprobs`; infinite where that overflows."""
        try:
            return math.exp(-self.logprob / len(self.token_logprobs))
        except OverflowError:
            return math.inf

    def _shown(self) -> dict[str, Any]:
        tokens = "  ".join(f"{t!r} {p:.2f}" for t, p in zip(self.tokens, self.token_logprobs, strict=True))
        return {"text": self.text, "logprob": self.logprob, "perplexity": self.perplexity, "tokens": tokens}


@dataclass(frozen=True, slots=True)
class Choice(Result):
    """One of the texts that were ranked.

    Attributes:
        text: The text as given.
        index: Its place among the choices as given.
        logprob: What it was ranked by: its log-probability, normalized as `rank` was told.
        probability: Its share among the choices, the softmax of their `logprob`s.
        score: Its log-probability by tokens, before it was normalized.
    """

    text: str
    index: int
    logprob: float
    probability: float
    score: Score

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text of each scored token."""
        return self.score.tokens

    def __str__(self) -> str:
        """Return the text."""
        return self.text


@dataclass(frozen=True, slots=True)
class Ranking(Result):
    """Texts in order of what the model finds likely.

    Attributes:
        choices: The likeliest first; equal ones as they were given.
        normalize: How log-probabilities were made comparable.
    """

    choices: tuple[Choice, ...]
    normalize: str

    def __str__(self) -> str:
        """Return the likeliest text."""
        return self.choices[0].text

    def _shown(self) -> dict[str, Any]:
        return {f"{n}": f"{choice.probability:.3f}  {choice.text}" for n, choice in enumerate(self.choices, start=1)}


def _plain(value: object) -> object:
    """Turn dataclasses and tuples into dicts and lists, and floats JSON cannot write into None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        return {name: _plain(getattr(value, name)) for name in names + _derived(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _derived(value: object) -> list[str]:
    """Name the properties of a result, which its JSON carries as well."""
    return [name for name in dir(type(value)) if isinstance(getattr(type(value), name), property)]


def _cell(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
