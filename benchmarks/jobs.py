"""What jobs cost: a record in the journal, a journal of a million rows read again, and chats beside `map`.

`python benchmarks/jobs.py [MODEL]`; the chats need a model with a chat template.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lmkit
from lmkit.jobs import journal as journals
from lmkit.jobs.journal import Journal
from lmkit.testing import FakeGenerator

ROWS, JOB_ROWS, CHATS, ROUNDS = 1_000_000, 100_000, 64, 5


def mib() -> float:
    """Return the most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def journal(folder: Path) -> None:
    """Append records of 100 bytes without a single sync, and read them again."""
    columns = json.dumps({"answer": "twenty-two " * 5, "finish_reason": "eos", "error": None}).encode()
    journals.SYNC_SECONDS = float("inf")
    with Journal(folder) as written:
        written.begin({})
        started = time.perf_counter()
        for row in range(ROWS):
            written.append(row, row, columns, failed=False)
        print(f"journal: {(time.perf_counter() - started) / ROWS * 1e6:.1f} microseconds a row")
    before, started = mib(), time.perf_counter()
    with Journal(folder) as read:
        assert read.count == ROWS  # noqa: S101
        seconds = time.perf_counter() - started
        print(f"resume of {ROWS:,} rows: {seconds:.1f} s, {mib() - before:.0f} MiB more")


def whole_job(folder: Path) -> None:
    """Run a job that a fake answers, and run it again when nothing is left to do."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    with source.open("w") as rows:
        rows.writelines(f'{{"id": {row}, "text": "{row % 1000}"}}\n' for row in range(JOB_ROWS))
    fake = FakeGenerator(lambda prompt, _options: prompt)
    fake._job = _forgetting(fake)  # type: ignore[method-assign]  # noqa: SLF001 - it notes each call
    for run in ("first", "again"):
        before = mib()
        print(f"{run}: {fake.run_job(source, output, progress=False)}, {mib() - before:.0f} MiB more")


def _forgetting(fake: Any) -> Any:
    job = fake._job  # noqa: SLF001

    def prepared(*given: Any) -> Any:
        fake.calls.clear()
        return job(*given)

    return prepared


def chats(folder: Path, model: str) -> None:
    """Answer chats by a job and by `map`, in turn."""
    rows = [[{"role": "user", "content": f"Say something about the number {n}."}] for n in range(CHATS)]
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options: Any = {"max_new_tokens": 24, "progress": False}
    ratios = []
    with lmkit.load("causal", model) as generator:
        for number in range(ROUNDS + 1):
            started = time.process_time()  # of all cores: what else runs here counts less
            list(generator.map(rows, **options))
            middle = time.process_time()
            generator.run_job(source, folder / "chats.out.jsonl", verb="chat", restart=True, **options)
            ended = time.process_time()
            if number:  # the first warms up
                ratios.append((ended - middle) / (middle - started))
                print(f"map {middle - started:.2f} s of processors, job {ended - middle:.2f} s", flush=True)
    print(f"{CHATS} chats: the job takes {statistics.median(ratios):.3f} of map's time in the median")


def main() -> None:
    """Print all figures."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        journal(folder / "journal")
        whole_job(folder)
        if sys.argv[1:]:
            chats(folder, sys.argv[1])


if __name__ == "__main__":
    main()
