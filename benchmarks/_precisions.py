"""Workloads of precision: K and P, quality; L, one stream; M, 32 rows; N, loading; O, a billion parameters."""

from __future__ import annotations

import copy
import functools
import gc
import math
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import _billion
import _data
import _models
from _context import WIDE, load
from _harness import Finding, Report, Run, Side, interleave, say
from _sides import decoding, generate_side, lmkit_side, stream_side
from _streams import NEW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _context import Bench

TEXT_TOKENS, WINDOW = 24 * 1024, 1024
"""How many tokens of text quality is measured on, in windows of this many."""

ROWS, ROW_TOKENS = 32, 48
OWN = ("int8", "int4")
STREAMS: dict[str, float | None] = dict.fromkeys(
    f"{word}{how}" for word in (WIDE, *OWN) for how in ("", ", kernels", ", compiled")
)
BEGINNING = "Once upon a time, there was a"


GRID = (
    "these weights were in 4 bits before (Q4_1: a scale and an offset for 32 weights), which is int4's own grid: int4 "
    "loses next to nothing on them, as it would on no other model"
)


def perplexity(bench: Bench) -> Report:
    """K: perplexity of every precision on a fixed English text."""
    tokens = bench.tokenizer(_data.documentation())["input_ids"][:TEXT_TOKENS]
    found: dict[str, float] = {}
    report = Report("K")
    for word in ("float32", "bfloat16", "int8", "int4", "nf4"):
        generator = load("causal", bench.checkpoint, word)
        found[word] = _perplexity(generator.model, tokens)
        say(f"  {word}: {found[word]:.4f}, {generator.plan.weights_bytes / 1e6:.1f} MB")
        report.findings.append(
            Finding(
                "K", f"perplexity, {word}", f"{found[word]:.3f}", "", f"{generator.plan.weights_bytes / 1e6:.1f} MB"
            )
        )
        generator.close()
    for word, other, most in (("int8", "bfloat16", 1.01), ("int4", "nf4", 1.0)):
        share = found[word] / found[other]
        shown = (f"{found[word]:.3f}", f"{found[other]:.3f}")
        report.bound(f"perplexity, {word} : {other}", shown, share, most, (f"{share:.4f}x", f"≤ {most:g}x"))
    report.notes += [
        f"{len(tokens):,} tokens of the Python documentation (pydoc_data.topics), in windows of {WINDOW}",
        GRID,
    ]
    return report


def grids(bench: Bench) -> Report:
    """P: perplexity of other ways to round to 4 bits, the linear layers alone, in bfloat16."""
    import torch

    tokens = bench.tokenizer(_data.documentation())["input_ids"][:TEXT_TOKENS]
    report = Report("P")
    for group, offset in ((32, True), (64, True), (32, False)):
        model: Any = copy.deepcopy(bench.model)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = _rounded(module.weight.data.float(), group, offset=offset).bfloat16()
        way = f"groups of {group}, {'a scale and an offset' if offset else 'a scale alone'}"
        report.findings.append(Finding("P", f"perplexity, {way}", f"{_perplexity(model, tokens):.3f}", "", ""))
    report.notes.append(GRID)
    return report


def _rounded(weight: Any, group: int, *, offset: bool) -> Any:
    """Round groups of a row's weights to 16 levels, evenly between the least and the greatest, or around 0."""
    import torch

    groups = weight.view(len(weight), -1, group)
    if offset:
        least, greatest = groups.aminmax(dim=-1, keepdim=True)
        scale = ((greatest - least) / 15).clamp(min=1e-8)
        rounded = ((groups - least) / scale).round() * scale + least
    else:
        farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # keeps its sign: it becomes level -8
        scale = torch.where(farthest == 0, 1e-8, farthest / -8)
        rounded = (groups / scale).round().clamp(-8, 7) * scale
    return rounded.view_as(weight)


def _perplexity(model: Any, tokens: list[int]) -> float:
    """Return the exponential of the mean negative log-probability of each token but the first of its window."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in torch.tensor(tokens).view(-1, WINDOW):
            scores = model(row[None]).logits[0, :-1].float().log_softmax(-1)
            total -= float(scores.gather(1, row[1:, None]).sum())
            count += len(row) - 1
    return math.exp(total / count)


def one_stream(bench: Bench) -> Report:
    """L: one stream of 128 tokens in every precision."""
    prompt = bench.tokenizer(BEGINNING)["input_ids"]
    forced = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": bench.ends}
    sides = [
        decoding(stream_side(functools.partial(bench.lmkit(way).stream, BEGINNING, **forced), f"lmkit {way}"))
        for way in ("nf4", *STREAMS)
    ]
    plain = generate_side(bench.model, prompt, NEW_TOKENS, suppress_tokens=bench.ends)
    sides.append(decoding(plain, f"generate {WIDE}"))
    peer = bench.peers.get("llama", gguf=str(_models.smollm2_gguf()), threads=os.cpu_count() or 1)
    if peer is not None:
        sides.append(decoding(peer.side([prompt], [NEW_TOKENS], "llama.cpp Q4_1")))
    for side in sides:
        side.run()
    report = Report("L", runs=interleave(sides, bench.repeats))
    report.each(STREAMS | {"int8, kernels": 2.0, "int4, kernels": 2.3}, f"lmkit {WIDE}")
    report.each(STREAMS, f"generate {WIDE}")
    report.each({"int4": None}, "lmkit nf4", note="bitsandbytes")
    if peer is not None:
        report.each({"int4, kernels": None, "int4, compiled": 1.1}, "llama.cpp Q4_1")
    report.notes.append("the speed of what comes behind the first token, so without the prompt's time")
    return report


def rows(bench: Bench) -> Report:
    """M: 32 rows of 48 tokens in every precision."""
    chats = _data.steady_chats()[:ROWS]
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    forced = {"max_new_tokens": ROW_TOKENS, "suppress_tokens": bench.ends}
    ways = STREAMS | {"int4, kernels": 1.3}
    sides = [lmkit_side(bench.lmkit(way), chats, prompts, f"lmkit {way}", **forced) for way in ways]
    for side in sides:
        side.run()
    report = Report("M", runs=interleave(sides, bench.repeats))
    report.each(ways, f"lmkit {WIDE}")
    return report


def loading(bench: Bench) -> Report:
    """N: the time to load, with everything imported and the files in the system's cache."""
    saved = _saved_int4(bench)
    ways: dict[str, Callable[[], object]] = {
        f"load {WIDE}": lambda: load("causal", bench.checkpoint),
        f"bare {WIDE}": lambda: _bare(bench.checkpoint),
        "load int4": lambda: load("causal", bench.checkpoint, "int4"),
        "load int4, saved": lambda: load("causal", saved, "auto"),
    }
    for way in ways.values():
        way()
    runs = interleave([_timed(name, way) for name, way in ways.items()], max(bench.repeats, 5))
    report = Report("N", runs=runs)
    seconds = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    ours, bare = seconds[f"load {WIDE}"], seconds[f"bare {WIDE}"]
    share = ours / bare
    shown = (f"{ours:.2f} s", f"{bare:.2f} s")
    report.bound("load : safetensors' load_file and the model on meta", shown, share, 1.3, (f"{share:.2f}x", "≤ 1.3x"))
    for name, most in (("load int4", 4.0), ("load int4, saved", 1.0)):
        report.bound(f"{name}, from {'4' if 'saved' in name else '16'} bits", (f"{seconds[name]:.2f} s", ""),
                     seconds[name], most, (f"{seconds[name]:.2f} s", f"≤ {most:g} s"))  # fmt: skip
    return report


def _timed(name: str, work: Callable[[], object]) -> Side:
    def run() -> Run:
        gc.collect()
        begun = time.perf_counter()
        held = work()
        seconds = time.perf_counter() - begun
        del held
        return Run(seconds, (1,))

    return Side(name, run)


def _bare(folder: Path) -> object:
    """Read the weights and build the model, without bringing them together or reading a tokenizer."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = load_file(folder / "model.safetensors")
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    touched = sum(int(tensor.view(torch.uint8).flatten()[::4096].sum()) for tensor in weights.values())
    return weights, model, touched


def _saved_int4(bench: Bench) -> Path:
    folder = bench.folder / "smollm2-135m-instruct-int4"
    if not (folder / "tokenizer_config.json").is_file():
        with load("causal", bench.checkpoint, "int4") as generator:
            generator.model.save_pretrained(folder)
            generator.tokenizer.save_pretrained(folder)
    return folder


def billion(bench: Bench) -> Report:
    """O: a Llama of a billion random parameters: bytes read for a token, against what the machine can read."""
    folder = _billion.checkpoint(bench.folder, bench.checkpoint)
    prompt = list(range(100, 116))
    forced: dict[str, Any] = {"max_new_tokens": 24, "suppress_tokens": bench.ends}
    speed = _billion.read_bytes_per_second()
    ways = (WIDE, "int8, kernels", "int4, kernels", "int4, compiled")
    loaded = {f"lmkit {way}": bench.lmkit(way, folder=folder) for way in ways}
    text = bench.tokenizer.decode(prompt)
    ids = bench.tokenizer(text)["input_ids"]
    sides = [decoding(stream_side(functools.partial(one.stream, text, **forced), name)) for name, one in loaded.items()]
    bench.peers.only(None)  # it may be up with another file
    gguf = _billion.gguf_file(bench.folder, _models.smollm2_gguf())
    peer = bench.peers.get("llama", gguf=str(gguf), threads=os.cpu_count() or 1)
    if peer is not None:
        sides.append(decoding(peer.side([ids], [forced["max_new_tokens"]], "llama.cpp Q4_0")))
    for side in sides:
        side.run()
    report = Report("O", runs=interleave(sides, bench.repeats))
    for name, one in loaded.items():
        taken = statistics.median(run.seconds / run.total for run in report.runs[name])
        # Of the embedding one row is read; tied, all of it is read as the output layer.
        share = one.plan.weights_bytes / taken / speed
        met = share >= 0.7 if "int" in name else None  # noqa: PLR2004 - the issue's number
        report.findings.append(
            Finding("O", f"{name}: weights read : what the machine reads", f"{1 / taken:.1f} tokens/s",
                    f"{speed / 1e9:.1f} GB/s", f"{share:.0%}", "≥ 70%" if met is not None else "", met)
        )  # fmt: skip
    report.each(dict.fromkeys(ways[1:]), f"lmkit {WIDE}")
    if peer is not None:
        report.each({"int4, kernels": None, "int4, compiled": 1.0}, "llama.cpp Q4_0")
    return report
