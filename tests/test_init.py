import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lmkit

SOURCE = Path(lmkit.__file__).read_text(encoding="utf-8")


def printed_by(code: str) -> str:
    """Run code in a fresh interpreter, where every warning is an error, and return what it prints."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.returncode == 0
    return run.stdout.strip()


def test_importing_lmkit_imports_nothing_heavy() -> None:
    """`import lmkit` loads no package it depends on, and listing its names loads none either."""
    heavy = "torch transformers accelerate bitsandbytes safetensors tokenizers huggingface_hub numpy"
    loaded = printed_by(
        "import sys, lmkit; dir(lmkit); lmkit.__all__\n"
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["LmkitError", "Greedy", "Generation", "Placement"])
def test_using_a_name_does_not_need_torch(name: str) -> None:
    """Names that hold no tensors come without torch, so that an error can be caught cheaply."""
    assert printed_by(f"import sys, lmkit; lmkit.{name}; print('torch' in sys.modules)") == "False"


def test_the_public_names_are_the_ones_that_can_be_imported() -> None:
    """Each name of `__all__` is found once, in the module that is its home, and `dir()` shows it."""
    assert len(set(lmkit.__all__)) == len(lmkit.__all__)
    assert dir(lmkit) == sorted([*lmkit.__all__, "__version__"])
    for name in lmkit.__all__:
        home = importlib.import_module(f"lmkit.{lmkit._HOMES[name]}")
        assert getattr(lmkit, name) is getattr(home, name)


def test_star_import_brings_exactly_the_public_names() -> None:
    """`from lmkit import *` binds `__all__` and no more."""
    names: dict[str, object] = {}
    exec("from lmkit import *", names)  # noqa: S102 - a star import is not allowed in a function
    assert set(names) - {"__builtins__"} == set(lmkit.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The imports under `TYPE_CHECKING` are those that happen lazily, from the same modules."""
    guarded = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {name: f"lmkit.{home}" for name, home in lmkit._HOMES.items()}


def test_every_error_is_public() -> None:
    """What lmkit raises on purpose can be caught by a public name."""
    from lmkit import errors

    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert raised <= set(lmkit.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that lmkit does not have is refused as by any module."""
    with pytest.raises(AttributeError, match="module 'lmkit' has no attribute 'pipeline'"):
        lmkit.pipeline  # noqa: B018
    assert not hasattr(lmkit, "generation_config")


def test_the_version_is_that_of_the_installed_package() -> None:
    """`lmkit.__version__` is what pip shows."""
    assert lmkit.__version__ == version("lmkit")
