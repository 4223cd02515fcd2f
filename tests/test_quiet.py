import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from lmkit._quiet import LIBRARIES, hushed, quiet, without_prints, without_warnings


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


def heard(library: logging.Logger, work: Callable[[], object]) -> list[str]:
    """Return what a library's handler hears while something is done."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library.addHandler(handler)
    try:
        work()
    finally:
        library.removeHandler(handler)
    return said


@pytest.mark.parametrize("silence", [hushed, quiet])
@pytest.mark.parametrize("name", [*LIBRARIES, "transformers.modeling_utils", "peft.utils"])
def test_libraries_say_nothing_below_an_error(name: str, silence: Any) -> None:
    """Inside, a library's warnings are held and its errors pass; outside, both pass."""
    library = logging.getLogger(name)

    def work() -> None:
        quiet(lambda: None)  # the loggers that are there are found by loads
        silence(lambda: (library.warning("held"), library.error("passes")))
        library.warning("passes too")

    assert heard(library, work) == ["passes", "passes too"]


def test_a_handler_that_others_share_hears_them() -> None:
    """What other libraries log in the same context passes, by the same handler."""
    library, other = logging.getLogger("transformers"), logging.getLogger("lmkit")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library.addHandler(handler)
    other.addHandler(handler)
    try:
        quiet(lambda: (library.warning("held"), other.warning("heard")))
    finally:
        library.removeHandler(handler)
        other.removeHandler(handler)
    assert said == ["heard"]


def test_what_another_thread_logs_meanwhile_is_heard() -> None:
    """The silence is the calling context's own."""
    library = logging.getLogger("transformers")

    def other() -> None:
        thread = threading.Thread(target=library.warning, args=("another thread",))
        thread.start()
        thread.join()

    assert heard(library, lambda: quiet(other)) == ["another thread"]


def test_python_warnings_are_held() -> None:
    """Inside, a warning is neither shown nor raised, though here warnings are errors."""
    without_warnings(lambda: warnings.warn("held", stacklevel=1))
    with pytest.raises(UserWarning, match="passes"):
        warnings.warn("passes", stacklevel=1)


def bars() -> tuple[bool, bool]:
    """Say whether transformers and the Hub's library draw bars."""
    return transformers_logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()


def test_progress_bars_are_hidden() -> None:
    """Inside, neither transformers nor the Hub's library draws a bar; afterwards they do again."""
    assert quiet(bars) == (False, False)
    assert bars() == (True, True)


def test_the_users_own_settings_come_back() -> None:
    """A level and hidden bars that the user chose are the same afterwards, on an error too."""
    library = logging.getLogger("transformers")
    level = library.level
    transformers_logging.disable_progress_bar()
    library.setLevel(logging.CRITICAL)
    try:
        before = state()
        with contextlib.suppress(ZeroDivisionError):
            quiet(lambda: 1 / 0)
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
        assert quiet(bars) == (False, False)
        assert bars() == (False, not hidden)
    finally:
        transformers_logging.enable_progress_bar()


def test_nested_silence_ends_with_the_outermost() -> None:
    """Leaving an inner silence keeps the outer one's."""
    library = logging.getLogger("transformers")

    def outer() -> None:
        quiet(lambda: None)
        library.warning("held")
        assert bars() == (False, False)

    assert heard(library, lambda: quiet(outer)) == []


def test_silences_of_two_threads_may_cross() -> None:
    """The first thread in may leave first: bars are hidden until the last one leaves."""
    entered, leave = threading.Event(), threading.Event()

    def late() -> None:
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=quiet, args=(late,))

    def first() -> None:
        thread.start()
        assert entered.wait(10)

    quiet(first)
    assert bars() == (False, False)
    leave.set()
    thread.join()


def test_warnings_filters_set_meanwhile_stay() -> None:
    """Filters that the user puts in place of those inside hold, and are not taken back."""
    before, own = warnings.filters, [*warnings.filters]
    try:
        without_warnings(lambda: setattr(warnings, "filters", own))
        assert warnings.filters is own
    finally:
        warnings.filters = before


def test_prints_of_this_thread_are_dropped_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    """What a library prints is dropped; another thread's prints pass, and standard output is what it was."""
    before = sys.stdout

    def work() -> None:
        print("a library's warning")  # noqa: T201
        other = threading.Thread(target=print, args=("another thread",))
        other.start()
        other.join()

    without_prints(work)
    print("afterwards")  # noqa: T201
    assert sys.stdout is before
    assert capsys.readouterr().out == "another thread\nafterwards\n"
