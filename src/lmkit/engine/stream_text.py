"""Token ids to text while a row grows: what can be shown already, and where a stop string begins."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lmkit.text.codec import Codec

Marks: TypeAlias = tuple[tuple[int, str], ...]
"""Special tokens that are not shown: before which character of a text each stands, and its name."""

WINDOW = 24
"""How many tokens are decoded anew at every step, twice as many at the most: more than any character has."""


class TextFeed:
    """The text of one row, released piece by piece.

    A half-finished character and a possible beginning of a stop string are held back until the next
    tokens decide, so that what was released never has to be taken back. A step decodes a window of the last tokens,
    so its cost does not grow with the row; where a tokenizer's text of a window is not the end of the whole text, all
    of it is decoded.

    Attributes:
        released: How many characters were shown, those of the context included.
        stop_reason: The stop string that ended the text.
    """

    def __init__(
        self,
        codec: Codec,
        stop: tuple[str, ...],
        *,
        context: Sequence[int] = (),
        named: Mapping[int, str] | None = None,
        special: bool = False,
    ) -> None:
        """Start with no text.

        Args:
            codec: The tokenizer.
            stop: The strings that end the text.
            context: Tokens before the row's, which its text goes on with: some tokenizers leave out a first space.
            named: The names of special tokens that are in stop strings, or are told of.
            special: Whether the text has the names of special tokens.
        """
        self._codec = codec
        self._stop = stop
        self._special = special
        self._named = named or {}
        self._marks: list[tuple[int, str]] = []  # where special tokens are that are named
        self.stop_reason: str | None = None
        self._anchor = 0  # tokens before the window
        self._head = ""  # text before the window's
        self._overlap = ""  # what the window's text began with when it was moved there
        self._begin(context)

    def _begin(self, context: Sequence[int]) -> None:
        self._context = list(context)
        self._looked = len(self._context)
        self._before = self._decode(self._context)
        self._text = self._before.rstrip("\N{REPLACEMENT CHARACTER}")
        self._start = self._certain = self.released = len(self._text)

    @property
    def text(self) -> str:
        """The row's text so far."""
        return self._text[self._start :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._codec.decode(token_ids, special=True) if self._special else self._codec.decode(token_ids)

    def read(self, row: Sequence[int], *, final: bool = False, end: int | None = None) -> None:
        """Take in all tokens so far; sets `stop_reason` and cuts `text` if a stop string is there.

        Args:
            row: All tokens of the row.
            final: Decode the whole row, as the result will show it.
            end: The token that ended the row, which is not shown.
        """
        token_ids = [*self._context, *row]
        text = self._decoded(token_ids)
        if self.released == self._start and self._context and not self._anchor:
            # A half character at the end of the context may become a whole one; one that was there stays.
            before = self._before if text.startswith(self._before) else self._before.rstrip("\N{REPLACEMENT CHARACTER}")
            self._start = self.released = len(before)
        if self._context and not self._anchor and not text.startswith(self._text[: self._start]):
            self._begin(())  # a tokenizer that changes what was there: the row's tokens alone
            self.read(row, final=final, end=end)
            return
        if final and self._anchor and (whole := self._decode(token_ids)).startswith(text[: self.released]):
            text = whole
        known = self._codec.whole_tokens(token_ids)
        self._certain = len(text if known == len(token_ids) else self._decoded(token_ids[:known]))
        for place in range(self._looked, len(token_ids)) if self._named and not self._special else ():
            if token_ids[place] in self._named:
                where = max(len(self._decoded(token_ids[:place])), self.released)
                self._marks.append((where, self._named[token_ids[place]]))
        self._looked = len(token_ids)
        last = self._named.get(-1 if end is None else end)
        found = [(start, stop) for start, stop in self._stops(text, last) if (start, stop) != (len(text), last)]
        if found:
            # The earliest wins; of two that begin together, the longer one.
            start, self.stop_reason = min(found, key=lambda place: (place[0], -len(place[1])))
            text = text[:start]
        elif len(token_ids) - self._anchor > 2 * WINDOW and known == len(token_ids):
            self._move(token_ids, text)
        self._text = text

    def _decoded(self, token_ids: Sequence[int]) -> str:
        if not self._anchor or len(token_ids) < self._anchor:
            return self._decode(token_ids)
        window = self._decode(token_ids[self._anchor :])
        if not window.startswith(self._overlap.rstrip("\N{REPLACEMENT CHARACTER}")):
            self._anchor, self._head, self._overlap = 0, "", ""
            return self._decode(token_ids)
        return self._head + window

    def _move(self, token_ids: Sequence[int], text: str) -> None:
        """Begin the window at a later token, if its text is the end of what is there."""
        anchor = len(token_ids) - WINDOW
        overlap = self._decode(token_ids[anchor:])
        if overlap and text.endswith(overlap):
            self._anchor, self._head, self._overlap = anchor, text[: len(text) - len(overlap)], overlap

    def _spelled(self, text: str, last: str | None) -> Iterator[tuple[str, str, Sequence[int]]]:
        """Give each stop string what it is looked for in: the text, with special tokens if it names one.

        Returns:
            The stop string, what it is looked for in, and the place in the text of each character of that.
        """
        plain: tuple[str, Sequence[int]] = text, range(len(text) + 1)
        marks = [(min(place, len(text)), name) for place, name in self._marks]
        marks += [(len(text), last)] if last else []
        whole = _with_marks(text, marks) if marks else plain
        for stop in self._stop:
            spelled, places = whole if any(name in stop for name in self._named.values()) else plain
            yield stop, spelled, places

    def _stops(self, text: str, last: str | None) -> list[tuple[int, str]]:
        """Find stop strings; what was released holds none, nor the beginning of one."""
        return [
            (places[start], stop)
            for stop, spelled, places in self._spelled(text, last)
            if (start := spelled.find(stop, bisect_left(places, self.released))) >= 0
        ]

    def unreleased(self, *, final: bool) -> tuple[str, int]:
        """Return the new text that no later token can change, or all the rest if `final`; and where it ends."""
        end = max(len(self._text) if final else self._settled(), self.released)
        return self._text[self.released : end], end

    def marks(self, start: int, end: int, *, final: bool) -> Marks:
        """Return the special tokens from a character of all texts to another, those at the end if `final`."""
        return tuple((at - start, name) for at, name in self._marks if start <= at < end + final)

    @property
    def all_marks(self) -> Marks:
        """The special tokens in the row's text."""
        return self.marks(self._start, len(self._text), final=True)

    def _settled(self) -> int:
        """Count the characters that are certain to stay."""
        text = self._text[: self._certain].rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (
            places[len(spelled) - length]
            for stop, spelled, places in self._spelled(text, None)
            for length in range(1, min(len(stop), len(spelled) + 1))
            if spelled.endswith(stop[:length])
        )
        return min(begun, default=len(text))


def _with_marks(text: str, marks: Sequence[tuple[int, str]]) -> tuple[str, list[int]]:
    """Put names of special tokens into a text at their places; say where in the text each character stands."""
    spelled, places, before = "", list[int](), 0
    for place, name in (*marks, (len(text), "")):
        spelled += text[before:place] + name
        places += [*range(before, place), *[place] * len(name)]
        before = place
    return spelled, [*places, len(text)]
