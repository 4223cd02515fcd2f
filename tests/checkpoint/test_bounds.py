"""A config that claims more than the weights could fill is refused before anything of that size is built."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import lmkit

HANGS = 20.0  # seconds, in which nothing of this size is built on any machine
plan: Any = lmkit.plan
load: Any = lmkit.load


def copy(where: Path, family: str, **values: Any) -> Path:
    """Copy a family's checkpoint, with other values in its config."""
    shutil.copytree(checkpoints.folder(family), where)
    file = where / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return where


@pytest.mark.parametrize("verb", [plan, load])
@pytest.mark.parametrize(
    "family, values, said",
    [
        ("llama", {"num_hidden_layers": 10**7}, "has num_hidden_layers: 10000000; at most 1084"),
        ("llama", {"num_hidden_layers": 1e9}, "has num_hidden_layers: 1000000000.0; at most 1084"),
        ("llama", {"num_hidden_layers": 900}, "more than 1084 tensors (num_hidden_layers: 900)"),
        ("llama", {"num_labels": 10**8}, "has num_labels: 100000000; at most 1084"),
        ("llama", {"head_dim": 10**9}, "more than 16777216 numbers (head_dim: 1000000000, "),
        ("llama", {"vocab_size": 10**12}, "more than 16777216 numbers (vocab_size: 1000000000000, "),
        ("llama", {"id2label": dict.fromkeys(range(70_000), "x")}, "has entries in id2label: 70000; at most 65536"),
        ("llama", {"layer_types": ["full_attention"] * 70_000}, "has entries in layer_types: 70000; at most 65536"),
        ("llama", {"text_config": {"num_hidden_layers": 10**30}}, f"has num_hidden_layers: {10**30}; at most"),
        ("gpt2", {"n_layer": 10**6}, "has n_layer: 1000000; at most"),
        ("mamba", {"num_hidden_layers": 10**9}, "has num_hidden_layers: 1000000000; at most"),
        ("t5", {"num_decoder_layers": 10**6}, "has num_decoder_layers: 1000000; at most"),
        ("bart", {"encoder_layers": 10**6}, "has encoder_layers: 1000000; at most"),
        ("xlm", {"n_langs": 10**9}, "has n_langs: 1000000000; at most"),
    ],
    ids=str,
)
def test_a_config_that_its_weights_cannot_fill_is_refused_at_once(
    verb: Any, family: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Layers, labels, sizes and lists beyond what the headers hold are an error that names the key and the bound."""
    where, started = copy(tmp_path / "copy", family, **values), time.monotonic()
    with pytest.raises(lmkit.WeightsError, match="does not belong to them, or is broken") as told:
        verb(checkpoints.FAMILIES[family].task, where, devices="cpu")
    assert said in str(told.value)
    assert time.monotonic() - started < HANGS


def test_a_config_of_a_few_more_layers_is_told_what_it_lacks(tmp_path: Path) -> None:
    """Below the bound, the error names the weights that the file has not."""
    with pytest.raises(lmkit.WeightsError, match=r"lacks weights that LlamaForCausalLM needs: 'model.layers.10"):
        plan("causal", copy(tmp_path / "copy", "llama", num_hidden_layers=40), devices="cpu")


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**6}, {"num_labels": 10**8}], ids=str)
def test_pickles_have_a_plain_bound(values: dict[str, Any], tmp_path: Path) -> None:
    """Where there are no headers, a config counts at most as much as any published model's."""
    where = copy(tmp_path / "copy", "llama", **values)
    torch.save(load_file(where / "model.safetensors"), where / "pytorch_model.bin")
    (where / "model.safetensors").unlink()
    with pytest.raises(lmkit.WeightsError, match="at most 4096, for its weights are pickles"):
        plan("causal", where, devices="cpu", allow_pickle=True)
