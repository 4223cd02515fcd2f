"""What version 0.1 left on disk before the rooms were made still opens: pickles, and checkpoints saved quantized."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmkit
from quantized_layers import widened
from quantized_models import layers

FORMER = Path(__file__).parent / "former"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrappers and plans were made of `examples/checkpoints/…`."""
    monkeypatch.chdir(ROOT)


def opened(name: str) -> Any:
    """Return what a pickle of this name holds."""
    return pickle.loads((FORMER / f"{name}.pickle").read_bytes())  # noqa: S301 - ours


@pytest.mark.parametrize(
    "name, kind",
    [
        ("generation", lmkit.Generation),
        ("translation", lmkit.Translation),
        ("unmasking", lmkit.Unmasking),
        ("score", lmkit.Score),
        ("ranking", lmkit.Ranking),
        ("chunk", lmkit.TextChunk),
        ("stats", lmkit.EngineStats),
    ],
)
def test_results_open(name: str, kind: type) -> None:
    """A result is of the class of today, and shows all that it holds."""
    result = opened(name)
    assert type(result) is kind
    assert repr(result)
    assert json.dumps(result.to_dict())
    assert result == pickle.loads(pickle.dumps(result))  # noqa: S301


def test_results_say_what_they_said() -> None:
    """The texts, reasons and numbers of then."""
    assert opened("translation").text == "sept"
    assert opened("unmasking").candidates[0].token == "yen"
    assert [completion.finish_reason for completion in opened("generation").completions] == ["length", "length"]
    assert opened("generation").seed == 1
    assert isinstance(opened("error"), lmkit.OptionError)


def test_modes_open() -> None:
    """Modes are equal to those of today."""
    assert opened("modes") == (lmkit.Greedy(), lmkit.Sample(temperature=0.5, top_k=3), lmkit.Beam(4))


@pytest.mark.parametrize("name", ["plan", "causal_plan"])
def test_plans_open(name: str) -> None:
    """A plan says what it said of bytes, devices and reasons, and can be shown, hashed and pickled again."""
    plan = opened(name)
    assert type(plan) is lmkit.LoadPlan
    assert plan.fits
    assert plan.weights_bytes == sum(module.bytes for module in plan.modules) > 10**5
    assert plan.bytes_per_device == {"cpu": plan.weights_bytes}
    assert plan.placement.max_memory == {"cpu": 10**9}
    assert plan.device_map == {"": "cpu"}
    assert plan.reasons["precision"]
    assert plan.name in str(plan)
    assert plan._repr_html_()
    assert json.dumps(plan.to_dict())
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301
    assert hash(plan)
    if name == "causal_plan":
        assert plan.precision.name == "int8"
        assert plan.key_values.per_token
        assert plan.max_rows(64) > 1


@pytest.mark.parametrize("name", ["wrapper", "placed_wrapper"])
def test_wrappers_open(name: str) -> None:
    """A wrapper is loaded again, by the arguments of then."""
    with opened(name) as unmasker:
        assert unmasker("The currency of Japan is the [MASK].").candidates[0].token == "yen"
        assert unmasker.precision == ("int8" if name == "placed_wrapper" else "float32")


def test_a_quantization_config_opens() -> None:
    """Lmkit's own config of a quantization, as a user may keep one."""
    assert (opened("quantization").quant_method, opened("quantization").bits) == ("lmkit", 8)


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_saved_checkpoints_open(word: str) -> None:
    """A checkpoint that was saved in few bits is read as it is: its layers hold the numbers of the file."""
    saved = load_file(FORMER / word / "model.safetensors")
    with lmkit.load("causal", FORMER / word, devices="cpu") as generator:
        assert generator.precision == word
        found = layers(generator.model)
        assert len(found) > 5
        for name, layer in found.items():
            part = {leaf: saved[f"{name}.{leaf}"] for leaf in ("weight", "scales")}
            again = layer.state_dict()
            torch.testing.assert_close(widened(again)[0], widened(part)[0], rtol=0, atol=0)
        assert generator("The old sailor", max_new_tokens=4).generated_tokens == 4


def test_the_quantizer_is_registered_by_its_former_name() -> None:
    """The import that the pages of 0.1 told users of plain transformers to write still registers lmkit's quantizer."""
    code = (
        "import lmkit.quantizer, transformers; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING; "
        "assert 'lmkit' in AUTO_QUANTIZER_MAPPING; assert lmkit.quantizer.WeightOnlyConfig(8).bits == 8"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_opening_one_first_needs_no_import() -> None:
    """A process that has imported nothing of lmkit opens a plan: pickle imports what it names."""
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__module__)"
    command = [sys.executable, "-c", code, str(FORMER / "plan.pickle")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "lmkit.planning.plan"
