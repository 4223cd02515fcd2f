import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import job_kills
import lmkit
from lmkit.jobs.journal import Journal

HEADER = {"format": 1, "options": {"stop": ["\n"]}}
Rows = list[tuple[int, int, str, bool]]
ROWS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 2**64 - 1), st.text(max_size=8), st.booleans()), max_size=6
)


def written(folder: Path, rows: Rows) -> bytes:
    """Write a journal, and return its bytes."""
    with Journal(folder, restart=True) as journal:
        journal.begin(HEADER)
        for row, key, text, failed in rows:
            journal.append(row, key, json.dumps({"answer": text}).encode(), failed=failed)
        return journal.path.read_bytes()


def told(journal: Journal, rows: Rows) -> dict[int, tuple[int | None, tuple[bytes, bool]]]:
    """Return what a journal has of rows."""
    return {row: (journal.key(row), journal.columns(row)) for row, *_ in rows if journal.key(row) is not None}


def last_of(rows: Rows) -> dict[int, tuple[int | None, tuple[bytes, bool]]]:
    """Return what a journal should have of rows, where later ones replace earlier ones."""
    return {row: (key, (json.dumps({"answer": text}).encode(), failed)) for row, key, text, failed in rows}


@given(rows=ROWS)
@settings(deadline=None)
def test_a_journal_says_what_was_written(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    """Each row has its last record, and with `retry_errors` none where that is an error."""
    folder = tmp_path_factory.mktemp("journal")
    written(folder, rows)
    with Journal(folder) as journal:
        assert journal.header == HEADER
        assert told(journal, rows) == last_of(rows)
        assert journal.count == len(last_of(rows))
    with Journal(folder, retry_errors=True) as journal:
        assert told(journal, rows) == {row: found for row, found in last_of(rows).items() if not found[1][1]}


@given(rows=ROWS, data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_journal_gives_all_whole_rows_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, data: st.DataObject
) -> None:
    """Whatever bytes are cut off, changed or put in: rows before the damage are there, and none behind it is lost."""
    folder = tmp_path_factory.mktemp("journal")
    whole = written(folder, rows)
    place = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["cut", "change", "insert"]))
    new = b"" if damage == "cut" else data.draw(st.binary(min_size=1, max_size=3))
    behind = b"" if damage == "cut" else whole[place + (len(new) if damage == "change" else 0) :]
    broken = whole[:place] + new + behind
    (folder / "journal").write_bytes(broken)
    lines, left = whole.splitlines(keepends=True), broken
    intact = 0
    while intact < len(lines) and left.startswith(lines[intact]):
        left, intact = left.removeprefix(lines[intact]), intact + 1
    if b"\n" in left[:-1]:
        with pytest.raises(lmkit.JobError, match=r"is broken in line \d+|is no journal of a job"):
            Journal(folder)
        assert (folder / "journal").read_bytes() == broken
        return
    with Journal(folder) as journal:
        kept = rows[: max(intact - 1, 0)]
        assert journal.header == (HEADER if intact else {})
        assert told(journal, rows) == last_of(kept)
        journal.append(99, 5, b"{}", failed=False)  # what comes behind a tail that was cut off is whole
    if intact:
        with Journal(folder) as journal:
            assert told(journal, [*kept, (99, 5, "", False)]) == last_of(kept) | {99: (5, (b"{}", False))}


def test_a_loss_of_power_leaves_the_names_of_a_journal_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is asked to hold the file, its name in its folder, and that folder's name in the one above."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with Journal(tmp_path / "out.lmkit") as journal:
        journal.begin(HEADER)
        assert set(synced) == {path.stat().st_ino for path in (journal.path, journal.path.parent, tmp_path)}


def test_another_process_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    """A journal that is open in a process is refused in another; one that is killed has let go of it."""
    reading, writing = os.pipe()

    def hold() -> None:
        journal = Journal(tmp_path)
        os.write(writing, b"!")
        signal.pause()
        journal.close()

    child = job_kills.forked(hold)
    os.read(reading, 1)
    with pytest.raises(lmkit.JobError, match="another process runs the job of"):
        Journal(tmp_path)
    os.kill(child, signal.SIGKILL)
    job_kills.ended(child)
    Journal(tmp_path).close()


@pytest.mark.parametrize("rows", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_of_a_journal_is_sixteen_bytes_a_row(tmp_path: Path, rows: int) -> None:
    """Answers stay on the disk: of however many rows, two numbers each are held."""
    with Journal(tmp_path) as journal:
        journal.begin({})
        for row in range(rows):
            journal.append(row, row, b'{"answer": "of some length"}', failed=False)
    with Journal(tmp_path) as journal:
        held = [one for one in vars(journal).values() if hasattr(one, "itemsize")]
        assert sum(one.itemsize * len(one) for one in held) == 16 * rows
        assert journal.columns(rows - 7) == (b'{"answer": "of some length"}', False)
