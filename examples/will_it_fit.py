"""Find the widest precision in which a model fits a budget, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import lmkit

CHECKPOINT = Path(__file__).parent / "checkpoints" / "world-bert"


def main() -> None:
    """Try budgets of a GPU that need not be here."""
    for budget in ("3MB", "1500KB", "500KB"):
        for precision in ("float32", "bfloat16", "int8"):
            plan = lmkit.plan("masked", CHECKPOINT, precision, {"cuda:0": budget})
            if plan.fits:
                print(f"{budget}: {precision}, {plan.weights_bytes / 1e6:.1f} MB of weights")
                break
        else:
            print(f"{budget}: {plan.reasons['fits']}")


if __name__ == "__main__":
    main()
