"""The journal of a job: a record for each row that ended, appended at once and checked when it is read again.

A line is `CRC ROW KEY STATE JSON`: the CRC-32 of what stands behind it, the row's number in the input, the first 64
bits of a SHA-256 of what the row was asked, `ok` or `error`, and its columns. The first line is `CRC JSON`, which says
what the job is. Later records of a row replace earlier ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from lmkit.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

SYNC_SECONDS = 1.0
"""How long records may be with the system and not on the disk while others come."""

NONE: Final = -1
"""The place of a row that has no record."""


class Journal:
    """What a job has done; it is locked while it is open.

    In memory it is 16 bytes for each row, whatever their answers.

    Attributes:
        header: What the job is, as its first run said; empty if there is no journal yet.
        count: How many rows have a record.
    """

    def __init__(self, folder: Path, *, restart: bool = False, retry_errors: bool = False) -> None:
        """Open the journal in a folder, which is made if need be; `restart` forgets what it has.

        Args:
            folder: Where it is.
            restart: Forget it.
            retry_errors: Take rows that failed as not done.

        Raises:
            JobError: Another process has it open, or it is broken.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "journal"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._reader = self.path.open("rb")
        try:
            _lock(self._file, folder)
            if restart:
                os.ftruncate(self._file, 0)
            self._places, self._keys = array("q"), array("Q")
            self.header: dict[str, Any] = {}
            self.count = self._end = 0
            self._synced = time.monotonic()
            self._read(retry_errors=retry_errors)
        except BaseException:
            self.close()
            raise

    def begin(self, header: dict[str, Any]) -> None:
        """Begin anew, and say what the job is."""
        os.ftruncate(self._file, 0)
        self._places, self._keys, self.count, self._end = array("q"), array("Q"), 0, 0
        self._write(_summed(json.dumps(header).encode()))
        self.sync()
        for folder in self.path.parents[:2]:  # the name of the journal, and that of its folder
            sync_folder(folder)
        self.header = header

    def append(self, row: int, key: int, columns: bytes, *, failed: bool) -> None:
        """Record a row: its number, its key, and its columns as JSON.

        Raises:
            OSError: The disk is full or gone. What was written of the record is taken back, or cut off later.
        """
        place = self._end
        self._write(_summed(b"%d %016x %s %s" % (row, key, b"error" if failed else b"ok", columns)))
        self._note(row, key, place)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def key(self, row: int) -> int | None:
        """Return the key of a row that has a record."""
        has = row < len(self._places) and self._places[row] != NONE
        return self._keys[row] if has else None

    def columns(self, row: int) -> tuple[bytes, bool]:
        """Return what a row that has a record was answered, as JSON, and whether it failed."""
        self._reader.seek(self._places[row])
        _, _, _, state, columns = self._reader.readline().split(b" ", 4)
        return columns.rstrip(b"\n"), state == b"error"

    def sync(self) -> None:
        """Have the disk hold all records."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Let others have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._reader.close()

    def __enter__(self) -> Self:
        """Return the journal; leaving the block closes it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close it, with all records on the disk as far as it can hold them."""
        with contextlib.suppress(OSError):
            self.sync()
        self.close()

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _read(self, *, retry_errors: bool) -> None:
        """Read all records; the last line is cut off if it is not whole, and none before it is passed over."""
        for number, line in enumerate(self._reader):
            if (said := _checked(line)) is None:
                if self._reader.read(1):
                    raise JobError(
                        f"{self.path} is broken in line {number + 1}: what stands there is not what was written. The "
                        f"{self.count} rows before it are whole: cut the file to {self._end} bytes to go on behind "
                        "them, or begin anew with restart=True."
                    )
                break
            if number == 0:
                self.header = self._read_header(said)
            else:
                row, key, state, _columns = said.split(b" ", 3)
                again = retry_errors and state == b"error"
                self._note(int(row), int(key, 16), NONE if again else self._end)
            self._end += len(line)
        os.ftruncate(self._file, self._end)

    def _read_header(self, said: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            if isinstance(header := json.loads(said), dict):
                return header
        raise JobError(f"{self.path} is no journal of a job, or has lost its first line: begin anew with restart=True.")

    def _note(self, row: int, key: int, place: int) -> None:
        if (more := row + 1 - len(self._places)) > 0:
            self._places.extend(array("q", [NONE]) * more)
            self._keys.extend(array("Q", [0]) * more)
        self.count += (place != NONE) - (self._places[row] != NONE)
        self._places[row], self._keys[row] = place, key


def _summed(said: bytes) -> bytes:
    return b"%08x %s\n" % (crc32(said), said)


def _checked(line: bytes) -> bytes | None:
    """Return what a line says; None if it is not as it was written."""
    said = line[9:-1]
    return said if line == _summed(said) else None


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keep others from an output, wherever their journals are, by a file beside it, which goes at the end.

    Raises:
        JobError: Another has it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = Path(f"{output}.lmkit-lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(file, output)
        if not (path.exists() and os.path.samestat(os.fstat(file), path.stat())):  # who had it has just taken it away
            raise JobError(f"another process has just ended the job of {output}: run it again.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(file)


def _lock(file: int, job: Path) -> None:
    """Lock an open file as long as it is open; a process that is killed has let go.

    Raises:
        JobError: Another has it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 2**40, os.SEEK_SET)  # others may not read a locked byte, so none that is there
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JobError(f"another process runs the job of {job}: wait for it, or end it first.") from error


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder, where systems can be asked for it."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
