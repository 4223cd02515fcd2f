"""Weights that a config ties and a file has apart: as transformers has it, they are two where their values differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import lmkit
from checkpoints import logits

load: Any = lmkit.load
plan: Any = lmkit.plan
HEADS = {
    "llama": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen3": ("lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "t5": ("lm_head.weight", "shared.weight"),
    "mt5": ("lm_head.weight", "shared.weight"),
    "bart": ("lm_head.weight", "model.shared.weight"),
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}
"""Of each family its head, and the embedding that it is in a new model."""
EVERY = pytest.mark.parametrize("name", HEADS)


def saved(name: str, where: Path, *, equal: bool = False, bare: str = "", pickled: bool = False) -> Path:
    """Copy a family's checkpoint, its config tied, with a head in the file: another one, or the embedding's equal."""
    shutil.copytree(checkpoints.folder(name), where)
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(where / "model.safetensors")
    head, embedding = HEADS[name]
    noise = torch.randn(tensors[embedding].shape, generator=torch.Generator().manual_seed(0))
    tensors[head] = tensors[embedding].clone() if equal else noise * tensors[embedding].std()
    tensors = {key.removeprefix(bare): tensor for key, tensor in tensors.items()}
    if pickled:
        (where / "model.safetensors").unlink()
        torch.save(tensors, where / "pytorch_model.bin")
    else:
        save_file(tensors, where / "model.safetensors", {"format": "pt"})
    return where


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far scores are from others, as a share of their size."""
    return float((found - expected).norm() / expected.norm())


@EVERY
@pytest.mark.parametrize("word, most", [("float32", 1e-4), ("int8", 0.2), ("int4", 0.9)])
def test_a_head_of_its_own_is_kept(name: str, word: str, most: float, tmp_path: Path) -> None:
    """In every precision the scores are those of the file's own head, as plain transformers computes them."""
    task = checkpoints.FAMILIES[name].task
    where = saved(name, tmp_path / name)
    expected = logits(checkpoints.plain(task, where)[0])
    assert off(logits(checkpoints.plain(task, checkpoints.folder(name))[0]), expected) > 0.6
    with load(task, where, word, "cpu") as wrapper:
        assert off(logits(wrapper.model), expected) < most
        layer = wrapper.model.get_output_embeddings()
        with torch.no_grad():
            widened = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)
        assert off(widened.T, load_file(where / "model.safetensors")[HEADS[name][0]]) < 0.02
        assert wrapper.memory_bytes == wrapper.plan.weights_bytes + wrapper.plan.beside_bytes
        head, embedding = HEADS[name]
        assert f"{head} beside {embedding}" in wrapper.plan.reasons["untied"]


@EVERY
def test_a_head_that_is_equal_stays_tied(name: str, tmp_path: Path) -> None:
    """Where both tensors are in the file and equal, the model is planned and loaded as the one with one of them."""
    task = checkpoints.FAMILIES[name].task
    where = saved(name, tmp_path / name, equal=True)
    for word in ("float32", "int8"):
        with load(task, where, word, "cpu") as wrapper:
            assert "untied" not in wrapper.plan.reasons
            assert HEADS[name][0] in checkpoints.plain(task, where)[0].all_tied_weights_keys
            assert wrapper.memory_bytes == wrapper.plan.weights_bytes + wrapper.plan.beside_bytes
    tied = plan(task, saved(name, tmp_path / "both", equal=True), "float32", {"cpu": "1GiB"}).weights_bytes
    own = plan(task, saved(name, tmp_path / "own"), "float32", {"cpu": "1GiB"}).weights_bytes
    embedding = load_file(where / "model.safetensors")[HEADS[name][1]]
    assert own - tied == embedding.nbytes


@EVERY
@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_head_of_its_own_is_saved(name: str, word: str, tmp_path: Path) -> None:
    """A quantized model with a head of its own is saved with it, and read back with the same scores."""
    task = checkpoints.FAMILIES[name].task
    with load(task, saved(name, tmp_path / name), word, "cpu") as wrapper:
        wrapper.model.save_pretrained(tmp_path / "saved")
        wrapper.tokenizer.save_pretrained(tmp_path / "saved")
        expected = logits(wrapper.model)
    with load(task, tmp_path / "saved", "auto", "cpu") as wrapper:
        assert wrapper.precision == word
        assert torch.equal(logits(wrapper.model), expected)
        assert wrapper.memory_bytes == wrapper.plan.weights_bytes + wrapper.plan.beside_bytes


@pytest.mark.parametrize("name, bare, pickled", [("gpt2", "transformer.", False), ("gpt2", "", True), ("t5", "", True)])
def test_it_is_found_under_other_names_and_in_pickles(name: str, bare: str, pickled: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A file with the bare model's names, and a pickle, are told apart and kept as well."""
    task = checkpoints.FAMILIES[name].task
    where = saved(name, tmp_path / name, bare=bare, pickled=pickled)
    expected = logits(checkpoints.plain(task, where)[0])
    with load(task, where, "int8", "cpu", allow_pickle=pickled) as wrapper:
        assert off(logits(wrapper.model), expected) < 0.2
    equal = saved(name, tmp_path / "equal", bare=bare, pickled=pickled, equal=True)
    assert "untied" not in plan(task, equal, "int8", "cpu", allow_pickle=pickled).reasons
