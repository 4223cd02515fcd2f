"""Silence for the libraries below, for the duration of a call, and for nobody else afterwards."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "huggingface_hub", "peft")

_lock = threading.Lock()
_depth = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries below lmkit from logging and drawing bars while it is open.

    Nested and concurrent uses share one silence: the first one in sets it, the last one out puts back
    what was there. Errors still pass: only messages below ERROR are held.
    """
    global _depth  # noqa: PLW0603 - how many are inside is a property of the process, like what is silenced
    with _lock:
        if _depth == 0:
            _undo.enter_context(_silenced())
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _undo.close()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [(logger, logger.level, max(logger.level, logging.ERROR)) for logger in loggers]
    with _without_bars():
        for logger, _, held in levels:
            logger.setLevel(held)
        try:
            yield
        finally:
            for logger, before, held in levels:
                if logger.level == held:  # else somebody has set it meanwhile, and means it
                    logger.setLevel(before)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    own: Any = transformers_logging  # neither module is typed
    hub: Any = utils
    shown, hub_hidden = own.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    own.disable_progress_bar()  # the Hub's as well
    try:
        yield
    finally:
        if shown:
            own.enable_progress_bar()  # the Hub's as well
        (hub.disable_progress_bars if hub_hidden else hub.enable_progress_bars)()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore Python's warnings while it is open: for a load and for calls of generate(), not for every step.

    Opening it makes Python forget which warnings it has shown once already, wherever they came from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
