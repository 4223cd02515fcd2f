"""An answer to content, reasoning and calls, as it comes: a whole one is one that comes at once."""

from __future__ import annotations

import itertools
import json
from itertools import compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lmkit.replies.tools import checked
from lmkit.results import ToolCall

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.replies.formats import Format, Region
    from lmkit.results import ChunkKind

SECONDS = 5.0
"""How long one search may take: a response template's patterns are the checkpoint's."""


class Scanner:
    """Reads one answer. Nothing in it raises, and every character of it goes to one of the three.

    Attributes:
        content: What was neither reasoning nor a call so far.
        reasoning: The reasoning so far.
        calls: The calls that have ended.
    """

    def __init__(self, form: Format, opening: str, tools: Mapping[str, Any] | None) -> None:
        """Begin behind `opening`, the prompt's end; calls are checked against `tools`, unless that is None."""
        self._form = form
        self._tools = tools
        self._raw, self._shown = "", bytearray()
        self._region: Region | None = None
        self._body = self._written = ""
        self._captured: dict[str, str] = {}
        self._marked = self._broken = False
        self.content = self.reasoning = ""
        self.calls: list[ToolCall] = []
        if opening:
            self.feed("", [(0, opening)])
            self._body, self.content, self.reasoning, self.calls = "", "", "", []

    @property
    def kind(self) -> ChunkKind:
        """What comes next, unless a marker does."""
        return self._region.kind if self._region else "content"

    def feed(self, text: str, marks: Sequence[tuple[int, str]] = ()) -> list[tuple[ChunkKind, str]]:
        """Read more of it.

        Args:
            text: What is shown.
            marks: Special tokens in it that are not shown: before which character each stands, and its name.

        Returns:
            What is shown and certain by now, in order, and what each piece of it is.
        """
        before = 0
        for at, name in [*marks, (len(text), "")]:
            self._raw += text[before:at] + name
            self._shown += b"\1" * (at - before) + bytes(len(name))
            before = at
        return self._scanned(final=False)

    def finish(self) -> list[tuple[ChunkKind, str]]:
        """Read what was held back, and take what is open as it is."""
        pieces = self._scanned(final=True)
        if self._region is not None and self._region.kind == "tool_call":
            self._end("" if self._region.ends else "the text ends before the call does")
        if self._marked:
            self.content, self.reasoning = self.content.strip(), self.reasoning.strip()
        return pieces

    def _scanned(self, *, final: bool) -> list[tuple[ChunkKind, str]]:
        pieces: list[tuple[ChunkKind, str]] = []
        while True:
            try:
                region, found, end = self._search(final=final)
            except Exception:  # noqa: BLE001 - a checkpoint's pattern that takes too long, or worse
                self._broken, region, found, end = True, None, None, len(self._raw)
            self._take(found.start() if found else end, pieces)
            if region is None:
                break
            self._turn(region, found, pieces)
        groups = itertools.groupby(pieces, itemgetter(0))
        joined: list[tuple[ChunkKind, str]] = [(kind, "".join(text for _, text in group)) for kind, group in groups]
        return [piece for piece in joined if piece[1]]

    def _search(self, *, final: bool) -> tuple[Region | None, Any, int]:
        """Find the next marker; where there is none that is certain, say how much is certain to be before it."""
        region, found, held = None, None, len(self._raw)
        for one in () if self._broken else self._watched():
            pattern = one.opens if self._region is None else one.closes
            match = pattern.search(self._raw, partial=not final, timeout=SECONDS)
            if match is None or (self._region is None and match.end() == match.start()):
                continue
            if not final and (match.partial or match.end() == len(self._raw)):
                held = min(held, match.start())  # it may become a marker, or a longer one
            elif found is None or (match.start(), -match.end()) < (found.start(), -found.end()):
                region, found = one, match
        if found is not None and (final or found.start() < held):
            return region, found, held
        return None, None, held

    def _watched(self) -> Sequence[Region]:
        if self._region is not None:
            return [self._region]
        bare = bool(self._tools) and not self.content.strip() and not self.calls
        return [region for region in self._form.regions if bare or not region.bare]

    def _take(self, count: int, pieces: list[tuple[ChunkKind, str]]) -> None:
        """Give what is before a marker to the part that is open."""
        raw, text = self._raw[:count], "".join(compress(self._raw[:count], self._shown))
        if self.kind == "content":
            self.content += text
        elif self.kind == "reasoning":
            self.reasoning += text
        self._body += raw
        self._drop(count, self.kind, pieces)

    def _drop(self, count: int, kind: ChunkKind, pieces: list[tuple[ChunkKind, str]]) -> None:
        self._written += self._raw[:count]
        pieces.append((kind, "".join(compress(self._raw[:count], self._shown))))
        self._raw, self._shown = self._raw[count:], self._shown[count:]

    def _turn(self, region: Region, found: Any, pieces: list[tuple[ChunkKind, str]]) -> None:
        """Open a part at its marker, or close it."""
        self._marked = True
        if self._region is not None:
            self._drop(found.end() - found.start(), region.kind, pieces)
            self._end("")
            return
        self._body = self._written = ""
        self._captured = {name: value for name, value in found.groupdict().items() if value is not None}
        self._drop(found.end() - found.start(), region.kind, pieces)
        if region.closes is not None:
            self._region, self._body = region, found.group() if region.bare else ""

    def _end(self, error: str) -> None:
        region, self._region = self._region, None
        if region is not None and region.kind == "tool_call":
            self.calls += self._read(region, error)

    def _read(self, region: Region, error: str) -> list[ToolCall]:
        """Read what stands in the markers of a call, which may be several; what nothing can read is one as well."""
        unread = ""
        for reader in region.readers:
            try:
                calls = [checked(*call, self._tools) for call in reader(self._body, self._captured)]
                json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()  # halves of characters, NaN
            except Exception as wrong:  # noqa: BLE001 - whatever a parser makes of what a model wrote
                unread = unread or f"the call cannot be read: {str(wrong)[:200]}"
                continue
            return [ToolCall(name, arguments, self._written, error or told) for name, arguments, told in calls]
        return [ToolCall("", None, self._written, error or unread)]
