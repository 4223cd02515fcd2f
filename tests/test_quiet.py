import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from lmkit._quiet import LIBRARIES, quiet, without_warnings


def state() -> dict[str, Any]:
    """Return everything that `quiet` changes for a while."""
    return {
        "levels": {name: logging.getLogger(name).level for name in LIBRARIES},
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "bars": transformers_logging.is_progress_bar_enabled(),
        "hub bars": hub.are_progress_bars_disabled(),
    }


@pytest.fixture(autouse=True)
def _same_afterwards() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_say_nothing_below_an_error(name: str) -> None:
    """Inside, a library's warnings are held and its errors pass; outside, both pass."""
    library = logging.getLogger(name)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library.addHandler(handler)
    try:
        with quiet():
            library.warning("held")
            library.error("passes")
        library.warning("passes too")
    finally:
        library.removeHandler(handler)
    assert said == ["passes", "passes too"]


def test_python_warnings_are_held() -> None:
    """Inside, a warning is neither shown nor raised, though here warnings are errors."""
    with without_warnings():
        warnings.warn("held", stacklevel=1)
    with pytest.raises(UserWarning, match="passes"):
        warnings.warn("passes", stacklevel=1)


def test_progress_bars_are_hidden() -> None:
    """Inside, neither transformers nor the Hub's library draws a bar; afterwards they do again."""
    with quiet():
        assert not transformers_logging.is_progress_bar_enabled()
        assert hub.are_progress_bars_disabled()
    assert transformers_logging.is_progress_bar_enabled()
    assert not hub.are_progress_bars_disabled()


def test_the_users_own_settings_come_back() -> None:
    """A level and hidden bars that the user chose are the same afterwards, on an error too."""
    library = logging.getLogger("transformers")
    level = library.level
    transformers_logging.disable_progress_bar()
    library.setLevel(logging.CRITICAL)
    try:
        before = state()
        with contextlib.suppress(RuntimeError), quiet():
            assert library.level == logging.CRITICAL  # never louder than the user wants
            raise RuntimeError
        assert state() == before
    finally:
        library.setLevel(level)
        transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("hidden", [True, False])
def test_the_hubs_bars_are_their_own_setting(*, hidden: bool) -> None:
    """Bars of the Hub's library come back as they were, whatever those of transformers were."""
    transformers_logging.disable_progress_bar()
    (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()
    try:
        with quiet():
            assert hub.are_progress_bars_disabled()
        assert hub.are_progress_bars_disabled() is hidden
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_nested_silence_ends_with_the_outermost() -> None:
    """Leaving an inner `quiet` keeps the outer one's silence."""
    with quiet():
        with quiet():
            pass
        assert logging.getLogger("transformers").level >= logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()


def test_silences_of_two_threads_may_cross() -> None:
    """The first thread in may leave first: silence lasts until the last one leaves."""
    entered, leave = threading.Event(), threading.Event()

    def late() -> None:
        with quiet():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=late)
    with quiet():
        thread.start()
        assert entered.wait(10)
    assert not transformers_logging.is_progress_bar_enabled()
    assert logging.getLogger("transformers").level >= logging.ERROR
    leave.set()
    thread.join()
