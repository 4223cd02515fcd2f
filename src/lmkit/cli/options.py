"""The arguments and options of the commands, in groups that commands share.

A group is a frozen dataclass whose fields are annotated as typer reads them; `register` makes a command of a
function whose parameters are groups.
"""

# Annotations are not postponed here: they are read when the program starts.
import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TextIO, get_type_hints

import typer

from lmkit.cli.screen import reported
from lmkit.errors import OptionError

__all__ = [
    "Chatting",
    "Checkpoint",
    "Decoding",
    "Filling",
    "Given",
    "Loading",
    "Output",
    "Planning",
    "Translating",
    "register",
]


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

    def load(self, task: Any) -> Any:
        """Load the checkpoint for a task."""
        from lmkit.loading import load

        return load(task, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        options = asdict(self)
        devices = [int(name) if name.isdecimal() else name for name in options.pop("device") or ()]
        return {**options, "devices": devices or "auto"}


@dataclass(frozen=True)
class Planning(Loading):
    """How a checkpoint would be loaded, on devices that need not be here."""

    task: Annotated[str | None, typer.Option(help="causal, seq2seq or masked; what it was made for if left out.")] = (
        None
    )
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
            msg = "pass --device or --budget, not both."
            raise typer.BadParameter(msg)
        task: Any = options.pop("task") or self._made_for()
        if budgets:
            options["devices"] = budgets
        return plan(task, **options)

    def _made_for(self) -> str:
        """Return the task that the checkpoint was made for; the first of several."""
        from lmkit.cli.facts import describe

        tasks: list[str] = describe(self)["tasks"]
        return tasks[0] if tasks else "causal"


def _budget(written: str) -> tuple[str, str | int | float]:
    """Split a device and its budget."""
    device, equals, given = written.partition("=")
    if not equals:
        msg = f"--budget {written!r} is not written as cuda:0=24GiB."
        raise typer.BadParameter(msg)
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
            msg = "pass TEXT or --file, not both."
            raise typer.BadParameter(msg)
        if self.nowhere:
            msg = "there is no text: pass TEXT or --file, or pipe one in."
            raise typer.BadParameter(msg)

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
            msg = f"{self.file or 'standard input'} is not UTF-8 text: {error}. Convert it first."
            raise OptionError(msg) from error


def _standard_input() -> TextIO:
    """Return standard input, read as UTF-8 whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    return sys.stdin


class Options:
    """What options of the library a group has; what was not given is the library's to decide."""

    def chosen(self) -> dict[str, Any]:
        """Return the options that were given, by name."""
        every: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # its subclasses are dataclasses
        return {name: value for name, value in every.items() if value not in (None, [])}


@dataclass(frozen=True)
class Decoding(Options):
    """The options of `GenerationOptions` that a command line needs most."""

    max_new_tokens: Annotated[int | None, typer.Option(help="The most tokens to write; 256 if left out.")] = None
    sample: Annotated[
        bool | None, typer.Option("--sample/--no-sample", help="Draw tokens, as the checkpoint recommends.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Draw tokens, the wilder the higher.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that add up to this.")] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None
    num_beams: Annotated[int | None, typer.Option(help="Search with this many beams.")] = None
    seed: Annotated[int | None, typer.Option(help="What is drawn is the same for the same seed.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat it for several.")] = None
    truncate: Annotated[str | None, typer.Option(help="Cut a text that is too long: left or right.")] = None


@dataclass(frozen=True)
class Translating(Decoding):
    """The options of `TranslationOptions`."""

    source: Annotated[str | None, typer.Option(help="The text's language: a code or a name, or detect.")] = None
    target: Annotated[str | None, typer.Option(help="The language to translate to.")] = None
    preset: Annotated[str | None, typer.Option(help="What else to do, such as summarization; see lmkit info.")] = None
    split: Annotated[str | None, typer.Option(help="Where a text is split: sentence, paragraph or none.")] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(help="What stays as it is: a pattern, or urls, emails, …; repeatable."),
    ] = None


@dataclass(frozen=True)
class Chatting(Decoding):
    """How a chat is answered."""

    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None


@dataclass(frozen=True)
class Filling(Options):
    """The options of `UnmaskOptions`."""

    top_k: Annotated[int | None, typer.Option(help="How many ways to show; 5 if left out.")] = None
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Consider only this word; repeat it for several.")
    ] = None
    order: Annotated[str | None, typer.Option(help="Which mask to fill first: left_to_right or most_certain.")] = None


@dataclass(frozen=True)
class Output:
    """How results and errors are shown."""

    json: Annotated[bool, typer.Option("--json", help="Write one JSON object per line.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def register(app: typer.Typer, function: Callable[..., None]) -> None:
    """Make a command of a function whose parameters are groups, an `Output` among them."""
    groups = {name: group for name, group in get_type_hints(function).items() if name != "return"}
    parameters: list[inspect.Parameter] = []
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        for one in fields(group):
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(one.name, kind, default=default, annotation=hints[one.name]))

    def run(**values: Any) -> None:
        with reported(debug=values["debug"]):
            function(**{name: group(**_of(group, values)) for name, group in groups.items()})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    app.command(function.__name__, help=function.__doc__)(run)


def _of(group: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in fields(group)}
