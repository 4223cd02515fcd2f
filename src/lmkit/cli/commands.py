"""The command line, thin over `load()`: `lmkit generate|chat|translate|unmask|run|info|plan`.

Exit codes: 0 done (also when the reader of a pipe goes away), 1 an error, in one line on standard error, or a plan
that does not fit, 2 a command that is written wrongly, 3 a job that is done but for rows which failed, 130 Ctrl-C.
Neither torch nor transformers is imported before a checkpoint is looked at.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmkit.cli.options import (
    Chatting,
    Checkpoint,
    Decoding,
    Doing,
    Filing,
    Filling,
    Given,
    Loading,
    Output,
    Planning,
    Translating,
    register,
)
from lmkit.cli.screen import as_flags, complain, note, write, write_json
from lmkit.errors import InputTooLongError, LmkitError
from lmkit.jobs.files import STANDARD
from lmkit.jobs.job import check_files
from lmkit.results import Unmasking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmkit.results.base import Result

    Prepare = Callable[[str], Any]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would read the brackets of texts and paths as markup
    pretty_exceptions_enable=False,  # --debug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def generate(checkpoint: Loading, given: Given, decoding: Decoding, output: Output) -> None:
    """Continue a text with a causal model."""
    respond(checkpoint, "causal", given, decoding.chosen(), output)


def translate(checkpoint: Loading, given: Given, decoding: Translating, output: Output) -> None:
    """Translate a text, or do what else an encoder-decoder was trained for."""
    respond(checkpoint, "seq2seq", given, decoding.chosen(), output)


def unmask(checkpoint: Loading, given: Given, filling: Filling, output: Output) -> None:
    """Fill in each [MASK] of a text: a line per way of doing it, its probability first."""
    respond(checkpoint, "masked", given, filling.chosen(), output)


def chat(checkpoint: Loading, given: Given, chatting: Chatting, output: Output) -> None:
    """Answer a message; without one, talk in the terminal.

    /exit or Ctrl-D ends the talk. Ctrl-C stops an answer, and its message is forgotten.
    """
    options = chatting.chosen()
    system = options.pop("system", None)
    before = [] if system is None else [{"role": "system", "content": system}]
    if given.nowhere and not given.lines:
        talk(checkpoint.load("causal"), before, options, output)
    else:

        def as_chat(text: str) -> list[dict[str, str]]:
            return [*before, {"role": "user", "content": text}]

        respond(checkpoint, "causal", given, options, output, prepare=as_chat)


def run(doing: Doing, checkpoint: Loading, files: Filing, decoding: Translating, output: Output) -> None:
    """Answer each row of a file; run again, it goes on behind the rows that are done."""
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter("lmkit: %(message)s"))
    logger = logging.getLogger("lmkit.jobs")
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    options = decoding.chosen() | files.chosen()
    check_files(files.in_file, files.out_file)
    try:
        with checkpoint.load(doing.task) as model:
            report = model.run_job(files.in_file, files.out_file, **options)
    except KeyboardInterrupt:
        note("stopped. Rows that are done are kept: the same command goes on behind them.")
        raise
    finally:
        logger.removeHandler(told)
    note(str(report))
    if output.json and files.out_file != STANDARD:
        write_json(report.to_dict())
    if report.failed:
        raise typer.Exit(3)


def info(checkpoint: Checkpoint, output: Output) -> None:
    """Say what a checkpoint is, which task fits it, and how to load it."""
    from lmkit.cli.facts import describe, in_words

    facts = describe(checkpoint)
    if output.json:
        write_json(facts)
        return
    for name, value in facts.items():
        write(f"{name.replace('_', ' ') + ':':<16}{in_words(value)}")


def plan(checkpoint: Planning, output: Output) -> None:
    """Say what a checkpoint would take, where its parts would go and whether they fit, without loading it."""
    decided = checkpoint.plan()
    write_json(decided.to_dict()) if output.json else write(str(decided))
    if not decided.fits:
        raise typer.Exit(1)


for _function in (generate, chat, translate, unmask, run, info, plan):
    register(app, _function)


def _version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        from lmkit import __version__

        write(f"lmkit {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)]


@app.callback()
def _lmkit(*, version: Version = False) -> None:
    """Load any text language model by name, and run it well."""


def main() -> None:
    """Run the command line; the `lmkit` script calls this."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    app(prog_name="lmkit")


def respond(
    checkpoint: Loading, task: str, given: Given, options: dict[str, Any], output: Output, *, prepare: Prepare = str
) -> None:
    """Answer one text, or line after line; `prepare` makes of each what the model is given."""
    given.check()
    if not given.lines:
        text = given.whole()  # before loading: what cannot be read need not wait for it
        tell(checkpoint.load(task), prepare(text), options, output)
        return
    model = checkpoint.load(task)
    inputs = (prepare(line) for line in given.rows())
    # Who types lines wants each answered before the next; map() reads ahead.
    windows: Any = ([one] for one in inputs) if given.typed else [inputs]
    results = (one for window in windows for one in model.map(window, on_error="return", **options))
    cut = failed = False
    for number, result in enumerate(results, start=1):
        if isinstance(result, LmkitError):
            failed = True
            complain(result, f"line {number}: ")
            error = {"error": as_flags(str(result)), "type": type(result).__name__}
            write_json(error) if output.json else write("")
        else:
            cut |= show(result, output) == "length"
    remark(options, output, cut=cut)
    if failed:
        raise typer.Exit(1)


def tell(model: Any, given: Any, options: dict[str, Any], output: Output) -> str:
    """Answer one input, in a terminal piece by piece, and return the answer."""
    if output.json or not sys.stdout.isatty() or model.plan.task == "masked":
        result = model(given, **options)
        remark(options, output, cut=show(result, output) == "length")
        return str(result)
    reason, answer = None, ""
    try:
        for chunk in model.stream(given, **options):
            write(chunk.text, end="")
            answer, reason = answer + chunk.text, chunk.finish_reason
    finally:
        write("")
    remark(options, output, cut=reason == "length")
    return answer


def show(result: Result, output: Output) -> str | None:
    """Write a result, and return why it ended."""
    if output.json:
        write_json(result.to_dict())
    elif isinstance(result, Unmasking):
        write("\n".join(f"{way.score:.4f}\t{way.text}" for way in result.candidates))
    else:
        write(str(result))
    return getattr(result, "finish_reason", None)


def remark(options: dict[str, Any], output: Output, *, cut: bool) -> None:
    """Say that a text stopped at a limit that nobody asked for; JSON says so itself."""
    if cut and "max_new_tokens" not in options and not output.json:
        note("stopped at the limit of tokens, which --max-new-tokens sets.")


def talk(generator: Any, messages: list[dict[str, str]], options: dict[str, Any], output: Output) -> None:
    """Answer what is typed, knowing what was said before."""
    for line in typed():
        messages.append({"role": "user", "content": line})
        try:
            answer = tell(generator, messages, options, output)
        except (KeyboardInterrupt, InputTooLongError) as error:
            messages.pop()
            if isinstance(error, InputTooLongError):
                complain(error)
        else:
            messages.append({"role": "assistant", "content": answer})


def typed() -> Iterator[str]:
    """Yield what is typed, line by line, until /exit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its arrow keys
    with contextlib.suppress(EOFError):
        while (line := input("> " if sys.stdout.isatty() else "").strip()) != "/exit":
            if line:
                yield line
        return
    write("")
