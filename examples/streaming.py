"""Show texts while they grow: several rows at once, and a row that its reader stops."""

from __future__ import annotations

from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"
TEXTS = ["seven", "forty-two", "nine hundred and ninety-nine thousand, nine hundred and ninety-nine"]


def show_all(translator: lmkit.Translator) -> None:
    """Print the rows of one call as they stand after each chunk; each row ends on its own."""
    rows = [""] * len(TEXTS)
    for chunk in translator.stream(TEXTS, source="eng_Latn", target="deu_Latn"):
        rows[chunk.index] += chunk.text
        ended = f"  (ended: {chunk.finish_reason})" if chunk.finish_reason else ""
        print(f"row {chunk.index}: {rows[chunk.index]}{ended}")


def stop_early(translator: lmkit.Translator) -> None:
    """Leave the loop after a few characters: the model stops there."""
    text = ""
    for chunk in translator.stream(TEXTS[-1], source="eng_Latn", target="fra_Latn"):
        text += chunk.text
        if len(text) > 20:  # noqa: PLR2004 - as much as this reader wants
            break
    print(f"stopped after: {text}")


def main() -> None:
    """Run both."""
    with lmkit.load("seq2seq", CHECKPOINT) as translator:
        show_all(translator)
        stop_early(translator)


if __name__ == "__main__":
    main()
