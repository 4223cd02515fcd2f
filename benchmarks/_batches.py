"""Workloads of many rows: A, chat prompts; B, ragged budgets; J, U and V, an encoder-decoder; X, documents."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import _data
import _models
from _context import device, load
from _harness import Report, Run, Side, best, contenders, interleave, say
from _sides import lmkit_side, pipeline_side, static_sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _context import Bench

NEW_TOKENS = 96
PIPELINE_EVERY = 8
"""The pipeline is given one in this many of the prompts, for it takes long."""

RAGGED = 256
RAGGED_SIZES = (32, 64)
PEER_ROWS = 256
"""How many rows vLLM may run at a time: as many as there are in a call."""

SOURCES, FEW_SOURCES, FORCED, BEAMS = 64, 16, 32, 4
DOCUMENT_TOKENS = 75
SHORTEST, LONGEST = 5, 60
WORDS = (1, 2, 4, 6, 8, 11, 14, 17, 20)
KINDS = ("int8", "bfloat16", "float32")


def chat_prompts(bench: Bench) -> Report:
    """A: 64 chat prompts, up to 96 new tokens each, to their natural end."""
    chats = _data.steady_chats()
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    budgets = [NEW_TOKENS] * len(chats)
    few = range(0, len(chats), PIPELINE_EVERY)
    sides = lmkit_sides(bench, chats, prompts, max_new_tokens=NEW_TOKENS)
    static = contenders(static_sides(bench.model, prompts, budgets))
    some = [chats[row] for row in few]
    pipe = pipeline_side(bench.model, bench.tokenizer, some, [prompts[row] for row in few], NEW_TOKENS)
    vllm = vllm_side(bench, prompts, budgets, forced=False)
    report = measured(bench, "A", [*sides, *static, pipe, *vllm], warm=[*sides, *vllm])
    report.notes.append(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    note = f"on {len(few)} of the {len(chats)} prompts"
    for ours in sides:
        report.faster(ours.name, pipe.name, 18, rows=few, note=note)
        report.faster(ours.name, best(static, report.runs), 1.4)
        for side in vllm:
            report.faster(ours.name, side.name, 1.1)
    return report


def ragged_budgets(bench: Bench) -> Report:
    """B: 256 prompts, each run to a budget of its own."""
    chats = _data.chats(bench.tokenizer, RAGGED)
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    budgets = _data.budgets(RAGGED)
    forced = {"suppress_tokens": bench.ends}
    sides = lmkit_sides(bench, chats, prompts, max_new_tokens=budgets, **forced)
    static = contenders(static_sides(bench.model, prompts, budgets, RAGGED_SIZES, **forced))
    vllm = vllm_side(bench, prompts, budgets, forced=True)
    report = measured(bench, "B", [*sides, *static, *vllm], warm=[*sides, *vllm])
    for ours in sides:
        report.faster(ours.name, best(static, report.runs), 2.5)
        for side in vllm:
            report.faster(ours.name, side.name, 1.0)
    return report


def lmkit_sides(bench: Bench, chats: Sequence[Any], prompts: Sequence[Sequence[int]], **options: Any) -> list[Side]:
    """One call with all rows, as lmkit comes, and with a compiled step."""
    sides = [lmkit_side(bench.generator, chats, prompts, **options)]
    if device() == "cpu":  # elsewhere benchmarks/gpu.py says what compiled steps do
        sides.append(lmkit_side(bench.compiled, chats, prompts, "lmkit, compiled", **options))
    return sides


def encoder_decoder(bench: Bench) -> Report:
    """J: 64 sentences of 5 to 60 tokens through a Marian-size model of random weights, 32 new tokens each."""
    report = translation(bench, "J", SOURCES, (1.5, 0.8))
    translator = load("seq2seq", _models.marian(bench.folder), "int8")
    texts = sentences(translator, SOURCES)
    sources = [list(translator.tokenizer(text)["input_ids"]) for text in texts]
    ours = lmkit_side(translator, texts, sources, "lmkit, int8", **forced(1))
    peers = contenders(ctranslate2_sides(bench, sources))
    if peers:
        again = measured(bench, "J", [ours, *peers], warm=[ours])
        again.faster(ours.name, best(peers, again.runs), 1.0)
        report.findings += again.findings
    translator.close()
    return report


def beams(bench: Bench) -> Report:
    """U: the same sentences, searched with 4 beams."""
    return translation(bench, "U", SOURCES, (2.2, 1.1), beams=BEAMS)


def few_sentences(bench: Bench) -> Report:
    """V: 16 of the sentences."""
    return translation(bench, "V", FEW_SOURCES, (1.6, None))


def splits(bench: Bench) -> Report:
    """X: 16 documents of three short sentences, by sentences and by paragraphs, with 75 new tokens each."""
    translator = load("seq2seq", _models.marian(bench.folder))
    documents = [
        " ".join(" ".join(one.split()[:3]).rstrip(".") + "." for one in _data.sentences(3, seed))
        for seed in range(FEW_SOURCES)
    ]
    sides = [split_side(translator, documents, "sentence", 3), split_side(translator, documents, "paragraph", 1)]
    report = measured(bench, "X", sides, warm=sides)
    report.faster(sides[0].name, sides[1].name)
    translator.close()
    return report


def split_side(translator: Any, documents: Sequence[str], split: str, pieces: int) -> Side:
    """Translate documents in so many pieces each, which write as many tokens in all."""
    new = DOCUMENT_TOKENS // pieces

    def run() -> Run:
        begun = time.perf_counter()
        results = translator(documents, split=split, max_new_tokens=new, min_new_tokens=new)
        seconds = time.perf_counter() - begun
        tokens = tuple(result.generated_tokens for result in results)
        if set(tokens) != {DOCUMENT_TOKENS}:
            msg = f"documents are not split into {pieces} pieces each"
            raise ValueError(msg)
        return Run(seconds, tokens)

    return Side(f"split={split!r}", run)


def translation(
    bench: Bench, workload: str, count: int, targets: tuple[float, float | None], *, beams: int = 1
) -> Report:
    """Translate sentences with lmkit, with `generate` on sorted batches and with CTranslate2."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    folder = _models.marian(bench.folder)
    translator = load("seq2seq", folder)
    texts = sentences(translator, count)
    sources: list[list[int]] = [list(translator.tokenizer(text)["input_ids"]) for text in texts]
    ours = lmkit_side(translator, texts, sources, **forced(beams))
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16).to(device())
    options: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
    static = contenders(static_sides(model, sources, [FORCED] * count, min_new_tokens=FORCED, **options))
    peers = contenders(ctranslate2_sides(bench, sources, beams)) if targets[1] else []
    report = measured(bench, workload, [ours, *static, *peers], warm=[ours])
    report.notes.append(f"sources of {min(map(len, sources))} to {max(map(len, sources))} tokens")
    report.faster(ours.name, best(static, report.runs), targets[0])
    if peers:
        report.faster(ours.name, best(peers, report.runs), targets[1])
    translator.close()
    return report


def forced(beams: int) -> dict[str, Any]:
    """Ask lmkit for as many tokens as every side writes."""
    return {"max_new_tokens": FORCED, "min_new_tokens": FORCED} | ({"num_beams": beams} if beams > 1 else {})


def sentences(translator: Any, count: int) -> list[str]:
    """Return texts of one word to half a sentence, in tokens from 5 to 60."""
    found: list[str] = []
    for seed in range(count):
        words = " ".join(_data.sentences(2, seed)).split()
        for size in WORDS:
            text = " ".join(words[:size]).replace(".", "")  # one sentence, which lmkit does not split
            if SHORTEST <= len(translator.tokenizer(text)["input_ids"]) <= LONGEST:
                found.append(text)
    step = len(found) // count
    return found[: step * count : step]


def vllm_side(bench: Bench, prompts: Sequence[Sequence[int]], budgets: Sequence[int], *, forced: bool) -> list[Side]:
    """Give vLLM the same token ids, if it is wanted."""
    peer = bench.peers.get("vllm", model=str(bench.checkpoint), rows=PEER_ROWS)
    return [] if peer is None else [peer.side(prompts, budgets, "vLLM", forced=forced)]


def ctranslate2_sides(bench: Bench, sources: Sequence[Sequence[int]], beams: int = 1) -> list[Side]:
    """Give CTranslate2 the same token ids: each kind of weights, one worker of all cores or one per core."""
    cores = os.cpu_count() or 1
    workers = [(1, cores), (cores, 1)]
    converted = str(bench.folder / "ctranslate2")
    settings = {"model": str(_models.marian(bench.folder)), "folder": converted, "kinds": KINDS, "workers": workers}
    peer = bench.peers.get("ctranslate2", **settings)
    if peer is None:
        return []
    # bfloat16 is not among them where the processor has no fast way for CTranslate2's kernels.
    return [
        peer.side(sources, [FORCED] * len(sources), f"CTranslate2 {setting}", setting=setting, beams=beams)
        for setting in peer.facts["settings"]
    ]


def measured(bench: Bench, workload: str, sides: Sequence[Side], warm: Sequence[Side]) -> Report:
    """Run those once that have not run yet, then all in turns."""
    for side in warm:
        run = side.run()
        say(f"  warm-up {side.name}: {run.seconds:.2f} s, {run.total} tokens")
    return Report(workload, runs=interleave(sides, bench.repeats))
