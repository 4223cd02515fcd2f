"""Workloads of scores: Q, texts of all lengths and the memory they take; R, choices under shared prompts."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import _data
from _batches import measured
from _context import WIDE, device, in_fresh_process
from _harness import Report, Run, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _context import Bench

TEXTS, SHORTEST, LONGEST = 128, 10, 200
PROMPTS, PROMPT_TOKENS, CHOICES = 64, 200, 4
CHOICE_WORDS = 4
MIB = 1024**2
MEMORY = 400


def texts_alone(bench: Bench) -> Report:
    """Q: 128 texts of 10 to 200 tokens, against plain transformers one by one in the same precision."""
    texts = scored_texts(bench.tokenizer)
    counts = [len(bench.tokenizer(text)["input_ids"]) - 1 for text in texts]
    ways = {WIDE: 1.9, f"{WIDE}, kernels": None, "int8, kernels": 2.0}
    ours = [timed(f"lmkit {way}", counts, functools.partial(bench.lmkit(way).score, texts)) for way in ways]
    plain = timed(f"one by one, {WIDE}", counts, lambda: [logprob(bench, text) for text in texts])
    report = measured(bench, "Q", [*ours, plain], warm=[*ours, plain])
    report.notes.append(f"{sum(counts)} tokens in texts of {min(counts) + 1} to {max(counts) + 1}")
    report.each(ways, plain.name)
    found = in_fresh_process("scores", str(bench.checkpoint))
    above = (found["peak"] - found["loaded"]) / MIB
    shown = f"{found['peak'] / MIB:.0f} MiB at the peak", f"{found['loaded'] / MIB:.0f} MiB when loaded"
    report.bound("memory above the model", shown, above, MEMORY, (f"{above:.0f} MiB", f"≤ {MEMORY} MiB"))
    return report


def shared_prompts(bench: Bench) -> Report:
    """R: 4 choices under each of 64 prompts of 200 tokens, against each pair by itself."""
    prompts = [_data.document(bench.tokenizer, PROMPT_TOKENS, seed) for seed in range(PROMPTS)]
    choices = [[first_words(text) for text in _data.sentences(CHOICES, PROMPTS + seed)] for seed in range(PROMPTS)]
    pairs = [(prompt, choice) for prompt, row in zip(prompts, choices, strict=True) for choice in row]
    counts = [len(bench.tokenizer(prompt + choice)["input_ids"]) for prompt, choice in pairs]
    ours = timed("lmkit.rank", counts, lambda: bench.generator.rank(prompts, choices))
    alone = timed("lmkit.score, each pair", counts, lambda: [bench.generator.score(*pair) for pair in pairs])
    plain = timed("transformers, each pair", counts, lambda: [logprob(bench, p + c) for p, c in pairs])
    report = measured(bench, "R", [ours, alone, plain], warm=[ours])
    report.notes.append(f"prompts and choices of {min(counts)} to {max(counts)} tokens together")
    report.faster(ours.name, alone.name, 2.5)
    report.faster(ours.name, plain.name, 2.5)
    return report


def scored_texts(tokenizer: Any) -> list[str]:
    """Return texts of evenly spread lengths in tokens, cut out of Python's documentation."""
    prose, draw = _data.documentation(), _data.rng(3)
    lengths = [SHORTEST + (LONGEST - SHORTEST) * number // (TEXTS - 1) for number in range(TEXTS)]
    draw.shuffle(lengths)
    texts = []
    for length in lengths:
        begin = prose.index(" ", draw.randrange(len(prose) - 20 * LONGEST)) + 1
        part = prose[begin : begin + 20 * LONGEST]
        end = tokenizer(part, return_offsets_mapping=True)["offset_mapping"][length - 1][1]
        texts.append(part[:end])
    return texts


def first_words(text: str) -> str:
    """Return the beginning of a sentence, as it stands behind another one."""
    return f" {' '.join(text.split()[:CHOICE_WORDS])}"


def logprob(bench: Bench, text: str) -> float:
    """Score one text as users of plain transformers do."""
    import torch

    token_ids = torch.tensor([bench.tokenizer(text)["input_ids"]], device=device())
    with torch.no_grad():
        logprobs = bench.model(token_ids).logits[0, :-1].float().log_softmax(-1)
    return float(logprobs.gather(-1, token_ids[0, 1:, None]).sum())


def timed(name: str, counts: Sequence[int], work: Callable[[], object]) -> Side:
    """Time work on rows of so many tokens."""

    def run() -> Run:
        begun = time.perf_counter()
        work()
        return Run(time.perf_counter() - begun, tuple(counts))

    return Side(name, run)
