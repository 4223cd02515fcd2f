"""Jobs that are killed, run out of disk, or lose their journal's end: run again, they end as if nothing had been."""

import os
import random
import resource
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import pytest

import job_kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

ROWS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job that nothing has come between."""
    folder = tmp_path_factory.mktemp("whole")
    job_kills.write_rows(folder, ROWS)
    job_kills.work(folder)
    return folder


def begun(whole: Path, folder: Path) -> Path:
    """Return a folder with the same rows and nothing done."""
    folder.mkdir()
    shutil.copy(whole / "in.jsonl", folder)
    return folder


def test_a_job_killed_inside_any_operation_ends_in_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """With half of each write done, before each sync, behind the rename: run again, it asks no row twice."""
    for operation in count():
        folder = begun(whole, tmp_path / str(operation))
        runs = iter([operation])

        def begin(folder: Path = folder, runs: "iter[int]" = runs) -> int:  # type: ignore[valid-type]
            number = next(runs, None)

            def inside() -> None:
                if number is not None:
                    job_kills.kill_before(number)
                job_kills.work(folder)

            return job_kills.forked(inside)

        killed = job_kills.finish(folder, begin, whole)
        if not killed:
            break
    assert operation > 2 * ROWS


def test_a_job_killed_from_outside_again_and_again_ends_in_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """At some twenty instants that no operation knows of."""
    draw, kills = random.Random(1), 0  # noqa: S311 - no secrets
    for job in count():
        folder = begun(whole, tmp_path / str(job))
        work = partial(job_kills.work, folder, 0.003)
        kills += job_kills.finish(folder, lambda work=work: job_kills.killed_later(work, draw.uniform(0, 0.06)), whole)
        if kills >= 20:
            break


@pytest.mark.parametrize("size", [0, 100, 900, 1400, 1900])
def test_a_disk_that_is_full_loses_nothing(whole: Path, tmp_path: Path, size: int) -> None:
    """Where the system writes half a record and no more, the job ends with its error, and goes on with more room."""
    folder = begun(whole, tmp_path / "job")

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            job_kills.work(folder)

    assert job_kills.ended(job_kills.forked(bounded))
    assert not (folder / "out.jsonl").exists()
    assert job_kills.finish(folder, lambda: job_kills.forked(partial(job_kills.work, folder)), whole) == 0
