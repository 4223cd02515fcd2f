"""Silence for the libraries below, for the duration of a call, and for nobody else afterwards."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "huggingface_hub", "peft")


class _Shared:
    """One silence for all who want it: the first one in sets it, the last one out puts back what was there."""

    def __init__(self, silence: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._silence = silence
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo.enter_context(self._silence())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


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
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_quiet, _without_warnings = _Shared(_silenced), _Shared(_unwarned)


def quiet() -> contextlib.AbstractContextManager[None]:
    """Keep the libraries below lmkit from logging and drawing bars while it is open.

    Nested and concurrent uses share one silence. Errors still pass: only messages below ERROR are held.
    """
    return _quiet()


def without_warnings() -> contextlib.AbstractContextManager[None]:
    """Ignore Python's warnings while it is open: for a load and for calls of generate(), not for every step.

    Opening it makes Python forget which warnings it has shown once already, wherever they came from. Concurrent uses
    share one silence.
    """
    return _without_warnings()
