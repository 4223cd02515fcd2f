import logging

import pytest

import lmkit
from checkpoints import texts, wrapper
from lmkit.wrappers import progress


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
