"""Quantize a model on a CPU, compare its answers, save it, and load what was saved."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "world-bert"
FACTS = ["The currency of Japan is the [MASK].", "The capital of France is [MASK].", "People in Brazil speak [MASK]."]


def main() -> None:
    """Print what each precision takes and answers."""
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "int8", "int4"):
            with lmkit.load("masked", CHECKPOINT, precision, "cpu") as unmasker:
                words = [result.candidates[0].token for result in unmasker(FACTS)]
                print(f"{precision}: {unmasker.plan.weights_bytes / 1e6:.2f} MB, {', '.join(words)}")
                unmasker.model.save_pretrained(Path(folder, precision))
                unmasker.tokenizer.save_pretrained(Path(folder, precision))
        with lmkit.load("masked", Path(folder, "int4"), devices="cpu") as unmasker:
            print(f"loaded again: {unmasker.precision}, {unmasker(FACTS[0])}")


if __name__ == "__main__":
    main()
