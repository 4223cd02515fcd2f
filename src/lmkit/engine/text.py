"""Token ids to text while a row grows: what can be shown already, and where a stop string begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.encoding import Codec

__all__ = ["TextFeed"]


class TextFeed:
    """The text of one row, released piece by piece.

    A half-finished character and a possible beginning of a stop string are held back until the next
    tokens decide, so that what was released never has to be taken back. The whole row is decoded at
    every step, which is the plain way and costs the square of the length.
    """

    def __init__(self, codec: Codec, stop: tuple[str, ...]) -> None:
        """Start with no text; `stop` are the strings that end it."""
        self._codec = codec
        self._stop = stop
        self.text = ""
        self.stop_reason: str | None = None
        self._certain = 0
        self._released = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in all tokens so far; sets `stop_reason` and cuts `text` if a stop string is there."""
        text = self._codec.decode(token_ids)
        whole = self._codec.whole_tokens(token_ids)
        self._certain = len(text if whole == len(token_ids) else self._codec.decode(token_ids[:whole]))
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The earliest wins; of two that begin together, the longer one.
            start, self.stop_reason = min(found, key=lambda place: (place[0], -len(place[1])))
            text = text[:start]
        self.text = text

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
