"""`Generator`: prompts and chats continued by a causal language model."""

# pyright: reportOverlappingOverload=false
# A str is an iterable of str too: its overload comes first.

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, get_args, overload

from lmkit.errors import LmkitError, OptionError, shown
from lmkit.options.generation import DEFAULT_MAX_NEW_TOKENS, GeneratorCall, GeneratorOptions
from lmkit.options.option import check_word, checked, declared
from lmkit.options.signatures import spelled_out
from lmkit.replies.asking import asked
from lmkit.results import Generation, Ranking, Score, TextChunk, Timing
from lmkit.text.chats import Chats
from lmkit.text.windows import SHORTEN, fit
from lmkit.wrappers.asynchronous import alternately, asynchronous
from lmkit.wrappers.base import Loaded, OnError, Rows, rows_of, text_of
from lmkit.wrappers.scoring import (
    Item,
    Normalize,
    alone,
    answered,
    choices_of,
    continued,
    first_score,
    made,
    pairs,
    prepared,
    ranked,
    scored,
    texts_of,
)
from lmkit.wrappers.writer import Job, Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lmkit.engine import Outcome
    from lmkit.engine.stream_text import Marks
    from lmkit.replies.scanner import Scanner
    from lmkit.results import Completion
    from lmkit.structured.outputs import Kind, ValueT

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: a dict with `role` and `content`, as transformers takes it."""

Chat: TypeAlias = Sequence[Message]
"""The messages of a chat, the oldest first."""

TokenIds: TypeAlias = Sequence[int]
"""A prompt that is encoded already; nothing is put around it."""

Prompt: TypeAlias = str | Chat | TokenIds
"""One row."""

Prompts: TypeAlias = Iterable[str] | Iterable[Chat] | Iterable[TokenIds]
"""Several rows: texts, chats, or token ids."""


@spelled_out
class Generator(Writer[Generation]):
    """A causal language model: continues prompts and answers chats.

    ```python
    generator = lmkit.load("causal", "HuggingFaceTB/SmolLM2-135M-Instruct")
    generator("Level up!", max_new_tokens=50).text
    generator.chat([{"role": "user", "content": "Hello!"}], temperature=0.7, seed=1).text
    ```

    Every verb takes a text or a chat, or a list of them. All options are those of `GeneratorOptions`. Results hold
    the new text only.
    """

    _accepted = GeneratorCall
    _verbs = {"generate": None, "chat": None, "score": "continuation", "rank": "choices"}  # noqa: RUF012

    def __init__(self, loaded: Loaded) -> None:
        """Take over a loaded model and start an engine for it."""
        super().__init__(loaded)
        self._chats = Chats(self._codec)
        self._vocabulary = self._rows or len(loaded.tokenizer)
        ends, tokenizer = self._checkpoint_config.eos_token_id, self._codec.tokenizer
        # What XLM puts behind a text ends it only by its config, and its tokenizer separates texts by it.
        separators = {tokenizer.sep_token_id, tokenizer.cls_token_id}
        self._ends = {*(ends if isinstance(ends, list) else [ends])} - separators | {tokenizer.eos_token_id}

    @overload
    def __call__(
        self, prompts: Prompt, *, output: Kind[ValueT], **options: Unpack[GeneratorOptions]
    ) -> Generation[ValueT]: ...
    @overload
    def __call__(
        self, prompts: Prompts, *, output: Kind[ValueT], **options: Unpack[GeneratorOptions]
    ) -> list[Generation[ValueT]]: ...
    @overload
    def __call__(
        self, prompts: Prompt, *, output: object = None, **options: Unpack[GeneratorOptions]
    ) -> Generation: ...
    @overload
    def __call__(
        self, prompts: Prompts, *, output: object = None, **options: Unpack[GeneratorOptions]
    ) -> list[Generation]: ...
    def __call__(self, prompts: Prompt | Prompts, *, output: object = None, **options: Unpack[GeneratorOptions]) -> Any:
        """Continue a prompt or answer a chat, or each of a list of them.

        Args:
            prompts: A text, a chat or token ids, or an iterable of them.
            output: What the answer must be, which is then the result's `value`: a type, or `OneOf`, `Regex`,
                `JSONSchema` or `Grammar`.
            **options: See `GeneratorOptions`; each is one value, or a list with one per prompt, as `output` is.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            OptionError: An option is unknown, not accepted, or contradicts another.
            InputTooLongError: A prompt fills the model's context and `truncate` is not given.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        return self._call(prompts_of(prompts), {**options, "output": output})

    @overload
    def chat(
        self, messages: Chat, *, output: Kind[ValueT], **options: Unpack[GeneratorOptions]
    ) -> Generation[ValueT]: ...
    @overload
    def chat(
        self, messages: Iterable[Chat], *, output: Kind[ValueT], **options: Unpack[GeneratorOptions]
    ) -> list[Generation[ValueT]]: ...
    @overload
    def chat(self, messages: Chat, *, output: object = None, **options: Unpack[GeneratorOptions]) -> Generation: ...
    @overload
    def chat(
        self, messages: Iterable[Chat], *, output: object = None, **options: Unpack[GeneratorOptions]
    ) -> list[Generation]: ...
    def chat(
        self, messages: Chat | Iterable[Chat], *, output: object = None, **options: Unpack[GeneratorOptions]
    ) -> Any:
        """Answer one chat, or each of a list of chats, by the checkpoint's own template.

        The same as a call with messages, but a text is an error. Control tokens written inside a message reach the
        model as plain text.

        Args:
            messages: Dicts with `role` and `content`, the oldest first; or an iterable of such lists.
            output: As for a call.
            **options: See `GeneratorOptions`.

        Raises:
            OptionError: The checkpoint has no chat template, or it refuses the messages; or `truncate` is given, which
                would cut the template.
            InputTooLongError: A chat fills the model's context.
        """
        rows, single = prompts_of(messages)
        for number, row in enumerate(rows):
            if isinstance(row, str) or ids_of(row, self._vocabulary, number):
                raise OptionError(
                    f"row {number} is {shown(row)}, not a chat: pass {_MESSAGE}, or call the generator with a text."
                )
        return self._call((rows, single), {**options, "output": output})

    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["raise"] = "raise",
        output: Kind[ValueT],
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation[ValueT]]: ...
    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["return"],
        output: Kind[ValueT],
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation[ValueT] | LmkitError]: ...
    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["raise"] = "raise",
        output: object = None,
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation]: ...
    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["return"],
        output: object = None,
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation | LmkitError]: ...
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: OnError = "raise",
        output: object = None,
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Any]:
        """Continue prompts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            prompts: Any iterable of texts or chats, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            output: As for a call.
            **options: See `GeneratorOptions`; one value each, for all prompts.
        """
        return self._map(prompts, {**options, "output": output}, on_error)

    def stream(
        self,
        prompts: Prompt | Prompts,
        *,
        output: object = None,
        partial: bool = False,
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[TextChunk]:
        """Continue prompts and yield their text while it grows.

        A row's chunks joined are its whole text; its last chunk has a `finish_reason`, and the value of `output`. With
        `partial`, each has the data so far. Leaving the loop ends the rows.

        Raises:
            OptionError: As for a call; also for `num_return_sequences` above 1.
        """
        return self._stream(prompts_of(prompts)[0], {**options, "output": output}, partial=partial)

    acall = asynchronous(__call__)
    """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""

    def astream(
        self,
        prompts: Prompt | Prompts,
        *,
        output: object = None,
        partial: bool = False,
        **options: Unpack[GeneratorOptions],
    ) -> AsyncIterator[TextChunk]:
        """Do as `stream` does, for asyncio."""
        return alternately(self.stream(prompts, output=output, partial=partial, **options))

    @overload
    def score(self, prompt: str | TokenIds, continuation: None = None, *, progress: bool | None = None) -> Score: ...
    @overload
    def score(
        self, prompt: Iterable[str] | Iterable[TokenIds], continuation: None = None, *, progress: bool | None = None
    ) -> list[Score]: ...
    @overload
    def score(
        self, prompt: Prompt, continuation: str, *, continue_final_message: bool = False, progress: bool | None = None
    ) -> Score: ...
    @overload
    def score(
        self,
        prompt: Prompt | Prompts,
        continuation: str | Iterable[str],
        *,
        continue_final_message: bool = False,
        progress: bool | None = None,
    ) -> list[Score]: ...
    @overload
    def score(
        self,
        prompt: Prompt | Prompts,
        continuation: str | Iterable[str] | None = None,
        *,
        continue_final_message: bool = False,
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
    ) -> list[Score | LmkitError]: ...
    def score(
        self,
        prompt: Prompt | Prompts,
        continuation: str | Iterable[str] | None = None,
        *,
        continue_final_message: bool = False,
        on_error: OnError = "raise",
        progress: bool | None = None,
    ) -> Any:
        """Say how likely the model finds a text, or the continuation of a prompt.

        A text is scored behind the BOS where the tokenizer puts one there; where it puts none, its first token is not
        scored, for there is nothing before it. An empty prompt is the token that texts begin with. No end token is
        added: to score the end as well, write it, such as `"Paris.<|im_end|>"`.

        Prompt and continuation are encoded as one text. The prompt's tokens are those that it has in common with the
        prompt alone, so a token with characters of both belongs to the continuation, and so do spaces before its first
        word. Behind a chat, the continuation is what the assistant answers.

        Args:
            prompt: A text, a chat or token ids, or an iterable of them; alone, what is scored.
            continuation: What is scored behind it, one for each prompt, or one for all. Several may have one prompt.
            continue_final_message: Whether it goes on with a chat's last message, the assistant's.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.

        Returns:
            One score for a text or a pair, a list of the same length and order for lists.

        Raises:
            OptionError: There are not as many continuations as prompts, or there is no token to score.
            InputTooLongError: A text is longer than the model takes; it is not scored in parts.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        if continuation is None:
            rows, single = prompts_of(prompt)
            items = prepared(self._alone, zip(rows), on_error)
        else:
            rows, one = prompts_of(prompt)
            given, single = pairs(rows, continuation, single=one)
            asked = ((before, [text], continue_final_message) for before, text in given)
            items = prepared(self._behind, asked, on_error)
        scores = scored(items, self._scores.run, first_score, on_error=on_error, progress=progress)
        return scores[0] if single else scores

    ascore = asynchronous(score)
    """Do as `score` does, for asyncio; cancelling the task ends it at its next forward pass."""

    @overload
    def rank(
        self,
        prompt: Prompt,
        choices: Iterable[str],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
        continue_final_message: bool = False,
        progress: bool | None = None,
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        prompt: Prompts,
        choices: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
        continue_final_message: bool = False,
        progress: bool | None = None,
    ) -> list[Ranking]: ...
    @overload
    def rank(
        self,
        prompt: Prompts,
        choices: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
        continue_final_message: bool = False,
        on_error: Literal["raise", "return"],
        progress: bool | None = None,
    ) -> list[Ranking | LmkitError]: ...
    def rank(
        self,
        prompt: Prompt | Prompts,
        choices: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
        continue_final_message: bool = False,
        on_error: OnError = "raise",
        progress: bool | None = None,
    ) -> Any:
        """Put continuations of a prompt in the order in which the model finds them likely.

        A prompt of more than 16 tokens is read once for all its choices, where `plan.engine` is `"lmkit"`. For what
        belongs to a choice, see `score`.

        Args:
            prompt: A text, a chat or token ids, or an iterable of them.
            choices: The continuations; for several prompts a list for each, or one list for all.
            normalize: How log-probabilities are made comparable: `"none"`, per token (`"tokens"`), per UTF-8 byte
                (`"bytes"`), or less what the choice has without the prompt (`"prior"`; Holtzman et al., "Surface Form
                Competition", 2021).
            neutral: What stands in the prompt's place for `"prior"`, such as `"Answer:"`.
            continue_final_message: Whether choices go on with a chat's last message, the assistant's.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            progress: As for a call.

        Raises:
            OptionError: `normalize` is another word, there are no choices, or not as many lists as prompts.
            InputTooLongError: A prompt with a choice is longer than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        check_word("normalize", normalize, get_args(Normalize))
        rows, single = prompts_of(prompt)
        lists = choices_of(choices, len(rows), single=single)
        around = neutral if normalize == "prior" else None
        asked = zip(rows, lists, itertools.repeat(around), itertools.repeat(continue_final_message))
        items = prepared(self._choices, asked, on_error)
        rankings = scored(items, self._scores.run, ranked(normalize), on_error=on_error, progress=progress)
        return rankings[0] if single else rankings

    arank = asynchronous(rank)
    """Do as `rank` does, for asyncio; cancelling the task ends it at its next forward pass."""

    def count_tokens(self, prompt: Prompt, *, template: Mapping[str, Any] | None = None) -> int:
        """Count the tokens that a prompt or a chat is to the model, whatever its length: what a call reads.

        Compare with `plan.context_length`, or ask `fits`.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        return len(self._prompt(prompt, {"template": template}, 0)[1])

    def fits(
        self, prompt: Prompt, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, *, template: Mapping[str, Any] | None = None
    ) -> bool:
        """Say whether a prompt or a chat leaves room for so many new tokens in the model's context."""
        limit = self._plan.context_length
        return limit is None or self.count_tokens(prompt, template=template) + max_new_tokens <= limit

    def _choices(self, prompt: Any, choices: Any, neutral: str | None, go_on: bool, row: int) -> list[Item]:  # noqa: FBT001
        """Make what is scored of a row's choices behind its prompt, and behind `neutral` if there is one."""
        texts = texts_of(choices, row)
        items = self._behind(prompt, texts, go_on, row)
        try:
            return items if neutral is None else items + self._behind(neutral, texts, False, row)  # noqa: FBT003
        except OptionError as error:
            raise OptionError(
                f"normalize='prior' scores the choices behind neutral={shown(neutral)}: {error} Here that is neutral=."
            ) from error

    def _behind(self, prompt: Any, texts: Sequence[str], go_on: bool, row: int) -> list[Item]:  # noqa: FBT001
        """Make what is scored of continuations of a prompt."""
        texts = [text_of(text, row, "a continuation") for text in texts]
        options = checked({"continue_final_message": go_on}, declared(self._accepted))
        if isinstance(prompt, str) and not options.get("continue_final_message"):
            found = continued(self._codec, prompt, texts)
        else:
            found = answered(self._codec, self._prompt(prompt, options, row)[1], texts)
        return [self._item(text, *tokens, row) for text, tokens in zip(texts, found, strict=True)]

    def _alone(self, given: Any, row: int) -> list[Item]:
        """Make what is scored of a text, or of token ids."""
        token_ids = ids_of(given, self._vocabulary, row)
        if token_ids is not None:
            return [self._item(self._codec.decode(token_ids, special=True), token_ids, 1, row)]
        return [self._item(given, *alone(self._codec, text_of(given, row)), row)]

    def _item(self, text: str, token_ids: list[int], start: int, row: int) -> Item:
        if not start:
            token_ids, start = self._beginning(row) + token_ids, 1
        self._check_rows(token_ids)
        return made(text, token_ids, start, row=row, limit=self._plan.context_length)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Job:
        chosen = self._options(options)
        chat = not isinstance(given, str) and ids_of(given, self._vocabulary, row) is None
        given = chat_of(given, row) if chat else given
        answer = asked(self._chats, self._codec, options) if chat else None
        prompt, token_ids, around = self._prompt(given, options | ({"template": answer.values} if answer else {}), row)
        if chosen.truncate is not None and around is None:
            raise OptionError(f"row {row} is a chat, and truncate= would cut its template: {_OLDEST}.")
        ends = self._plan.end_token_ids if around is None or chosen.output is not None else ()
        token_ids = token_ids or self._beginning(row)
        context = self._plan.context_length
        # One place of the context is needed for the first new token.
        limit = None if context is None else context - 1
        # A prompt that is cut leaves room for the answer, but never more than half the context.
        keep = None if context is None else max(context - chosen.max_new_tokens, context // 2)
        advice, around = _OLDEST if around is None else SHORTEN, around or (0, 0)
        token_ids, cut = fit(
            token_ids, limit, keep=keep, around=around, truncate=chosen.truncate, row=row, advice=advice
        )
        room = chosen.max_new_tokens if context is None else context - len(token_ids)
        if answer is None:
            requests = (self._request(chosen, token_ids, room=room, ends=ends),)
            return Job(requests, prompt, cut, row, output=chosen.output)
        begun = given[-1].get("content") if options.get("continue_final_message") else ""
        scanner = answer.scanner(prompt, begun if isinstance(begun, str) else "")
        output, before = answer.held(self._codec, scanner, chosen.output)
        request = self._request(
            replace(chosen, output=output),
            token_ids,
            room=room,
            ends=ends,
            before=before,
            processors=answer.processor(self._codec, scanner, len(token_ids)),
            marked=True,
        )
        name = answer.reasoning_name
        return Job((request,), prompt, cut, row, output=chosen.output, scanner=scanner, reasoning_name=name)

    def _prompt(
        self, given: Any, options: Mapping[str, Any], row: int
    ) -> tuple[str, list[int], tuple[int, int] | None]:
        """Return what the model reads, as text and as tokens, and how many special ones are around; None of a chat."""
        token_ids = ids_of(given, self._vocabulary, row)
        if token_ids is None and not isinstance(given, str):
            continued = bool(options.get("continue_final_message"))
            return *self._chats.encode(chat_of(given, row), options.get("template") or {}, continued=continued), None
        for name in ("template", "continue_final_message", "tools", "tool_choice", "thinking"):
            if options.get(name):
                kind = "a text" if token_ids is None else "token ids"
                raise OptionError(f"row {row} is {kind}, and {name}= belongs to chats: leave it out, or pass messages.")
        if token_ids is not None:
            return self._codec.decode(token_ids, special=True), token_ids, (0, 0)
        token_ids, (before, after) = self._codec.encode(text_of(given, row)), self._codec.around
        while after and token_ids[-1] in self._ends:  # a prompt that has ended is not continued
            token_ids, after = token_ids[:-1], after - 1
        return given, token_ids, (before, after)

    def _beginning(self, row: int) -> list[int]:
        """Return what stands for an empty prompt: the token that texts begin with."""
        config = self._checkpoint_config
        if config.bos_token_id is None:
            raise OptionError(
                f"row {row} is empty, and this checkpoint has no token that begins a text: pass a prompt."
            )
        return [int(config.bos_token_id)]

    def _result(self, job: Job, outcomes: Sequence[Outcome], timing: Timing) -> Generation:
        completions = outcomes[0].completions
        if job.scanner is not None:
            pairs = zip(completions, outcomes[0].marks, strict=True)
            completions = tuple(parts_of(one, marks, job.scanner(), job.reasoning_name) for one, marks in pairs)
        return Generation(
            prompt=job.text,
            completions=completions,
            prompt_tokens=len(job.requests[0].input_ids),
            seed=job.requests[0].seed,
            truncated=job.truncated,
            timing=timing,
        )


def parts_of(completion: Completion, marks: Marks, scanner: Scanner, reasoning_name: str) -> Completion:
    """Tell the parts of a chat's answer apart."""
    scanner.feed(completion.text, marks)
    scanner.finish()
    return replace(
        completion,
        content=scanner.content,
        reasoning=scanner.reasoning,
        tool_calls=tuple(scanner.calls),
        reasoning_name=reasoning_name,
    )


_OLDEST = "leave out its oldest messages"
_MESSAGE = "a list of messages like {'role': 'user', 'content': 'Hello!'}"


def prompts_of(given: Any) -> Rows:
    """Return the rows of a call, where a single one is a text, the messages of one chat, or token ids."""
    rows, single = rows_of(_plain(given))
    if not single and rows and isinstance(rows[0], (Mapping, SupportsIndex)):
        return [rows], True
    return rows, single


def _plain(given: Any) -> Any:
    """Return an array as lists.

    Raises:
        OptionError: It is one of torch's meta device, which has no values.
    """
    try:
        return given.tolist() if hasattr(given, "tolist") and not isinstance(given, type) else given
    except RuntimeError as error:
        raise OptionError(f"{shown(given)} cannot be read: {error}") from error


def ids_of(given: Any, vocabulary: int, row: int) -> list[int] | None:
    """Return a row that is token ids; None if it is something else.

    Raises:
        OptionError: One of them is no token of the model's.
    """
    found = _plain(given)
    if not isinstance(found, (list, tuple)) or not found or not isinstance(found[0], SupportsIndex):
        return None
    for token_id in found:
        whole = isinstance(token_id, SupportsIndex) and not isinstance(token_id, bool)
        if not whole or not 0 <= index(token_id) < vocabulary:
            raise OptionError(
                f"row {row} has the token id {shown(token_id)}: the model has those from 0 to {vocabulary - 1}."
            )
    return [index(token_id) for token_id in found]


def chat_of(messages: Any, row: int) -> Chat:
    """Return a row that is a chat.

    Raises:
        OptionError: It has no messages, or one that is not a dict with a role.
    """
    rows, single = rows_of(messages)
    parts = [] if single else rows
    wrong = [part for part in parts if not (isinstance(part, Mapping) and isinstance(part.get("role"), str))]
    if wrong or not parts:
        told = f"is a list with {shown(wrong[0])}, and that is" if wrong else f"has {shown(messages)},"
        kind = "no message: pass a text, or" if wrong else "not a text and not"
        raise OptionError(f"row {row} {told} {kind} {_MESSAGE}, with roles such as 'system', 'user', 'assistant'.")
    return parts
