"""What lmkit takes from the libraries below beside their public interface: all listed, there, and loud when gone."""

import ast
import logging
import re
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from lmkit import _borrowed
from lmkit._borrowed import BORROWED, OLDEST, TESTED, Borrowed

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "lmkit").rglob("*.py"))
LIBRARIES = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "torch", "transformers")
OF_INSTANCES = {"_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_modules", "_parameters"}
"""Attributes that only an instance of `torch.nn.Module` has, or a hook of accelerate's puts there."""
DOCUMENTED = {
    "huggingface_hub.errors",
    "torch.fx.traceback",
    "torch.nn.functional",
    "transformers.modeling_outputs",
    "transformers.quantizers.auto",
    "transformers.utils",
    "transformers.utils.quantization_config",
}
"""Modules below a library's root that its documentation names."""
PATHS = {one.path for one in BORROWED}
LAST = {name for path in PATHS for name in path.partition(":")[2].split(".")}


@pytest.mark.parametrize("one", BORROWED, ids=lambda one: one.path)
def test_all_of_it_is_there(one: Borrowed) -> None:
    """Each thing that is borrowed can be found in the versions that are installed."""
    assert one.there, one.without


OF_PYTHON = {"_is_owned", "_at_fork_reinit", "_lock"}
"""What Python's own locks, and its module logging, have in all versions."""


def private_names(source: str) -> Iterator[str]:
    """Yield the names behind a dot that begin with an underscore and are not lmkit's own, by the linter's marks."""
    for line in source.splitlines():
        if "noqa: SLF001" in line or "noqa: B018, SLF001" in line:
            yield from re.findall(r"[\w\])]\.(_[a-z]\w+)", line.partition("#")[0])


def test_what_is_used_is_listed() -> None:
    """Every private attribute that the linter was told to let pass is in the list, with the module that uses it."""
    own = {name for file in SOURCES for name in re.findall(r"(?:def |self\.)(_[a-z]\w*)", file.read_text("utf-8"))}
    found = {(file.stem, name) for file in SOURCES for name in private_names(file.read_text(encoding="utf-8"))}
    used = {(stem, name) for stem, name in found if name not in own | OF_INSTANCES | OF_PYTHON}
    assert len(used) > 15
    assert {"_is_owned", "_at_fork_reinit"} <= set(dir(threading.RLock()))
    assert "_lock" in vars(logging)
    for stem, name in used:
        rooms = [one.room for one in BORROWED if name in re.split(r"[.:]", one.path)]
        assert rooms, name
        assert any(stem in room for room in rooms), (stem, name)
    assert OF_INSTANCES - {"_hf_hook"} <= vars(torch.nn.Linear(1, 1)).keys()


def test_undocumented_modules_are_listed() -> None:
    """Every name that is imported from below a library's root, but for type checkers, is in the list or documented."""
    checked = 0
    for file in SOURCES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for block in ast.walk(tree):
            if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING":
                block.body.clear()
        for node in ast.walk(tree):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.partition(".")[0] in LIBRARIES and "." in module:
                for name in (alias.name for alias in node.names):
                    checked += 1
                    known = any(path.startswith((f"{module}:{name}", f"{module}.{name}:")) for path in PATHS)
                    assert known or module in DOCUMENTED, (file.name, module, name)
    assert checked > 15


def pins(name: str) -> dict[str, str]:
    """Read the versions of a file of constraints."""
    lines = (ROOT / "versions" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_versions_are_the_ones_that_are_tried() -> None:
    """The oldest versions are the bounds of the package and those of `nox -s versions`, and so are the newest."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in content["project"]["dependencies"])  # type: ignore[union-attr]
    for library, oldest in OLDEST.items():
        assert bounds[library] == oldest == pins("oldest")[library]
        assert pins("newest")[library] == TESTED[library]


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Let the libraries be checked again."""
    for once in (_borrowed.check_versions, _borrowed.warn_of_gone):
        once.cache_clear()
    yield
    for once in (_borrowed.check_versions, _borrowed.warn_of_gone):
        once.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("verb", [lmkit.load, lmkit.plan])
def test_an_older_library_is_refused(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use says which library is too old and what to install, instead of blaming the checkpoint."""
    there = {"transformers": "5.0.0"}
    monkeypatch.setattr(_borrowed, "version", lambda name: there.get(name, OLDEST.get(name, "99")))
    told = rf"transformers 5\.0\.0 is too old, lmkit needs {re.escape(OLDEST['transformers'])} or later: pip install"
    with pytest.raises(lmkit.VersionError, match=told) as raised:
        verb("causal", "any/name")
    assert isinstance(raised.value, ImportError)


@pytest.mark.usefixtures("asked_anew")
def test_what_is_gone_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A load warns of what a library no longer has, with what that costs and the version that was tested."""
    gone = Borrowed("transformers:PreTrainedModel._once_there", "somewhere", "a slower way")
    elsewhere = Borrowed("not_imported_yet:anything", "somewhere", "nothing")
    monkeypatch.setattr(_borrowed, "BORROWED", (gone, elsewhere))
    with caplog.at_level(logging.WARNING, "lmkit"):
        for _ in range(2):
            checkpoints.fresh("gpt2").close()
    (told,) = [record.getMessage() for record in caplog.records if "_once_there" in record.getMessage()]
    assert f"tested with {TESTED['transformers']}): a slower way" in told
