"""Jobs that are killed, again and again, until they are done: what is left is compared with an unbroken run.

`python tests/helpers/job_kills.py 200` kills at as many instants, and says what it found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.jobs import files
from lmkit.testing import FakeGenerator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SEED = 7


def write_rows(folder: Path, count: int) -> None:
    """Write an input with rows of all kinds: long, short, without a text, and one line that is no JSON."""
    rows = [
        json.dumps({"id": n, "text": f"row {n} " * (1 + n % 5), "é": n / 3}, ensure_ascii=False) for n in range(count)
    ]
    rows[count // 2] = '{"id": "broken'
    rows[count // 3] = '{"id": "without a text"}'
    (folder / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def answering(folder: Path, seconds: float) -> Callable[[str, Mapping[str, Any]], str | Exception]:
    """Return what answers by a row's seed, notes which row was asked, and fails now and then."""

    def answer(prompt: str, options: Mapping[str, Any]) -> str | Exception:
        with (folder / "asked").open("a") as asked:
            asked.write(f"{prompt.split()[1]}\n")
        time.sleep(seconds)
        return ValueError("no answer") if options["seed"] % 7 == 0 else f"{prompt} drew {options['seed']}"

    return answer


def work(folder: Path, seconds: float = 0.0) -> None:
    """Do the job of a folder, or what is left of it."""
    fake = FakeGenerator(answering(folder, seconds))
    fake.run_job(folder / "in.jsonl", folder / "out.jsonl", temperature=0.8, seed=SEED)


def forked(do: Callable[[], object]) -> int:
    """Begin something in a process that is forked now, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on, Python warns of forks beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> bool:
    """Wait for a process; say whether it came to its end."""
    return os.waitpid(child, 0)[1] == 0


def kill_before(operation: int) -> None:
    """Have this process kill itself in its operation on files of this number, with half of it done."""
    left = iter(range(operation))

    def broken(name: str, real: Any, half: Callable[..., object] = lambda *_: None) -> None:
        def call(*given: Any, **options: Any) -> Any:
            if next(left, None) is None:
                half(*given)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        setattr(os if hasattr(os, name) else files, name, call)

    write, replace = os.write, os.replace
    broken("write", write, lambda file, said: write(file, said[: len(said) // 2]))
    broken("replace", replace, replace)
    broken("fsync", os.fsync)
    broken("ftruncate", os.ftruncate)
    broken("joined", files.joined)


def journaled(folder: Path) -> set[str]:
    """Return which rows have a record, by what stands in the file."""
    journal = folder / "out.jsonl.lmkit" / "journal"
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return {line.split(b" ")[1].decode() for line in lines}


def finish(folder: Path, begin: Callable[[], int], whole: Path) -> int:
    """Run the job of a folder until it comes to its end; return how often it did not.

    Raises:
        AssertionError: A row was asked that had a record, or the output is not that of the unbroken job in `whole`.
    """
    output, unbroken = folder / "out.jsonl", (whole / "out.jsonl").read_bytes()
    for broken in range(10_000):
        before = journaled(folder)
        (folder / "asked").unlink(missing_ok=True)
        ended_well = ended(begin())
        asked = (folder / "asked").read_text().split() if (folder / "asked").exists() else []
        assert not before & set(asked), "a row that is done was asked again"
        assert len(asked) == len(set(asked))
        assert not output.exists() or output.read_bytes() == unbroken, "the output is not whole"
        if ended_well:
            assert output.exists()
            return broken
    raise AssertionError("it never ends")


def killed_later(do: Callable[[], object], seconds: float) -> int:
    """Begin something, and kill it from outside after so many seconds."""
    child = forked(do)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return child


def main(instants: int, seed: int = 0) -> None:
    """Kill at random instants, from outside and inside operations, and say what was left."""
    draw, began, kills, jobs = random.Random(seed), time.monotonic(), 0, 0  # noqa: S311 - no secrets
    with tempfile.TemporaryDirectory() as where:
        whole = Path(where, "whole")
        whole.mkdir()
        write_rows(whole, 40)
        work(whole)
        while kills < instants:
            folder = Path(where, str(jobs))
            folder.mkdir()
            shutil.copy(whole / "in.jsonl", folder)

            def begin(folder: Path = folder) -> int:
                if draw.random() < 0.5:
                    return killed_later(lambda: work(folder, 0.002), draw.uniform(0, 0.12))

                def inside(operation: int = draw.randrange(60)) -> None:
                    kill_before(operation)
                    work(folder)

                return forked(inside)

            kills += finish(folder, begin, whole)
            jobs += 1
    print(f"{kills} kills in {jobs} jobs, all of which end in the same bytes as an unbroken run")  # noqa: T201
    print(f"{time.monotonic() - began:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:]))
