"""Give each row of a call its own options: a list has one value per row, a single value is for all."""

from __future__ import annotations

from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"
TEXT = "two thousand and twenty-six"


def main() -> None:
    """Translate one number into three languages, then cut, search and draw in one call."""
    with lmkit.load("seq2seq", CHECKPOINT) as translator:
        targets = ["deu_Latn", "fra_Latn", "spa_Latn"]
        for result in translator([TEXT] * 3, source="eng_Latn", target=targets):
            print(f"{result.target_language}: {result.text}")

        results = translator(
            [TEXT] * 3,
            source="eng_Latn",
            target="fra_Latn",
            max_new_tokens=[3, 40, 40],
            num_beams=[1, 4, 1],
            temperature=[0, 0, 1.5],
            seed=7,
        )
        for mode, result in zip(("greedy", "beams", "sampled"), results, strict=True):
            print(f"{mode}: {result.text} (ended: {result.finish_reason}, seed: {result.seed})")


if __name__ == "__main__":
    main()
