"""Workloads of many rows: A, chat prompts; B, ragged budgets; J, U and V, an encoder-decoder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import _data
import _models
from _context import WIDE, device, tried
from _harness import Report, Side, best, contenders, interleave, say
from _sides import lmkit_side, pipeline_side, static_sides

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from _context import Bench

NEW_TOKENS = 96
PIPELINE_EVERY = 8
"""The pipeline is given one in this many of the prompts, for it takes long."""

RAGGED = 256
RAGGED_SIZES = (32, 64)
OURS: dict[str, float | None] = dict.fromkeys((WIDE, f"{WIDE}, kernels", f"{WIDE}, compiled"))
NARROW: dict[str, float | None] = dict.fromkeys(("int8, kernels", "int8, compiled"))
"""lmkit's ways in the precision of vLLM, and in a narrower one."""

PEER_ROWS = 256
"""How many rows vLLM may run at a time: as many as there are in a call."""

SOURCES, FEW_SOURCES, FORCED, BEAMS = 64, 16, 32, 4
SHORTEST, LONGEST = 5, 60
WORDS = (1, 2, 4, 6, 8, 11, 14, 17, 20)
KINDS = ("int8", "bfloat16", "float32")


def chat_prompts(bench: Bench) -> Report:
    """A: 64 chat prompts, up to 96 new tokens each, to their natural end; in 8 bits as many as in bfloat16."""
    chats = _data.steady_chats()
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    budgets = [NEW_TOKENS] * len(chats)
    written = [result.generated_tokens for result in bench.lmkit()(chats, max_new_tokens=NEW_TOKENS)]
    sides = lmkit_sides(bench, OURS, chats, prompts, max_new_tokens=NEW_TOKENS)
    sides += lmkit_sides(bench, NARROW, chats, prompts, max_new_tokens=written, suppress_tokens=bench.ends)
    static = contenders(static_sides(bench.model, prompts, budgets))
    few = range(0, len(chats), PIPELINE_EVERY)
    some = [chats[row] for row in few]
    pipe = pipeline_side(bench.model, bench.tokenizer, some, [prompts[row] for row in few], NEW_TOKENS)
    vllm = vllm_side(bench, prompts, budgets, forced=False)
    report = measured(bench, "A", [*sides, *static, pipe, *vllm], warm=[*sides, *vllm])
    report.notes.append(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
    note = f"on {len(few)} of the {len(chats)} prompts"
    report.each({WIDE: 18}, pipe.name, rows=few, note=note)
    report.each({WIDE: 1.4, f"{WIDE}, compiled": 1.4}, best(static, report.runs))
    for side in vllm:
        report.each(OURS | {f"{WIDE}, compiled": 0.95} | NARROW | {"int8, compiled": 1.3}, side.name)
    return report


def ragged_budgets(bench: Bench) -> Report:
    """B: 256 prompts, each run to a budget of its own."""
    chats = _data.chats(bench.tokenizer, RAGGED)
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    budgets = _data.budgets(RAGGED)
    forced = {"suppress_tokens": bench.ends}
    sides = lmkit_sides(bench, OURS | NARROW, chats, prompts, max_new_tokens=budgets, **forced)
    static = contenders(static_sides(bench.model, prompts, budgets, RAGGED_SIZES, **forced))
    vllm = vllm_side(bench, prompts, budgets, forced=True)
    report = measured(bench, "B", [*sides, *static, *vllm], warm=[*sides, *vllm])
    report.each({WIDE: 2.5, f"{WIDE}, compiled": 2.5}, best(static, report.runs))
    for side in vllm:
        report.each(OURS | {f"{WIDE}, compiled": 0.9} | NARROW | {"int8, compiled": 1.2}, side.name)
    return report


def lmkit_sides(
    bench: Bench, ways: Iterable[str], inputs: Sequence[Any], prompts: Sequence[Sequence[int]], **options: Any
) -> list[Side]:
    """One call with all rows, in each of lmkit's ways: elsewhere than on a CPU those without kernels for it."""
    here = filter(tried, ways)
    return [lmkit_side(bench.lmkit(way), inputs, prompts, f"lmkit {way}", **options) for way in here]


def encoder_decoder(bench: Bench) -> Report:
    """J: 64 sentences of 5 to 60 tokens through a Marian-size model of random weights, 32 new tokens each."""
    return translation(bench, "J", SOURCES, 1.5, {WIDE: None, f"{WIDE}, kernels": None, "int8, kernels": 1.1})


def beams(bench: Bench) -> Report:
    """U: the same sentences, searched with 4 beams."""
    ways = {WIDE: None, f"{WIDE}, kernels": None, "int8, kernels": 1.1}
    return translation(bench, "U", SOURCES, 2.2, ways, beams=BEAMS)


def few_sentences(bench: Bench) -> Report:
    """V: 16 of the sentences."""
    return translation(bench, "V", FEW_SOURCES, 1.6, {})


def translation(
    bench: Bench, workload: str, count: int, target: float, ways: Mapping[str, float | None], *, beams: int = 1
) -> Report:
    """Translate sentences with lmkit, with `generate` on sorted batches and in `ways` beside CTranslate2."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    folder = _models.marian(bench.folder)
    loaded = {way: bench.lmkit(way, "seq2seq", folder) for way in ways or (WIDE,)}
    texts = sentences(loaded[WIDE], count)
    sources: list[list[int]] = [list(loaded[WIDE].tokenizer(text)["input_ids"]) for text in texts]
    ours = [lmkit_side(one, texts, sources, f"lmkit {way}", **forced(beams)) for way, one in loaded.items()]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, WIDE)).to(device())
    options: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
    static = contenders(static_sides(model, sources, [FORCED] * count, min_new_tokens=FORCED, **options))
    peers = contenders(ctranslate2_sides(bench, sources, beams)) if ways else []
    report = measured(bench, workload, [*ours, *static, *peers], warm=ours)
    report.notes.append(f"sources of {min(map(len, sources))} to {max(map(len, sources))} tokens")
    report.each({WIDE: target}, best(static, report.runs))
    if peers:
        report.each(ways, best(peers, report.runs))
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
    return [] if peer is None else [peer.side(prompts, budgets, f"vLLM {WIDE}", forced=forced)]


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
