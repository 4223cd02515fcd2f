"""Fill masks: the best guesses, a choice among given words, and several masks that fit together."""

from __future__ import annotations

from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "world-bert"


def main() -> None:
    """Ask for a fact, for the better of two words, and for two words at once."""
    with lmkit.load("masked", CHECKPOINT) as unmasker:
        result = unmasker("The currency of Japan is the [MASK].", top_k=3)
        print(result.text, [f"{guess.token} {guess.score:.3f}" for guess in result.candidates])

        result = unmasker("The capital of France is [MASK].", targets=["lisbon", "paris"])
        print(result.candidates[0])

        result = unmasker("[MASK] uses the [MASK] as its currency.", top_k=3)
        alone = [slot.candidates[0].token for slot in result.masks]
        print(f"each mask alone: {alone}; together: {result.candidates[0].tokens}")


if __name__ == "__main__":
    main()
