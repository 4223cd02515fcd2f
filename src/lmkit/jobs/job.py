"""A job: the rows of a file asked one by one, their answers in a journal, and the output made of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from lmkit.errors import JobError, LmkitError, OptionError, listed, shown
from lmkit.jobs.files import STANDARD, Line, Table, joined, json_bytes, schema_of, standard_input, write
from lmkit.jobs.journal import Journal, alone, sync_folder
from lmkit.results import JobReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

logger = logging.getLogger("lmkit.jobs")

FORMAT = 1
"""Of journals; one of another is refused."""

LOOKED_AT = 100
"""How many rows say whether an input is the one that a journal is of."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one row is asked.

    Attributes:
        row: Its number in the input.
        given: What the model reads.
        options: Its own, as its columns say them.
    """

    row: int
    given: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Taken:
    """A column that is read.

    Attributes:
        column: Its name.
        test: Whether a value is one; a text that is none is read as JSON.
        needed: Whether each row has to have it.
        many: Whether a text that is the JSON of a list is that list, although a text alone would be accepted too.
    """

    column: str
    test: Callable[[Any], bool]
    needed: bool = False
    many: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What is done with each row; see `lmkit.wrappers.file_jobs`.

    Attributes:
        column: What the model reads.
        options: What else rows say, by the names of options.
        run: Answers rows as they end, with their numbers.
        told: Makes columns of an answer, and the error of one that has no value.
        columns: The names of those columns, each with what Arrow calls its type; empty for JSON.
        error: The name of the column that has errors.
        identity: What has to be the same for a job to go on.
        seed: Of all draws, if it was given.
        draws: Whether rows take a seed.
        bar: Shows how far it is: of how many rows, and how many were done before.
    """

    column: Taken
    options: Mapping[str, Taken]
    run: Callable[[Iterator[Asked]], Iterator[tuple[int, Any]]]
    told: Callable[[Any], tuple[dict[str, Any], LmkitError | None]]
    columns: Mapping[str, str]
    error: str
    identity: dict[str, Any]
    seed: int | None
    draws: bool
    bar: Callable[[int | None, int], AbstractContextManager[Callable[[object], None]]]

    def ask(self, row: int, line: Line) -> tuple[Asked, OptionError | None]:
        """Say what a row is asked, and why it cannot be if so."""
        problem = None if line.problem is None else OptionError(line.problem)
        if problem is None:
            try:
                given = _value(self.column, line, row)
                told = {name: _value(taken, line, row) for name, taken in self.options.items()}
                return Asked(row, given, {name: value for name, value in told.items() if value is not None}), None
            except OptionError as error:
                problem = error
        return Asked(row, [dict(line.values), line.text]), problem


class Job:
    """Work on a file; `run` does it."""

    def __init__(self, work: Work, source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
        """Look at the files: at names and columns, and for Parquet at the types of all values.

        Raises:
            OptionError: A format is unknown, a column is not there, or the output is the input.
        """
        self._work = work
        self._source, self._output = check_files(source, output)
        self._name = Path(source).name
        self._new = {**work.columns, work.error: ""}
        if self._source is not None and self._output is not None and self._output.kind == "parquet":
            schema_of(self._source)  # rather now than when all is done
        if self._source is not None:
            check_columns(self._source, [work.column, *work.options.values()])
        self._asking: dict[int, int] = {}
        self._seen = self._done = self._kept = self._changed = self._failed = self._tokens = 0

    def run(self, journal: str | os.PathLike[str] | None, *, restart: bool, retry_errors: bool) -> JobReport:
        """Do what is not done, and write the output.

        Raises:
            JobError: Another process runs it, or the journal is broken or of another job.
        """
        started = time.perf_counter()
        with contextlib.ExitStack() as opened:
            if self._output is not None:
                opened.enter_context(alone(self._output.path))
            folder = journal or (self._output and f"{self._output.path}.lmkit")
            folder = Path(folder or opened.enter_context(tempfile.TemporaryDirectory(prefix="lmkit-")))
            self._journal = opened.enter_context(Journal(folder, restart=restart, retry_errors=retry_errors))
            self._begin(restart=restart)
            kept = folder / "input.jsonl"
            self._again = self._source or Table(kept, "jsonl")
            self._lines = standard_input(kept) if self._source is None else self._source.lines()
            pairs = self._pairs()
            self._answer(pairs)
            self._journal.sync()
            if self._output is not None:
                self._compose(folder, pairs)
        told = str(self._output.path) if self._output else "standard output"
        counts = (self._seen, self._done, self._kept, self._changed, self._failed, self._tokens)
        return JobReport(told, *counts, seconds=time.perf_counter() - started)

    def _begin(self, *, restart: bool) -> None:
        """Go on with the job of the journal if that is this one, else begin it if there is none."""
        mine = {"format": FORMAT, "source": self._name, **self._work.identity}
        journal, versions = self._journal, {name: version(name) for name in ("lmkit", "torch", "transformers")}
        if not journal.count:
            if self._output is not None and self._output.path.exists() and not (restart or journal.header):
                raise JobError(
                    f"{self._output.path} exists, and {journal.path} does not say that this job wrote it: choose "
                    "another output, or write over it with restart=True."
                )
            seed = secrets.randbits(48) if self._work.seed is None else self._work.seed
            journal.begin({**mine, "seed": seed, "versions": versions})
        header = {name: value for name, value in journal.header.items() if name not in ("seed", "versions")}
        if self._work.seed is not None:
            header["seed"], mine["seed"] = journal.header.get("seed"), self._work.seed
        if different := differences(header, mine):
            raise JobError(
                f"{journal.path} is of another job: {'; '.join(different)}. Say the same again, choose another output, "
                "or begin anew with restart=True."
            )
        for told in differences(journal.header.get("versions", {}), versions):
            logger.warning("the job began with other versions, so answers may differ: %s", told)
        if self._source is not None and journal.count:
            self._check_input(self._source)

    def _check_input(self, source: Table) -> None:
        """Refuse an input of the same name in which no row is as it was."""
        with contextlib.closing(source.lines()) as lines:  # type: ignore[type-var]  # a generator
            asked = [
                (self._journal.key(row), key_of(self._work.ask(row, line)[0]))
                for row, line in enumerate(islice(lines, LOOKED_AT))
            ]
        known = [before == now for before, now in asked if before is not None]
        if known and not any(known):
            raise JobError(
                f"{self._journal.path} is of another input: none of the first rows that it has is in {source.path} as "
                "it was. Choose another output, or begin anew with restart=True."
            )

    def _answer(self, pairs: Iterator[tuple[Line, bytes]]) -> None:
        """Have all rows answered that are not; what goes to standard output goes there in order, as it comes."""
        total = None if self._source is None else self._source.count()
        run, written = self._work.run(self._todo()), 0
        with self._work.bar(total, self._journal.count) as ended, contextlib.closing(run):  # type: ignore[type-var]
            for news in chain(run, [None]):
                if news is not None:
                    self._record(*news)
                    ended(news[1])
                while self._output is None and written < self._seen and written not in self._asking:
                    sys.stdout.buffer.write(joined(*next(pairs), as_is=self._again.kind == "jsonl"))
                    sys.stdout.flush()
                    written += 1

    def _todo(self) -> Iterator[Asked]:
        """Read the input, and give what is not done; rows that cannot be asked are done at once."""
        for row, line in enumerate(self._lines):
            asked, problem = self._work.ask(row, line)
            if taken := [name for name in self._new if name in line.values]:
                raise OptionError(f"row {row} has a column {taken[0]!r} of its own: pass a prefix= for the new ones.")
            key, known = key_of(asked), self._journal.key(row)
            self._seen = row + 1
            if key == known:
                self._kept += 1
                continue
            self._changed += known is not None
            self._asking[row] = key
            if problem is not None:
                self._record(row, problem, line.text if line.problem else "")
                continue
            if self._work.draws and "seed" not in asked.options:
                asked = replace(asked, options={**asked.options, "seed": row_seed(self._journal.header["seed"], row)})
            yield asked

    def _record(self, row: int, result: Any, unread: str = "") -> None:
        """Write what came of a row into the journal; of a line that cannot be read, the line."""
        columns, error = ({}, result) if isinstance(result, LmkitError) else self._work.told(result)
        found = {**dict.fromkeys(self._new), **columns}
        if error is not None:
            told = {"type": type(error).__name__, "message": str(error)}
            found[self._work.error] = {**told, "line": unread} if unread else told
        self._journal.append(row, self._asking.pop(row), json_bytes(found), failed=error is not None)
        self._done += 1
        self._tokens += getattr(result, "generated_tokens", 0)

    def _pairs(self) -> Iterator[tuple[Line, bytes]]:
        """Read the input again, and give each row with its new columns."""
        for row, line in enumerate(self._again.lines()):
            if row >= self._seen or self._journal.key(row) != key_of(self._work.ask(row, line)[0]):
                raise JobError(
                    f"{self._again.path} has changed in row {row} while the job ran: run it again for what changed."
                )
            columns, failed = self._journal.columns(row)
            self._failed += failed
            yield line, columns

    def _compose(self, journal: Path, pairs: Iterator[tuple[Line, bytes]]) -> None:
        """Write the output beside its place, since the journal may be on another disk, and name it when it is whole."""
        assert self._output is not None  # noqa: S101 - of a file alone
        made = Path(f"{self._output.path}.{crc32(os.fsencode(journal.resolve())):08x}")
        write(replace(self._output, path=made), self._again, pairs, self._new)
        with made.open("rb+") as written:
            os.fsync(written.fileno())
        made.replace(self._output.path)
        sync_folder(self._output.path.parent)


def check_files(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[Table | None, Table | None]:
    """Tell what files are, links followed; None for standard input or output.

    Raises:
        OptionError: By its name the format of one is not known, the input is not there or is the output, or the output
            is a folder.
    """
    first, last = (
        None if os.fspath(name) == STANDARD else Table.named(Path(os.path.realpath(name))) for name in (source, output)
    )
    if first is not None and not first.path.is_file():
        raise OptionError(f"there is no file {str(first.path)!r} to read rows from.")
    if first is not None and last is not None and first.path == last.path:
        raise OptionError(f"the input and the output are both {str(last.path)!r}: write to another file.")
    if last is not None and last.path.is_dir():
        raise OptionError(f"{str(last.path)!r} is a folder: name a file to write to.")
    return first, last


def check_columns(source: Table, taken: Sequence[Taken]) -> None:
    """Refuse a file without a column that is read; lines of JSON may lack one that is not needed.

    Raises:
        OptionError: There is none, in JSONL in none of the first rows.
    """
    if (names := source.columns()) is not None:
        some, needed = "it", taken
    else:
        with contextlib.closing(source.lines()) as lines:  # type: ignore[type-var]  # a generator
            names = list(dict.fromkeys(name for line in islice(lines, LOOKED_AT) for name in line.values))
        some, needed = f"in its first rows, up to {LOOKED_AT}, it", [one for one in taken if one.needed]
    if not names:
        return  # of an empty file, or of lines that cannot be read
    missing = [one.column for one in taken if one.column not in names]
    if any(one.column in missing for one in needed):
        raise OptionError(f"{source.path} has no column {listed(missing)}: {some} has {listed(names)}.")
    if missing:
        logger.warning("%s has no column %s: %s has %s.", source.path, listed(missing), some, listed(names))


def key_of(asked: Asked) -> int:
    """Return what tells whether a row is asked the same as before: 64 bits of a hash."""
    said = json.dumps([asked.given, asked.options], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big")


def row_seed(seed: int, row: int) -> int:
    """Return the seed of a row, which depends on nothing but the job's and its number."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:6], "big")


def _value(taken: Taken, line: Line, row: int) -> Any:
    """Return what a row has in a column; None if that is nothing.

    Raises:
        OptionError: It lacks a column that it needs, or has something else there.
    """
    value = line.values.get(taken.column)
    if value is None or (value == "" and not (taken.needed and taken.test(value))):
        if taken.needed:
            raise OptionError(
                f"row {row} has nothing in the column {taken.column!r}: its columns are {listed(line.values)}."
            )
        return None
    if isinstance(value, str) and (taken.many or not taken.test(value)):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(value)
            value = read if isinstance(read, list) or not taken.many else value
    if isinstance(value, float) and value.is_integer() and not taken.test(value):
        value = int(value)  # pandas makes whole numbers floats where one is missing
    if taken.needed and not taken.test(value):
        raise OptionError(
            f"row {row} has {shown(value, 60)} in the column {taken.column!r}, which is not accepted there."
        )
    return value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Say what differs between two headers."""
    found: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{name} ")
        elif old != new:
            found.append(f"{where}{name} was {shown(old, 60)} and is {shown(new, 60)}")
    return found
