"""`Generator`: prompts and chats continued by a causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, overload

from lmkit.encoding import fit
from lmkit.errors import OptionError
from lmkit.generation import GENERATION_OPTIONS, GenerationOptions
from lmkit.results import Generation
from lmkit.scoring import alone, answered, check_normalize, choices_of, continued, made, pairs
from lmkit.wrapper import rows_of, text_of
from lmkit.writing import Job, Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from typing_extensions import Unpack

    from lmkit.engine import Outcome
    from lmkit.errors import LmkitError
    from lmkit.results import Ranking, Score, TextChunk, Timing
    from lmkit.rows import PerRow
    from lmkit.scoring import Item, Normalize

__all__ = ["Chat", "Generator", "GeneratorOptions", "Message"]

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: a dict with `role` and `content`, as transformers takes it."""

Chat: TypeAlias = Sequence[Message]
"""The messages of a chat, the oldest first."""

Prompts: TypeAlias = Iterable[str] | Iterable[Chat]
"""Several rows: texts, or chats."""


class GeneratorOptions(GenerationOptions, total=False):
    """The options of every call of a `Generator`: those of generation, and one for chats.

    `template` is what the checkpoint's chat template is given beside the messages, such as
    `{"tools": [...]}` or `{"enable_thinking": False}`.
    """

    template: PerRow[Mapping[str, Any]]


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

    _accepted: ClassVar[frozenset[str]] = GENERATION_OPTIONS | {"template"}

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompts: str | Chat, **options: Unpack[GeneratorOptions]
    ) -> Generation: ...
    @overload
    def __call__(self, prompts: Prompts, **options: Unpack[GeneratorOptions]) -> list[Generation]: ...
    def __call__(
        self, prompts: str | Chat | Prompts, **options: Unpack[GeneratorOptions]
    ) -> Generation | list[Generation]:
        """Continue a prompt or answer a chat, or each of a list of them.

        Args:
            prompts: A text or a chat, or an iterable of them.
            **options: See `GeneratorOptions`; each is one value, or a list with one per prompt.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            OptionError: An option is unknown, not accepted, or contradicts another.
            InputTooLongError: A prompt fills the model's context and `truncate` is not given.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        rows, single = prompts_of(prompts)
        results = self._call(rows, options)
        return results[0] if single else results

    @overload
    def chat(self, messages: Chat, **options: Unpack[GeneratorOptions]) -> Generation: ...
    @overload
    def chat(self, messages: Iterable[Chat], **options: Unpack[GeneratorOptions]) -> list[Generation]: ...
    def chat(
        self, messages: Chat | Iterable[Chat], **options: Unpack[GeneratorOptions]
    ) -> Generation | list[Generation]:
        """Answer one chat, or each of a list of chats, by the checkpoint's own template.

        The same as a call with messages, but a text is an error. Control tokens written inside a message reach the
        model as plain text.

        Args:
            messages: Dicts with `role` and `content`, the oldest first; or an iterable of such lists.
            **options: See `GeneratorOptions`.

        Raises:
            OptionError: The checkpoint has no chat template, or it refuses the messages.
            InputTooLongError: A chat fills the model's context and `truncate` is not given.
        """
        rows, single = prompts_of(messages)
        for number, row in enumerate(rows):
            if isinstance(row, str):
                msg = f"row {number} is {row!r}, not a chat: pass {_MESSAGE}, or call the generator with a text."
                raise OptionError(msg)
        results = self._call(rows, options)
        return results[0] if single else results

    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation]: ...
    @overload
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["return"],
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Generation | LmkitError]: ...
    def map(
        self,
        prompts: Prompts,
        *,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[GeneratorOptions],
    ) -> Iterator[Any]:
        """Continue prompts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            prompts: Any iterable of texts or chats, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            **options: See `GeneratorOptions`; one value each, for all prompts.
        """
        return self._map(prompts, options, on_error)

    def stream(self, prompts: str | Chat | Prompts, **options: Unpack[GeneratorOptions]) -> Iterator[TextChunk]:
        """Continue prompts and yield their text while it grows.

        A row's chunks joined are its whole text; its last chunk has a `finish_reason`. Leaving the loop
        ends the rows.

        Raises:
            OptionError: As for a call; also for `num_return_sequences` above 1.
        """
        return self._stream(prompts_of(prompts)[0], options)

    @overload
    async def acall(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompts: str | Chat, **options: Unpack[GeneratorOptions]
    ) -> Generation: ...
    @overload
    async def acall(self, prompts: Prompts, **options: Unpack[GeneratorOptions]) -> list[Generation]: ...
    async def acall(
        self, prompts: str | Chat | Prompts, **options: Unpack[GeneratorOptions]
    ) -> Generation | list[Generation]:
        """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""
        rows, single = prompts_of(prompts)
        results = await self._acall(rows, options)
        return results[0] if single else results

    def astream(self, prompts: str | Chat | Prompts, **options: Unpack[GeneratorOptions]) -> AsyncIterator[TextChunk]:
        """Do as `stream` does, for asyncio."""
        return self._astream(prompts_of(prompts)[0], options)

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompt: str, continuation: None = None
    ) -> Score: ...
    @overload
    def score(self, prompt: Iterable[str], continuation: None = None) -> list[Score]: ...
    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompt: str | Chat, continuation: str
    ) -> Score: ...
    @overload
    def score(self, prompt: str | Chat | Prompts, continuation: str | Iterable[str]) -> list[Score]: ...
    def score(
        self, prompt: str | Chat | Prompts, continuation: str | Iterable[str] | None = None
    ) -> Score | list[Score]:
        """Say how likely the model finds a text, or the continuation of a prompt.

        A text is scored behind the BOS where the tokenizer puts one there; where it puts none, its first token is not
        scored, for there is nothing before it. An empty prompt is the token that texts begin with. No end token is
        added: to score the end as well, write it, such as `"Paris.<|im_end|>"`.

        Prompt and continuation are encoded as one text. The prompt's tokens are those that it has in common with the
        prompt alone, so a token with characters of both belongs to the continuation, and so do spaces before its first
        word. Behind a chat, the continuation is what the assistant answers.

        Args:
            prompt: A text or a chat, or an iterable of them; alone, what is scored.
            continuation: What is scored behind it, one for each prompt, or one for all. Several may have one prompt.

        Returns:
            One score for a text or a pair, a list of the same length and order for lists.

        Raises:
            OptionError: There are not as many continuations as prompts, or there is no token to score.
            InputTooLongError: A text is longer than the model takes; it is not scored in parts.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        if continuation is None:
            rows, single = rows_of(prompt)
            items = [self._item(text, *alone(self._codec, text_of(text, row)), row) for row, text in enumerate(rows)]
        else:
            rows, one = prompts_of(prompt)
            given, single = pairs(rows, continuation, single=one)
            items = [self._behind(before, [text], row)[0] for row, (before, text) in enumerate(given)]
        scores = self._scores.score(items)
        return scores[0] if single else scores

    @overload
    def rank(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompt: str | Chat, choices: Iterable[str], *, normalize: Normalize = "none", neutral: str = ""
    ) -> Ranking: ...
    @overload
    def rank(
        self,
        prompt: Prompts,
        choices: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
    ) -> list[Ranking]: ...
    def rank(
        self,
        prompt: str | Chat | Prompts,
        choices: Iterable[str] | Iterable[Iterable[str]],
        *,
        normalize: Normalize = "none",
        neutral: str = "",
    ) -> Ranking | list[Ranking]:
        """Put continuations of a prompt in the order in which the model finds them likely.

        The prompt is read once for all its choices; for what belongs to a choice, see `score`.

        Args:
            prompt: A text or a chat, or an iterable of them.
            choices: The continuations; for several prompts a list for each, or one list for all.
            normalize: How log-probabilities are made comparable: `"none"`, per token (`"tokens"`), per UTF-8 byte
                (`"bytes"`), or less what the choice has without the prompt (`"prior"`; Holtzman et al., "Surface Form
                Competition", 2021).
            neutral: What stands in the prompt's place for `"prior"`, such as `"Answer:"`.

        Raises:
            OptionError: `normalize` is another word, there are no choices, or not as many lists as prompts.
            InputTooLongError: A prompt with a choice is longer than the model takes.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        self._opened  # noqa: B018 - a closed wrapper refuses here
        check_normalize(normalize)
        rows, single = prompts_of(prompt)
        lists = choices_of(choices, len(rows), single=single)
        items = [self._behind(before, texts, row) for row, (before, texts) in enumerate(zip(rows, lists, strict=True))]
        try:
            priors = [
                self._behind(neutral, texts, row) for row, texts in enumerate(lists if normalize == "prior" else ())
            ]
        except OptionError as error:
            msg = f"normalize='prior' scores the choices behind neutral={neutral!r}: {error} Here that is neutral=."
            raise OptionError(msg) from error
        rankings = self._scores.rank(items, normalize, priors)
        return rankings[0] if single else rankings

    def _behind(self, prompt: Any, texts: Sequence[str], row: int) -> list[Item]:
        """Make what is scored of continuations of a prompt."""
        texts = [text_of(text, row, "a continuation") for text in texts]
        if isinstance(prompt, str):
            found = continued(self._codec, prompt, texts)
        else:
            found = answered(self._codec, self._codec.encode_chat(chat_of(prompt, row))[1], texts)
        return [self._item(text, *tokens, row) for text, tokens in zip(texts, found, strict=True)]

    def _item(self, text: str, token_ids: list[int], start: int, row: int) -> Item:
        if not start:
            token_ids, start = self._beginning(row) + token_ids, 1
        return made(text, token_ids, start, row=row, limit=self._plan.context_length)

    def _check(self, options: dict[str, Any]) -> None:
        options.pop("template", None)
        super()._check(options)

    def _job(self, given: Any, options: dict[str, Any], row: int) -> Job:
        template = options.pop("template", None)
        if template is not None and not isinstance(template, Mapping):
            msg = f"template={template!r} is not accepted: template takes a dict, such as {{'enable_thinking': False}}."
            raise OptionError(msg)
        chosen = self._options(options)
        around = (0, 0)
        if not isinstance(given, str):
            if chosen.truncate is not None:
                msg = f"row {row} is a chat, and truncate= would cut its template: leave out its oldest messages."
                raise OptionError(msg)
            prompt, token_ids = self._codec.encode_chat(chat_of(given, row), **(template or {}))
        elif template is not None:
            msg = f"row {row} is a text, and template= belongs to chats: leave it out, or pass messages."
            raise OptionError(msg)
        else:
            prompt, token_ids, around = given, self._codec.encode(text_of(given, row)), self._codec.around
        token_ids = token_ids or self._beginning(row)
        context = self._plan.context_length
        # One place of the context is needed for the first new token.
        limit = None if context is None else context - 1
        # A prompt that is cut leaves room for the answer, but never more than half the context.
        keep = None if context is None else max(context - chosen.max_new_tokens, context // 2)
        token_ids, cut = fit(token_ids, limit, keep=keep, around=around, truncate=chosen.truncate, row=row)
        room = chosen.max_new_tokens if context is None else context - len(token_ids)
        return Job((self._request(chosen, token_ids, room=room),), prompt, cut, row)

    def _beginning(self, row: int) -> list[int]:
        """Return what stands for an empty prompt: the token that texts begin with."""
        config = self._checkpoint_config
        if config.bos_token_id is None:
            msg = f"row {row} is empty, and this checkpoint has no token that begins a text: pass a prompt."
            raise OptionError(msg)
        return [int(config.bos_token_id)]

    def _result(self, job: Job, outcomes: Sequence[Outcome], timing: Timing) -> Generation:
        return Generation(
            prompt=job.text,
            completions=outcomes[0].completions,
            prompt_tokens=len(job.requests[0].input_ids),
            seed=job.requests[0].seed,
            truncated=job.truncated,
            timing=timing,
        )


_MESSAGE = "a list of messages like {'role': 'user', 'content': 'Hello!'}"


def prompts_of(given: Any) -> tuple[list[Any], bool]:
    """Return the rows of a call, and whether it was a single one: a text, or the messages of one chat."""
    rows, single = rows_of(given)
    if not single and rows and isinstance(rows[0], Mapping):
        return [rows], True
    return rows, single


def chat_of(messages: Any, row: int) -> Chat:
    """Return a row that is a chat.

    Raises:
        OptionError: It has no messages, or one that is not a dict with a role.
    """
    parts = list(messages) if isinstance(messages, Iterable) and not isinstance(messages, (bytes, Mapping)) else []
    wrong = [part for part in parts if not (isinstance(part, Mapping) and "role" in part)]
    if wrong or not parts:
        shown = repr(wrong[0] if wrong else messages)
        msg = f"row {row} has {shown}, not a text and not {_MESSAGE}, with roles such as 'system', 'user', 'assistant'."
        raise OptionError(msg)
    return parts
