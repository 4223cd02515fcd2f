"""Pieces back to a text, with what became of each."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import regex

from lmkit.results import Segment, SegmentNote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.documents.pieces import Piece


def between(source: str, pieces: Sequence[Piece], start: int = 0) -> tuple[str, ...]:
    """Return what stands before, between and behind the pieces of a source; one more than there are pieces."""
    starts, ends = [piece.start for piece in pieces], [piece.end for piece in pieces]
    return tuple(source[a:b] for a, b in zip([start, *ends], [*starts, len(source)], strict=True))


_SOLID, _LOOSE = "Bopo Hani Hira Kana", "Khmr Lana Laoo Mymr Tale Talu Thai Tibt"
"""Scripts without spaces, and those that have some between phrases, but none between words."""
_SPACING = dict.fromkeys([*_SOLID.split(), "Hans", "Hant", "Hrkt", "Jpan"], "") | dict.fromkeys(_LOOSE.split())
_IN_SOLID, _IN_LOOSE = (
    regex.compile("[" + "".join(rf"\p{{scx={script}}}" for script in scripts.split()) + "]")
    for scripts in (_SOLID, _LOOSE)
)
_WRITTEN = regex.compile(rf"(?r)\p{{L}}|{_IN_SOLID.pattern}|{_IN_LOOSE.pattern}")
"""The last thing in a text that tells its script: a letter, or a mark that only some scripts have."""


def spacing(script: str, output: str) -> str | None:
    """Return what stands between sentences of a script: a space, nothing, or None for what the source has there.

    Args:
        script: The script's code in ISO 15924; `Zzzz` is that of the last letter of `output`.
        output: What is written in it.
    """
    if script != "Zzzz":
        return _SPACING.get(script, " ")
    last = found[0] if (found := _WRITTEN.search(output)) else ""
    return "" if _IN_SOLID.match(last) else None if _IN_LOOSE.match(last) else " "


def gap(source: str, left: Piece, right: Piece, script: str, output: str) -> str:
    """Return what is to stand behind the translation of a piece that another one follows.

    It is what stands between the pieces, but for a space that the target's script has and the source has not, or the
    other way round. Where a word was cut that is longer than the model takes, nothing comes between its parts.

    Args:
        source: The source.
        left: The piece.
        right: The one behind it.
        script: What the target is written in; see `spacing`.
        output: What became of the piece.
    """
    copied, space = source[left.end : right.start], spacing(script, output)
    if space is None or copied not in ("", " "):
        return copied
    cut = "split" in left.notes and "split" in right.notes
    edges = source[left.end - 1], source[right.start]
    if cut and not copied and not any(_IN_SOLID.match(one) or _IN_LOOSE.match(one) for one in edges):
        return ""
    return space


def joined(
    source: str,
    pieces: Sequence[Piece],
    outputs: Sequence[tuple[str, tuple[SegmentNote, ...]]],
    start: int = 0,
    gaps: Sequence[str] = (),
) -> tuple[str, tuple[Segment, ...]]:
    """Put outputs where their pieces were.

    Args:
        source: The source.
        pieces: Its pieces.
        outputs: What became of each, and what there is to note of it.
        start: How many characters of the source come before the document and told the model what to do.
        gaps: What is to stand before each output; what stands before its piece if left out.

    Returns:
        The text, and segments that cover every character of the source and of the text once, in order. What
        stands between pieces is a segment of its own, with the note `"copied"`, or `"spaced"` where it is another.
    """
    parts: list[tuple[int, str, tuple[SegmentNote, ...]]] = [(start, "", ("prefix",))] if start else []
    copied = between(source, pieces, start)
    for old, new, piece, (output, notes) in zip(copied, gaps or copied, pieces, outputs, strict=False):
        if old or new:
            parts.append((piece.start, new, ("copied",) if new == old else ("spaced",)))
        parts.append((piece.end, output, piece.notes + notes))
    if tail := source[pieces[-1].end if pieces else start :]:
        parts.append((len(source), tail, ("copied",)))
    ends = list(itertools.accumulate(len(output) for _, output, _ in parts))
    begun = zip([0, *(end for end, _, _ in parts)], [0, *ends], parts, ends, strict=False)
    segments = tuple(Segment(source_start, part[0], place, end, part[2]) for source_start, place, part, end in begun)
    return "".join(output for _, output, _ in parts), segments
