"""A card in one command: the tests marked `gpu`, what has to be measured there, and the engine's workloads; one table.

```sh
python benchmarks/gpu.py                    # everything; under ten minutes on a card of the usual kind
python benchmarks/gpu.py --only T1 T3       # some of what is measured
python benchmarks/gpu.py --device cpu       # to try this script where there is no card
```

`travel.py` lays what it needs into a folder that a machine without a network can take. Exits with 1 if a test fails or
something cannot be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _machine
import _models
import engine
from _context import DEVICE, Bench, device, load
from _harness import Finding, say, table
from _peers import Peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parent.parent
WORKLOADS = ("A", "B", "C", "D", "E", "F", "G", "H", "J", "L", "Q", "S", "T", "W")
STEPS = 48
SECONDS = 540
"""When no further workload is begun."""

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
WAYS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8, "seed": 1},
    "top-k, top-p": {**SAMPLED, "top_k": 50},
    "top-p, repetition penalty": {**SAMPLED, "repetition_penalty": 1.1},
    "logprobs=5": {"logprobs": 5},
}


def prompts(count: int, *, even: bool = False, words: int = 24) -> list[str]:
    """Return prompts of one length, or of several."""
    return [" ".join(["word"] * (words if even else words - number % 8)) for number in range(count)]


def step_ms(wrapper: Any, rows: Sequence[str], **options: Any) -> float:
    """Return what a step takes: what 48 more of them add to a call. The median of three."""

    def seconds(budget: int) -> float:
        begun = time.perf_counter()
        wrapper(rows, max_new_tokens=budget, min_new_tokens=budget, **options)
        return time.perf_counter() - begun

    seconds(4)
    found = [seconds(4 + STEPS) - seconds(4) for _ in range(3)]
    return 1000 * statistics.median(found) / STEPS


def versus(name: str, compared: str, mine: float, other: float, unit: str = "ms") -> Finding:
    """Write two numbers and their ratio."""
    return Finding(name, compared, f"{mine:.2f} {unit}", f"{other:.2f} {unit}", f"{mine / max(other, 1e-9):.2f}x")


@contextlib.contextmanager
def cudnn_too() -> Iterator[None]:
    """Let steps take cuDNN's attention, as torch would."""
    from importlib import import_module

    batches: Any = import_module("lmkit.engine.batches")
    plain = batches.one_token
    batches.one_token = lambda _device, do: do()
    try:
        yield
    finally:
        batches.one_token = plain


def cudnn(bench: Bench) -> Iterator[Finding]:
    """T1: steps without cuDNN's attention and with it, one row and 8 of several lengths."""
    for count in (1, 8):
        mine = step_ms(bench.generator, prompts(count))
        with cudnn_too():
            yield versus("T1", f"{count} rows, without cuDNN : with it", mine, step_ms(bench.generator, prompts(count)))


def threads(bench: Bench) -> Iterator[Finding]:
    """T2: 8 threads that call in turn: memory of the process and of the card, before and behind."""
    import torch

    def call() -> None:
        for _ in range(4):
            bench.generator(prompts(1)[0], max_new_tokens=16)

    call()
    before = _machine.resident_bytes(), torch.accelerator.memory_reserved() if device() != "cpu" else 0
    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    after = _machine.resident_bytes(), torch.accelerator.memory_reserved() if device() != "cpu" else 0
    for what, one, other in zip(("resident", "reserved on the card"), after, before, strict=True):
        if what == "resident" or device() != "cpu":
            yield versus("T2", f"{what}, behind 8 threads : before", one / 2**20, other / 2**20, "MiB")


def choice(bench: Bench) -> Iterator[Finding]:
    """T3: what options cost a step, of 1, 8 and 64 rows."""
    for count in (1, 8, 64):
        greedy = step_ms(bench.generator, prompts(count))
        for name, way in WAYS.items():
            yield versus(
                "T3", f"{count} rows, {name} : greedy", step_ms(bench.generator, prompts(count), **way), greedy
            )


def kernels(bench: Bench) -> Iterator[Finding]:
    """T4: 64 rows of one length and of several, of 500 tokens, and which kernels attend."""
    from torch.profiler import ProfilerActivity, profile

    rows = {name: prompts(64, even=name == "even", words=500) for name in ("even", "ragged")}
    ms = {name: step_ms(bench.generator, some) for name, some in rows.items()}
    yield versus("T4", "64 rows of 500 tokens, ragged : even", ms["ragged"], ms["even"])
    if device() == "cpu":
        return
    for name, some in rows.items():
        with profile(activities=[ProfilerActivity.CUDA]) as taken:
            bench.generator(some, max_new_tokens=4)
        words = ("flash", "fmha", "attention", "cudnn", "softmax")
        found = sorted({e.key[:60] for e in taken.key_averages() if any(word in e.key.lower() for word in words)})
        yield Finding("T4", f"kernels, {name}", "; ".join(found[:4]), "", "")


def compiled(bench: Bench) -> Iterator[Finding]:
    """T6: a compiled step against a plain one, of prompts whose lengths are no multiples of 16."""
    for count in (1, 8):
        rows = prompts(count, words=143)
        mine = step_ms(bench.lmkit("bfloat16, compiled"), rows)
        yield versus("T6", f"{count} rows, compiled : plain", mine, step_ms(bench.generator, rows))


def long_rows(bench: Bench) -> Iterator[Finding]:
    """T8: how much more the card reserves than is held, behind rows of 2,000 tokens."""
    import torch

    bench.generator(prompts(8, words=1000), max_new_tokens=512, min_new_tokens=512)
    if device() != "cpu":
        kept, held = torch.accelerator.memory_reserved(), torch.accelerator.memory_allocated()
        yield versus("T8", "reserved : allocated", kept / 2**20, held / 2**20, "MiB")


def precisions(bench: Bench) -> Iterator[Finding]:
    """T12, T13: precisions against bfloat16, of 1, 8 and 64 rows; and int4 that lmkit made on a CPU, saved."""
    plain = {count: step_ms(bench.generator, prompts(count)) for count in (1, 8, 64)}
    saved = bench.folder / "int4-saved"
    if not (saved / "config.json").is_file():
        import lmkit

        with lmkit.load("causal", bench.checkpoint, "int4", "cpu") as generator:
            generator.model.save_pretrained(saved)
            generator.tokenizer.save_pretrained(saved)
    for word in ("int8", "int4", "nf4", "int4, saved by lmkit"):
        folder, precision = (saved, "auto") if "saved" in word else (bench.checkpoint, word)
        with load("causal", folder, precision) as generator:
            for count, other in plain.items():
                name = "T13" if "saved" in word else "T12"
                yield versus(name, f"{count} rows, {word} : bfloat16", step_ms(generator, prompts(count)), other)


def passes(bench: Bench) -> Iterator[Finding]:
    """T14: a long prompt in passes of 2,048 tokens and of 8,192."""
    from lmkit.engine import scheduler

    (text,), plain, found = prompts(1, words=6000), scheduler.PROMPT_TOKENS, {}
    try:
        for tokens in (8192, 2048):
            scheduler.PROMPT_TOKENS = tokens
            bench.generator(text, max_new_tokens=1)
            begun = time.perf_counter()
            bench.generator(text, max_new_tokens=1)
            found[tokens] = 1000 * (time.perf_counter() - begun)
    finally:
        scheduler.PROMPT_TOKENS = plain
    yield versus("T14", "a prompt of 6,000 tokens, passes of 8,192 : 2,048", found[8192], found[2048])


def beams(bench: Bench) -> Iterator[Finding]:
    """T15: 64 sources with 5 beams against greedy answers, and the most memory that the card held."""
    import torch

    with load("seq2seq", _models.marian(bench.folder)) as translator:
        rows, told = prompts(64), {"max_new_tokens": 32, "min_new_tokens": 32}
        seconds = []
        for width in ({"num_beams": 5}, {}):
            translator(rows, **told, **width)
            begun = time.perf_counter()
            translator(rows, **told, **width)
            seconds.append(time.perf_counter() - begun)
        yield versus("T15", "64 sources, 5 beams : greedy", seconds[0], seconds[1], "s")
        if device() == "cuda":
            yield Finding("T15", "most memory", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB", "", "")


MEASURED: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "T1": cudnn,
    "T2": threads,
    "T3": choice,
    "T4": kernels,
    "T6": compiled,
    "T8": long_rows,
    "T12": precisions,
    "T14": passes,
    "T15": beams,
}
"""The others are tests, in tests/gpu."""


def measured(name: str, bench: Bench) -> list[Finding]:
    """Measure; what fails is a line of the table."""
    say(str(MEASURED[name].__doc__))
    found: list[Finding] = []
    try:
        found.extend(MEASURED[name](bench))
    except Exception as error:  # noqa: BLE001 - the others are still worth measuring
        traceback.print_exc()
        found.append(Finding(name, "failed", "", "", f"{type(error).__name__}: {error}".splitlines()[0], met=False))
    return found


def tested() -> Finding:
    """Run the tests that are marked; one that is skipped shows nothing."""
    import pytest

    os.chdir(ROOT)
    counted = Counted()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"], plugins=[counted])
    told = ", ".join(f"{number} {what}" for what, number in sorted(counted.outcomes.items())) or "none was run"
    return Finding("tests", "marked gpu", told, "", "", met=int(status) == 0 and set(counted.outcomes) == {"passed"})


class Counted:
    """Counts how tests end, for pytest."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test, or what it failed in before or behind it."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description="Test and measure lmkit on a card.")
    parser.add_argument("--device", default="cuda", help="where models are put (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help=f"of tests {' '.join((*MEASURED, *WORKLOADS))}")
    parser.add_argument("--checkpoints", type=Path, default=os.environ.get("LMKIT_BENCH_CHECKPOINTS"))
    given = parser.parse_args()
    os.environ[DEVICE] = given.device
    begun, wanted = time.perf_counter(), given.only or ["tests", *MEASURED, *WORKLOADS]
    facts = _machine.facts()
    if given.device == "cuda":
        import torch

        facts["card"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    with tempfile.TemporaryDirectory() as spare, Peers(None) as peers:
        bench = Bench(Path(given.checkpoints or spare), 1, peers)
        found = [tested()] if "tests" in wanted else []
        for name in wanted:
            if name in MEASURED:
                found += measured(name, bench)
            elif name in WORKLOADS and (given.only or time.perf_counter() - begun < SECONDS):
                # Targets are those of a CPU.
                found += [Finding(*line[:5]) for line in map(_columns, engine.measure(name, bench).findings)]
    print("\n".join([table(found), "", *(f"- {name}: {value}" for name, value in facts.items())]))
    return int(any(finding.met is False for finding in found))


def _columns(finding: Finding) -> tuple[str, str, str, str, str]:
    return finding.workload, finding.compared, finding.lmkit, finding.other, finding.value


if __name__ == "__main__":
    sys.exit(main())
