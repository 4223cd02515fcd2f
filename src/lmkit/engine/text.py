"""Token ids to text while a row grows: what can be shown already, and where a stop string begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["TextFeed"]


class TextFeed:
    """The text of one row, released piece by piece.

    A half-finished character and a possible beginning of a stop string are held back until the next
    tokens decide, so that what was released never has to be taken back. The whole row is decoded at
    every step, which is the plain way and costs the square of the length.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...]) -> None:
        """Start with no text; `decode` turns token ids into text, `stop` are the stop strings."""
        self._decode = decode
        self._stop = stop
        self.text = ""
        self.stop_reason: str | None = None
        self._released = 0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take in all tokens so far; sets `stop_reason` and cuts `text` if a stop string is there."""
        text = self._decode(token_ids)
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
        end = len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        for stop in self._stop:
            longest = min(len(stop) - 1, end)
            held = next((n for n in range(longest, 0, -1) if self.text[:end].endswith(stop[:n])), 0)
            end = min(end, len(self.text) - held)
        return end
