"""Workloads of masked models: S, of the size of MiniLM; T, of the size of BERT-base."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import _data
import _models
from _context import WIDE, device
from _harness import Report, Run, Side, interleave

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from _context import Bench

TEXTS, SHORTEST, LONGEST = 512, 6, 200
TOP_K, BATCH = 5, 32
PIPELINE_EVERY = 4
"""The pipeline as it comes is given one in this many of the texts, for it takes long."""


def mini(bench: Bench) -> Report:
    """S: 512 texts of 6 to 200 tokens with one or two masks, 6 layers of 384, results formatted."""
    return filled(bench, "S", _models.bert(bench.folder, "mini", hidden=384, layers=6), (5.0, 3.0, 6.0))


def base(bench: Bench) -> Report:
    """T: the same texts, 12 layers of 768."""
    return filled(bench, "T", _models.bert(bench.folder, "base", hidden=768, layers=12), (4.0, 2.0, 4.5))


def filled(bench: Bench, workload: str, folder: Path, targets: tuple[float, float, float]) -> Report:
    """Fill masks with lmkit and with the pipeline, as it comes and at its best.

    The pipeline guesses each mask alone, so lmkit is told to do the same; filling two masks jointly is shown beside it.
    """
    import torch

    ways = {WIDE: targets[1], f"{WIDE}, kernels": None, "int8, kernels": targets[2]}
    unmasker = bench.lmkit(WIDE, "masked", folder)
    given = texts(unmasker.tokenizer)
    tokens = [len(unmasker.tokenizer(text)["input_ids"]) for text in given]
    few = range(0, len(given), PIPELINE_EVERY)
    ours = [
        lmkit_side(bench.lmkit(way, "masked", folder), given, tokens, f"lmkit {way}", order="independent")
        for way in ways
    ]
    joint = lmkit_side(unmasker, given, tokens, f"lmkit {WIDE}, two masks jointly")
    some = [given[row] for row in few], [tokens[row] for row in few]
    as_it_comes = pipeline_side(folder, *some, "pipeline as it comes")
    name, dtype = f"pipeline, {WIDE}, batches of {BATCH}", getattr(torch, WIDE)
    best = pipeline_side(folder, given, tokens, name, dtype=dtype, size=BATCH)
    for side in ours:
        side.run()
    report = Report(workload, runs=interleave([*ours, joint, as_it_comes, best], bench.repeats))
    report.notes.append(f"texts of {min(tokens)} to {max(tokens)} tokens; tokens are those that are read")
    note = f"on {len(few)} of the {len(given)} texts"
    report.each({WIDE: targets[0]}, as_it_comes.name, rows=few, note=note)
    report.each(ways, best.name)
    report.faster(joint.name, best.name, note="which fills each mask alone")
    return report


def texts(tokenizer: Any, count: int = TEXTS) -> list[str]:
    """Return beginnings of chronicles in which one or two words are masked, in tokens from 6 to 200."""
    draw = _data.rng(3)
    found: list[str] = []
    for seed in range(count):
        tokens = draw.randint(SHORTEST, LONGEST)
        words = _data.document(tokenizer, LONGEST, seed).split()[: tokens - 2]
        while len(tokenizer(" ".join(words))["input_ids"]) > tokens:  # full stops are tokens too
            words.pop()
        for place in draw.sample(range(len(words)), draw.randint(1, 2)):
            words[place] = "[MASK]"
        found.append(" ".join(words))
    return found


def lmkit_side(unmasker: Any, given: Sequence[str], tokens: Sequence[int], name: str, **options: Any) -> Side:
    """One call with all texts."""

    def run() -> Run:
        begun = time.perf_counter()
        unmasker(given, top_k=TOP_K, progress=False, **options)
        return Run(time.perf_counter() - begun, tuple(tokens))

    return Side(name, run)


def pipeline_side(
    folder: Path, given: Sequence[str], tokens: Sequence[int], name: str, *, size: int = 1, dtype: Any = "auto"
) -> Side:
    """Run transformers' own pipeline, in the precision of the checkpoint unless told otherwise."""
    import transformers

    hf: Any = transformers
    fill = hf.pipeline("fill-mask", model=str(folder), device=device(), dtype=dtype)

    def run() -> Run:
        begun = time.perf_counter()
        fill(list(given), top_k=TOP_K, batch_size=size)
        return Run(time.perf_counter() - begun, tuple(tokens))

    return Side(name, run)
