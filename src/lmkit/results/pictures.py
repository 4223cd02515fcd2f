"""How results look: blocks of texts, bars and facts, drawn for a notebook as HTML, and for a terminal.

What a model says is untrusted text: every character of it is escaped, kept in its own direction, and cannot steer a
terminal.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from zlib import crc32

WIDTH = 24
"""How many characters a full bar has in a terminal."""

_TINTS = (None, 230, 223, 216, 209)
"""Colours of a terminal, of 256, from nothing to surprise."""

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters other than line feeds and tabs, and those that turn the direction of writing."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a text.

    Attributes:
        text: The piece.
        tint: How strongly it is coloured, 0 to 1: how surprising it is.
        hint: What is said of it where the mouse rests.
        group: What lights up together with it.
    """

    text: str
    tint: float = 0.0
    hint: str = ""
    group: int | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Pieces of a text, one behind the other, or several texts side by side."""

    columns: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """Shares between 0 and 1, each with its label and what is said behind it."""

    title: str
    rows: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """What is shown when it is asked for."""

    title: str
    inside: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """Data: dicts and lists in each other."""

    value: Any


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to know, by name."""

    pairs: Mapping[str, object]


Block: TypeAlias = Text | Bars | Fold | Tree | Facts


def as_it_is(text: str) -> Text:
    """Show a text as it is."""
    return Text(((Span(text),),))


def visible(text: str) -> str:
    r"""Write control characters as JSON does (`\u001b`)."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shortened(text: str, most: int) -> str:
    """Cut a text that is longer than `most`, and say how much of it there is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


# In a notebook ----------------------------------------------------------------------------------


def to_html(blocks: Iterable[Block]) -> str:
    """Draw blocks as HTML that needs nothing else, in light and in dark: colours are tints of what is behind them."""
    return f'<div style="max-width:60em;line-height:1.5;overflow-wrap:anywhere">{"".join(map(_html, blocks))}</div>'


def table(rows: Iterable[Iterable[tuple[str, object]]]) -> str:
    """Draw rows of named cells, which need not all have the same names, as one table."""
    given = [dict(row) for row in rows]
    names = list(dict.fromkeys(name for row in given for name in row))
    head = "".join(f'<th style="text-align:left">{_escaped(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_cell(name)}">{_escaped(row.get(name, ""))}</td>' for name in names) + "</tr>"
        for row in given
    )
    return f'<table style="max-width:60em"><tr>{head}</tr>{body}</table>'


def _cell(name: str) -> str:
    wraps = (
        "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext" if name == "text" else "white-space:nowrap"
    )
    return f"text-align:left;vertical-align:top;{wraps}"


def _escaped(value: object) -> str:
    return html.escape(visible(str(value)))


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return _text_html(block)
    if isinstance(block, Bars):
        return _bars_html(block)
    if isinstance(block, Fold):
        inside = "".join(map(_html, block.inside))
        return f"<details><summary>{_escaped(block.title)}</summary>{inside}</details>"
    if isinstance(block, Tree):
        return _tree_html(block.value)
    cells = "".join(
        f'<div style="opacity:.8">{_escaped(name)}</div><div style="white-space:pre-wrap">{_escaped(value)}</div>'
        for name, value in block.pairs.items()
    )
    return f'<div style="display:grid;grid-template-columns:max-content 1fr;column-gap:1em">{cells}</div>'


def _text_html(block: Text) -> str:
    groups = sorted({span.group for column in block.columns for span in column if span.group is not None})
    columns = "".join(
        f'<div dir="auto" style="white-space:pre-wrap">{"".join(map(_span_html, column))}</div>'
        for column in block.columns
    )
    name = f"lmkit-{crc32(columns.encode('utf-8', 'replace')):08x}"
    rules = "".join(
        f'#{name}:has([data-n="{n}"]:hover) [data-n="{n}"]{{background:rgba(76,120,168,.4)}}' for n in groups
    )
    style = f"<style>{rules}</style>" if rules else ""
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16em,100%),1fr));gap:0 1.5em;margin:.3em 0"
    return f'{style}<div id="{name}" style="{grid}">{columns}</div>'


def _span_html(span: Span) -> str:
    more = f' title="{_escaped(span.hint)}"' if span.hint else ""
    more += f' data-n="{span.group}"' if span.group is not None else ""
    tint = f";background:rgba(255,140,0,{0.4 * span.tint:.2f})" if span.tint > 0 else ""
    return f'<span{more} style="unicode-bidi:isolate{tint}">{_escaped(span.text)}</span>'


def _bars_html(block: Bars) -> str:
    cells = "".join(
        f'<div dir="auto" style="white-space:pre-wrap">{_escaped(label)}</div>'
        f'<div style="align-self:center;height:.9em;width:{100 * share:.1f}%;background:rgba(76,120,168,.6)"></div>'
        f"<div>{_escaped(note)}</div>"
        for label, share, note in block.rows
    )
    title = f'<div style="opacity:.8">{_escaped(block.title)}</div>' if block.title else ""
    columns = "grid-template-columns:minmax(0,max-content) minmax(4em,12em) max-content"
    return f'{title}<div style="display:grid;{columns};column-gap:1em;margin:.3em 0">{cells}</div>'


def _tree_html(value: Any) -> str:
    if isinstance(value, Mapping):
        items = [(f"{_escaped(name)}: ", one) for name, one in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [("", one) for one in value]
    else:
        return _escaped(_json(value))
    inside = "".join(f"<li>{name}{_tree_html(one)}</li>" for name, one in items)
    return f'<ul style="margin:0;padding-left:1.5em">{inside}</ul>' if inside else _escaped(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# In a terminal ----------------------------------------------------------------------------------


def to_text(blocks: Iterable[Block], *, colours: bool = False) -> str:
    """Draw blocks for a terminal; without colours, as what can be read anywhere."""
    return "\n".join(line for block in blocks for line in _lines(block, colours=colours))


def _lines(block: Block, *, colours: bool) -> list[str]:
    if isinstance(block, Text):
        columns = ("".join(_span_text(span, colours=colours) for span in column) for column in block.columns)
        return [line for column in columns for line in [*column.split("\n"), ""]][:-1]
    if isinstance(block, Bars):
        width = max((len(label) for label, _, _ in block.rows), default=0)
        bars = [
            f"{visible(label):<{width}}  {'█' * round(WIDTH * share):<{WIDTH}}  {visible(note)}"
            for label, share, note in block.rows
        ]
        return [*([visible(block.title)] if block.title else []), *bars]
    if isinstance(block, Fold):
        return [
            f"{visible(block.title)}:",
            *(f"  {line}" for one in block.inside for line in _lines(one, colours=colours)),
        ]
    if isinstance(block, Tree):
        return visible(json.dumps(block.value, ensure_ascii=False, default=str, indent=2)).split("\n")
    width = max(map(len, block.pairs), default=0)
    return [f"{name:<{width}}  {visible(str(value))}" for name, value in block.pairs.items()]


def _span_text(span: Span, *, colours: bool) -> str:
    tint = _TINTS[min(int(span.tint * len(_TINTS)), len(_TINTS) - 1)] if colours else None
    text = visible(span.text)
    return text if tint is None else f"\x1b[30;48;5;{tint}m{text}\x1b[0m"


def show(drawn: Any, blocks: Sequence[Block]) -> None:
    """Show something: in a notebook as its picture, elsewhere by print."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        sys.modules["IPython"].display.display(drawn)
    else:
        print(to_text(blocks, colours=sys.stdout.isatty()))  # noqa: T201 - what it is for
