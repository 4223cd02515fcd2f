"""Translate columns by Ray's class without Ray: a batch in, the batch with answers and errors out.

`rows.map_batches(lmkit.ray.Mapper, fn_constructor_args=…)` does the same in each actor; the page on Ray has the lines.
"""

from __future__ import annotations

from pathlib import Path

import lmkit.ray

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"


def main() -> None:
    """Translate two batches, each row into the language that its column names."""
    mapper = lmkit.ray.Mapper("seq2seq", str(CHECKPOINT), source="eng_Latn", columns={"target": "to"})
    for batch in (
        {"text": ["forty-two", "one"], "to": ["spa_Latn", "deu_Latn"]},
        {"text": ["three", None], "to": ["fra_Latn", "fra_Latn"]},
    ):
        answers = mapper(batch)
        for text, answer, error in zip(answers["text"], answers["answer"], answers["error"], strict=True):
            print(f"{text} → {answer or error}")


if __name__ == "__main__":
    main()
