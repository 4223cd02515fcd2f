"""The command line, thin over `load()`: `lmkit generate|chat|translate|unmask|score|rank|run|info|plan`.

Exit codes: 0 done (also when the reader of a pipe goes away), 1 an error, in one line on standard error, or a plan
that does not fit, 2 a command that is written wrongly, 3 a job that is done but for rows which failed, 130 Ctrl-C.
Neither torch nor transformers is imported before a checkpoint is looked at.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated, Any

import typer

from lmkit.cli.answers import respond
from lmkit.cli.options import (
    PAIR,
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
    Ranking,
    Scoring,
    Tasked,
    Translating,
    register,
)
from lmkit.cli.screen import FLAGS, note, write, write_json
from lmkit.cli.talk import Talk
from lmkit.jobs.files import STANDARD
from lmkit.jobs.job import check_files

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would read the brackets of texts and paths as markup
    pretty_exceptions_enable=False,  # --debug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def generate(checkpoint: Loading, given: Given, decoding: Decoding, output: Output) -> None:
    """Continue a text with a causal model."""
    respond(checkpoint, "causal", given, decoding.chosen(), output)


def translate(checkpoint: Loading, given: Given, decoding: Translating, output: Output) -> None:
    """Translate a text, or what else an encoder-decoder was made for."""
    respond(checkpoint, "seq2seq", given, decoding.chosen(), output)


def unmask(checkpoint: Loading, given: Given, filling: Filling, output: Output) -> None:
    """Fill in each [MASK] of a text.

    A line for each way of doing it: its probability, a tab and the text.
    """
    respond(checkpoint, "masked", given, filling.chosen(), output)


def chat(checkpoint: Loading, given: Given, chatting: Chatting, output: Output) -> None:
    """Answer a message; without one, talk in the terminal.

    In the talk, /help lists what there is. Ctrl-C ends an answer, and Ctrl-D the talk. There an answer ends where the
    model ends it, unless --max-new-tokens is given.
    """
    options = chatting.chosen()
    system = options.pop("system", None)
    before = [] if system is None else [{"role": "system", "content": system}]
    if given.nowhere and not given.lines and not output.json:
        Talk(checkpoint.load("causal"), before, options).run()
    else:

        def as_chat(text: str) -> list[dict[str, str]]:
            return [*before, {"role": "user", "content": text}]

        respond(checkpoint, "causal", given, options, output, prepare=as_chat)


def score(checkpoint: Tasked, given: Given, scoring: Scoring, output: Output) -> None:
    """Say how likely a text is.

    In a terminal its tokens are tinted by surprise; in a pipe, and with --lines, a line has the log-probability, a tab
    and the perplexity.
    """
    _compare("score", checkpoint, given, scoring.chosen(), output, argument="continuation")


def rank(checkpoint: Tasked, given: Given, ranking: Ranking, output: Output) -> None:
    """Put continuations of a text in order, the likeliest first.

    In a terminal they are bars; in a pipe, and with --lines, a line for each has its share, a tab and the choice.
    """
    _compare("rank", checkpoint, given, ranking.chosen(), output, argument="choices")


def _compare(
    verb: str, checkpoint: Tasked, given: Given, options: dict[str, Any], output: Output, *, argument: str
) -> None:
    """Score or rank what stands behind the texts, after a check that the task takes what is given."""
    task = checkpoint.chosen_task()
    not_taken = {"causal": PAIR, "seq2seq": ("neutral",), "masked": (*PAIR, argument)}[task]
    if wrong := [name for name in not_taken if name in options]:
        raise typer.BadParameter(f"a {task} model takes no {FLAGS[wrong[0]]}.")
    if task == "seq2seq" and argument not in options:
        raise typer.BadParameter(f"a translation is what is scored: pass {FLAGS[argument]}.")
    behind = (options.pop(argument),) if argument in options else ()
    respond(checkpoint, task, given, options, output, verb=verb, behind=behind)


def run(doing: Doing, checkpoint: Loading, files: Filing, decoding: Translating, output: Output) -> None:
    """Answer each row of a file.

    Run again, it goes on behind the rows that are done.
    """
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
    """Say what a checkpoint is, and how to load it."""
    from lmkit.cli.facts import describe, in_words

    facts = describe(checkpoint)
    if output.json:
        write_json(facts)
        return
    for name, value in facts.items():
        write(f"{name.replace('_', ' ') + ':':<16}{in_words(value)}")


def plan(checkpoint: Planning, output: Output) -> None:
    """Say whether a checkpoint fits, without loading it.

    What it would take, and where its parts would go; the exit code is 1 where it does not fit.
    """
    decided = checkpoint.plan()
    write_json(decided.to_dict()) if output.json else write(str(decided))
    if not decided.fits:
        raise typer.Exit(1)


for _function in (generate, chat, translate, unmask, score, rank, run, info, plan):
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
