"""How texts are answered and shown: one text piece by piece in a terminal, or line after line."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import typer

from lmkit.cli.screen import as_flags, complain, note, write, write_json
from lmkit.errors import LmkitError
from lmkit.results import Ranking, Score, Unmasking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lmkit.cli.options import Given, Loading, Output
    from lmkit.results import TextChunk
    from lmkit.results.base import Result

    Prepare = Callable[[str], Any]

WINDOW = 128
"""How many lines are scored or ranked together."""


def respond(
    checkpoint: Loading,
    task: str,
    given: Given,
    options: dict[str, Any],
    output: Output,
    *,
    prepare: Prepare = str,
    verb: str | None = None,
    behind: tuple[Any, ...] = (),
) -> None:
    """Answer one text, or line after line.

    Args:
        checkpoint: The model.
        task: What it is loaded for.
        given: The texts.
        options: Of the verb.
        output: How answers are shown.
        prepare: Makes of a text what the model is given.
        verb: `"score"` or `"rank"`; a call if left out.
        behind: What the verb takes behind the text.
    """
    given.check()
    if not given.lines:
        text = given.whole()  # before loading: what cannot be read need not wait for it
        model = checkpoint.load(task)
        if verb is None:
            tell(model, prepare(text), options, output)
        else:
            show(getattr(model, verb)(prepare(text), *behind, **options), output, drawn=sys.stdout.isatty())
        return
    model = checkpoint.load(task)
    # Who types lines wants each answered before the next; map() reads ahead.
    most = 1 if given.typed else WINDOW if verb else None
    if sys.stdout.isatty():
        options = {**options, "progress": False}  # answers come where the bar would be
    answer = getattr(model, verb or "map")
    windows = _windows(map(prepare, given.rows()), most)
    _list((one for window in windows for one in answer(window, *behind, on_error="return", **options)), options, output)


def _windows(inputs: Iterator[Any], most: int | None) -> Iterator[Iterable[Any]]:
    """Take so many inputs at once; None is all, as they come."""
    return iter([inputs]) if most is None else iter(lambda: list(itertools.islice(inputs, most)), [])


def _list(results: Iterable[Any], options: dict[str, Any], output: Output) -> None:
    """Show results line by line, an error in its line's place."""
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


def tell(model: Any, given: Any, options: dict[str, Any], output: Output) -> None:
    """Answer one input, in a terminal piece by piece."""
    if output.json or not sys.stdout.isatty() or model.plan.task == "masked":
        reason = show(model(given, **options), output)
    else:
        reason = spell(model.stream(given, **options))
    remark(options, output, cut=reason == "length")


def spell(chunks: Iterable[TextChunk]) -> str | None:
    """Write a text as it comes, reasoning dimmed, and return why it ended."""
    reason = None
    try:
        for chunk in chunks:
            write(chunk.text, end="", dimmed=chunk.kind == "reasoning")
            reason = chunk.finish_reason
    finally:
        write("")
    return reason


def show(result: Result, output: Output, *, drawn: bool = False) -> str | None:
    """Write a result, or draw it, and return why it ended."""
    if output.json:
        write_json(result.to_dict())
    elif drawn:
        result.show()
    elif isinstance(result, Unmasking):
        write("\n".join(f"{way.score:.4f}\t{way.text}" for way in result.candidates))
    elif isinstance(result, Score):
        write(f"{result.logprob:.4f}\t{result.perplexity:.4f}")
    elif isinstance(result, Ranking):
        write("\n".join(f"{choice.probability:.4f}\t{choice.text}" for choice in result.choices))
    else:
        write(str(result))
    return getattr(result, "finish_reason", None)


def remark(options: dict[str, Any], output: Output, *, cut: bool) -> None:
    """Say that a text stopped at a limit that nobody asked for; JSON says so itself."""
    if cut and "max_new_tokens" not in options and not output.json:
        note("stopped at the limit of tokens, which --max-new-tokens sets.")
