"""The arguments and options of the commands, in groups that commands share.

A group is a frozen dataclass whose fields are annotated as typer reads them; `register` makes a command of a
function whose parameters are groups.
"""

# Annotations are not postponed here: they are read when the program starts.
import contextlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from lmkit.cli.screen import FLAGS, busy, reported
from lmkit.errors import OptionError
from lmkit.options.generation import GeneratorOptions
from lmkit.options.option import Option, checked, declared
from lmkit.options.tasks import PairOptions, TranslationOptions, UnmaskOptions
from lmkit.structured.outputs import JSONSchema


@dataclass(frozen=True)
class Checkpoint:
    """Which checkpoint, and how far it is trusted."""

    name: Annotated[str, typer.Argument(metavar="NAME", help="A Hub id, a folder, or a .gguf file.")]
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the Hub.")] = None
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Make no network call.")] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights, which can run any code.")
    ] = False


@dataclass(frozen=True)
class Loading(Checkpoint):
    """How a checkpoint is loaded."""

    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8, int4 or nf4.")] = "auto"
    device: Annotated[
        list[str] | None, typer.Option(help="Such as cpu or cuda:0; repeat it to split over several.")
    ] = None

    context_length: Annotated[
        int | None, typer.Option(help="How many tokens the model takes at once; what its config says if left out.")
    ] = None

    def load(self, task: Any) -> Any:
        """Load the checkpoint for a task."""
        with busy(f"loading {self.name}"):
            from lmkit.loading import load

            return load(task, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        options = asdict(self)
        devices = [int(name) if name.isdecimal() else name for name in options.pop("device") or ()]
        return {**options, "devices": devices or "auto"}


@dataclass(frozen=True)
class Tasked(Loading):
    """The same, for any task."""

    task: Annotated[str | None, typer.Option(help="causal, seq2seq or masked; what it was made for if left out.")] = (
        None
    )

    def chosen_task(self) -> Any:
        """Return the task; the first of those that the checkpoint was made for if none is given."""
        from lmkit.checkpoint.tasks import resolve_task
        from lmkit.cli.facts import describe

        return resolve_task(self.task) if self.task else next(iter(describe(self)["tasks"]), "causal")

    def _arguments(self) -> dict[str, Any]:
        options = super()._arguments()
        del options["task"]
        return options


@dataclass(frozen=True)
class Planning(Tasked):
    """How a checkpoint would be loaded, on devices that need not be here."""

    budget: Annotated[
        list[str] | None, typer.Option(help="Such as cuda:0=24GiB or disk=offload/; repeat it for several.")
    ] = None
    reserve_tokens: Annotated[int, typer.Option(help="Tokens of keys and values that must fit as well.")] = 0

    def plan(self) -> Any:
        """Plan to load the checkpoint."""
        from lmkit.loading import plan

        options = self._arguments()
        budgets = dict(_budget(written) for written in options.pop("budget") or ())
        if budgets and self.device:
            raise typer.BadParameter("pass --device or --budget, not both.")
        if budgets:
            options["devices"] = budgets
        return plan(self.chosen_task(), **options)


def _budget(written: str) -> tuple[str, str | int | float]:
    """Split a device and its budget."""
    device, equals, given = written.partition("=")
    if not equals:
        raise typer.BadParameter(f"--budget {written!r} is not written as cuda:0=24GiB.")
    if given.isdecimal():
        return device, int(given)
    return device, float(given) if given.replace(".", "", 1).isdecimal() else given


@dataclass(frozen=True)
class Given:
    """Where the texts come from."""

    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text; - or none at all reads standard input.")
    ] = None
    file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Read the text from a UTF-8 file.")] = (
        None
    )
    lines: Annotated[bool, typer.Option("--lines", help="Take each line as a text of its own, as it comes.")] = False

    @property
    def nowhere(self) -> bool:
        """Whether no text is given and none is piped in."""
        return self.text is None and self.file is None and sys.stdin.isatty()

    @property
    def typed(self) -> bool:
        """Whether the text comes from a keyboard."""
        return self.text == "-" and sys.stdin.isatty()

    def check(self) -> None:
        """Refuse, before a model is loaded, what says too much or too little."""
        if self.text is not None and self.file is not None:
            raise typer.BadParameter("pass TEXT or --file, not both.")
        if self.nowhere:
            raise typer.BadParameter("there is no text: pass TEXT or --file, or pipe one in.")

    def whole(self) -> str:
        """Return the text; that of a file or a pipe without its last line feed, as `$(…)` does."""
        with self._opened() as stream:
            text = stream.read()
        return text if isinstance(stream, io.StringIO) else text.removesuffix("\n")

    def rows(self) -> Iterator[str]:
        """Yield the lines as they come, without their ends."""
        with self._opened() as stream:
            for line in stream:
                yield line.removesuffix("\n")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[TextIO]:
        try:
            if self.file is not None:
                with self.file.open(encoding="utf-8-sig") as stream:
                    yield stream
            elif self.text in (None, "-"):
                yield _standard_input()
            else:
                yield io.StringIO(self.text)
        except UnicodeDecodeError as error:
            raise OptionError(
                f"{self.file or 'standard input'} is not UTF-8 text: {error}. Convert it first."
            ) from error


def _standard_input() -> TextIO:
    """Return standard input, read as UTF-8 whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    return sys.stdin


class LibraryOptions:
    """Options that the library declares; what was not given is the library's to decide."""

    _known: ClassVar[Mapping[str, Option]] = {}

    def __init_subclass__(cls, declared_in: type = GeneratorOptions, names: str = "") -> None:
        """Make a field of each of the names."""
        for name in names.split():
            cls.__annotations__[name] = _written(declared_in, name)
            setattr(cls, name, None)
        cls._known = {**cls._known, **{name: declared(declared_in)[name] for name in names.split()}}

    def chosen(self) -> dict[str, Any]:
        """Return the options that were given, by name, each a value that it takes: none loads a model in vain."""
        given = {name: value for name, value in vars(self).items() if value not in (None, [])}
        checked({name: value for name, value in given.items() if name in self._known}, self._known)
        return given


def _written(declared_in: type, name: str) -> Any:
    """Say how an option is written: one value; or the items of a list, each behind its singular."""
    option = declared(declared_in)[name]
    kind: Any = list[str] if option.many else get_args(get_type_hints(declared_in)[name])[0]
    flags = [f"--{name.removesuffix('s')}"] if option.many else []
    told = option.meaning + ("; repeat it for several." if option.many else ".")
    told += f" [default: {option.default}]" if option.default else ""
    return Annotated[kind | None, typer.Option(*flags, help=told)]


@dataclass(frozen=True)
class Decoding(LibraryOptions, names="max_new_tokens sample temperature top_p top_k num_beams seed stop truncate"):
    """The options of `GeneratorOptions` that a command line needs most."""


@dataclass(frozen=True)
class Translating(Decoding, declared_in=TranslationOptions, names="source target preset split keep suppress_unknown"):
    """The same, and those of `TranslationOptions` alone."""


@dataclass(frozen=True)
class Chatting(Decoding):
    """How a chat is answered."""

    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None


@dataclass(frozen=True)
class Filling(LibraryOptions, declared_in=UnmaskOptions, names="top_k targets order"):
    """The options of `UnmaskOptions` that a command line needs most."""


PAIR = tuple(declared(PairOptions))


@dataclass(frozen=True)
class Scoring(LibraryOptions, declared_in=PairOptions, names=" ".join(PAIR)):
    """What is scored behind a text."""

    continuation: Annotated[
        str | None, typer.Option(help="What is scored behind the text: of a translator, its translation.")
    ] = None


@dataclass(frozen=True)
class Ranking(LibraryOptions, declared_in=PairOptions, names=" ".join(PAIR)):
    """What is ranked behind a text, and how."""

    choices: Annotated[list[str], typer.Option("--choice", help="A continuation, or a translation; repeat it.")]
    normalize: Annotated[
        str | None, typer.Option(help="Compare them by none, tokens, bytes or prior. [default: none]")
    ] = None
    neutral: Annotated[str | None, typer.Option(help="What stands in the text's place for --normalize prior.")] = None


@dataclass(frozen=True)
class Doing:
    """What a checkpoint is loaded for."""

    task: Annotated[str, typer.Argument(metavar="TASK", help="causal, seq2seq or masked.")]


@dataclass(frozen=True)
class Filing:
    """Which rows are done, and how."""

    in_file: Annotated[
        str, typer.Argument(metavar="IN", help="A .jsonl, .csv or .parquet file; - is JSONL from standard input.")
    ]
    out_file: Annotated[str, typer.Argument(metavar="OUT", help="The same, for the rows with their answers.")]
    verb: Annotated[
        str | None, typer.Option(help="generate, chat, translate, fill, score or rank; the usual one if left out.")
    ] = None
    column: Annotated[
        str | None, typer.Option(help="What the model reads. [default: messages of chats, else text]")
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option("--from", help="A row's own option or argument, as choices=COLUMN; repeat it for several."),
    ] = None
    option: Annotated[
        list[str] | None, typer.Option(help="Any other option, as lookup=true; repeat it for several.")
    ] = None
    schema: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with the JSON schema of answers.")
    ] = None
    prefix: Annotated[str, typer.Option(help="What the names of new columns begin with.")] = ""
    full: Annotated[bool, typer.Option("--full", help="Add all of each result.")] = False
    journal: Annotated[Path | None, typer.Option(help="The journal's folder. [default: OUT.lmkit]")] = None
    restart: Annotated[bool, typer.Option("--restart", help="Forget what is done.")] = False
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Do the rows again that failed.")] = False

    def chosen(self) -> dict[str, Any]:
        """Return what `run_job` takes."""
        given = asdict(self)
        for name in ("in_file", "out_file", "option", "schema"):
            del given[name]
        given["columns"] = dict(_named(one, "--from") for one in self.columns or ())
        if self.schema is not None:
            given["output"] = JSONSchema(self.schema.read_text(encoding="utf-8"))
        others = (_named(one, "--option") for one in self.option or ())
        return given | {name: value_of(value) for name, value in others}


def _named(written: str, flag: str) -> tuple[str, str]:
    """Split a name and what it is."""
    name, equals, value = written.partition("=")
    if not equals:
        raise typer.BadParameter(f"{flag} {written!r} is not written as NAME=VALUE.")
    return name, value


def value_of(written: str) -> Any:
    """Read a value that is JSON, or else a text."""
    try:
        return json.loads(written)
    except ValueError:
        return written


@dataclass(frozen=True)
class Output:
    """How results and errors are shown."""

    json: Annotated[bool, typer.Option("--json", help="Write one JSON object per line.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def register(app: typer.Typer, function: Callable[..., None]) -> None:
    """Make a command of a function whose parameters are groups, an `Output` among them."""
    groups = {name: group for name, group in get_type_hints(function).items() if name != "return"}
    parameters = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for group in groups.values()
        for one in inspect.signature(group).parameters.values()
    ]

    for one in parameters:
        if isinstance(told := one.annotation.__metadata__[-1], OptionInfo):
            given = told.default  # which is the flag, if one is written out
            FLAGS[one.name] = given if isinstance(given, str) else "--" + one.name.replace("_", "-")

    def run(**values: Any) -> None:
        with reported(debug=values["debug"]):
            given = {name: {one.name: values[one.name] for one in fields(group)} for name, group in groups.items()}
            function(**{name: group(**given[name]) for name, group in groups.items()})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(function.__name__, help=function.__doc__)(run)
