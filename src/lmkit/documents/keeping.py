"""What must come out as it went in: placeholders found, and put right where a model changed them."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import regex

from lmkit.errors import OptionError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmkit.documents.pieces import Span
    from lmkit.results import SegmentNote


def _braced(depth: int) -> str:
    """Match braces and what is in them, further ones up to a depth: a limit keeps long texts of braces quick.

    For Python's own `re`: the package `regex` looks for a closing brace to the end of the text at each opening one.
    """
    inner = _braced(depth - 1) if depth else r"[^\s\S]"
    return rf"\{{(?:[^{{}}]++|{inner})*+\}}"


_EMOJI = (
    r"(?:\p{RI}{2}|[0-9#*]\ufe0f?\u20e3|(?![©®™‼⁉ℹ](?!\ufe0f))"
    r"\p{Extended_Pictographic}\ufe0f?\p{EMod}?(?:[\U000e0020-\U000e007e]+\U000e007f)?)"
)
"""One emoji, by the regular expression of Unicode Technical Standard 51, without signs that are text by themselves."""

Pattern: TypeAlias = Any
"""A pattern of the package `regex`, which ships no types."""

READY = {
    "emails": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "emoji": rf"(?:{_EMOJI}(?:\u200d{_EMOJI})*+)++",
    "icu": r"(?=\{[\s{]{0,8}\w|\{\{[\s{]{0,8}[#/^&>!~-])" + _braced(6),
    "printf": (
        r"%(?:%|(?:\d+\$|\(\w+\))?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh?|ll?|[Lqjzt])?[diouxXeEfFgGaAcspnr@](?!\w))"
    ),
    "tags": r"</?[A-Za-z][\w:.-]*(?:\s(?:\"[^\"]*\"|'[^']*'|[^<>\"'])*)?/?>|<!--.*?-->|&(?:#\d+|#[xX][\da-fA-F]+|\w+);",
    "urls": r"(?:(?:https?|ftp)://|www\.)[^\s<>\"'`。，、！？）」』]*[^\s<>\"'`。，、！？）」』.,;:!?)\]}»”’]",
}
"""Ready patterns by name: addresses; emoji, those in a row as one; ICU fields such as `{count, plural, …}`, those of
`str.format` and `{{name}}`, as a whole; conversions of printf and Python's `%(name)s`; tags, comments and entities of
HTML and XML."""


def patterns(keep: str | Sequence[str] | None) -> tuple[Pattern, ...]:
    """Compile what `keep=` holds: regular expressions of the package `regex`, and names from `READY`.

    Raises:
        OptionError: One is no regular expression, or a ready name misspelt.
    """
    return _compiled((keep,) if isinstance(keep, str) else tuple(keep or ()))


@lru_cache(maxsize=64)
def _compiled(given: tuple[str, ...]) -> tuple[Pattern, ...]:
    found = []
    for item in given:
        if item not in READY and item.isalpha() and (hint := _meant(item)):
            raise OptionError(f"keep has {item!r}.{hint} If the word itself is to be kept, write it as '(?:{item})'.")
        try:
            found.append((re if item == "icu" else regex).compile(READY.get(item, item)))
        except regex.error as error:
            raise OptionError(
                f"keep has {item!r}, which is no regular expression: {error}.{nearest(item, READY)}"
            ) from error
    return tuple(found)


def _meant(word: str) -> str:
    """Return a hint at the ready name that a bare word may stand for, or nothing."""
    return nearest({"html": "tags", "xml": "tags"}.get(word, word).lower(), READY) if len(word) > _SHORT else ""


_SHORT = 2
"""So many letters are a pattern, whatever they begin like."""


def kept(text: str, found_by: Sequence[Pattern], start: int = 0) -> list[Span]:
    """Return the spans that match, in order; those that overlap are one."""
    spans: list[Span] = []
    for begin, end in sorted(found.span() for pattern in found_by for found in pattern.finditer(text, start)):
        if spans and begin < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        elif begin < end:
            spans.append((begin, end))
    return spans


def restored(
    source: str, spans: Sequence[Span], text: str, found_by: Sequence[Pattern]
) -> tuple[str, tuple[SegmentNote, ...]]:
    """Put right in a translation what its source keeps.

    Each placeholder is looked for as it is; then changed in spaces, case, quotes, widths or escapes; then as another
    match of the patterns, which the source lacks. One that is nowhere is put in at its place in proportion, at the
    border of a word, and copies that are too many are taken out.

    Args:
        source: The piece that was translated.
        spans: What it keeps, in order, without overlap.
        text: Its translation.
        found_by: The patterns.

    Returns:
        The text, and what was done: `"repaired"`, `"inserted"`, `"removed"`; `"unmatched"` if the patterns still do
        not find in it what they find in the source.
    """
    work = _Restoring(source, spans, text, found_by)
    if [text[start:end] for start, end in work.free] != work.wanted:
        work.find()
        work.remove()
        work.insert()
        if Counter(work.text[start:end] for start, end in kept(work.text, found_by)) != Counter(work.wanted):
            work.notes["unmatched"] = None
    return work.text, tuple(work.notes)


class _Restoring:
    """A translation while its placeholders are put right.

    Attributes:
        text: The translation so far.
        wanted: The source's placeholders.
        free: Matches in the text that stand for no placeholder yet.
        notes: What was done, as a set in order.
    """

    def __init__(self, source: str, spans: Sequence[Span], text: str, found_by: Sequence[Pattern]) -> None:
        self.text = text
        self.wanted = [source[start:end] for start, end in spans]
        self.free = kept(text, found_by)
        self.notes: dict[SegmentNote, None] = {}
        self._source, self._spans, self._found_by = source, spans, found_by
        self._places: list[Span | None] = [None] * len(spans)

    def find(self) -> None:
        """Find the placeholders that are there, whole or changed, and write them as in the source."""
        for find in (self._same, self._changed, self._another):
            for number, word in enumerate(self.wanted):
                if self._places[number] is None and (place := find(word)):
                    self._write(number, *place)

    def remove(self) -> None:
        """Take out copies that are too many, each with the white space on one side of it; parts of words stay."""
        self.free = [span for span in self.free if not any(map(self._in_word, span))]
        while (span := self._taken(self._known)) is not None:
            start, end = span
            if self.text[:start].endswith((" ", "\N{NO-BREAK SPACE}")) or not start:
                start, end = max(start - 1, 0), end + (not start and self.text[end : end + 1].isspace())
            self._replace(start, end, "")
            self.notes["removed"] = None

    def insert(self) -> None:
        """Put in what is missing."""
        for number, word in enumerate(self.wanted):
            if self._places[number] is not None:
                continue
            at = self._at(number)
            start, end = self._spans[number]
            left = _gap(self.text[:at][-1:], word[0], self._source[:start][-1:])
            right = _gap(self.text[at : at + 1], word[-1], self._source[end : end + 1])
            self._replace(at, at, left + word + right)
            self._places[number] = at + len(left), at + len(left + word)
            self.notes["inserted"] = None

    def _taken(self, fits: Callable[[str], bool]) -> Span | None:
        """Take the first free match whose text fits."""
        found = next((span for span in self.free if fits(self.text[slice(*span)])), None)
        if found is not None:
            self.free.remove(found)
        return found

    def _in_word(self, at: int) -> bool:
        """Whether a place is between two letters of a word."""
        return (
            self.text[at - 1 : at].isalnum() and self.text[at : at + 1].isalnum() and not _BORDER.match(self.text, at)
        )

    def _known(self, text: str) -> bool:
        """Whether a match is one of the source's, changed or not."""
        return any(_variants(word).fullmatch(text) for word in self.wanted)

    def _same(self, word: str) -> Span | None:
        """Take a match that is the placeholder as it is."""
        return self._taken(lambda text: text == word)

    def _another(self, word: str) -> Span | None:
        """Take a match of the placeholder's own pattern that the source does not have."""
        kind = self._kind(word)
        return self._taken(lambda text: not self._known(text) and self._kind(text) == kind)

    def _changed(self, word: str) -> Span | None:
        """Find a placeholder that was changed, where no other one is."""
        taken = [span for span in self._places if span is not None]
        for found in _variants(word).finditer(self.text):
            start, end = found.span()
            if not any(start < stop and begin < end for begin, stop in taken):
                self.free = [span for span in self.free if span[1] <= start or end <= span[0]]
                return start, end
        return None

    def _kind(self, word: str) -> int | None:
        return next((n for n, pattern in enumerate(self._found_by) if pattern.search(word)), None)

    def _write(self, number: int, start: int, end: int) -> None:
        """Write a placeholder as the source has it over what was found for it."""
        word = self.wanted[number]
        if self.text[start:end] != word:
            self._replace(start, end, word)
            self.notes["repaired"] = None
        self._places[number] = start, start + len(word)

    def _replace(self, start: int, end: int, word: str) -> None:
        """Replace a part of the text; places behind it move."""
        shift = len(word) - (end - start)
        self.text = self.text[:start] + word + self.text[end:]
        self._places = [span and _moved(span, end, shift) for span in self._places]
        self.free = [_moved(span, end, shift) for span in self.free]

    def _at(self, number: int) -> int:
        """Return the border of a word nearest to where a placeholder would be in proportion to its neighbours."""
        first, last = (0, 0), (len(self._source), len(self.text))
        before = [(self._spans[n][1], place[1]) for n, place in enumerate(self._places[:number]) if place]
        after = [(self._spans[n][0], place[0]) for n, place in enumerate(self._places) if n > number and place]
        (from_source, low), (to_source, high) = [first, *before][-1], [*after, last][0]
        if low > high:  # the model turned them round
            (from_source, low), (to_source, high) = first, last
        start, end = self._spans[number]
        ahead, behind = start - from_source, to_source - end
        part = ahead / (ahead + behind) if ahead + behind > 0 else 0.0
        found = list(_SPACES.finditer(self.text)) or list(_BORDERS.finditer(self.text))
        borders = {0, low, high, len(self.text)}.union(border.start() for border in found)
        taken = [place for place in (*self._places, *self.free) if place]
        open_ = [at for at in borders if low <= at <= high and not any(begin < at < end for begin, end in taken)]
        return min(open_, key=lambda at: (abs(at - low - part * (high - low)), at))


def _gap(beside: str, edge: str, in_source: str) -> str:
    """Return the space between a placeholder that is put in and what it comes to stand beside."""
    if not beside or beside.isspace():
        return ""
    together = in_source and not in_source.isspace() and not (beside.isalnum() and edge.isalnum())
    return "" if together else " "


_SPACES = regex.compile(r"\s+")
_BORDER = regex.compile(r"(?w)\b")
"""A border of a word by Unicode's rules, which has them between the letters of scripts without spaces, too."""
_BORDERS = regex.compile(r"(?w)\b(?<![-‐‑])(?![-‐‑])")  # hyphens hold words together


def _moved(span: Span, end: int, shift: int) -> Span:
    return (span[0] + shift, span[1] + shift) if span[0] >= end else span


_ALIKE = {"'": "'‘’‛`´", '"': '"“”„‟«»', "-": "-‐‑‒–—−", ".": ".。．", "%": "%٪", "<": "<‹", ">": ">›"}
_ESCAPES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", '"': "&quot;", "'": "&#39;"}
_TO_FULL_WIDTH = 0xFEE0


@lru_cache(maxsize=1024)
def _variants(word: str) -> re.Pattern[str]:
    """Match what models make of a placeholder: other spaces, case, quotes, widths, and escapes."""
    parts = []
    for letter in "".join(word.split()):
        alike = _ALIKE.get(letter, letter) + (chr(ord(letter) + _TO_FULL_WIDTH) if "!" <= letter <= "~" else "")
        one = "[" + "".join(map(re.escape, alike)) + "]"
        one = f"(?:{one}|{re.escape(_ESCAPES[letter])})" if letter in _ESCAPES else one
        parts.append(one if letter.isalnum() else rf"\\?{one}")
    first, last = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    return re.compile(first + r"\s*".join(parts) + last, re.IGNORECASE)
