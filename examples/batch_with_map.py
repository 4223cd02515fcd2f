"""Translate a stream of lines without holding them all: lazy in, lazy out, and no line lost to a bad one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lmkit

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"


def lines() -> Iterator[str]:
    """Yield texts one by one, as a file or a queue would; one of them is longer than the model takes."""
    yield from ("one", "twenty-two", "three hundred and thirty-three")
    yield "one hundred and one, " * 20
    yield from ("four thousand", "fifty-five thousand, five hundred and fifty-five")


def main() -> None:
    """Print each translation as it comes, and the error of the line that has none."""
    with lmkit.load("seq2seq", CHECKPOINT) as translator:
        # A line is one text here, too long or not; without split="none" it would be translated in pieces.
        results = translator.map(lines(), on_error="return", split="none", source="eng_Latn", target="spa_Latn")
        for number, result in enumerate(results, start=1):
            if isinstance(result, lmkit.LmkitError):
                print(f"{number}  failed: {result}")
            else:
                print(f"{number}  {result.source} → {result.text}")


if __name__ == "__main__":
    main()
