"""Translate a number from each language of a checkpoint to each other one, in a single call, and rank translations."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "numbers-m2m100"
NINETY_NINE = {
    "English": "ninety-nine",
    "German": "neunundneunzig",
    "French": "quatre-vingt-dix-neuf",
    "Spanish": "noventa y nueve",
}


def main() -> None:
    """Print what is translated from what, and the likelier of two translations."""
    sources, targets = zip(*permutations(NINETY_NINE, 2), strict=True)
    with lmkit.load("seq2seq", CHECKPOINT) as translator:
        results = translator([NINETY_NINE[one] for one in sources], source=sources, target=targets)
        for result, target in zip(results, targets, strict=True):
            right = "" if result.text == NINETY_NINE[target] else f"  (not {NINETY_NINE[target]})"
            print(f"{result.source_language} → {result.target_language}: {result.text}{right}")
        ranking = translator.rank("ninety", ["neunzig", "neunzehn"], source="English", target="German")
        print(f"ninety is {ranking}, with a probability of {ranking.choices[0].probability:.2f} of the two")


if __name__ == "__main__":
    main()
