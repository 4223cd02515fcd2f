"""Jobs on files, as a loaded model does them: what a row is asked, and how it is answered."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lmkit._interrupts import surely
from lmkit.engine import Caller
from lmkit.errors import LmkitError, OptionError, OutputError, UnknownOptionError, listed, nearest, shown
from lmkit.jobs.job import Asked, Job, Taken, Work
from lmkit.options.option import check_word, declared, is_a
from lmkit.options.per_row import split
from lmkit.replies.tools import definition
from lmkit.results import Ranking, Score, Unmasking
from lmkit.structured.outputs import is_output, output_of
from lmkit.wrappers.ordered_map import ReadAhead
from lmkit.wrappers.progress import bar

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lmkit.planning.plan import LoadPlan
    from lmkit.results import JobReport

WINDOW = 128
"""How many rows are scored or ranked together."""

CALLS = ("generate", "chat", "translate", "fill")
"""The verbs whose rows run one by one."""

UNWRITTEN = ("mode", "output", "processors")
"""Options that no file can hold."""

FACTS = {
    "generate": {"finish_reason": "string"},
    "chat": {"finish_reason": "string", "message": ""},
    "translate": {"finish_reason": "string"},
    "fill": {"score": "double"},
    "score": {"perplexity": "double"},
    "rank": {"probability": "double"},
}
"""The columns that a row has beside its answer, by the verb, each with its type."""

FILES = "*.safetensors *.bin *.gguf *.json *.jinja *.model *.txt".split()
"""The files of a checkpoint that say what it answers."""


class FileJobs:
    """The verb of wrappers that takes a file and writes another.

    Attributes:
        _verbs: The verbs that rows can be done by, the usual one first, each with the argument that it has beside rows.
        _pair: The options that `score` and `rank` take per row.
    """

    _verbs: ClassVar[Mapping[str, str | None]]
    _pair: ClassVar[Sequence[str]] = ()
    _accepted: ClassVar[type]
    _plan: LoadPlan
    _opened: Any
    _check: Any
    _jobs: Any
    _run: Any

    def run_job(
        self,
        in_file: str | os.PathLike[str],
        out_file: str | os.PathLike[str],
        /,
        *,
        verb: str | None = None,
        column: str | None = None,
        columns: Mapping[str, str] | None = None,
        prefix: str = "",
        full: bool = False,
        journal: str | os.PathLike[str] | None = None,
        restart: bool = False,
        retry_errors: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> JobReport:
        """Answer each row of a file, and write them all with their answers to another; what is cut short goes on.

        The same line again goes on behind the rows that are done, which a journal beside the output holds. The output
        gets its name when it is whole. A row that fails has an `error` in place of its answer.

        Args:
            in_file: A `.jsonl`, `.csv` or `.parquet` file (text also as `.gz` or `.zst`), or `"-"`: JSONL from
                standard input.
            out_file: The same, or standard output; the folder `OUT_FILE.lmkit` holds the journal.
            verb: `"generate"`, `"chat"`, `"translate"`, `"fill"`, `"score"` or `"rank"`; if left out, what a call does.
            column: What the model reads; `"messages"` of chats and else `"text"` if left out.
            columns: Which columns have a row's own options or other arguments, by their names, as
                `{"choices": "answers", "max_new_tokens": "limit"}`.
            prefix: What the names of the new columns begin with.
            full: Whether rows also have `result`, all that `to_dict()` says.
            journal: A folder for the journal instead.
            restart: Forget what is done.
            retry_errors: Do the rows again that failed.
            progress: As for a call.
            **options: Of the verb, one value each, for all rows.

        Raises:
            OptionError: An option, a column or a file's name is not accepted.
            JobError: Another process runs the job, or the journal is broken, or of other options, another checkpoint
                or another input.
            EngineError: The model was closed.
        """
        work = self._work(options, verb, column, columns or {}, prefix=prefix, full=full, progress=progress)
        return Job(work, in_file, out_file).run(journal, restart=restart, retry_errors=retry_errors)

    def _work(
        self,
        options: dict[str, Any],
        verb: str | None,
        column: str | None,
        columns: Mapping[str, str],
        *,
        prefix: str = "",
        full: bool = False,
        progress: bool | None = False,
    ) -> Work:
        """Say what is done with each row, after a check of all that is said; see `run_job`."""
        verb = next(iter(self._verbs)) if verb is None else verb
        check_word("verb", verb, list(self._verbs))
        taken = self._taken(verb, column, columns)
        reads = taken.pop("")
        run = self._by_call(options, whole=not columns) if verb in CALLS else self._together(verb, options, columns)
        said = {"tools": [definition(tool) for tool in options["tools"]]} if options.get("tools") else {}
        new = {"answer": "double" if verb == "score" else "" if "output" in options else "string", **FACTS[verb]}
        new |= {"result": ""} if full else {}
        return Work(
            column=reads,
            options=taken,
            run=run,
            told=functools.partial(told, verb, prefix, valued="output" in options, full=full),
            columns={prefix + name: kind for name, kind in new.items()},
            error=f"{prefix}error",
            identity={
                "verb": verb,
                "column": reads.column,
                "columns": dict(columns),
                "prefix": prefix,
                "full": full,
                "options": json.loads(json.dumps({**options, **said, "seed": None}, default=written)),
                "model": self._identity(),
            },
            seed=options.get("seed"),
            draws=verb in CALLS,
            bar=functools.partial(bar, progress, logs=True),
        )

    def _taken(self, verb: str, column: str | None, columns: Mapping[str, str]) -> dict[str, Taken]:
        """Say which columns are read, by the names of what they are; the model's own by an empty one."""
        word = self._verbs[verb]
        options = declared(self._accepted)
        tests = {name: option.test for name, option in options.items() if not option.call}
        if verb not in CALLS:
            tests = {name: tests[name] for name in self._pair}
            tests |= {word: is_a(list if verb == "rank" else str)} if word else {}
        for name in columns:
            if name not in tests or name in UNWRITTEN:
                known = [one for one in tests if one not in UNWRITTEN]
                raise UnknownOptionError(f"columns= has {name!r}.{nearest(name, known)} Accepted: {listed(known)}.")
        kinds: Any = (str, list) if "generate" in self._verbs else str
        given = is_a(list if verb == "chat" or (verb == "rank" and not word) else kinds)
        found = {"": Taken(column or ("messages" if verb == "chat" else "text"), given, needed=True)}
        many = {name for name, option in options.items() if option.many}
        return found | {name: Taken(one, tests[name], name == word, name in many) for name, one in columns.items()}

    def _identity(self) -> dict[str, Any]:
        """Say which model it is: what a job that goes on must find again."""
        loaded, plan = self._opened, self._plan
        options = getattr(loaded.reload, "keywords", {})
        adapters = options.get("adapter") or {}
        folders = {"checkpoint": getattr(loaded.model, "name_or_path", None) or plan.name}
        folders |= adapters if isinstance(adapters, dict) else {"adapter": adapters}
        return {
            "task": plan.task,
            "name": Path(plan.name).name,
            "precision": plan.precision.name,
            "context_length": plan.context_length,
            "language": options.get("language"),
            **{name: files_of(str(folder)) for name, folder in folders.items()},
        }

    def _by_call(
        self, options: dict[str, Any], *, whole: bool
    ) -> Callable[[Iterator[Asked]], Iterator[tuple[int, Any]]]:
        """Check the options, and return what answers rows as they end, reading a bounded number ahead.

        Those that are not `whole`, since rows have some of their own, are checked together in each row.
        """
        (known,) = split(options, None, declared(self._accepted))
        if whole:
            self._check(known)

        def run(asked: Iterator[Asked]) -> Iterator[tuple[int, Any]]:
            numbers: dict[int, int] = {}

            def prepare(one: Asked, number: int) -> Any:
                numbers[number] = one.row
                try:
                    return self._jobs([one.given], options | one.options, one.row)[0]
                except LmkitError as error:
                    return error

            rows: ReadAhead[Any, Any] = ReadAhead(asked, prepare)
            news = self._run(rows.jobs(), Caller(lazy=True))
            try:
                for update in itertools.chain(news, [None]):
                    if update is not None:
                        rows.end(update.index, update.error or update.outcome)
                    for number, result in rows.ended_early():
                        yield numbers.pop(number), result
            finally:
                surely(news.close, news.close)
            if rows.broken is not None:
                raise rows.broken

        return run

    def _together(
        self, verb: str, options: dict[str, Any], columns: Mapping[str, str]
    ) -> Callable[[Iterator[Asked]], Iterator[tuple[int, Any]]]:
        """Check the options, and return what scores or ranks rows, a window of them at a time."""
        method, word = getattr(self, verb), self._verbs[verb]
        parameters = inspect.signature(method).parameters
        known = [*parameters, *self._pair]
        if unknown := [name for name in options if name not in known or name in ("on_error", "told")]:
            raise UnknownOptionError(f"unknown option {unknown[0]!r}.{nearest(unknown[0], known)}")
        if word and parameters[word].default is inspect.Parameter.empty and word not in {*options, *columns}:
            raise OptionError(f"{verb} needs {word}=, or in columns= the name of the column that has each row's.")
        for name in options.keys() & {word, *self._pair}:
            given, several = options[name], verb == "rank" and name == word
            texts = given if several else [given]
            if (several and not isinstance(given, (list, tuple))) or not all(isinstance(one, str) for one in texts):
                what = f"pass {'a list of texts' if several else 'a text'} for all rows"
                raise OptionError(f"{name}={shown(given)} is not accepted: {what}, or a column's name in columns=.")

        def run(asked: Iterator[Asked]) -> Iterator[tuple[int, Any]]:
            while window := list(itertools.islice(asked, WINDOW)):
                own = {name for one in window for name in one.options}
                lists = {name: [one.options.get(name, options.get(name)) for one in window] for name in own}
                results = method([one.given for one in window], **(options | lists), on_error="return", progress=False)
                for number, (one, result) in enumerate(zip(window, results, strict=True)):
                    if isinstance(result, LmkitError):  # it counts from the window's first
                        result.args = (re.sub(rf"\brow {number}\b", f"row {one.row}", str(result), count=1),)
                    yield one.row, result

        return run


def told(verb: str, prefix: str, result: Any, *, valued: bool, full: bool) -> tuple[dict[str, Any], LmkitError | None]:
    """Make columns of an answer, and say why it has no value if it should have one."""
    error: LmkitError | None = None
    if isinstance(result, Score):
        found: dict[str, Any] = {"answer": result.logprob, "perplexity": result.perplexity}
    elif isinstance(result, Ranking):
        found = {"answer": str(result), "probability": result.choices[0].probability}
    elif isinstance(result, Unmasking):
        found = {"answer": str(result), "score": result.candidates[0].score}
    else:
        found = {"answer": result.content if verb == "chat" else result.text, "finish_reason": result.finish_reason}
        found |= {"message": result.message} if verb == "chat" else {}
        try:
            found |= {"answer": result.value} if valued else {}
        except OutputError as none:
            found["answer"], error = None, none
    found |= {"result": result} if full else {}
    return {prefix + name: value for name, value in found.items()}, error


def written(value: Any) -> Any:
    """Write the value of an option so that it is the same in another process."""
    asked = output_of(value) if is_output(value) else value
    schema = getattr(asked, "schema", None)
    return schema if isinstance(schema, (dict, str)) else re.sub(r" at 0x[0-9a-f]+", "", repr(asked))


def files_of(name: str) -> Any:
    """Say which files a checkpoint has: the commit of a repository, or the sizes and times of a folder's files."""
    folder = Path(name)
    if folder.parent.name == "snapshots":
        return {"commit": folder.name}
    files = sorted(file for pattern in FILES for file in folder.glob(pattern))
    found = ((file.name, file.stat()) for file in files)
    return {name: f"{stat.st_size} bytes of {int(stat.st_mtime)}" for name, stat in found} or name
