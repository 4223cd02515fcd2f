"""Workloads of one row: D, a stream; E, starts with compilation; F, a chat; G, editing; X, long prompts."""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _data
import _models
from _context import WIDE, in_fresh_process, load
from _harness import Finding, Report, Run, Side, interleave, same_work
from _sides import lmkit_side, prefill_side, single_side, stream_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _context import Bench

NEW_TOKENS = 128
PREFILL_SHARE = 1.1
STARTS = (30, 2)
PROMPTS, LONG_SHARE = (450, 1800, 7200), 0.45

DOCUMENT_TOKENS, ANSWER_TOKENS = 1500, 24


def one_stream(bench: Bench) -> Report:
    """D: one stream of 128 new tokens, and the time to its first."""
    chat = longest_chat(bench)
    prompt = _data.encode(bench.tokenizer, chat)
    forced = {"suppress_tokens": bench.ends}
    ways = {WIDE: None, f"{WIDE}, kernels": 1.6, f"{WIDE}, compiled": 2.2}
    wanted = {"max_new_tokens": NEW_TOKENS, **forced}
    ours = [stream_side(functools.partial(bench.lmkit(way).stream, chat, **wanted), f"lmkit {way}") for way in ways]
    plain = single_side(bench.model, prompt, NEW_TOKENS, **forced)
    bare = prefill_side(bench.model, prompt)
    sides = [*ours, plain, bare]
    peer = bench.peers.get("llama", gguf=str(_models.smollm2_gguf()), threads=os.cpu_count() or 1)
    if peer is not None:
        sides.append(peer.side([prompt], [NEW_TOKENS], "llama.cpp Q4_1"))
    for side in sides:
        side.run()
    report = Report("D", runs=interleave(sides, bench.repeats))
    report.notes.append(f"a prompt of {len(prompt)} tokens")
    report.each(ways, plain.name)
    first_token(report, ours[0], bare)
    for side in sides[len(ways) + 2 :]:
        report.each(dict.fromkeys(ways), side.name, note="weights of 4 bits, lmkit's have 16")
    return report


def long_prompts(bench: Bench) -> Report:
    """X: one prompt of 450, 1,800 and 7,200 tokens, to its first new token; tokens are those that are read."""
    ids = bench.tokenizer(_data.documentation())["input_ids"]
    texts = {size: bench.tokenizer.decode(ids[:size]) for size in PROMPTS}
    prompts = {size: bench.tokenizer(text)["input_ids"] for size, text in texts.items()}
    report = Report("X")
    ways = (WIDE, f"{WIDE}, kernels", "int8, kernels")
    sides = {
        f"lmkit {way}, {size}": reading(lmkit_side(bench.lmkit(way), [text], [prompts[size]], max_new_tokens=1), size)
        for size, text in texts.items()
        for way in ways
    }
    _measure_prompts(report, bench, sides)
    peers = {
        "vllm": (f"vLLM {WIDE}", {"model": str(bench.checkpoint), "rows": 256}),
        "llama": ("llama.cpp Q4_1", {"gguf": str(_models.smollm2_gguf()), "threads": os.cpu_count() or 1}),
    }
    for name, (label, settings) in peers.items():
        peer = bench.peers.get(name, **settings)
        if peer is not None:
            their = {f"{label}, {n}": reading(peer.side([p], [1], forced=True), n) for n, p in prompts.items()}
            _measure_prompts(report, bench, their)
            for size in prompts:
                for way in ways:
                    target = 1.0 if (name, way) == ("vllm", f"{WIDE}, kernels") else None
                    report.faster(f"lmkit {way}, {size}", f"{label}, {size}", target)
    short, *_, long = PROMPTS
    for way in ways:
        report.share(f"lmkit {way}, {long}", f"lmkit {way}, {short}", LONG_SHARE)
    return report


def _measure_prompts(report: Report, bench: Bench, sides: dict[str, Side]) -> None:
    named = [Side(name, side.run) for name, side in sides.items()]
    named[0].run()
    report.runs |= interleave(named, bench.repeats)


def reading(side: Side, tokens: int) -> Side:
    """Count what a side reads in place of what it writes."""
    return Side(side.name, lambda: Run(side.run().seconds, (tokens,)))


def longest_chat(bench: Bench) -> _data.Chat:
    """Return the chat prompt of workload A with the most tokens."""
    return max(_data.steady_chats(), key=lambda chat: len(_data.encode(bench.tokenizer, chat)))


def first_token(report: Report, ours: Side, bare: Side) -> None:
    """Compare the time until the first text of a stream with a bare forward pass."""
    firsts = [
        statistics.median(run.first_seconds or run.seconds for run in report.runs[side.name]) for side in (ours, bare)
    ]
    share = firsts[0] / firsts[1]
    shown = (f"{firsts[0] * 1000:.1f} ms", f"{firsts[1] * 1000:.1f} ms")
    report.bound("first token : bare prefill", shown, share, PREFILL_SHARE, (f"{share:.2f}x", f"≤ {PREFILL_SHARE:g}x"))


def starts(bench: Bench) -> Report:
    """E: loads with `compile=True`, in fresh processes: the first compiles, the second finds it done."""
    with tempfile.TemporaryDirectory() as cache:
        found = [in_fresh_process("compiled", str(bench.checkpoint), cache=Path(cache)) for _ in STARTS]
    report = Report("E")
    for name, start, most in zip(("first", "second"), found, STARTS, strict=True):
        shown = (f"{start['load']:.1f} s", f"{start['first_call']:.1f} s for the first call")
        report.bound(f"{name} load", shown, start["load"], most, (f"{start['load']:.1f} s", f"≤ {most} s"))
    return report


def chat_turns(bench: Bench) -> Report:
    """F: four turns of a chat over a long document; the time to the first token of turns 2 to 4."""
    sides = [
        talk_side(bench, load("causal", bench.checkpoint, reuse=True), "prefix reuse"),
        talk_side(bench, load("causal", bench.checkpoint), "no prefix reuse"),
    ]
    for side in sides:
        side.run()
    report = Report("F", runs=interleave(sides, bench.repeats))
    reused, plain = (side.name for side in sides)
    if not same_work(report.runs[reused], report.runs[plain]):
        report.findings.append(Finding("F", f"{reused} : {plain}", "", "", "not the same work"))
        return report
    report.sooner(reused, plain, 5, first=True)
    report.notes.append("each value is the sum of the times to the first token of turns 2, 3 and 4")
    return report


def talk_side(bench: Bench, generator: Any, name: str) -> Side:
    """Hold a chat over a document that is another one in every repeat; tokens are those read and written."""
    seeds = itertools.count()

    def run() -> Run:
        text = _data.document(bench.tokenizer, DOCUMENT_TOKENS, seed=next(seeds))
        chat: list[dict[str, str]] = []
        firsts: list[float] = []
        tokens: list[int] = []
        begun = time.perf_counter()
        for question in _data.TEXTS["about_document"]:
            asked = question if chat else f"{text}\n\n{question}"
            chat.append({"role": "user", "content": asked})
            turn = time.perf_counter()
            chunks: list[Any] = []
            for chunk in generator.stream(chat, max_new_tokens=ANSWER_TOKENS, suppress_tokens=bench.ends):
                if not chunks:
                    firsts.append(time.perf_counter() - turn)
                chunks.append(chunk)
            chat.append({"role": "assistant", "content": "".join(chunk.text for chunk in chunks)})
            result = chunks[-1].result
            tokens.append(result.prompt_tokens + result.generated_tokens)
        return Run(time.perf_counter() - begun, tuple(tokens), sum(firsts[1:]))

    return Side(name, run)


def editing(bench: Bench) -> Report:
    """G: a text again with one word changed, with `lookup=True` and without."""
    text, (old, new) = _data.TEXTS["to_edit"], _data.TEXTS["edit"]
    wanted = bench.tokenizer(text.replace(old, new))["input_ids"]
    prompt = editing_prompt(text, old, new)
    ids = bench.tokenizer(prompt)["input_ids"]
    forced = {"max_new_tokens": len(wanted), "suppress_tokens": bench.ends}
    plain = lmkit_side(bench.generator, [prompt], [ids], "plain greedy", **forced)
    looked = lmkit_side(bench.generator, [prompt], [ids], "lookup=True", lookup=True, **forced)
    written = [bench.generator(prompt, **forced, **more).token_ids for more in ({}, {"lookup": True})]
    report = Report("G", runs=interleave([looked, plain], bench.repeats))
    report.faster(looked.name, plain.name, 2)
    report.notes += [
        f"a prompt of {len(ids)} tokens; {copied(written[0], wanted):.0%} of what is written is the edited text",
        f"with lookup the first {agreeing(*written)} of {len(wanted)} tokens are the same, in {WIDE}",
    ]
    return report


def editing_prompt(text: str, old: str, new: str) -> str:
    """Ask in a way that a small model follows: it has seen the text with the change, and without.

    Told only which word to change, a model of this size copies the text and does not change it.
    """
    return f"Original text:\n{text}\n\nCorrected text:\n{text.replace(old, new)}\n\nCorrected text, once more:\n"


def copied(written: Sequence[int], wanted: Sequence[int]) -> float:
    """Return which share of the tokens written stand in the wanted text, in its order."""
    matcher = difflib.SequenceMatcher(None, list(written), list(wanted), autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / len(written)


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens before the first that differs."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)
