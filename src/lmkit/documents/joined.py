"""Pieces back to a text, with what became of each."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from lmkit.results import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmkit.documents.pieces import Piece
    from lmkit.results import SegmentNote

__all__ = ["between", "joined"]


def between(source: str, pieces: Sequence[Piece], start: int = 0) -> tuple[str, ...]:
    """Return what stands before, between and behind the pieces of a source; one more than there are pieces."""
    starts, ends = [piece.start for piece in pieces], [piece.end for piece in pieces]
    return tuple(source[a:b] for a, b in zip([start, *ends], [*starts, len(source)], strict=True))


def joined(
    source: str,
    pieces: Sequence[Piece],
    outputs: Sequence[tuple[str, tuple[SegmentNote, ...]]],
    start: int = 0,
) -> tuple[str, tuple[Segment, ...]]:
    """Put outputs where their pieces were.

    Args:
        source: The source.
        pieces: Its pieces.
        outputs: What became of each, and what there is to note of it.
        start: How many characters of the source come before the document and told the model what to do.

    Returns:
        The text, and segments that cover every character of the source and of the text once, in order. What
        stands between pieces is a segment of its own, with the note `"copied"`.
    """
    parts: list[tuple[int, str, tuple[SegmentNote, ...]]] = [(start, "", ("prefix",))] if start else []
    for gap, piece, (output, notes) in zip(between(source, pieces, start), pieces, outputs, strict=False):
        if gap:
            parts.append((piece.start, gap, ("copied",)))
        parts.append((piece.end, output, piece.notes + notes))
    if tail := source[pieces[-1].end if pieces else start :]:
        parts.append((len(source), tail, ("copied",)))
    ends = list(itertools.accumulate(len(output) for _, output, _ in parts))
    begun = zip([0, *(end for end, _, _ in parts)], [0, *ends], parts, ends, strict=False)
    segments = tuple(Segment(source_start, part[0], place, end, part[2]) for source_start, place, part, end in begun)
    return "".join(output for _, output, _ in parts), segments
