"""Text to token ids and back: one tokenizer, shared by threads, never changed by a call."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lmkit.errors import InputTooLongError, OptionError, listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["Codec", "checked"]


def checked(text: str, what: str = "a text") -> str:
    """Return a text that has only characters; `what` names it in the message.

    Raises:
        OptionError: It has a lone surrogate, which no tokenizer can read.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            msg = (
                f"{what} has {text[error.start]!r} at character {error.start}, which is half of a character (a lone "
                "surrogate): mend or remove it, for example with text.encode('utf-16', 'surrogatepass')"
                ".decode('utf-16', 'replace')."
            )
            raise OptionError(msg) from error
    return text


class Codec:
    """Encodes and decodes with a transformers tokenizer.

    Padding and truncation are settings of the tokenizer that its callers share, so lmkit never uses
    them: it encodes texts one by one and pads and cuts the ids itself. A lock keeps tokenizers written in
    Python, and those that compile a template, from two callers at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap `tokenizer`, which is not changed."""
        self.tokenizer: Any = tokenizer
        self._lock = threading.Lock()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the text's token ids, with the checkpoint's special tokens around them if `special`."""
        with self._lock:
            token_ids: list[int] = self.tokenizer(checked(text), add_special_tokens=special, verbose=False)["input_ids"]
        return token_ids[self._doubled(token_ids) :] if special else token_ids

    def _doubled(self, token_ids: list[int]) -> bool:
        """Say whether a text that a template has already given its BOS got the tokenizer's as well."""
        bos = self.tokenizer.bos_token_id
        return bool(bos is not None and token_ids[:2] == [bos, bos] and self.around[0])

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]], list[int | None]] | None:
        """Encode as `encode` does, and say where in the text each token is, and in which of its words.

        Returns:
            Token ids, characters and numbers of words; None of a tokenizer that is written in Python and cannot tell.
        """
        if not self.tokenizer.is_fast:
            return None
        with self._lock:
            found = self.tokenizer(checked(text), return_offsets_mapping=True, verbose=False)
        columns = found["input_ids"], found["offset_mapping"], found.word_ids()
        first = self._doubled(columns[0])
        return columns[0][first:], columns[1][first:], columns[2][first:]

    @cached_property
    def unknown(self) -> int | None:
        """The token of what the vocabulary lacks; None if there is none, or it has another meaning too."""
        tokenizer = self.tokenizer
        number: int | None = tokenizer.unk_token_id
        return None if number in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) else number

    def encode_target(self, text: str) -> list[int]:
        """Return the token ids of an answer, which some encoder-decoders write with another vocabulary."""
        with self._lock:
            token_ids: list[int] = self.tokenizer(text_target=checked(text), verbose=False)["input_ids"]
        return token_ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> tuple[str, list[int]]:
        """Write a chat as the checkpoint's template does; control tokens inside messages stay plain text.

        Returns:
            What the model reads, as text, and as token ids; the template alone brings the BOS.

        Raises:
            OptionError: The checkpoint has no template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if reserved := sorted(_OWN & template.keys()):
            msg = f"template= cannot set {listed(reserved)}: lmkit sets them itself."
            raise OptionError(msg)
        if not self.tokenizer.chat_template:
            msg = (
                "this checkpoint has no chat template, so there is no telling how it separates messages: "
                "call the generator with one plain prompt, or load a checkpoint made for chat "
                "(their names often end in -Instruct, -it or -chat)."
            )
            raise OptionError(msg)
        conversation = [dict(message) for message in messages]
        try:
            with self._lock:
                encoded = self.tokenizer.apply_chat_template(
                    conversation,
                    add_generation_prompt=True,
                    sanitize_control_tokens=True,
                    **template,
                )
            token_ids: list[int] = list(encoded["input_ids"])
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            msg = f"the checkpoint's chat template refuses these messages: {error}"
            raise OptionError(msg) from error
        with self._lock:
            text: str = self.tokenizer.decode(token_ids)
        return text, token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated tokens, special ones left out."""
        with self._lock:
            text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """Return the text of one token, a special one's name included."""
        with self._lock:
            text: str = self.tokenizer.decode([token_id])
        return text

    def whole_tokens(self, token_ids: Sequence[int]) -> int:
        """Count the tokens before a last run of single bytes, whose text later bytes can still change.

        Tokenizers with byte fallback write what they have no token for as bytes, and decode a run of them only as a
        whole: one that is not UTF-8 turns into replacement characters, a line break in it too.
        """
        count = len(token_ids)
        while count and token_ids[count - 1] in self._byte_tokens:
            count -= 1
        return count

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        vocabulary = self.tokenizer.get_vocab()
        found = {vocabulary[name] for n in range(256) if (name := f"<0x{n:02X}>") in vocabulary}
        # Special tokens are not written, so they do not end a run.
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special} | set(self.tokenizer.all_special_ids)
        return frozenset(found | special if found else ())

    @cached_property
    def around(self) -> tuple[int, int]:
        """How many special tokens `encode` puts before and after a text."""
        with self._lock:
            inner, whole = (
                self.tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
            )
        starts = range(len(whole) - len(inner) + 1)
        before = next((n for n in starts if whole[n : n + len(inner)] == inner), 0)
        return before, len(whole) - len(inner) - before


def window(length: int, start: int, end: int, limit: int | None, around: tuple[int, int]) -> tuple[int, int]:
    """Choose what a model sees of a text: all, or as much on both sides of a part of it as fits.

    Args:
        length: How many tokens the text has, special tokens included.
        start: The part's first token.
        end: One past its last.
        limit: The most tokens the model takes; None is no limit.
        around: How many special tokens at each end it sees in any case.

    Returns:
        The first token between those at the ends that it sees, and one past the last.
    """
    before, last = around[0], length - around[1]
    if limit is None or length <= limit:
        return before, last
    room = limit - sum(around)
    first = min(max(start - (room - (end - start)) // 2, before), last - room)
    return first, first + room


def seen(
    row: Sequence[int], start: int, end: int, limit: int | None, around: tuple[int, int]
) -> tuple[tuple[int, ...], int]:
    """Return what a model sees of a row around one of its parts, and where the part begins in that: see `window`."""
    first, last = window(len(row), start, end, limit, around)
    before, after = around
    return (*row[:before], *row[first:last], *row[len(row) - after :]), start - first + before


_OWN = frozenset({"conversation", "tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length"})
"""Arguments of `apply_chat_template` that are no business of the template's."""


def fit(
    token_ids: Sequence[int],
    limit: int | None,
    *,
    keep: int | None = None,
    around: tuple[int, int] = (0, 0),
    truncate: Literal["left", "right"] | None = None,
    row: int = 0,
    advice: str = "shorten or split the text, or pass truncate='left' or truncate='right' to cut that end of it",
) -> tuple[list[int], bool]:
    """Check that an input fits the model, or cut it where the caller said so.

    Args:
        token_ids: The input, special tokens included.
        limit: The most tokens the model takes; None is no limit.
        keep: How many to keep when cutting; by default `limit`.
        around: How many special tokens at each end are kept when cutting.
        truncate: The side to cut, or None to refuse.
        row: The row's number, for the message.
        advice: What to do, for the message.

    Returns:
        The ids, and whether they were cut.

    Raises:
        InputTooLongError: The input is longer than `limit` and `truncate` is None.
    """
    if limit is None or len(token_ids) <= limit:
        return list(token_ids), False
    if truncate is None:
        msg = f"row {row} has {len(token_ids)} tokens, the model takes {limit}: {advice}."
        raise InputTooLongError(msg)
    before, after = around
    body = list(token_ids[before : len(token_ids) - after])
    room = max((keep or limit) - before - after, 1)
    body = body[-room:] if truncate == "left" else body[:room]
    return [*token_ids[:before], *body, *token_ids[len(token_ids) - after :]], True
