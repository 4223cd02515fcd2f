"""The tables of options on the pages, as the library declares them."""

from __future__ import annotations

from lmkit.options.generation import GenerationOptions, GeneratorOptions
from lmkit.options.option import declared
from lmkit.options.tasks import TranslationOptions, UnmaskOptions

PAGES: dict[str, list[tuple[type, type | None]]] = {
    "docs/options.md": [
        (GenerationOptions, None),
        (GeneratorOptions, GenerationOptions),
        (TranslationOptions, GenerationOptions),
    ],
    "docs/fill-mask.md": [(UnmaskOptions, GenerationOptions)],
}
"""Which tables a page has: the options of a class, without those that the page shows elsewhere."""


def table(kind: type, without: type | None = None) -> str:
    """Write the options of a class as a table in Markdown."""
    elsewhere = [] if without is None else rows(without)
    own = [row for row in rows(kind) if row not in elsewhere]
    return "\n".join(["| option | takes | left out | what it does |", "| --- | --- | --- | --- |", *own])


def rows(kind: type) -> list[str]:
    """Write each option of a class as a row."""
    return [
        f"| `{name}` | {one.accepts} | {one.default or 'none'} | {one.meaning} |"
        for name, one in declared(kind).items()
    ]


def list_options() -> list[str]:
    """Name the options that are lists themselves."""
    kinds = (GeneratorOptions, TranslationOptions, UnmaskOptions)
    return sorted({name for kind in kinds for name, option in declared(kind).items() if option.many})
