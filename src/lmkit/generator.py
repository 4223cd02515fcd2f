"""`Generator`: prompts and chats continued by a causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, overload

from lmkit.encoding import fit
from lmkit.errors import OptionError
from lmkit.generation import GENERATION_OPTIONS
from lmkit.results import Generation
from lmkit.wrapper import rows_of
from lmkit.writing import Job, Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from typing_extensions import Unpack

    from lmkit.engine import Outcome
    from lmkit.errors import LmkitError
    from lmkit.generation import GenerationOptions
    from lmkit.results import TextChunk

__all__ = ["Chat", "Generator", "Message"]

Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: a dict with `role` and `content`, as transformers takes it."""

Chat: TypeAlias = "Sequence[Message]"
"""The messages of a chat, the oldest first."""


@dataclass(frozen=True, slots=True)
class Messages:
    """A chat on its way to the model, with what its template is given beside the messages."""

    messages: Chat
    template: Mapping[str, Any]


class Generator(Writer[Generation]):
    """A causal language model: continues prompts and answers chats.

    ```python
    generator = lmkit.load("causal", "HuggingFaceTB/SmolLM2-135M-Instruct")
    generator("Level up!", max_new_tokens=50).text
    generator.chat([{"role": "user", "content": "Hello!"}], temperature=0.7, seed=1).text
    ```

    All options are those of `GenerationOptions`. Results hold the new text only.
    """

    _accepted: ClassVar[frozenset[str]] = GENERATION_OPTIONS

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompts: str, **options: Unpack[GenerationOptions]
    ) -> Generation: ...
    @overload
    def __call__(self, prompts: Iterable[str], **options: Unpack[GenerationOptions]) -> list[Generation]: ...
    def __call__(
        self, prompts: str | Iterable[str], **options: Unpack[GenerationOptions]
    ) -> Generation | list[Generation]:
        """Continue one prompt, or each of a list of prompts.

        Args:
            prompts: A text, or an iterable of texts.
            **options: See `GenerationOptions`; each is one value, or a list with one per prompt.

        Returns:
            One result for a text, a list of the same length and order for a list.

        Raises:
            OptionError: An option is unknown, not accepted, or contradicts another.
            InputTooLongError: A prompt fills the model's context and `truncate` is not given.
            EngineError: The model was closed, or a row failed; its `results` hold the other rows.
        """
        rows, single = rows_of(prompts, str, "a text")
        results = self._call(rows, options)
        return results[0] if single else results

    @overload
    def chat(self, messages: Chat, **options: Unpack[GenerationOptions]) -> Generation: ...
    @overload
    def chat(self, messages: Sequence[Chat], **options: Unpack[GenerationOptions]) -> list[Generation]: ...
    def chat(
        self,
        messages: Chat | Sequence[Chat],
        *,
        template: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation | list[Generation]:
        """Answer one chat, or each of a list of chats, by the checkpoint's own template.

        Control tokens written inside a message reach the model as plain text.

        Args:
            messages: Dicts with `role` and `content`, the oldest first; or a list of such lists.
            template: What the template is given beside the messages, such as `{"tools": […]}` or
                `{"enable_thinking": False}`.
            **options: See `GenerationOptions`.

        Raises:
            OptionError: The checkpoint has no chat template, or it refuses the messages.
            InputTooLongError: A chat fills the model's context and `truncate` is not given.
        """
        chats, single = chats_of(messages, template or {})
        results = self._call(chats, options)
        return results[0] if single else results

    @overload
    def map(
        self,
        prompts: Iterable[str],
        *,
        on_error: Literal["raise"] = "raise",
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Generation]: ...
    @overload
    def map(
        self,
        prompts: Iterable[str],
        *,
        on_error: Literal["return"],
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Generation | LmkitError]: ...
    def map(
        self,
        prompts: Iterable[str],
        *,
        on_error: Literal["raise", "return"] = "raise",
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Any]:
        """Continue prompts as they come, lazily and in order, reading a bounded number ahead.

        Args:
            prompts: Any iterable, an endless one too.
            on_error: `"return"` puts the error of a row that fails in its place instead of raising it.
            **options: See `GenerationOptions`; one value each, for all prompts.
        """
        return self._map(prompts, options, on_error)

    def stream(self, prompts: str | Iterable[str], **options: Unpack[GenerationOptions]) -> Iterator[TextChunk]:
        """Continue prompts and yield their text while it grows.

        A row's chunks joined are its whole text; its last chunk has a `finish_reason`. Leaving the loop
        ends the rows.

        Raises:
            OptionError: As for a call; also for `num_return_sequences` above 1.
        """
        return self._stream(rows_of(prompts, str, "a text")[0], options)

    def chat_stream(
        self,
        messages: Chat | Sequence[Chat],
        *,
        template: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[TextChunk]:
        """Answer chats as `chat` does and yield the text while it grows, as `stream` does."""
        return self._stream(chats_of(messages, template or {})[0], options)

    @overload
    async def acall(  # type: ignore[overload-overlap]  # a str is an iterable of str too: it comes first
        self, prompts: str, **options: Unpack[GenerationOptions]
    ) -> Generation: ...
    @overload
    async def acall(self, prompts: Iterable[str], **options: Unpack[GenerationOptions]) -> list[Generation]: ...
    async def acall(
        self, prompts: str | Iterable[str], **options: Unpack[GenerationOptions]
    ) -> Generation | list[Generation]:
        """Do as a call does, for asyncio; cancelling the task ends its rows at their next step."""
        rows, single = rows_of(prompts, str, "a text")
        results = await self._acall(rows, options)
        return results[0] if single else results

    def astream(self, prompts: str | Iterable[str], **options: Unpack[GenerationOptions]) -> AsyncIterator[TextChunk]:
        """Do as `stream` does, for asyncio."""
        return self._astream(rows_of(prompts, str, "a text")[0], options)

    def _job(self, given: str | Messages, options: dict[str, Any], row: int) -> Job:
        chosen = self._options(options)
        if isinstance(given, Messages):
            prompt, token_ids = self._codec.encode_chat(given.messages, **given.template)
            around = (0, 0)
        else:
            prompt, token_ids, around = given, self._codec.encode(given), self._codec.around
        token_ids = token_ids or self._beginning(row)
        context = self._plan.context_length
        # One place of the context is needed for the first new token.
        limit = None if context is None else context - 1
        keep = None if context is None else max(context - chosen.max_new_tokens, 1)
        token_ids, cut = fit(token_ids, limit, keep=keep, around=around, truncate=chosen.truncate, row=row)
        room = chosen.max_new_tokens if context is None else context - len(token_ids)
        return Job(self._request(chosen, token_ids, room=room), prompt, cut)

    def _beginning(self, row: int) -> list[int]:
        """Return what stands for an empty prompt: the token that texts begin with."""
        config = self._checkpoint_config
        if config.bos_token_id is None:
            msg = f"row {row} is empty, and this checkpoint has no token that begins a text: pass a prompt."
            raise OptionError(msg)
        return [int(config.bos_token_id)]

    def _result(self, job: Job, outcome: Outcome) -> Generation:
        return Generation(
            prompt=job.text,
            completions=outcome.completions,
            prompt_tokens=len(job.request.input_ids),
            seed=job.request.seed,
            truncated=job.truncated,
            timing=outcome.timing,
        )


def chats_of(messages: Any, template: Mapping[str, Any]) -> tuple[list[Messages], bool]:
    """Return the chats of a call, and whether it was a single one.

    Raises:
        OptionError: A message is not a dict with a role.
    """
    given = list(messages) if isinstance(messages, Iterable) and not isinstance(messages, str) else [messages]
    single = bool(given) and isinstance(given[0], (Mapping, str))
    rows: list[Messages] = []
    for chat in [given] if single else given:
        parts, _ = rows_of(chat, Mapping, "a message like {'role': 'user', 'content': 'Hello!'}")
        for message in parts:
            if "role" not in message:
                msg = f"the message {message!r} has no 'role': write 'system', 'user' or 'assistant'."
                raise OptionError(msg)
        rows.append(Messages(parts, template))
    return rows, single
