"""What a call that writes returns."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, Literal, TypeAlias

from typing_extensions import TypeVar

from lmkit.errors import OutputError
from lmkit.results.base import Result, plain
from lmkit.results.pictures import Block, Facts, Fold, Span, Text, Tree, as_it_is

FinishReason: TypeAlias = Literal["eos", "stop", "length", "cancelled"]
"""Why a row ended: its end token, a stop string, its budget of tokens, or its caller."""

ChunkKind: TypeAlias = Literal["content", "reasoning", "tool_call"]
"""What a piece of a chat's answer is, the markers around it included."""

SegmentNote: TypeAlias = Literal[
    "copied",
    "empty",
    "inserted",
    "length",
    "prefix",
    "removed",
    "repaired",
    "spaced",
    "split",
    "unknown",
    "unmatched",
    "unwritten",
]
"""What there is to know of a segment.

- `"copied"`: not translated but taken over: white space, line ends, list markers, parts without letters or digits.
- `"spaced"`: a space between pieces that the target's script writes and the source's does not, or the other way round.
- `"prefix"`: a tag at the beginning of the source, which told the model its language and is not in the text.
- `"split"`: less than a sentence, since the sentence is longer than the model takes.
- `"unknown"`: it has characters that the vocabulary lacks, which the model does not see: they may be missing.
- `"unwritten"`: the model wrote its unknown token, for something that its vocabulary lacks: it is not in the text.
- `"length"`: the model ran out of `max_new_tokens`, so the end may be missing.
- `"empty"`: the model wrote nothing for it.
- `"repaired"`, `"inserted"`, `"removed"`: something to `keep` had been changed, was missing and has been put in where
  it is likely to belong, or had come too often.
- `"unmatched"`: the patterns to `keep` do not match in the text what they match in the source.
"""


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


_UNTIMED = Timing(0.0, 0.0, 0.0)

ValueT_co = TypeVar("ValueT_co", covariant=True, default=Any)


@dataclass(frozen=True, slots=True)
class ToolCall(Result):
    """A call of a tool that a model has written; nothing has run it. `lmkit.call_tools` does.

    Attributes:
        name: The tool's name; empty where the text cannot be read.
        arguments: The arguments by name; None where the text cannot be read.
        text: What the model wrote, markers included. Calls that are written as one list have it in common.
        error: What is wrong with it: not readable, cut, or not as the tool's definition says.
    """

    name: str
    arguments: dict[str, Any] | None = field(hash=False)
    text: str = ""
    error: str | None = None

    @property
    def id(self) -> str:
        """Nine letters and digits that the answer to the call has as well, for templates that ask for them."""
        return hashlib.sha256(f"{self.name} {self.arguments} {self.text}".encode("utf-8", "replace")).hexdigest()[:9]


@dataclass(frozen=True, slots=True, repr=False)
class Completion(Result, Generic[ValueT_co]):
    """One continuation of a prompt.

    Attributes:
        text: The new text only, cut before a stop string.
        token_ids: The new tokens, the end-of-sequence token left out.
        score: A beam's length-normalised log-probability; None for other modes.
        finish_reason: Why it ended.
        stop_reason: The stop string that ended it, if one did.
        logprobs: One entry per generated token, if `logprobs=` asked for them.
        generated_tokens: How many tokens the model produced, the end token included.
        content: Of a chat's answer what is neither reasoning nor a call of a tool; else the text.
        reasoning: What the model wrote for itself before it answered.
        tool_calls: The calls of tools in it.
        reasoning_name: What the chat template calls the reasoning of a message.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    score: float | None = None
    finish_reason: FinishReason = "eos"
    stop_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    generated_tokens: int = 0
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_name: str = "reasoning_content"
    _value: Any = field(default=None, hash=False)
    _value_error: str | None = "no output= was asked for"

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def _told(self) -> dict[str, object]:
        stop = {} if self.stop_reason is None else {"stop_reason": self.stop_reason}
        return {"finish_reason": self.finish_reason, **stop}

    def _picture(self) -> list[Block]:
        tokens = self.logprobs or ()
        tinted: list[Block] = [Text((tuple(map(_span, tokens)),))] if tokens else []
        whole = tinted and "".join(one.token for one in tokens).startswith(self.text)  # but for halves of characters
        blocks = tinted if whole else [as_it_is(self.text), *tinted]
        if self._value_error is None:
            blocks.insert(0, Tree(plain(self._value)))
        if self.reasoning:
            blocks.insert(0, Fold("reasoning", (as_it_is(self.reasoning),)))
        calls = (
            Fold(f"call of {one.name or '?'}", (Tree(one.arguments) if one.error is None else as_it_is(one.text),))
            for one in self.tool_calls
        )
        return [*blocks, *calls, Facts(self._told())]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message to append to the chat; calls that cannot be read are in its content."""
        unread = [call.text for call in self.tool_calls if call.arguments is None]
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(filter(None, [self.content, *unread]))}
        if self.reasoning:
            message[self.reasoning_name] = self.reasoning
        calls = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
            if call.arguments is not None
        ]
        return {**message, "tool_calls": calls} if calls else message

    @property
    def value(self) -> ValueT_co:
        """What `output=` asked for, made of the text.

        Raises:
            OutputError: The text was cut or is no such answer, or nothing was asked for.
        """
        if self._value_error is not None:
            raise no_value(self.text, self._value_error)
        value: ValueT_co = self._value
        return value

    @property
    def value_error(self) -> str | None:
        """Why there is no value; None where there is one."""
        return self._value_error


@dataclass(frozen=True, slots=True, repr=False)
class Generation(Result, Generic[ValueT_co]):
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
    completions: tuple[Completion[ValueT_co], ...]
    prompt_tokens: int = 0
    seed: int | None = None
    truncated: bool = False
    timing: Timing = _UNTIMED

    def __str__(self) -> str:
        """Return the first completion's text."""
        return self.text

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def value(self) -> ValueT_co:
        """What `output=` asked for, made of the first completion's text.

        Raises:
            OutputError: See `Completion`.
        """
        return self.completions[0].value

    @property
    def value_error(self) -> str | None:
        """Why the first completion has no value; None where it has one."""
        return self.completions[0].value_error

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first completion's new tokens."""
        return self.completions[0].token_ids

    @property
    def content(self) -> str:
        """Of the first completion what is neither reasoning nor a call of a tool."""
        return self.completions[0].content

    @property
    def reasoning(self) -> str:
        """What the model wrote for itself before the first completion's answer."""
        return self.completions[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools in the first completion."""
        return self.completions[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        """The first completion as a message to append to the chat."""
        return self.completions[0].message

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

    def _told(self) -> dict[str, object]:
        return self.completions[0]._told()  # noqa: SLF001 - of the same kind

    def _picture(self) -> list[Block]:
        several = len(self.completions) > 1
        answers = [
            block
            for number, one in enumerate(self.completions, start=1)
            for block in ([Facts({"text": number})] if several else []) + one._picture()  # noqa: SLF001
        ]
        facts = {**self.completions[-1]._told(), **self._facts().pairs}  # noqa: SLF001
        return [Fold("prompt", (as_it_is(self.prompt),)), *answers[:-1], Facts(facts)]

    def _facts(self) -> Facts:
        speed = f"{self.timing.tokens_per_second:.1f} tokens/s"
        return Facts({"tokens": f"{self.prompt_tokens} read, {self.generated_tokens} generated, {speed}"})


@dataclass(frozen=True, slots=True)
class EngineStats(Result):
    """What an engine holds at the moment, and what it has done since the model was loaded.

    Of a `Generator` and a `Translator`, passes of `score` and `rank` are not counted. An `Unmasker` holds nothing
    between calls: only `forwards` and `prompt_tokens` are counted, those of `score` and `rank` included.

    Attributes:
        running: Rows in batches.
        waiting: Rows that have not begun.
        cache_bytes: Keys and values of running rows, as far as lmkit holds them itself.
        prefix_bytes: Keys and values kept of recent prompts.
        forwards: Forward passes; beam searches that generate() runs together are one.
        prompt_tokens: Tokens of prompts or sources read; of an `Unmasker`, tokens in passes, padding included.
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


@dataclass(frozen=True, slots=True, repr=False)
class Translation(Generation[ValueT_co]):
    """What a text was translated to, or turned into by a preset.

    Attributes:
        source: The text as given.
        source_language: The checkpoint's code of the source language, where it has one.
        target_language: The checkpoint's code of the target language, where it has one.
        segments: Which part of the source became which part of the text (of the first completion).
    """

    source: str = ""
    source_language: str | None = None
    target_language: str | None = None
    segments: tuple[Segment, ...] = ()

    def _picture(self) -> list[Block]:
        pieces = list(enumerate(self.segments)) or [(0, Segment(0, len(self.source), 0, len(self.text)))]
        there, here = attrgetter("source_start", "source_end"), attrgetter("start", "end")
        sides = [
            tuple(Span(text[slice(*ends(one))], bool(one.notes), ", ".join(one.notes), n) for n, one in pieces)
            for text, ends in ((self.source, there), (self.text, here))
        ]
        others: list[Block] = [as_it_is(one.text) for one in self.completions[1:]]
        others += [Fold("tokens", (Text((tuple(map(_span, self.logprobs)),)),))] if self.logprobs else []
        languages = {"languages": f"{self.source_language or '?'} → {self.target_language or '?'}"}
        why = {name: value for name, value in self._told().items() if value}
        return [Text(tuple(sides)), *others, Facts({**languages, **why, **self._facts().pairs})]


@dataclass(frozen=True, slots=True)
class TextChunk(Result):
    """A piece of a streamed text.

    Attributes:
        text: The new characters; joined in order they are the row's whole text.
        index: Which row of the call the piece belongs to.
        finish_reason: Why the row ended, on its last chunk only.
        result: The whole result with its timing, on its last chunk only.
        kind: What it is of a chat's answer; always `"content"` of other rows.
        partial: With `partial=True`, the data of the answer so far, unchecked: None where there is none yet.
    """

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    result: Generation[Any] | None = None
    kind: ChunkKind = "content"
    partial: Any = field(default=None, hash=False)

    @property
    def value(self) -> Any:
        """What `output=` asked for, on the row's last chunk.

        Raises:
            OutputError: See `Completion`; or there is more to come.
        """
        if self.result is None:
            raise no_value(self.text, "the row goes on, and the value comes with its last chunk")
        return self.result.value

    def __str__(self) -> str:
        """Return the piece of text."""
        return self.text


def _span(one: TokenLogprob) -> Span:
    """Tint a token by how unlikely it was, with what else might have come."""
    others = "".join([f"\n{math.exp(other.logprob):7.3f}  {other.token!r}" for other in one.top])
    share = math.exp(one.logprob)
    return Span(one.token, 1 - share, f"{share:.3f}{others}")


def no_value(text: str, reason: str) -> OutputError:
    """Say why a text has no value."""
    return OutputError(f"the answer has no value: {reason}. Its text: {text[:200]!r}", text, reason)
