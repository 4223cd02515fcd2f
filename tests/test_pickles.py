"""Pickled weights that are allowed and are not what they should be: an error that says what to do, and no code runs."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit

ADVICE = "nothing in them is run: fetch the file again, or have it saved as safetensors."
Tensors = dict[str, torch.Tensor]


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


MARK = checkpoints.ROOT / "ran"


def saved(what: object, **options: Any) -> bytes:
    """Return the bytes of something that torch saved."""
    written = io.BytesIO()
    torch.save(what, written, **options)
    return written.getvalue()


def legacy_tar() -> bytes:
    """Return an archive such as torch wrote before version 0.1.10."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            content = pickle.dumps(Code())
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def of_a_class_that_is_gone() -> bytes:
    """Return a pickle of an object whose module is not there."""
    module: Any = types.ModuleType("gone")
    module.Thing = type("Thing", (), {"__module__": "gone"})
    sys.modules["gone"] = module
    try:
        return saved({"a": module.Thing()})
    finally:
        del sys.modules["gone"]


def changed(tensors: Tensors, change: Callable[[torch.Tensor], Any]) -> bytes:
    """Save tensors, the first of them changed."""
    first = next(iter(tensors))
    return saved(tensors | {first: change(tensors[first])})


REFUSED: dict[str, Callable[[Tensors], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda tensors: saved(tensors)[:4000],
    "no zip": lambda _: b"PK\x03\x04" + b"x" * 100,
    "no pickle": lambda _: b"<html>",
    "gone class": lambda _: of_a_class_that_is_gone(),
    "code": lambda tensors: saved(tensors | {"a": Code()}),
    "code alone": lambda _: pickle.dumps(Code()),
    "code of former versions": lambda _: saved({"a": Code()}, _use_new_zipfile_serialization=False),
    "tar": lambda _: legacy_tar(),
    "list": lambda tensors: saved(list(tensors.values())),
    "tensor": lambda _: saved(torch.ones(3)),
    "number": lambda _: saved(5),
    "module": lambda _: saved(torch.nn.Linear(2, 2)),
    "numbers": lambda tensors: saved(dict.fromkeys(tensors, 5)),
    "numbered": lambda tensors: saved(dict(enumerate(tensors.values()))),
    "arrays": lambda tensors: saved({name: tensor.numpy() for name, tensor in tensors.items()}),
    "one number": lambda tensors: changed(tensors, lambda _: 5),
    "sparse": lambda tensors: changed(tensors, lambda one: one.to_sparse()),
    "meta": lambda tensors: changed(tensors, lambda one: one.to("meta")),
}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Return the weights of a tiny Llama."""
    found: Tensors = checkpoints.reference("llama")[0].state_dict()
    return dict(found)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """Copy a tiny Llama without its weights."""
    shutil.copytree(checkpoints.folder("llama"), tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "copy"


def refused(where: Path) -> str:
    """Return what a load says, which runs nothing; a plan opens no pickle."""
    assert lmkit.plan("causal", where, "float32", "cpu", allow_pickle=True).fits
    with pytest.raises(lmkit.WeightsError) as caught:
        lmkit.load("causal", where, "float32", "cpu", allow_pickle=True)
    assert not MARK.exists()
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_pickle_that_torch_refuses_says_what_to_do(name: str, where: Path, tensors: Tensors) -> None:
    """Whatever is wrong with it, no code of it runs, and nobody is told to have it run."""
    (where / "pytorch_model.bin").write_bytes(REFUSED[name](tensors))
    said = refused(where)
    assert said.endswith(ADVICE)
    assert "weights_only` set to `False`" not in said


@pytest.mark.parametrize("second", [b"", saved({"a": Code()})], ids=["empty", "code"])
def test_a_shard_that_torch_refuses_says_what_to_do(second: bytes, where: Path, tensors: Tensors) -> None:
    """One shard of several is as one file."""
    names = list(tensors)
    half = {name: tensors[name] for name in names[::2]}
    (where / "pytorch_model-1.bin").write_bytes(saved(half))
    (where / "pytorch_model-2.bin").write_bytes(second)
    held = {name: f"pytorch_model-{1 if name in half else 2}.bin" for name in names}
    (where / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": held}))
    assert refused(where).endswith(ADVICE)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "former"])
def test_a_whole_pickle_is_the_model(options: dict[str, Any], where: Path, tensors: Tensors) -> None:
    """The same files with their tensors load, and answer as plain transformers does."""
    (where / "pytorch_model.bin").write_bytes(saved(tensors, **options))
    with lmkit.load("causal", where, "float32", "cpu", allow_pickle=True) as generator:
        found = generator("She", max_new_tokens=4).token_ids
    assert checkpoints.generated("llama", ["She"], max_new_tokens=4)[0][:4] == list(found)
