"""Token ids to text while a row grows: what can be shown already, and where a stop string begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.encoding import Codec

__all__ = ["TextFeed"]

WINDOW = 24
"""How many tokens are decoded anew at every step, twice as many at the most: more than any character has."""


class TextFeed:
    """The text of one row, released piece by piece.

    A half-finished character and a possible beginning of a stop string are held back until the next
    tokens decide, so that what was released never has to be taken back. A step decodes a window of the last tokens,
    so its cost does not grow with the row; where a tokenizer's text of a window is not the end of the whole text, all
    of it is decoded.
    """

    def __init__(self, codec: Codec, stop: tuple[str, ...]) -> None:
        """Start with no text; `stop` are the strings that end it."""
        self._codec = codec
        self._stop = stop
        self.text = ""
        self.stop_reason: str | None = None
        self._certain = 0
        self._released = 0
        self._anchor = 0  # tokens before the window
        self._head = ""  # text before the window's
        self._overlap = ""  # what the window's text began with when it was moved there

    def read(self, token_ids: Sequence[int], *, final: bool = False) -> None:
        """Take in all tokens so far; sets `stop_reason` and cuts `text` if a stop string is there.

        Args:
            token_ids: All tokens of the row.
            final: Decode the whole row, as the result will show it.
        """
        text = self._decoded(token_ids)
        if final and self._anchor and (whole := self._codec.decode(token_ids)).startswith(text[: self._released]):
            text = whole
        known = self._codec.whole_tokens(token_ids)
        self._certain = len(text if known == len(token_ids) else self._decoded(token_ids[:known]))
        found = self._stops(text)
        if found:
            # The earliest wins; of two that begin together, the longer one.
            start, self.stop_reason = min(found, key=lambda place: (place[0], -len(place[1])))
            text = text[:start]
        elif len(token_ids) - self._anchor > 2 * WINDOW and known == len(token_ids):
            self._move(token_ids, text)
        self.text = text

    def _decoded(self, token_ids: Sequence[int]) -> str:
        if not self._anchor or len(token_ids) < self._anchor:
            return self._codec.decode(token_ids)
        window = self._codec.decode(token_ids[self._anchor :])
        if not window.startswith(self._overlap.rstrip("\N{REPLACEMENT CHARACTER}")):
            self._anchor, self._head, self._overlap = 0, "", ""
            return self._codec.decode(token_ids)
        return self._head + window

    def _move(self, token_ids: Sequence[int], text: str) -> None:
        """Begin the window at a later token, if its text is the end of what is there."""
        anchor = len(token_ids) - WINDOW
        overlap = self._codec.decode(token_ids[anchor:])
        if overlap and text.endswith(overlap):
            self._anchor, self._head, self._overlap = anchor, text[: len(text) - len(overlap)], overlap

    def _stops(self, text: str) -> list[tuple[int, str]]:
        """Find stop strings; what was released holds none, nor the beginning of one."""
        return [(start, stop) for stop in self._stop if (start := text.find(stop, self._released)) >= 0]

    def release(self, *, final: bool) -> str:
        """Return the new text that no later token can change; all the rest if `final`."""
        end = len(self.text) if final else self._settled()
        piece = self.text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _settled(self) -> int:
        """Count the characters that are certain to stay."""
        text = self.text[: self._certain].rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        return len(text) - max((len(beginning) for beginning in begun if text.endswith(beginning)), default=0)
