import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import lmkit
from checkpoints import texts, wrapper
from lmkit.wrappers import progress
from notebooks import lines


def test_a_bar_shows_rows_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """With `progress=True` a call and a `map` draw a bar on standard error, with rows done and tokens per second."""
    wrapper("llama")(texts("llama"), max_new_tokens=4, progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "tokens/s" in shown
    list(wrapper("llama").map(iter(texts("llama")), max_new_tokens=4, progress=True))
    assert "5 rows" in capsys.readouterr().err


def test_masks_have_a_bar_too(capsys: pytest.CaptureFixture[str]) -> None:
    """An `Unmasker` draws one as well."""
    wrapper("bert")(["Birds [MASK]."] * 3, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [None, False])
def test_nothing_is_drawn_where_nobody_looks(wanted: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside of a terminal and a notebook there is no bar unless it is asked for."""
    wrapper("llama")(texts("llama"), max_new_tokens=4, progress=wanted)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_unless_the_logger_is_silenced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal a call that takes long has a bar; the logger set above WARNING turns that off."""
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    wrapper("llama")(texts("llama"), max_new_tokens=4)
    assert "0/5" in capsys.readouterr().err
    wrapper("llama")("She", max_new_tokens=4)
    assert not capsys.readouterr().err
    monkeypatch.setattr(logging.getLogger("lmkit"), "level", logging.ERROR)
    wrapper("llama")(texts("llama"), max_new_tokens=4)
    assert not capsys.readouterr().err


def test_progress_is_true_or_false() -> None:
    """Another value is refused, and a stream, which shows its own progress, takes none."""
    with pytest.raises(lmkit.OptionError, match="progress takes True or False"):
        wrapper("llama")("She", progress="yes")
    with pytest.raises(lmkit.OptionError, match="unknown option 'progress'"):
        wrapper("llama").stream("She", progress=True)


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
import lmkit
from lmkit.testing import FakeGenerator
from lmkit.wrappers import progress

progress.DELAY_SECONDS = -1
model = lmkit.load("masked", {model!r})
print("loaded", file=sys.stderr)
FakeGenerator(lambda prompt, options: time.sleep(0.01) or "Yes.")(["Is it?"] * 50, progress={progress})
"""


def shown_by(columns: int | None, wanted: object) -> str:
    """Return what a script that loads and calls writes to its terminal of so many columns, or to a pipe."""
    model = Path(__file__).parents[2] / "examples" / "checkpoints" / "world-bert"
    script = SCRIPT.format(paths=sys.path, model=str(model), progress=wanted)
    ours, theirs = os.pipe() if columns is None else pty.openpty()
    if columns is not None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs) as child:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while more := os.read(ours, 4096):
                told += more
    os.close(ours)
    assert child.returncode == 0, told
    return told.decode()


@pytest.mark.parametrize("columns", [40, 100])
def test_a_bar_fits_its_terminal(columns: int) -> None:
    """Of a load and of a call: no line is wider than the terminal, so that it is drawn over and not below the last."""
    told = shown_by(columns, wanted=True).replace("\r\n", "\n")
    assert all(len(line) <= columns for line in re.split("[\r\n]", told))
    assert "Loading weights:" in told
    loaded, bar, *rest = lines(told)
    assert (loaded, rest) == ("loaded", [""])
    assert "50/50" in bar


def test_a_pipe_has_no_bar_unless_it_is_wanted() -> None:
    """A log has nothing of loads and calls; with `progress=True` it has the bar of the call."""
    assert shown_by(None, wanted=None) == "loaded\n"
    told = shown_by(None, wanted=True)
    assert told.startswith("loaded\n\r")
    assert "50/50" in lines(told)[1]
