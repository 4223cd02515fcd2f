"""Translate a document with headings, lists and placeholders, and say what became of each piece."""

from __future__ import annotations

from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"
DOCUMENT = """\
# seventeen

- twenty-one
- seventy-one, {n}

> two ☂
"""


def main() -> None:
    """Print the translation, then the pieces that are worth a look."""
    with lmkit.load("seq2seq", CHECKPOINT) as translator:
        result = translator(DOCUMENT, source="en", target="fr", keep=[r"\{\w+\}"])
    print(result.text)
    for segment in result.segments:
        if segment.notes not in {(), ("copied",)}:
            source = result.source[segment.source_start : segment.source_end]
            print(f"{', '.join(segment.notes)}: {source!r} → {result.text[segment.start : segment.end]!r}")


if __name__ == "__main__":
    main()
