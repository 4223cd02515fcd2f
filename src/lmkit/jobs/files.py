"""The formats of a job's files: rows in, one at a time, and rows out with columns beside their own."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

from lmkit.errors import JobError, LmkitError, MissingExtraError, OptionError, listed
from lmkit.results.base import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Kind: TypeAlias = Literal["jsonl", "csv", "parquet"]
ENDINGS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
STANDARD = "-"
"""Standard input or output."""

BATCH_ROWS = 8192
"""How many rows of a Parquet file are held at once."""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the input.

    Attributes:
        values: Its columns; empty where it cannot be read.
        text: The line as it stands in a JSONL file, and in a CSV file if it cannot be read.
        problem: Why it cannot be read, if so.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A file with rows.

    Attributes:
        path: Where it is.
        kind: Its format.
        compressed: How it is compressed, as the ending of its name says; empty if it is not.
    """

    path: Path
    kind: Kind
    compressed: str = ""

    @classmethod
    def named(cls, name: Path) -> Table:
        """Tell the format by a file's name.

        Raises:
            OptionError: By its name it has none that is known.
        """
        compressed = name.suffix if name.suffix in COMPRESSED else ""
        ending = Path(name.stem).suffix if compressed else name.suffix
        if ending not in ENDINGS or (compressed and ENDINGS[ending] == "parquet"):
            raise OptionError(
                f"{str(name)!r} is not accepted: the names of files end in {listed(ENDINGS)}, those of text also with "
                f"{listed(COMPRESSED)} behind it; {STANDARD!r} is JSONL by standard input or output."
            )
        return cls(name, ENDINGS[ending], compressed)

    @contextlib.contextmanager
    def open(self, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
        """Open the file; what is written compressed has no date in it, so that equal rows are equal bytes.

        Raises:
            JobError: It is to be read, and is damaged or cut short, at any time until it is closed.
        """
        with contextlib.ExitStack() as opened:
            if mode == "rb":
                opened.enter_context(_reading(self.path))
            if self.compressed == ".zst":
                stream: Any = opened.enter_context(_zstd(self.path, mode))
            else:
                stream = opened.enter_context(self.path.open(mode))
            if self.compressed == ".gz":
                stream = opened.enter_context(gzip.GzipFile("", mode, fileobj=stream, mtime=0))
            yield stream

    def lines(self) -> Iterator[Line]:
        """Read the rows, one by one."""
        if self.kind == "parquet":
            yield from (Line(row) for batch in parquet_batches(self.path) for row in _python_rows(batch))
            return
        with self.open("rb") as stream:
            yield from json_lines(stream) if self.kind == "jsonl" else csv_lines(stream)

    def columns(self) -> list[str] | None:
        """Return the names of the columns, as far as the beginning of the file says them."""
        if self.kind == "parquet":
            with _parquet_file(self.path) as file:
                return list(file.schema_arrow.names)
        if self.kind == "csv":
            with self.open("rb") as stream, _csv_text(stream) as text:
                return _header(csv.reader(text, strict=True))
        return None

    def count(self) -> int:
        """Return how many rows there are; those of text are looked through for it."""
        if self.kind == "parquet":
            with _parquet_file(self.path) as file:
                return int(file.metadata.num_rows)
        if self.kind == "csv":
            return sum(1 for _ in self.lines())
        with self.open("rb") as stream:
            return sum(1 for line in stream if line.strip())


def _zstd(path: Path, mode: str) -> Any:
    """Open a file of Zstandard by the standard library, from Python 3.14 on, or by pyarrow."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").open(path, mode)
    pa = _arrow(f"{path.name} is compressed by Zstandard, and before Python 3.14")
    if mode == "wb":
        return pa.CompressedOutputStream(str(path), "zstd")
    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))


def _arrow(why: str = "a Parquet file") -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError(
            f"{why} needs a package that is not installed: pip install 'lmkit[parquet]'."
        ) from error


def _parquet() -> Any:
    _arrow()
    return importlib.import_module("pyarrow.parquet")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a file that it cannot be read, whatever its format's reader raises."""
    try:
        yield
    except LmkitError:
        raise
    except Exception as error:
        raise JobError(f"{path} cannot be read: {error}. Mend it; what is done is kept.") from error


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    with _reading(path), _parquet().ParquetFile(path) as file:
        _check_names(file.schema_arrow.names, f"the columns of {path}")
        yield file


def parquet_batches(path: Path) -> Iterator[Any]:
    """Read a Parquet file in parts."""
    with _parquet_file(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _python_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Give the rows of a batch; what Python has no type for, such as nanoseconds, as texts."""
    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except ValueError:
            columns.append(column.cast("string").to_pylist())
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


# JSONL ------------------------------------------------------------------------------------------


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON's")


NESTED = 300
"""From how many brackets on a line is looked at, whether it can be written: Python bounds how deep they may go."""

_JSON = json.JSONDecoder(parse_constant=_refuse)


def json_lines(stream: Iterable[bytes]) -> Iterator[Line]:
    """Read JSON, an object a line; blank lines are no rows."""
    for number, line in enumerate(stream, start=1):
        if stripped := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield _json_line(stripped, number)


def _json_line(line: bytes, number: int) -> Line:
    try:
        text = line.decode()
        values = _JSON.decode(text)
        if text.count("[") + text.count("{") > NESTED:
            plain(values)  # rather now than when the output is made
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Line(text=line.decode(errors="backslashreplace"), problem=f"line {number} is no JSON: {told}")
    if not isinstance(values, dict):
        return Line(text=text, problem=f"line {number} is JSON, but no object with columns")
    return Line(values, text)


def json_bytes(value: object) -> bytes:
    """Write JSON in UTF-8; half of a character, which UTF-8 cannot write, is an escape."""
    return json.dumps(plain(value), ensure_ascii=False).encode("utf-8", "backslashreplace")


def joined(line: Line, columns: bytes, *, as_is: bool) -> bytes:
    """Put columns, which are JSON, behind those of a row; `as_is` where its text is JSON that needs no change."""
    own = line.text.encode() if as_is and line.problem is None else json_bytes(line.values)
    return own[:-1].rstrip() + (b", " if line.values else b"") + columns[1:] + b"\n"


# CSV --------------------------------------------------------------------------------------------


def _csv_text(stream: BinaryIO) -> io.TextIOWrapper:
    csv.field_size_limit(2**31 - 1)  # of the whole process: its own is shorter than some chats
    return io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")  # what is no UTF-8 comes out as it was


def _header(reader: Any) -> list[str]:
    names: list[str] = next(reader, [])
    _check_names(names, "the first line of a CSV file")
    return names


def _check_names(names: list[str], where: str) -> None:
    if not names or len(set(names)) != len(names):
        raise OptionError(f"{where} must name columns, each once, and there is {names!r}.")


def _noted(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    for line in lines:
        read.append(line)
        yield line


def csv_lines(stream: BinaryIO) -> Iterator[Line]:
    """Read CSV whose first line names the columns; each cell is a text."""
    with _csv_text(stream) as text:
        read: list[str] = []  # of a row
        reader = csv.reader(_noted(text, read), strict=True)
        names = _header(reader)
        while True:
            read.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Line(text="".join(read), problem=f"line {reader.line_num} is no CSV: {error}")
                continue
            if len(cells) == len(names):
                yield Line(dict(zip(names, cells, strict=True)))
            elif cells:
                told = f"line {reader.line_num} has {len(cells)} cells, and there are {len(names)} columns"
                yield Line(dict(zip(names, cells, strict=False)), "".join(read), told)


def _cell(value: object) -> str:
    """Write a value for CSV: a text as it is, nothing for None, JSON for others but numbers that JSON does not have."""
    value = repr(value) if isinstance(value, float) else plain(value)
    if isinstance(value, str):
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half of a character, as JSON can have it
            return value.encode("utf-8", "backslashreplace").decode()
        return value
    return "" if value is None else json_bytes(value).decode()


# Out --------------------------------------------------------------------------------------------

Pairs: TypeAlias = "Iterable[tuple[Line, bytes]]"
"""Rows, each with its new columns as JSON."""


def write(table: Table, source: Table, pairs: Pairs, new: Mapping[str, str]) -> None:
    """Write rows with their new columns.

    Args:
        table: The file.
        source: Where the rows come from.
        pairs: The rows.
        new: The names of the new columns, each with what Arrow calls its type; empty for what is JSON.
    """
    if table.kind == "parquet":
        _write_parquet(table.path, source, pairs, new)
        return
    with table.open("wb") as stream:
        if table.kind == "jsonl":
            stream.writelines(joined(line, columns, as_is=source.kind == "jsonl") for line, columns in pairs)
        else:
            _write_csv(stream, _names(source), pairs, new)


def _names(source: Table) -> list[str]:
    """Return the names of all columns, in the order in which they come."""
    known = source.columns()
    return list(dict.fromkeys(name for line in source.lines() for name in line.values)) if known is None else known


def _write_csv(stream: BinaryIO, names: list[str], pairs: Pairs, new: Mapping[str, str]) -> None:
    def put(row: str) -> None:
        stream.write(row.removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n")

    sink: Any = SimpleNamespace(write=put)
    writer = csv.writer(sink, lineterminator="\r\n")  # for Python quotes only what ends lines
    writer.writerow([*names, *new])
    for line, columns in pairs:
        more = json.loads(columns)
        cells = [*(line.values.get(name) for name in names), *(more.get(name) for name in new)]
        writer.writerow(map(_cell, cells))


def _write_parquet(path: Path, source: Table, pairs: Pairs, new: Mapping[str, str]) -> None:
    pa, rows = _arrow(), iter(pairs)
    own = schema_of(source)
    added = [pa.field(name, kind or "string") for name, kind in new.items()]
    schema = pa.schema([*own, *added], own.metadata)
    with _parquet().ParquetWriter(path, schema) as writer:
        for batch in _batches(source, own):
            more = [json.loads(columns) for _, columns in itertools.islice(rows, batch.num_rows)]
            columns = [pa.array([_typed(row.get(one.name), new[one.name]) for row in more], one.type) for one in added]
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema))


def _typed(value: Any, kind: str) -> Any:
    return value if kind or value is None else json_bytes(value).decode()


def _batches(source: Table, schema: Any) -> Iterator[Any]:
    """Give the rows of a file as Arrow has them."""
    if source.kind == "parquet":
        yield from parquet_batches(source.path)
        return
    rows = (dict(line.values) for line in source.lines())
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        with _fitting(source):
            made = _arrow().RecordBatch.from_pylist(batch, schema=schema)
        yield made


def schema_of(source: Table) -> Any:
    """Return the columns of a file as Arrow has them; those of JSONL are looked through for it.

    Raises:
        JobError: A column has values of several types, or a text that is no Unicode.
    """
    if source.kind == "parquet":
        with _parquet_file(source.path) as file:
            return file.schema_arrow
    pa = _arrow()
    if source.kind == "csv":
        return pa.schema([(name, "string") for name in source.columns() or ()])
    schema, rows = pa.schema([]), (dict(line.values) for line in source.lines())
    with _fitting(source):
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            names = dict.fromkeys(name for row in batch for name in row)
            part = pa.RecordBatch.from_pylist([dict.fromkeys(names) | row for row in batch]).schema
            schema = pa.unify_schemas([schema, part], promote_options="permissive")
        _parquet().ParquetWriter(pa.BufferOutputStream(), schema).close()
    return schema


@contextlib.contextmanager
def _fitting(source: Table) -> Iterator[None]:
    """Say of rows that Arrow cannot hold what to do with them."""
    pa = _arrow()
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise JobError(
            f"{source.path} fits no Parquet file, where a column has one type and texts are Unicode: {error}. Write "
            "JSONL; journal= says where rows are that are done."
        ) from error


def standard_input(kept: Path) -> Iterator[Line]:
    """Read JSONL from standard input, and keep what was read, to be read again at the end."""
    with kept.open("wb", buffering=0) as keeping:

        def lines() -> Iterator[bytes]:
            for line in sys.stdin.buffer:
                keeping.write(line)
                yield line

        yield from json_lines(lines())
