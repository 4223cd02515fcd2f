"""What is measured, how repeats take turns, and how two sides are compared."""

from __future__ import annotations

import gc
import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from _context import tried

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SAME_WORK = 0.02
"""Sides whose totals of tokens differ by more than this share did not do the same work."""

NEAR_BEST = 0.95
"""Rivals slower than this share of the fastest in their trial are left out of the repeats."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one repeat of one side took and gave.

    Attributes:
        seconds: On the clock.
        tokens: How many new tokens each row got, in the order of the prompts; padding does not count.
        first_seconds: To the first token, where that was measured.
    """

    seconds: float
    tokens: tuple[int, ...]
    first_seconds: float | None = None

    @property
    def total(self) -> int:
        """New tokens of all rows."""
        return sum(self.tokens)

    @property
    def speed(self) -> float:
        """New tokens per second."""
        return self.total / self.seconds


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that do the same work."""

    name: str
    run: Callable[[], Run]


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the table.

    Attributes:
        workload: The letter of the workload.
        compared: What stands against what.
        lmkit: What lmkit reached.
        other: What the other side reached.
        value: The ratio, or the share, that the target is about; None if the sides did not do the same work.
        target: The bound, as the issue words it.
        met: Whether the value reaches it; None where there is no target, or no value.
    """

    workload: str
    compared: str
    lmkit: str
    other: str
    value: str
    target: str = ""
    met: bool | None = None


@dataclass(slots=True)
class Report:
    """What a workload found.

    Attributes:
        workload: Its letter.
        findings: Its lines of the table.
        notes: What the table has no place for.
        runs: Every repeat of every side.
    """

    workload: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def faster(
        self, ours: str, other: str, target: float | None = None, *, rows: Sequence[int] | None = None, note: str = ""
    ) -> None:
        """Add how many times as fast one side was as another, in tokens per second.

        Args:
            ours: The name of lmkit's side.
            other: The name of the side it is compared with.
            target: How many times at least.
            rows: The rows of ours that the other side worked on; all by default.
            note: What to say of the other side.
        """
        mine, theirs = self.runs[ours], self.runs[other]
        speeds = [statistics.median(run.speed for run in runs) for runs in (mine, theirs)]
        totals = [
            statistics.median(part(run, rows if runs is mine else None) for run in runs) for runs in (mine, theirs)
        ]
        shown = [f"{speed:.0f} tokens/s, {total:.0f} tokens" for speed, total in zip(speeds, totals, strict=True)]
        compared = f"{ours} : {other}{f' ({note})' if note else ''}"
        if abs(totals[0] - totals[1]) > SAME_WORK * totals[1]:
            ours, other = shown
            self.findings.append(Finding(self.workload, compared, ours, other, "not the same work"))
            return
        self._ratio(compared, shown, speeds[0] / speeds[1], spread(mine, theirs), target)

    def each(
        self, ways: Mapping[str, float | None], other: str, *, rows: Sequence[int] | None = None, note: str = ""
    ) -> None:
        """Add for each of lmkit's ways how many times as fast it was as another side; None is a way without target.

        One that is not tried on this device is left out.
        """
        for way, target in ways.items():
            if tried(way):
                self.faster(f"lmkit {way}", other, target, rows=rows, note=note)

    def share(self, ours: str, other: str, target: float) -> None:
        """Add how many times as fast one side was as another that did other work."""
        speeds = [statistics.median(run.speed for run in self.runs[name]) for name in (ours, other)]
        shown = [f"{speed:.0f} tokens/s" for speed in speeds]
        self._ratio(f"{ours} : {other}", shown, speeds[0] / speeds[1], "", target)

    def sooner(self, ours: str, other: str, target: float | None = None, *, first: bool = False) -> None:
        """Add how many times as long another side took, to the end or to the first token."""
        mine, theirs = ([run.first_seconds if first else run.seconds for run in self.runs[n]] for n in (ours, other))
        medians = [statistics.median(value for value in values if value is not None) for values in (mine, theirs)]
        shown = [f"{value * 1000:.0f} ms" for value in medians]
        self._ratio(f"{ours} : {other}", shown, medians[1] / medians[0], "", target)

    def bound(self, compared: str, shown: tuple[str, str], value: float, target: float, words: tuple[str, str]) -> None:
        """Add a value that may be at most `target`, each as worded."""
        self.findings.append(Finding(self.workload, compared, *shown, words[0], words[1], value <= target))

    def _ratio(self, compared: str, shown: Sequence[str], ratio: float, around: str, target: float | None) -> None:
        words = "" if target is None else f"≥ {target:g}x"
        met = None if target is None else ratio >= target
        lmkit, other = shown
        self.findings.append(Finding(self.workload, compared, lmkit, other, f"{ratio:.2f}x{around}", words, met))


def part(run: Run, rows: Sequence[int] | None) -> int:
    """Count the new tokens of some rows."""
    return run.total if rows is None else sum(run.tokens[row] for row in rows)


def same_work(ours: Sequence[Run], theirs: Sequence[Run]) -> bool:
    """Say whether two sides' median totals of tokens are close enough."""
    mine, other = (statistics.median(run.total for run in runs) for runs in (ours, theirs))
    return abs(mine - other) <= SAME_WORK * other


def spread(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Say between what the ratios of single repeats lie."""
    ratios = [mine.speed / other.speed for mine, other in zip(ours, theirs, strict=False)]
    return f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""


def interleave(sides: Sequence[Side], repeats: int) -> dict[str, list[Run]]:
    """Run every side once, then every side again, so that what slows the machine slows all of them."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for repeat in range(1, repeats + 1):
        for side in sides:
            gc.collect()
            run = side.run()
            runs[side.name].append(run)
            say(f"  {repeat}/{repeats} {side.name}: {run.seconds:.2f} s, {run.total} tokens, {run.speed:.0f} tokens/s")
    return runs


def contenders(sides: Sequence[Side]) -> list[Side]:
    """Try each of a peer's settings once and keep those near the best, the first of all included."""
    speeds: dict[str, float] = {}
    for side in sides:
        run = side.run()
        speeds[side.name] = run.speed
        say(f"  trial {side.name}: {run.seconds:.2f} s, {run.speed:.0f} tokens/s")
    return [side for side in sides if speeds[side.name] >= NEAR_BEST * max(speeds.values())]


def best(sides: Sequence[Side], runs: Mapping[str, Sequence[Run]]) -> str:
    """Name the side with the highest median speed."""
    return max((side.name for side in sides), key=lambda name: statistics.median(run.speed for run in runs[name]))


def table(findings: Sequence[Finding]) -> str:
    """Write the findings as a Markdown table."""
    head = ("", "compared", "lmkit", "the other", "lmkit is", "target", "met")
    lines = [head, tuple("---" for _ in head)]
    for finding in findings:
        met = {True: "yes", False: "**no**", None: ""}[finding.met]
        lines.append(
            (finding.workload, finding.compared, finding.lmkit, finding.other, finding.value, finding.target, met)
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(message: str) -> None:
    """Tell who waits how far it is; what is measured goes to stdout at the end."""
    print(message, file=sys.stderr, flush=True)
