"""Whether files have a model's weights, told from headers: compared with what plain transformers reports of a load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
import lmkit
from lmkit.errors import WeightsError
from lmkit.planning import weight_names

hf: Any = transformers
plan: Any = lmkit.plan
FAMILIES = pytest.mark.parametrize("name", checkpoints.FAMILIES)
Weights = dict[str, torch.Tensor]


def rewritten(name: str, where: Path, edit: Callable[[Weights], Weights]) -> Path:
    """Copy a family's checkpoint with other tensors in it."""
    for file in checkpoints.folder(name).iterdir():
        if file.suffix != ".safetensors":
            (where / file.name).write_bytes(file.read_bytes())
    tensors = edit(load_file(checkpoints.folder(name) / "model.safetensors"))
    save_file({key: one.contiguous() for key, one in tensors.items()}, where / "model.safetensors", {"format": "pt"})
    return where


def reported(name: str, where: Path) -> set[str]:
    """Return which weights plain transformers finds missing, or of another shape, when it has read a checkpoint."""
    auto = getattr(hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])
    _, told = auto.from_pretrained(where, output_loading_info=True, ignore_mismatched_sizes=True)
    return {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}


def judged(name: str, where: Path) -> str:
    """Return what a plan says against a checkpoint; nothing if it is planned."""
    try:
        plan(checkpoints.FAMILIES[name].task, where, "auto", {"cpu": "1GiB"})
    except WeightsError as error:
        return str(error)
    return ""


@FAMILIES
def test_a_plan_says_what_a_load_would_report(name: str, tmp_path: Path) -> None:
    """Of every family, a file without one of its tensors fails in the plan if transformers then misses a weight."""
    keys = list(load_file(checkpoints.folder(name) / "model.safetensors"))
    without = keys[len(keys) // 2]
    where = rewritten(name, tmp_path, lambda found: {key: one for key, one in found.items() if key != without})
    missing = reported(name, where)
    told = judged(name, where)
    assert bool(told) == bool(missing)
    assert all(key in told for key in sorted(missing)[:5])
    assert "lacks weights that" in told or not missing


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "marian", "bert"])
def test_other_shapes_fail_in_a_plan(name: str, tmp_path: Path) -> None:
    """A tensor of another shape than the model's is named before it is read, as transformers names it when it is."""
    keys = [key for key, one in load_file(checkpoints.folder(name) / "model.safetensors").items() if one.dim() == 2]
    other = keys[len(keys) // 2]
    where = rewritten(name, tmp_path, lambda found: found | {other: found[other][:-1]})
    (mismatched,) = reported(name, where)
    assert f"has other shapes for weights that {type(checkpoints.reference(name)[0]).__name__} needs" in judged(
        name, where
    )
    assert f"'{mismatched}'" in judged(name, where)


@pytest.mark.parametrize(
    "name, old, new",
    [("llama", "model.", ""), ("gpt2", "transformer.", ""), ("bert", "LayerNorm.bias", "LayerNorm.beta")],
)
def test_names_that_transformers_maps_are_planned(name: str, old: str, new: str, tmp_path: Path) -> None:
    """A file whose names are those of the bare model, or of old times, is planned, since transformers can load it."""
    where = rewritten(name, tmp_path, lambda found: {key.replace(old, new): one for key, one in found.items()})
    assert not any(old in key for key in load_file(where / "model.safetensors"))
    assert reported(name, where) == set()
    assert judged(name, where) == ""


def mixtral(where: Path, layers: int = 1) -> Weights:
    """Save a small Mixtral, whose experts are one by one in the file; return its weights."""
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    for file in checkpoints.folder("llama").glob("tokenizer*"):
        (where / file.name).write_bytes(file.read_bytes())
    hf.MixtralForCausalLM(config).save_pretrained(where)
    tensors: Weights = load_file(where / "model.safetensors")
    assert [key for key in tensors if ".experts.3." in key]
    return tensors


def test_experts_that_are_joined_when_read_are_planned(tmp_path: Path) -> None:
    """Experts that a file has one by one, and the model in one tensor, are all looked for."""
    tensors = mixtral(tmp_path)
    assert plan("causal", tmp_path, "auto", {"cpu": "1GiB"}).fits
    for key in tensors:
        if ".experts." in key:
            tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"has other shapes for weights that MixtralForCausalLM needs: .*experts"):
        plan("causal", tmp_path, "auto", {"cpu": "1GiB"})


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many tensors transformers is given to match at a time."""
    counts: list[int] = []
    report = weight_names._report

    def counted(skeleton: Any, found: Any) -> Any:
        counts.append(len(found))
        return report(skeleton, found)

    monkeypatch.setattr(weight_names, "_report", counted)
    return counts


def test_one_of_all_layers_that_are_alike_is_matched(given: list[int], tmp_path: Path) -> None:
    """Of 14 layers of one kind the first with one digit is matched, and the first with two, and what is in none."""
    tensors = mixtral(tmp_path, 14)
    assert plan("causal", tmp_path, "auto", {"cpu": "1GiB"}).fits
    layer = sum(".layers.0." in key for key in tensors)
    assert given == [2 * layer + len(tensors) - 14 * layer]


@pytest.mark.parametrize("number", [0, 7, 10, 13])
@pytest.mark.parametrize("what", ["experts.2.w1", "q_proj"])
def test_a_layer_that_is_unlike_the_others_is_looked_at(
    what: str, number: int, given: list[int], tmp_path: Path
) -> None:
    """Whichever layer lacks a weight, or has one of another shape, a plan says of it what a load reports."""
    tensors = mixtral(tmp_path, 14)
    (key,) = (key for key in tensors if f".layers.{number}." in key and what in key)
    without = {name: one for name, one in tensors.items() if name != key}
    for edited in (without, tensors | {key: tensors[key][:-1].contiguous()}):
        save_file(edited, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError) as caught:
            plan("causal", tmp_path, "auto", {"cpu": "1GiB"})
        try:
            _, report = hf.MixtralForCausalLM.from_pretrained(
                tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except RuntimeError:  # experts that do not fit together
            assert "conversion of the weights" in str(caught.value)
            continue
        expected = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        assert expected
        assert all(f"'{name}'" in str(caught.value) for name in expected)
        assert given[-1] == len(edited)


def test_a_pattern_with_a_layers_number_has_all_layers_matched(
    given: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers maps the names of one layer by its number, no layer stands for another."""
    from transformers import conversion_mapping, modeling_utils
    from transformers.core_model_loading import WeightRenaming

    own = conversion_mapping.get_model_conversion_mapping
    other = WeightRenaming(
        source_patterns=r"layers\.(0|10)\.self_attn\.q", target_patterns=r"layers.\1.self_attn.q_proj"
    )
    for module in (conversion_mapping, modeling_utils):
        monkeypatch.setattr(module, "get_model_conversion_mapping", lambda *args, **more: [other, *own(*args, **more)])
    tensors = {key.replace("q_proj", "q"): one for key, one in mixtral(tmp_path, 14).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks .*layers\.11\.self_attn\.q_proj"):
        plan("causal", tmp_path, "auto", {"cpu": "1GiB"})
    assert given == [len(tensors)]


@pytest.mark.parametrize("word", ["int8", "int4", "nf4", "bfloat16"])
def test_it_is_told_in_any_precision_and_no_weight_is_read(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load of such a file fails before the weights are read, whatever they would be held in."""
    where = rewritten("llama", tmp_path, lambda found: {key: one for key, one in found.items() if "q_proj" not in key})
    monkeypatch.setattr("lmkit.loading.entry.read_model", lambda *_, **__: pytest.fail("weights were read"))
    load: Any = lmkit.load
    with pytest.raises(WeightsError, match=r"lacks weights that LlamaForCausalLM needs: 'model\.layers\.0\..*q_proj"):
        load("causal", where, word, "cpu")
