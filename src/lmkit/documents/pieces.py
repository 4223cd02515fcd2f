"""A text to the pieces that a model reads; what stands between them stays as it is."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass, replace
from html import unescape
from typing import TYPE_CHECKING, Literal, TypeAlias

import regex

from lmkit.documents.sentences import sentence_ends
from lmkit.errors import InputTooLongError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lmkit.results import SegmentNote

Split: TypeAlias = Literal["sentence", "paragraph", "none"]
"""Every sentence alone, whole sentences of a paragraph packed as they fit, or the text as it is."""

Span: TypeAlias = tuple[int, int]
"""Where something begins and ends in a text, in characters, the end exclusive."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text that is translated by itself.

    Attributes:
        start: Where it begins in the text.
        end: Where it ends, exclusive.
        notes: `("split",)` if it is less than a sentence.
    """

    start: int
    end: int
    notes: tuple[SegmentNote, ...] = ()


@dataclass(frozen=True, slots=True)
class Size:
    """How long a piece may be.

    Attributes:
        count: Counts a piece's tokens, with all that the model reads around it.
        most: The most tokens the model takes; only a sentence that is longer is split.
        together: The most tokens of several sentences in a piece: what the model's answer has room for.
    """

    count: Callable[[str], int]
    most: int
    together: int


_BREAK = regex.compile(r"[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]|(?<=\p{Sentence_Terminal}[\p{Pe}\p{Pf}\"']*)\s{2,}")
"""What is never inside a piece: line breaks, tabs, and wide white space behind the end of a sentence. A model would
write one space for it."""

_BLOCK = regex.compile(
    r"(?i)</?(?:address|article|aside|blockquote|br|caption|center|d[dlt]|div|figcaption|figure|footer|form|h[1-6r]|header|"
    r"legend|li|main|nav|ol|option|p|pre|section|summary|t(?:able|body|d|foot|h|head|r)|title|ul)\b[^<>]*>"
)
"""Tags of HTML, where they are kept, that begin or end a paragraph or a line of its own."""

_MARKER = regex.compile(r"\s*\ufeff?(?:\s*(?:[-*+•‣◦·–—]|#{1,6}|>|\(?\d{1,3}[.)]|\(?[A-Za-z]\)|\[[ xX]\])(?=\s|\Z))*")
"""What a line of a list, a quotation or a heading may begin with."""

_SPEAKS = regex.compile(r"[\p{L}\p{N}]")
_HALF = regex.compile(r"(?:<|\[|\{+)#?(/?)([\w:.-]+)")
"""What begins one of two tags around something: whether it is the second, and the name that both have."""

_INNER = (
    regex.compile(r"(?<=\p{P})\s+|(?<=[、，；：。！？])"),  # clauses: punctuation, in most scripts with space behind it
    regex.compile(r"\s+"),  # words
    regex.compile(r"\X"),  # what is read as one character
    regex.compile(r".", regex.DOTALL),
)
"""Where a sentence may be split, coarse to fine."""

SENTENCES = -1


def pieces(
    text: str,
    size: Size,
    *,
    split: Literal["sentence", "paragraph"],
    language: str | None = None,
    kept: Sequence[Span] = (),
    start: int = 0,
) -> list[Piece]:
    """Split a text into pieces that fit.

    A line is a paragraph, and so is what stands between tags of HTML that say so, if they are kept. Pieces are in
    order and do not overlap; they have no white space around them, and no list marker before them. Characters in no
    piece are to be copied: white space, line breaks, markers, tabs between columns, and parts without a letter or a
    digit (such as `* * *` or an emoji) or with nothing but what is kept.

    Args:
        text: The text.
        size: How long a piece may be.
        split: `"sentence"` makes each sentence a piece; `"paragraph"` packs whole sentences of a line as they fit.
        language: The text's language, for the sentences.
        kept: Spans, in order, without overlap, that no piece may begin or end in. Tags and symbols among them are in
            no piece that they are at the edge of, unless their other half is inside.
        start: Where to begin.

    Returns:
        The pieces. A sentence longer than `size.most` is split at clauses, else words, else characters.

    Raises:
        InputTooLongError: A single character is longer than `size.most`.
        MissingExtraError: Sentences have to be found, and `sentencex` is not installed.
    """
    return list(_Splitter(text, size, split, language, kept).pieces(start))


class _Splitter:
    """One text on its way to pieces."""

    def __init__(self, text: str, size: Size, split: str, language: str | None, kept: Sequence[Span]) -> None:
        self._text, self._size, self._split, self._language = text, size, split, language
        self._kept = kept
        self._kept_ends = [end for _, end in kept]

    def pieces(self, start: int) -> Iterator[Piece]:
        for piece in self._whole(start):
            begin, stop = self._inner(piece.start, piece.end)
            yield replace(piece, start=begin, end=stop)

    def _whole(self, start: int) -> Iterator[Piece]:
        blocks = [span for span in self._kept if span[0] >= start and _BLOCK.fullmatch(self._text, *span)]
        breaks = [found.span() for found in _BREAK.finditer(self._text, start) if not self._touches(*found.span())]
        edges = [start, *itertools.chain.from_iterable(sorted(blocks + breaks)), len(self._text)]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            marker = _MARKER.match(self._text, begin, end)
            core = self._core(begin if marker is None else marker.end(), end)
            if core is None or not self._speaks(*core):
                continue
            if self._split == "paragraph" and self._fits(*core, self._size.together):
                yield Piece(*core)
            else:
                yield from self._divided(*core, SENTENCES)

    def _divided(self, start: int, end: int, level: int) -> Iterator[Piece]:
        """Pack the units of a level; one that does not fit is divided at the next finer level."""
        units = list(self._units(start, end, level))
        most = 1 if level == SENTENCES and self._split == "sentence" else len(units)
        first = 0
        while first < len(units):
            count = self._fitting(units[first : first + most])
            begin, stop = units[first][0], units[first + max(count, 1) - 1][1]
            if not self._speaks(begin, stop):
                pass  # copied, however long it is
            elif count:
                yield Piece(begin, stop, () if level == SENTENCES else ("split",))
            elif level == len(_INNER) - 1:
                raise InputTooLongError(
                    f"the model takes {self._size.most} tokens, and {self._text[begin:stop]!r} alone has more."
                )
            else:
                yield from self._divided(begin, stop, level + 1)
            first += max(count, 1)

    def _units(self, start: int, end: int, level: int) -> Iterator[Span]:
        """Cut a part of the text at every place that a level allows and that is not in a kept span."""
        part = self._text[start:end]
        if level == SENTENCES:
            cuts = sentence_ends(part, self._language)
        else:
            cuts = [found.end() for found in _INNER[level].finditer(part)]
        inner = [start + cut for cut in cuts if 0 < cut < len(part) and not self._inside(start + cut)]
        for begin, stop in itertools.pairwise([start, *inner, end]):
            if core := self._core(begin, stop):
                yield core

    def _fitting(self, units: Sequence[Span]) -> int:
        """Count the units, from the first on, that fit into one piece: steps double until one fails, then halve."""
        count, step, growing = 0, 1, True
        while step:
            longer = count + step
            fits = longer <= len(units) and self._fits(
                units[0][0], units[longer - 1][1], self._size.most if longer == 1 else self._size.together
            )
            count, growing = longer if fits else count, growing and fits
            step = step * 2 if growing else step // 2
        return count

    def _fits(self, start: int, end: int, most: int) -> bool:
        return self._size.count(self._text[start:end]) <= most

    def _core(self, start: int, end: int) -> Span | None:
        """Leave out the white space around a part, but for what is kept."""
        part = self._text[start:end]
        if not part or part.isspace():
            return None
        begin, stop = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
        before, after = self._inside(begin), self._inside(stop)
        return before[0] if before else begin, after[1] if after else stop

    def _inner(self, start: int, end: int) -> Span:
        """Leave out tags and symbols at the edges of a piece, but for those whose other half stays inside."""
        spans = self._kept[bisect_left(self._kept_ends, start + 1) : bisect_left(self._kept_ends, end + 1)]
        halves = _halves(self._text, spans)
        outer = {span for span in spans if _silent(self._text[slice(*span)], paired=span in halves)}
        while spans:
            first, last = spans[0], spans[-1]
            begins = first in outer and not self._text[start : first[0]].strip()
            ends = last in outer and not self._text[last[1] : end].strip()
            if begins and (first not in halves or (ends and halves[first] == last)):
                start, spans = first[1], spans[1:]
                halves.pop(last, None)
            elif ends and last not in halves:
                end, spans = last[0], spans[:-1]
            else:
                break
        return self._core(start, end) or (start, end)

    def _speaks(self, start: int, end: int) -> bool:
        """Whether there is something to translate: a letter or a digit outside what is kept."""
        found = _SPEAKS.finditer(self._text, start, end)
        return any(not self._touches(letter.start(), letter.end()) for letter in found)

    def _inside(self, place: int) -> Span | None:
        """Return the kept span that a cut at this place would cut."""
        return next((span for span in self._nearby(place) if span[0] < place < span[1]), None)

    def _touches(self, start: int, end: int) -> bool:
        return any(begin < end and start < stop for begin, stop in self._nearby(start + 1))

    def _nearby(self, place: int) -> Sequence[Span]:
        """Return the first kept span that ends at or behind a place."""
        number = bisect_left(self._kept_ends, place)
        return self._kept[number : number + 1]


def _halves(text: str, spans: Sequence[Span]) -> dict[Span, Span]:
    """Pair what opens and closes: tags of one name, and marks such as `**`, which do both."""
    opened: list[tuple[str, Span]] = []
    halves: dict[Span, Span] = {}
    for span in spans:
        written = text[slice(*span)]
        closes, name = found.groups() if (found := _HALF.match(written)) else ("/", written)
        names = [one for one, _ in opened]
        if closes and name in names:
            at = len(names) - 1 - names[::-1].index(name)
            halves[span], halves[opened[at][1]] = opened[at][1], span
            del opened[at:]
        elif not (found and closes):
            opened.append((name, span))
    return halves


def _silent(written: str, *, paired: bool) -> bool:
    """Whether something that is kept is a tag or a symbol; a percent sign belongs to its number."""
    if written.startswith("<") or (paired and _HALF.match(written)):
        return True
    return "%" not in written and not _SPEAKS.search(unescape(written))
