"""Chats to tokens: those of plain `apply_chat_template`, and nothing that a caller says becomes a control token."""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from lmkit.errors import OptionError
from lmkit.text.codec import checked
from lmkit.text.meter import Meter
from lmkit.text.templates import Template, chosen, parsed

if TYPE_CHECKING:
    from lmkit.text.codec import Codec

T = TypeVar("T")
ROLES = frozenset(["assistant", "developer", "function", "ipython", "model", "system", "tool", "user"])
"""Words that templates build control tokens of, as `'<|' + message.role + '|>'` does."""

MARKS = 0x20000
"""Where the characters begin that stand for a caller's: ideographs, which are letters to every test of a template."""
_THEIRS = re.compile(r"[\U00020000-\U0003ffff](?:[\s\"'\\]*[\U00020000-\U0003ffff])*")

MOST_RENDERED = 500
"""How often a template is run at the most to find what it reads of a chat, and where it writes it."""


class Chats:
    """Writes chats with the templates of a checkpoint.

    The tokens are those that `apply_chat_template` gives. They are checked: the control tokens among them are to be the
    same, in the same order, as with harmless words in the place of all that the caller says. Only where they are not,
    what the caller says is encoded as plain text, and checked again.
    """

    def __init__(self, codec: Codec) -> None:
        """Write with the templates of `codec`'s tokenizer."""
        self._codec = codec
        self._control: dict[tuple[str, int], dict[int, str]] = {}

    def encode(
        self, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any], *, continued: bool = False
    ) -> tuple[str, list[int]]:
        """Write a chat, and open the assistant's turn; or, if `continued`, leave its last message open.

        Returns:
            What the model reads, as text, and as token ids; the template alone brings the BOS.

        Raises:
            OptionError: The checkpoint has no template, the template refuses the chat or does not read what it is
                given, or something in a message would be a control token however it is encoded.
        """
        if continued:
            check_last(messages[-1])
        chat = _Chat(self._codec, messages, template, continued=continued)
        key = chat.template.source, len(self._codec.tokenizer)
        if key not in self._control:
            self._control[key] = control_tokens(self._codec, chat.template)
        return chat.text, _Guard(self._codec, chat, self._control[key]).token_ids()


def check_last(message: Mapping[str, Any]) -> None:
    """Refuse to go on with a chat's last message that is not the assistant's."""
    if message["role"] in sorted(ROLES - {"assistant", "model"}):
        raise OptionError(
            f"continue_final_message=True goes on with the assistant's last message, and the last one is the "
            f"{message['role']}'s: append {{'role': 'assistant', 'content': 'what it begins with'}}."
        )


def control_tokens(codec: Codec, template: Template) -> dict[int, str]:
    """Return the tokens that structure a chat: special ones, and added ones that the template can write."""
    tokenizer = codec.tokenizer
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    named = set(tokenizer.chat_control_tokens or ())
    found = {token_id: text for token_id, text in added.items() if text in named or template.writes(text)}
    found |= {token_id: str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in codec.special}
    return {token_id: text for token_id, text in found.items() if token_id != codec.unknown}


class _Chat:
    """One chat, what its template writes of it, and what it would of other words.

    Attributes:
        template: The template.
        said: What the caller says: the strings, and where each is.
        text: What the template writes.
    """

    def __init__(
        self, codec: Codec, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any], *, continued: bool
    ) -> None:
        self._codec = codec
        self._continued = continued
        self.template = _told(lambda: parsed(chosen(codec.tokenizer, given)))
        self.template.check(given, messages)
        self._messages = len(messages)
        values = {name: value for name, value in given.items() if name != "chat_template"}
        self._parts: list[tuple[str, Any]] = [(f"message {number}", one) for number, one in enumerate(messages)]
        if "tools" in values:
            values["tools"] = _told(lambda: _schemas(given["tools"]))
        self._parts += values.items()
        self.said: list[tuple[str, str]] = []
        _told(self._listen)
        self._meter = Meter(sum(len(text) + 8 for _, text in self.said))
        self.text = checked(_told(lambda: self._render([text for _, text in self.said])), "the chat")
        self._check_contents(messages)

    def _listen(self) -> None:
        def note(text: str) -> str:
            self.said.append((where, text))
            return text

        for where, part in self._parts:
            _rebuilt(part, note, where)

    def written(self, strings: Iterable[str]) -> str | None:
        """Return what the template writes with other strings in the place of the caller's; None if it refuses."""
        try:
            return _told(lambda: self._render(strings))
        except OptionError:
            if self._meter.out:
                raise
            return None

    def _render(self, strings: Iterable[str]) -> str:
        given = iter(strings)
        parts = [(where, _rebuilt(part, lambda _: next(given), where)) for where, part in self._parts]
        messages = [message for _, message in parts[: self._messages]]
        return self._codec.written(
            messages,
            self._meter,
            chat_template=self.template.source,
            add_generation_prompt=not self._continued,
            continue_final_message=self._continued,
            **dict(parts[self._messages :]),
        )

    def _check_contents(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a content of parts that the template prints as Python would."""
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, (list, tuple, Mapping)) and content and str(content) in self.text:
                raise OptionError(
                    f"message {number}: this checkpoint's chat template reads a content of one text, and would print "
                    f"{str(content)[:60]!r} as it stands. Pass the text alone: {{'role': …, 'content': 'Hello!'}}."
                )


def _told(run: Callable[[], T]) -> T:
    """Run something of a template's; a template is a program, and raises what it likes."""
    try:
        return run()
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"the checkpoint's chat template refuses these messages: {str(error)[:500]}") from error


def _schemas(tools: Any) -> Any:
    """Return tools as what a template is given: functions as their descriptions."""
    from transformers import utils

    documented: Any = utils  # it is there, but not typed as being there
    schema = documented.get_json_schema
    return [schema(tool) if callable(tool) else tool for tool in tools] if isinstance(tools, list) else tools


def _rebuilt(value: Any, change: Callable[[str], str], where: str) -> Any:
    """Copy what a caller gave, with each string and key changed, in order."""
    if isinstance(value, str):
        return change(str.__str__(value))
    if isinstance(value, Mapping):
        return {_rebuilt(key, change, where): _rebuilt(one, change, where) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        copied = [_rebuilt(one, change, where) for one in value]
        return copied if isinstance(value, list) else tuple(copied)
    if value is None or isinstance(value, Number):
        return value
    if callable(getattr(value, "tolist", None)):
        return _rebuilt(value.tolist(), change, where)
    raise OptionError(
        f"{where} has an object of type {type(value).__name__}, which is no text: pass strings, numbers, and lists and "
        f"dicts of them{'; of bytes pass .decode()' if isinstance(value, (bytes, bytearray)) else ''}."
    )


_Place: TypeAlias = tuple[int, int]  # which of the caller's strings, and which piece of it


class _Guard:
    """Keeps what a caller says from becoming control tokens.

    Where a template writes something of the caller's is found by running it again, with other characters in its place:
    if nothing else changes, those are its places. What the template reads, such as an end of thoughts that it looks
    for, changes more than that: this is written twice instead, and is where it comes twice.
    """

    def __init__(self, codec: Codec, chat: _Chat, control: Mapping[int, str]) -> None:
        self._codec = codec
        self._chat = chat
        self._control = control
        self._known = chat.template.names | ROLES
        self._rendered = 0
        letters = set().union(*(text for _, text in chat.said))
        free = (mark for mark in itertools.count(MARKS) if chr(mark) not in letters)
        marked = [
            letter for letter in letters if letter.isprintable() and not letter.isspace() and letter not in "\"'\\"
        ]
        self._table = {ord(letter): chr(mark) for letter, mark in zip(sorted(marked), free, strict=False)}
        self._back = {ord(mark): letter for letter, mark in self._table.items()}

    def token_ids(self) -> list[int]:
        """Return the tokens of the chat.

        Raises:
            OptionError: Something that the caller says would be a control token however it is encoded.
        """
        token_ids = self._codec.encode(self._chat.text, special=False)
        harmless = self._chat.written(self._marked(text) for _, text in self._chat.said)
        if harmless is not None and self._same(token_ids, harmless):
            return token_ids
        looked_for = {one for one in self._chat.template.names if one.strip() and not one.isidentifier()}
        parts = sorted({*self._control.values(), *looked_for}, key=len, reverse=True)
        self._pieces = [re.split(f"({'|'.join(map(re.escape, parts))})", text) for _, text in self._chat.said]
        places: list[_Place] = []
        alone: dict[tuple[int, str], list[_Place]] = {}
        for n, pieces in enumerate(self._pieces):
            for m, piece in enumerate(pieces):
                if m % 2 and any(piece in one for one in looked_for):
                    alone.setdefault((n, piece), []).append((n, m))
                elif self._marked(piece) != piece:
                    places.append((n, m))
        # What a template only looks for, and does not write, it finds as well where it is there twice.
        places += self._said_too(list(alone.values()))
        marked = self._apart([], places)
        text = self._written(marked) or ""
        said = [ord(one) in self._back for one in text]
        lost = [one for one in places if one not in marked and not self._find(one, marked, text, said)]
        token_ids = self._as_text(said)
        marks = (chr(MARKS) if theirs else one for one, theirs in zip(self._chat.text, said, strict=True))
        if not lost and self._same(token_ids, "".join(marks)):
            return token_ids
        raise self._refused()

    def _said_too(self, alone: list[list[_Place]]) -> list[_Place]:
        """Return the pieces that the template writes too, and does not only look for."""
        every = [place for places in alone for place in places]
        if not alone or self._written([], every) == self._chat.text:
            return []
        half = len(alone) // 2
        return self._said_too(alone[:half]) + self._said_too(alone[half:]) if half else every

    def _marked(self, text: str) -> str:
        """Put other characters in the place of a caller's; words that templates ask for by name stay."""
        return text if text.isidentifier() and text in self._known else text.translate(self._table)

    def _same(self, token_ids: Iterable[int], marked: str) -> bool:
        """Compare control tokens with those of a text in which harmless words stand for what is the caller's."""
        harmless = self._codec.encode(_THEIRS.sub("word", marked), special=False)
        return self._sequence(token_ids) == self._sequence(harmless)

    def _sequence(self, token_ids: Iterable[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id in self._control]

    def _written(self, marked: Sequence[_Place], twice: Sequence[_Place] = ()) -> str | None:
        """Return what the template writes with some pieces of the caller's strings marked, and some twice."""
        self._rendered += 1
        if self._rendered > MOST_RENDERED:
            raise OptionError("this chat has too many control tokens in its messages to tell them from the template's.")
        chosen = set(marked)
        return self._chat.written(
            "".join(
                (self._marked(one) if (n, m) in chosen else one) * (2 if (n, m) in twice else 1)
                for m, one in enumerate(pieces)
            )
            for n, pieces in enumerate(self._pieces)
        )

    def _apart(self, marked: list[_Place], more: list[_Place]) -> list[_Place]:
        """Add to the pieces that are marked all that can be without another change of the text."""
        text = self._written([*marked, *more]) if more else None
        if not more or (text is not None and text.translate(self._back) == self._chat.text):
            return [*marked, *more]
        half = len(more) // 2
        return self._apart(self._apart(marked, more[:half]), more[half:]) if half else marked

    def _find(self, place: _Place, marked: list[_Place], text: str, said: list[bool]) -> bool:
        """Note where a piece stands that the template reads, if it writes it, too; say whether that is known."""
        twice = self._written(marked, [place])
        if twice is None or twice == text:
            return twice == text
        piece = self._pieces[place[0]][place[1]]
        start = text.rfind(piece, 0, len(os.path.commonprefix([text, twice])))  # noqa: RUF071 - characters are meant
        end = start + len(piece)
        beside = text[end : end + len(piece)], text[max(start - len(piece), 0) : max(start, 0)]
        if start < 0 or piece in beside or text[:end] + piece + text[end:] != twice:
            return False
        said[start:end] = [True] * len(piece)
        return True

    def _as_text(self, said: Sequence[bool]) -> list[int]:
        """Encode the chat, cut inside of every control token that has a character of the caller's."""
        text, cuts = self._chat.text, {0}
        while True:
            bounds = itertools.pairwise([*sorted(cuts), len(text)])
            parts = [part for start, end in bounds for part in self._codec.inside(text[start:end], start)]
            wrong = [(start, end) for n, start, end in parts if n in self._control and any(said[start:end])]
            more = {start + 1 for start, end in wrong if end - start > 1}
            if not more:
                return [n for n, _, _ in parts]
            cuts |= more

    def _refused(self) -> OptionError:
        """Say which control token is meant, and where it comes from."""
        plain = self._sequence(self._codec.encode(self._chat.text, special=False))
        for part in dict.fromkeys(where for where, _ in self._chat.said):
            strings = (self._marked(text) if where == part else text for where, text in self._chat.said)
            without = self._sequence(self._codec.encode(self._chat.written(strings) or "", special=False))
            if without != plain:
                pairs = itertools.zip_longest(plain, without)
                token = next(self._control[one or other] for one, other in pairs if one != other)
                return OptionError(
                    f"{part} has the control token {token!r}, or what the chat template makes it of, and cannot be "
                    "encoded as plain text there: change or remove it."
                )
        return OptionError("the messages have control tokens that cannot be encoded as plain text: remove them.")
