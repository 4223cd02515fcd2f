"""A bar for calls and loads that take long: rows done, and tokens per second."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

from lmkit._interrupts import surely
from lmkit._quiet import without_warnings
from lmkit.options.generation import ModeOptions
from lmkit.options.option import checked, declared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger("lmkit")

ResultT = TypeVar("ResultT")

DELAY_SECONDS = 2.0
"""A call that is done sooner shows nothing."""

LOG_SECONDS = 30.0
"""How far apart lines in a log are."""


@contextlib.contextmanager
def bar(
    wanted: object, total: int | None, done: int = 0, *, logs: bool = False, unit: str = "rows"
) -> Iterator[Callable[[object], None]]:
    """Give a function to call with each result; it draws the bar.

    Args:
        wanted: True draws, False does not; None draws in a terminal or a notebook, unless the level of the logger
            "lmkit" is above WARNING.
        total: How many rows there are, if it is known. A single row has no bar unless it is wanted.
        done: How many of them were done before.
        logs: Whether to log a line now and then where no bar is drawn, unless `wanted` is False.
        unit: What is counted.
    """
    checked({"progress": wanted}, declared(ModeOptions))
    if wanted is False or (wanted is None and (total == 1 or not watched())):
        yield _logged(total, done) if logs and wanted is None else lambda _result: None
        return
    delay = 0 if wanted else DELAY_SECONDS
    shown = _drawn(total=total, initial=done, unit=f" {unit}", delay=delay, leave=bool(wanted))
    started, tokens = time.perf_counter(), 0

    def update(result: object) -> None:
        nonlocal tokens
        tokens += getattr(result, "generated_tokens", 0)
        if tokens:
            speed = tokens / (time.perf_counter() - started)
            shown.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        shown.update()

    with contextlib.closing(shown):
        yield update


def loading(do: Callable[[], ResultT]) -> ResultT:
    """Call `do`, which loads weights, with transformers' bar of them where somebody looks and it takes long."""
    if multiprocessing.parent_process() is not None or not watched():  # replicas would draw over each other
        return do()
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda _, given, named: _drawn(*given, **named, delay=DELAY_SECONDS, leave=False))
    return surely(do, lambda: set_tqdm_hook(before))


def _drawn(*given: Any, **named: Any) -> Any:
    def draw() -> Any:
        from tqdm.auto import tqdm

        return tqdm(*given, **named, dynamic_ncols=True)

    return without_warnings(draw)  # a notebook without widgets gets a plain bar, and a warning


def _logged(total: int | None, done: int) -> Callable[[object], None]:
    """Return what logs how far a job is."""
    started = told = time.monotonic()
    rows = tokens = 0

    def update(result: object) -> None:
        nonlocal told, rows, tokens
        rows, tokens = rows + 1, tokens + getattr(result, "generated_tokens", 0)
        now = time.monotonic()
        if now - told < LOG_SECONDS:
            return
        told, speed = now, rows / (now - started)
        of = f" of {total:,}" if total is not None else ""
        left = f", {(total - done - rows) / speed / 60:.0f} minutes left" if total is not None else ""
        speeds = f"{speed:.1f} rows/s, {tokens / (now - started):.0f} tokens/s"
        logging.getLogger("lmkit.jobs").info("%s%s rows, %s%s", f"{done + rows:,}", of, speeds, left)

    return update


def watched() -> bool:
    """Say whether somebody looks: at a terminal or a notebook."""
    if logger.getEffectiveLevel() > logging.WARNING:
        return False
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return sys.stderr.isatty() or "ZMQ" in type(shell).__name__
