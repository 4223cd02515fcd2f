"""Processes killed while they write: what they leave is refused, or whole."""

import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import hub_stub
import lmkit
from lmkit.engine.compiled import CompiledStep

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

SHARDS = 20000
"""How many bytes a shard has, of a model in shards."""

REPO = "someone/tiny"


def forked(work: Callable[[], object]) -> int:
    """Begin something in a process that is forked now, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on, Python warns of forks beside threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def ended(child: int) -> bool:
    """Wait for a process; say whether it came to its end."""
    return os.waitpid(child, 0)[1] == 0


def saved_up_to(operation: int, model: Any, folder: Path, shard: int | str) -> bool:
    """Save a model in a process that is killed before an operation on a file; say whether it came to its end."""
    from transformers import modeling_utils

    done = iter(range(operation))

    def count() -> None:
        if next(done, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and "w" in str(arguments[1])
        if (writes or event == "os.remove") and str(arguments[0]).startswith(str(folder)):
            count()

    def save(*given: Any, **options: Any) -> None:
        count()  # safetensors writes elsewhere, and renames: Python is not told
        write(*given, **options)
        count()

    def work() -> None:
        modeling_utils.safe_save_file = save
        sys.addaudithook(hook)
        model.save_pretrained(folder, max_shard_size=shard)

    write: Any = modeling_utils.safe_save_file
    return ended(forked(work))


def another(where: Path, seed: int, theta: float) -> Path:
    """Save a Llama of its own, which differs in what no tensor shows too."""

    def edit(model: Any, _tokenizer: Any) -> None:
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.3 * weight.std() * torch.randn_like(weight)
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": theta}

    return checkpoints.changed("llama", where, edit)


def opened(folder: Path, precision: Any = "auto") -> Any:
    """Load a folder."""
    return lmkit.load("causal", str(folder), precision, "cpu")


def written(generator: Any) -> list[tuple[int, ...]]:
    """Continue two prompts."""
    return [result.token_ids for result in generator(["She wrote", "The old"], max_new_tokens=12)]


def found(folder: Path) -> list[tuple[int, ...]] | None:
    """Load what a process has left, and return what it writes; None if it is refused."""
    try:
        with opened(folder) as generator:
            return written(generator)
    except lmkit.WeightsError:
        return None


OVER: dict[str, tuple[str | None, str, int | str, int | str]] = {
    "nothing": (None, "int8", "50GB", "50GB"),
    "a file": ("int8", "int8", "50GB", "50GB"),
    "shards": ("int4", "int4", SHARDS, SHARDS),
    "a file instead of shards": ("int8", "int8", SHARDS, "50GB"),
    "wide weights": ("float32", "int8", "50GB", "50GB"),
    "another precision": ("int8", "int4", "50GB", "50GB"),
    "quantized weights": ("int8", "float32", "50GB", "50GB"),
}
"""What is saved over what: the precision that was there and the new one, and how many bytes their files have."""


@pytest.mark.parametrize("name", OVER)
def test_a_save_killed_at_any_operation_leaves_nothing_half_new(tmp_path: Path, name: str) -> None:
    """At each operation on a file: a later load is refused, or writes what the old or the new model writes."""
    before, precision, old_shard, new_shard = OVER[name]
    there = tmp_path / "there"
    shutil.copytree(checkpoints.folder("llama"), there, ignore=shutil.ignore_patterns("model*", "*config.json"))
    old = None
    if before is not None:
        with opened(another(tmp_path / "old", 1, 1e4), before) as generator:
            generator.model.save_pretrained(there, max_shard_size=old_shard)
        old = found(there)
        assert old is not None
    with opened(another(tmp_path / "new", 2, 77.0), precision) as generator:
        new, whole, operation = written(generator), False, 0
        while not whole:
            folder = Path(shutil.copytree(there, tmp_path / f"killed at {operation}"))
            whole = saved_up_to(operation, generator.model, folder, new_shard)
            assert found(folder) in ([new] if whole else [None, old, new])
            operation += 1
    assert operation > 4


def test_shards_beside_an_old_file_are_refused(tmp_path: Path) -> None:
    """The old file would be read in place of the new shards, with the new config."""
    with opened(checkpoints.folder("llama"), "int8") as generator:
        for shard in ("50GB", SHARDS):
            generator.model.save_pretrained(tmp_path, max_shard_size=shard)
        generator.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(lmkit.WeightsError, match=r"model\.safetensors was not saved with the config\.json beside it"):
        opened(tmp_path)
    with pytest.raises(lmkit.WeightsError, match="Save the model again, into an empty folder"):
        lmkit.plan("causal", str(tmp_path))


@pytest.mark.parametrize("last", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_download_that_is_killed_is_not_taken_for_whole(
    tmp_path: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are fetched last: where they are, no other file is missing, however slow it was."""
    respond, child = hub_stub._Handler._respond, [0]

    def slow(self: Any) -> None:
        if self.command == "GET" and self.path.endswith(f"/{last}") and child[0]:
            until = time.monotonic() + 0.5
            while not list(tmp_path.glob("*/snapshots/*/model.safetensors")) and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(child[0], signal.SIGKILL)
        else:
            respond(self)

    monkeypatch.setattr(hub_stub._Handler, "_respond", slow)
    options: Any = {"devices": "cpu", "cache_dir": tmp_path}
    with hub_stub.serving() as hub:
        hub.repositories[REPO] = {"main": checkpoints.folder("llama")}
        child[0] = forked(lambda: lmkit.load("causal", REPO, **options))
        assert not ended(child[0])
        child[0] = 0
        with pytest.raises(lmkit.ModelNotFoundError, match="nothing whole in the cache"):
            lmkit.load("causal", REPO, local_files_only=True, **options)
        lmkit.load("causal", REPO, **options).close()
        kept = {file.name for file in tmp_path.glob("*/snapshots/*/*")}
    assert last in kept


def test_a_compilation_that_is_killed_leaves_nothing_to_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled in a folder of the process's own, which nobody else reads; one that fails removes it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parent, there = os.getpid(), []

    def compile_half(_graph: object, _inputs: object) -> None:
        kernels = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        there.extend(kernels.parent.iterdir())
        kernels.mkdir()
        (kernels / "half.so").write_bytes(b"\x7fELF")
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CompiledStep, "_part", staticmethod(compile_half))
    folder = str(checkpoints.folder("llama"))
    assert not ended(forked(lambda: lmkit.load("causal", folder, devices="cpu", compile=True)))
    left = list(tmp_path.rglob("half.so"))
    with pytest.raises(lmkit.EngineError, match="no compiler"):
        lmkit.load("causal", folder, devices="cpu", compile=True)
    assert there == []
    assert len(left) == 1
    assert list(tmp_path.rglob("half.so")) == left
    assert not list(tmp_path.rglob("*.step"))
