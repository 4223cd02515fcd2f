import pickle
from typing import Any

import pytest

import lmkit
from lmkit import errors

FAMILY = {
    "UnknownTaskError": ValueError,
    "ModelNotFoundError": OSError,
    "PrecisionError": ValueError,
    "PlacementError": ValueError,
    "WeightsError": OSError,
    "LanguageError": ValueError,
    "OptionError": ValueError,
    "OutputError": ValueError,
    "UnknownOptionError": TypeError,
    "InputTooLongError": ValueError,
    "MissingExtraError": ImportError,
    "VersionError": ImportError,
    "EngineError": RuntimeError,
    "JobError": RuntimeError,
}


@pytest.mark.parametrize("name, builtin", FAMILY.items())
def test_every_error_is_an_lmkit_error_and_a_builtin(name: str, builtin: type[Exception]) -> None:
    """Each error can be caught as LmkitError and as the builtin that fits, and is public."""
    kind = getattr(lmkit, name)
    assert issubclass(kind, lmkit.LmkitError)
    assert issubclass(kind, builtin)
    assert kind is getattr(errors, name)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """The module's drawing names every class with the builtin it derives from."""
    assert {name for name, kind in vars(errors).items() if isinstance(kind, type)} == {*FAMILY, "LmkitError"}
    assert errors.__doc__ is not None
    for name, builtin in FAMILY.items():
        line = next(line for line in errors.__doc__.splitlines() if f"─ {name} " in line)
        assert f"({builtin.__name__})" in line


@pytest.mark.parametrize("name", FAMILY)
def test_errors_can_be_pickled(name: str) -> None:
    """An error raised in another process arrives with its class and words."""
    error = getattr(lmkit, name)("what was given, what is accepted")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - written in the line itself
    assert (type(again), str(again)) == (type(error), "what was given, what is accepted")


def test_an_error_has_no_results_of_its_own() -> None:
    """Without a failed row `results` is empty, and one error's results are not another's."""
    first, second = lmkit.EngineError("x"), lmkit.EngineError("y")
    first.results = [1]
    assert list(second.results) == []


@pytest.mark.parametrize(
    "word, found",
    [
        ("temprature", " Did you mean 'temperature'?"),
        ("temp", " Did you mean 'temperature'?"),
        ("TOP_K", " Did you mean 'top_k'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_the_nearest_word_is_proposed(word: str, found: str) -> None:
    """A word close to a choice, or its beginning, proposes it; a far one proposes nothing."""
    assert errors.nearest(word, ["top_k", "temperature"]) == found


def test_words_are_listed_quoted() -> None:
    """Choices in a message are quoted and separated by commas."""
    assert errors.listed(["a", "b"]) == "'a', 'b'"
    assert errors.listed([]) == ""


def test_a_notebook_shows_where_the_caller_was(capsys: pytest.CaptureFixture[str]) -> None:
    """The message and the caller's own lines, none of lmkit's frames; elsewhere a traceback is Python's own."""
    from IPython.core.interactiveshell import InteractiveShell

    shell: Any = InteractiveShell()
    shell.run_cell("import lmkit\ndef ask():\n    lmkit.load('causal', 'x', 'int9', local_files_only=True)")
    capsys.readouterr()
    shell.run_cell("ask()")
    shown = capsys.readouterr().out
    assert "ask()" in shown
    assert "lmkit.load('causal', 'x', 'int9', local_files_only=True)" in shown
    assert shown.rstrip().splitlines()[-1].startswith("ModelNotFoundError: ")
    assert len(shown.splitlines()) < 10
    assert "loading.py" not in shown
    InteractiveShell.clear_instance()
