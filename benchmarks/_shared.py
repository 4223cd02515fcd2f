"""Workloads that look at the engine: C, threads that share it; H, its own time; I, its memory."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _data
from _context import in_fresh_process, load
from _harness import Finding, Report, Run, Side, interleave, say
from _sides import lmkit_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _context import Bench

THREADS, CALLS, NEW_TOKENS = 16, 8, 32
ROWS, STEPS = 32, 64
OVERHEAD_SHARE = 0.03
UP_TO = 96
MIB = 1024**2
ALLOWED_MIB = 400


def threads(bench: Bench) -> Report:
    """C: 16 threads of 8 calls each, against the same calls one after the other."""
    chats = _data.chats(bench.tokenizer, THREADS * CALLS)
    options = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": bench.ends}

    def side(name: str, run: Callable[[Any, Sequence[Any], Any], list[Any]]) -> Side:
        def timed() -> Run:
            begun = time.perf_counter()
            results = run(bench.generator, chats, options)
            return Run(time.perf_counter() - begun, tuple(result.generated_tokens for result in results))

        return Side(name, timed)

    bench.generator(chats[:4], **options)
    sides = [side("16 threads", from_threads), side("one after the other", in_turn)]
    report = Report("C", runs=interleave(sides, bench.repeats))
    report.faster(sides[0].name, sides[1].name, 5)
    say("  the same in float32, to compare the results")
    exact = load("causal", bench.checkpoint, "float32")
    pairs = zip(from_threads(exact, chats, options), in_turn(exact, chats, options), strict=True)
    equal = sum(one.token_ids == other.token_ids and one.text == other.text for one, other in pairs)
    exact.close()
    shown = (f"{equal} equal", f"{len(chats)} calls")
    compared = "results from threads : serial, float32"
    report.findings.append(Finding("C", compared, *shown, f"{equal / len(chats):.0%}", "all", equal == len(chats)))
    return report


def in_turn(generator: Any, chats: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Make the calls one after the other."""
    return [generator(chat, **options) for chat in chats]


def from_threads(generator: Any, chats: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Make the calls from threads that begin together, each its own calls one after the other."""
    together = threading.Barrier(THREADS)

    def own(number: int) -> list[Any]:
        together.wait()
        return in_turn(generator, chats[number * CALLS : (number + 1) * CALLS], options)

    with ThreadPoolExecutor(THREADS) as pool:
        return [result for results in pool.map(own, range(THREADS)) for result in results]


@dataclass(slots=True)
class Clock:
    """Adds up the time that is spent in functions, calls of theirs to one another counted once."""

    seconds: float = 0.0
    calls: int = 0
    _inside: bool = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added up."""
        import functools

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside = True
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        return timed


@contextlib.contextmanager
def clocked(owner: type, names: Sequence[str], clock: Clock) -> Iterator[None]:
    """Add up the time in methods of a class."""
    kept = {name: vars(owner)[name] for name in names}
    for name, function in kept.items():
        setattr(owner, name, clock.wrap(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(owner, name, function)


def host_overhead(bench: Bench) -> Report:
    """H: what a step of 32 rows takes outside of the forward pass and of choosing tokens."""
    from lmkit.engine.choice import Chooser
    from lmkit.text.codec import Codec

    chats = _data.steady_chats()[:ROWS]
    prompts = [_data.encode(bench.tokenizer, chat) for chat in chats]
    forward, choice, text = Clock(), Clock(), Clock()
    codec = [name for name, value in vars(Codec).items() if callable(value) and not name.startswith("_")]
    with (
        clocked(type(bench.model), ["forward"], forward),
        clocked(Chooser, ["choose"], choice),
        clocked(Codec, codec, text),
    ):
        # Loaded within, so that an engine that keeps the method keeps the one with the clock.
        generator = load("causal", bench.checkpoint)
        side = lmkit_side(generator, chats, prompts, max_new_tokens=STEPS, suppress_tokens=bench.ends)
        side.run()
        for clock in (forward, choice, text):
            clock.seconds, clock.calls = 0.0, 0
        report = Report("H", runs=interleave([side], bench.repeats))
        generator.close()
    whole = sum(run.seconds for run in report.runs[side.name])
    if not forward.calls:
        report.findings.append(Finding("H", "host overhead", "", "", "the forward passes are not seen"))
        return report
    share = (whole - forward.seconds - choice.seconds) / whole
    per_step = 1000 / (bench.repeats * STEPS)
    shown = (f"{(whole - forward.seconds - choice.seconds) * per_step:.2f} ms", f"{whole * per_step:.2f} ms")
    report.bound("host overhead : step", shown, share, OVERHEAD_SHARE, (f"{share:.1%}", f"< {OVERHEAD_SHARE:.0%}"))
    report.notes.append(
        f"of a step of {ROWS} rows: forward {forward.seconds / whole:.1%}, choosing {choice.seconds / whole:.1%}; "
        f"tokenization, which is in the overhead, {text.seconds / whole:.1%}; "
        f"{forward.calls / bench.repeats:.0f} forward passes a call"
    )
    return report


def memory(bench: Bench) -> Report:
    """I: the peak resident size of a process that loads the model and runs A."""
    found = in_fresh_process("memory", str(bench.checkpoint), str(UP_TO))
    alone = in_fresh_process("imports")
    needed = found["weights"] + found["keys_values"] + alone["resident"]
    allowed = needed + ALLOWED_MIB * MIB
    peak = max(found["max_rss"], found["peak"])
    words = (f"{(peak - needed) / MIB:.0f} MiB more", f"≤ {ALLOWED_MIB} MiB more")
    report = Report("I")
    report.bound(
        "peak resident size : weights, keys and values, and what importing torch and transformers takes",
        (f"{peak / MIB:.0f} MiB", f"{needed / MIB:.0f} MiB"),
        peak,
        allowed,
        words,
    )
    report.notes.append(
        f"weights {found['weights'] / MIB:.0f} MiB ({found['held'] / MIB:.0f} MiB as lmkit holds them); "
        f"keys and values of all rows at their ends "
        f"{found['keys_values'] / MIB:.0f} MiB; ru_maxrss {found['max_rss'] / MIB:.0f} MiB, "
        f"VmHWM {found['peak'] / MIB:.0f} MiB; {found['loaded'] / MIB:.0f} MiB resident after loading; "
        f"{alone['resident'] / MIB:.0f} MiB after importing torch and transformers alone; {found['tokens']} tokens"
    )
    return report
