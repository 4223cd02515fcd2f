"""Hostile checkpoints, planned and loaded: `nox -s fuzz -- --plans 2000 --loads 100`.

First the seeds, `seeds.jsonl`: cases that were found once. Then cases drawn by hypothesis, in processes of their own,
which are ended when a case hangs in native code. What is wrong is printed with the shortest case that shows it, as a
line for `seeds.jsonl`; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 120
"""Seconds after which a process that says nothing is ended: a case has hung in native code."""


def work(plans: int, loads: int, seed: int, *, seeds: bool) -> None:
    """Try cases, and print a line of JSON for each thing that is wrong, and for what was done."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "helpers")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    import cases
    import hypothesis
    import oracles

    scratch = Path(tempfile.mkdtemp(prefix="lmkit-fuzz-"))
    for name in cases.TASKS:  # and whatever is set up once
        cases.base(name)
        oracles.loaded({"base": name, "edits": []}, cases.base(name))
    oracles.watch(scratch / "caches", Path.home() / ".cache")
    numbers = itertools.count()

    def tried(case: cases.Case, judge: Any, *, drawn: bool = True) -> list[str]:
        _tell(tries=case)
        folder = cases.write(case, scratch / str(next(numbers)))
        wrong, ended = judge(case, folder)
        shutil.rmtree(folder)
        _tell(ended=f"{judge.__name__}: {ended}", drawn=drawn)
        return wrong

    for line in (HERE / "seeds.jsonl").read_text(encoding="utf-8").splitlines() if seeds else ():
        for judge in (oracles.planned, oracles.loaded):
            if wrong := tried(case := json.loads(line), judge, drawn=False):
                _tell(wrong=wrong, case=case)
    for judge, count in ((oracles.planned, plans), (oracles.loaded, loads)):
        for first in range(0, count, 500):
            check = functools.partial(tried, judge=judge)
            _drawn(hypothesis, cases.cases(), check, min(500, count - first), seed + first)


def _tell(**what: Any) -> None:
    print(json.dumps({"fuzz": 1, **what}), flush=True)  # read by `Worker`


def _drawn(hypothesis: Any, strategy: Any, tried: Any, examples: int, seed: int) -> None:
    """Try drawn cases; print the shortest one that is wrong."""
    last: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def property_(case: Any) -> None:
        if wrong := tried(case):
            last[:] = [{"wrong": wrong, "case": case}]
            raise AssertionError(wrong[0][:60])

    try:
        property_()
    except Exception:  # noqa: BLE001 - it was raised above, once or in a group
        _tell(**last[0])


class Worker:
    """A process that tries its share of the cases, and its successors where a case ends it.

    Attributes:
        ends: How the cases ended.
        wrong: How many things were wrong.
    """

    def __init__(self, plans: int, loads: int, seed: int, *, seeds: bool, until: float) -> None:
        """Take a share, which ends at a time of the clock `time.monotonic` as well."""
        self._left = {"planned": plans, "loaded": loads}
        self._until = until
        self._seed, self._seeds = seed, seeds
        self.ends: collections.Counter[str] = collections.Counter()
        self.wrong = 0

    def run(self) -> None:
        """Try all cases."""
        while self._seeds or any(count > 0 for count in self._left.values()):
            share = [str(max(count, 0)) for count in self._left.values()]
            command = [sys.executable, str(HERE), *share, str(self._seed), "--seeds" if self._seeds else "--drawn"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                last = self._read(process)
                if process.wait() == 0 or time.monotonic() > self._until:
                    return
                self._say([f"a process ended with {process.returncode}, or hung"], last)
            self._seed, self._seeds = self._seed + 1000, False

    def _read(self, process: subprocess.Popen[bytes]) -> Any:
        """Read what a process tells, and end it if it tells nothing more; return the case it was at."""
        case, rest = None, b""
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        while True:
            late = time.monotonic() > self._until
            if late or not select.select([process.stdout], [], [], PATIENCE)[0]:
                process.kill()
                return case
            if not (some := os.read(process.stdout.fileno(), 2**16)):
                return case
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                told: dict[str, Any] = json.loads(line) if line.startswith(b'{"fuzz"') else {}
                case = told.get("tries", case)
                if "ended" in told:
                    self.ends[told["ended"]] += 1
                    self._left[told["ended"].split(":")[0]] -= told["drawn"]
                if "wrong" in told:
                    self._say(told["wrong"], told["case"])

    def _say(self, wrong: list[str], case: Any) -> None:
        self.wrong += 1
        print(f"WRONG {wrong}\n{json.dumps(case):.2000}", flush=True)


def main() -> int:
    """Run the processes, a thread for each; return how many things were wrong."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--plans", type=int, default=2000)
    parser.add_argument("--loads", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no more cases are tried")
    options = parser.parse_args()
    started = time.perf_counter()
    share = options.plans // options.workers, options.loads // options.workers
    until = time.monotonic() + 60 * options.minutes
    seeds = [10**6 * (options.seed + n) for n in range(options.workers)]
    workers = [Worker(*share, seed, seeds=n == 0, until=until) for n, seed in enumerate(seeds)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = sum((worker.ends for worker in workers), collections.Counter())
    wrong = sum(worker.wrong for worker in workers)
    for end, count in sorted(ends.items()):
        print(f"{count:8,}  {end}")
    print(f"{sum(ends.values()):8,}  cases in {time.perf_counter() - started:.0f} s, {wrong} of them wrong")
    return wrong


if __name__ == "__main__":
    if sys.argv[-1] in ("--seeds", "--drawn"):
        work(*map(int, sys.argv[1:4]), seeds=sys.argv[-1] == "--seeds")
    else:
        sys.exit(1 if main() else 0)
