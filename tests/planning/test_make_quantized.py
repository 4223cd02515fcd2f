"""Plans of quantized models for accelerators that are recorded, not here; bitsandbytes' layers are the reference."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

import checkpoints
import lmkit
import published
from lmkit.errors import PlacementError, PrecisionError
from lmkit.planning.machine import Device, Machine
from lmkit.planning.make import check_fits
from machines import CPU, GIB, MPS, OLD_CUDA, TWO_CUDA, planned
from quantized_models import by_hand, checkpoint, quantized

hf: Any = transformers
CUDA = Machine({"cuda:0": Device(24 * GIB, 23 * GIB, bfloat16=True), "cpu": Device(64 * GIB, 40 * GIB, bfloat16=True)})
"""A card of 24 GiB, and a processor with bfloat16 units."""
ONE = {"cuda:0": "24GiB"}
NAMES = pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
EIGHT = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": EIGHT,
    "int4": NF4,
    "nf4": NF4,
    "nf4, single": {**NF4, "bnb_4bit_use_double_quant": False},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
}
"""What each word is to bitsandbytes, and configs that no word is."""


def plan(name: str, precision: Any, machine: Machine = CUDA, devices: Any = ONE, **which: Any) -> lmkit.LoadPlan:
    """Plan to load a family's checkpoint on a machine."""
    return planned(checkpoints.FAMILIES[name].task, checkpoint(name, **which), machine, precision, devices)


def asked(precision: str) -> Any:
    """Return a word as it is, or the config that is called so."""
    return precision if precision in ("int8", "int4", "nf4") else BitsAndBytesConfig(**SETTINGS[precision])


def weights_only(model: Any) -> int:
    """Count what a model holds by hand, without what it computes itself and does not save."""
    model = copy.copy(model)
    unsaved = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }
    return by_hand(model) - sum(buffer.nbytes for buffer in model.buffers() if id(buffer) in unsaved)


# What the words are -----------------------------------------------------------------------------


@pytest.mark.parametrize("word, name", [("int4", "int4"), ("4bit", "int4"), ("nf4", "nf4")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_four_bits_are_nf4_with_sound_defaults(word: str, name: str, dtype: str) -> None:
    """On CUDA, four bits are bitsandbytes' nf4, doubly quantized, and compute in the checkpoint's dtype."""
    chosen = plan("llama", word, dtype=dtype).precision
    config: Any = chosen.quantization
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype is chosen.dtype is getattr(torch, dtype)
    assert (chosen.name, chosen.asked) == (name, word)
    assert "bitsandbytes nf4, double quantization" in chosen.reason


@pytest.mark.parametrize("word", ["int8", "8bit"])
def test_eight_bits_are_bitsandbytes_int8(word: str) -> None:
    """On CUDA, eight bits are LLM.int8(), with the library's own threshold."""
    chosen = plan("llama", word).precision
    config: Any = chosen.quantization
    assert (config.load_in_8bit, config.load_in_4bit) == (True, False)
    assert config.llm_int8_threshold == BitsAndBytesConfig().llm_int8_threshold
    assert (chosen.name, chosen.dtype) == ("int8", torch.bfloat16)
    assert "bitsandbytes LLM.int8()" in chosen.reason


@pytest.mark.parametrize("dtype, computed", [("bfloat16", "float32"), ("float16", "float16"), ("float32", "float32")])
def test_an_older_card_computes_in_what_it_has(dtype: str, computed: str) -> None:
    """A card without bfloat16 units computes a bfloat16 checkpoint in float32, in the quantized layers too."""
    chosen = plan("llama", "nf4", OLD_CUDA, "auto", dtype=dtype).precision
    config: Any = chosen.quantization
    assert chosen.dtype is config.bnb_4bit_compute_dtype is getattr(torch, computed)


@pytest.mark.parametrize("word", ["int8", "int4"])
@pytest.mark.parametrize(
    "machine, devices", [(CPU, "cpu"), (MPS, "mps:0"), (CUDA, "cpu")], ids=["cpu", "mps", "beside"]
)
def test_elsewhere_the_words_are_lmkits_own(word: str, machine: Machine, devices: str) -> None:
    """On a CPU, also one beside a card, and on Apple's devices, int8 and int4 are lmkit's quantizer."""
    found = plan("llama", word, machine, devices)
    config: Any = found.precision.quantization
    assert (config.quant_method, config.bits) == ("lmkit", int(word.removeprefix("int")))
    assert "lmkit's own weight-only quantizer" in found.precision.reason


@pytest.mark.parametrize("odd", [0, 16])
def test_a_card_multiplies_what_a_processor_cannot(odd: int) -> None:
    """Layers whose widths bitsandbytes' CPU kernel does not take are quantized on CUDA, and left out on such a CPU."""
    on_card, on_cpu = plan("llama", "nf4", odd=odd), plan("llama", "nf4", CPU, "cpu", odd=odd)
    assert on_card.precision.quantization.llm_int8_skip_modules is None  # type: ignore[union-attr]
    skipped: Any = on_cpu.precision.quantization
    assert any("mlp" in name for name in skipped.llm_int8_skip_modules or ()) == bool(odd)
    assert (on_card.weights_bytes < on_cpu.weights_bytes) == bool(odd)


# Bytes ------------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("precision", SETTINGS)
@pytest.mark.parametrize("odd", [0, 16, 2])
def test_bytes_are_those_of_the_layers_themselves(name: str, precision: str, odd: int) -> None:
    """A plan's bytes are, to the byte, what plain transformers and bitsandbytes hold after a load, on a CPU here."""
    settings = BitsAndBytesConfig(
        **SETTINGS[precision], **({} if precision == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16})
    )
    auto = getattr(hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])
    model = auto.from_pretrained(
        checkpoint(name, odd=odd), quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    found = plan(name, asked(precision), odd=odd)
    assert found.weights_bytes == weights_only(model)
    assert found.bytes_per_device == {"cuda:0": found.weights_bytes}
    held = {module.name: module.bytes for module in found.modules}
    for block in [module for module in held if module.rpartition(".")[2].isdecimal()]:
        assert held[block] == weights_only(model.get_submodule(block))


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_bytes_of_a_published_model_are_those_of_its_layers(word: str) -> None:
    """Llama-3 8B takes on CUDA what bitsandbytes' layers of its shapes take, 32 times, and the rest in bfloat16."""
    entry = next(entry for entry in published.PUBLISHED if str(entry) == "Meta-Llama-3-8B")
    folder = published.write(entry, checkpoints.ROOT / "llama-3-8b")
    found = planned("causal", folder, CUDA, word, ONE)
    shapes = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
    block = sum(count * built(word, *shape) for shape, count in shapes.items()) + 2 * 2 * 4096
    assert found.weights_bytes == 32 * block + 2 * (2 * 128256 * 4096 + 4096)
    assert found.fits
    assert {module.bytes for module in found.modules if ".layers." in module.name} == {block}


def built(word: str, outputs: int, inputs: int) -> int:
    """Count what a quantized layer of a shape holds, when it has been quantized by bitsandbytes."""
    weight = torch.zeros(outputs, inputs, dtype=torch.bfloat16)
    weight[:, ::64] = 1
    if word == "int8":
        layer: Any = bitsandbytes.nn.Linear8bitLt(1, 1, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        return int(layer.weight.nbytes + layer.weight.SCB.nbytes)
    layer = bitsandbytes.nn.Linear4bit(1, 1, bias=False)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return by_hand(layer)


@NAMES
@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_quantized_plan_says_what_is_and_what_is_not(name: str, word: str) -> None:
    """A reason tells how much is quantized and how much stays wide; blocks name the types of their weights."""
    found = plan(name, word)
    assert "stay in torch.bfloat16" in found.reasons["quantized"]
    blocks = [module.dtype.split(", ") for module in found.modules if module.name.rpartition(".")[2].isdecimal()]
    assert all(("int8" if word == "int8" else "nf4") in dtypes for dtypes in blocks)  # T5 has more of them wide
    assert found.weights_bytes < plan(name, "bfloat16").weights_bytes


# Divided models ---------------------------------------------------------------------------------

BESIDE: dict[str, Any] = {
    "cpu": lmkit.Placement({"": "cuda:0", "model.layers.1": "cpu"}),
    "disk": lmkit.Placement({"": "cuda:0", "model.layers.1": "disk"}, offload_folder="offload"),
}


@pytest.mark.parametrize("place", BESIDE)
@pytest.mark.parametrize("precision", SETTINGS)
def test_bitsandbytes_parts_stay_on_accelerators(place: str, precision: str) -> None:
    """A map with parts on the CPU or a disk does not fit, and a load of it is refused, with what would help."""
    found = plan("llama", asked(precision), devices=BESIDE[place])
    assert not found.fits
    assert f"bitsandbytes wants all parts on accelerators, and some would be on '{place}'" in found.reasons["fits"]
    assert "llm_int8_enable_fp32_cpu_offload=True" in found.reasons["fits"]
    with pytest.raises(PlacementError, match="bitsandbytes wants all parts on accelerators"):
        check_fits(found)


@pytest.mark.parametrize("place", BESIDE)
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_config_may_allow_parts_elsewhere(place: str, precision: str) -> None:
    """With `llm_int8_enable_fp32_cpu_offload` such a map is planned."""
    config = BitsAndBytesConfig(**SETTINGS[precision], llm_int8_enable_fp32_cpu_offload=True)
    found = plan("llama", config, devices=BESIDE[place])
    assert found.fits
    assert {module.name: module.device for module in found.modules}["model.layers.1"] == place
    assert "cross to cuda:0 for each token" in found.reasons["offload"]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("place", BESIDE)
def test_parts_that_are_allowed_elsewhere_are_wide(precision: str, place: str) -> None:
    """What bitsandbytes leaves on the CPU or a disk is not quantized, and takes what it takes in the plain model."""
    config = BitsAndBytesConfig(**SETTINGS[precision], llm_int8_enable_fp32_cpu_offload=True)
    found = plan("llama", config, devices=BESIDE[place])
    wide_plan = plan("llama", "bfloat16", devices=BESIDE[place])
    sizes, wide_sizes = ({module.name: module.bytes for module in one.modules} for one in (found, wide_plan))
    assert sizes["model.layers.1"] == wide_sizes["model.layers.1"]
    assert sizes["model.layers.0"] == {m.name: m.bytes for m in plan("llama", config).modules}["model.layers.0"]
    assert sizes["model.layers.0"] < wide_sizes["model.layers.0"]
    assert {m.name: m.dtype for m in found.modules}["model.layers.1"] == "bfloat16"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_wide_parts_have_to_fit_the_cpu(precision: str) -> None:
    """A CPU that has room for the parts quantized, and not for them as they will be, does not fit."""
    config = BitsAndBytesConfig(**SETTINGS[precision], llm_int8_enable_fp32_cpu_offload=True)
    block = {m.name: m.bytes for m in plan("llama", "bfloat16").modules}["model.layers.1"]
    where: Any = BESIDE["cpu"].device_map
    tight, roomy = (lmkit.Placement(where, {"cuda:0": "24GiB", "cpu": room}) for room in (block - 1, block))
    assert not plan("llama", config, devices=tight).fits
    assert plan("llama", config, devices=roomy).fits


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_config_that_allows_parts_on_the_cpu_leaves_a_model_there_wide(precision: str) -> None:
    """On the CPU alone, such a config quantizes nothing, and the plan says so as plain transformers does."""
    config = BitsAndBytesConfig(**SETTINGS[precision], llm_int8_enable_fp32_cpu_offload=True)
    model = hf.AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert plan("llama", config, CPU, "cpu").weights_bytes == weights_only(model)


@pytest.mark.parametrize("word", ["int8", "int4", "nf4"])
def test_several_cards_divide_a_quantized_model(word: str) -> None:
    """Parts go to both cards, each whole, with the bytes that they have undivided."""
    whole = plan("llama", word)
    share = f"{int(whole.weights_bytes * 0.9)}"
    found = plan("llama", word, TWO_CUDA, {"cuda:0": int(share), "cuda:1": int(share)})
    assert found.fits
    assert set(found.bytes_per_device) == {"cuda:0", "cuda:1"}
    assert sum(found.bytes_per_device.values()) == found.weights_bytes == whole.weights_bytes


@pytest.mark.parametrize("word", ["int8", "int4", "nf4"])
def test_a_model_that_all_went_to_the_cpu_is_planned_for_it(word: str) -> None:
    """Where the card has no room for any part, the model computes on the CPU, and is quantized as it is there."""
    found = plan("llama", word, devices={"cuda:0": "1KiB", "cpu": "1GiB"}, odd=16)
    assert found.bytes_per_device.keys() == {"cpu"}
    expected: Any = plan("llama", word, CPU, "cpu", odd=16)
    assert type(found.precision.quantization) is type(expected.precision.quantization)
    assert found.weights_bytes == expected.weights_bytes


# Words that are not to be had -------------------------------------------------------------------


def test_a_device_without_nf4_says_what_it_has() -> None:
    """There is no nf4 for Apple's devices, and the error names what can be had there."""
    with pytest.raises(PrecisionError) as caught:
        plan("llama", "nf4", MPS, "mps:0")
    message = str(caught.value)
    assert "precision='nf4' is not to be had on 'mps'" in message
    assert "pass 'auto', 'float32', 'bfloat16', 'float16', 'int8' or 'int4'" in message or "'int8', 'int4'" in message


@pytest.mark.parametrize("machine, devices", [(CUDA, ONE), (CPU, "cpu"), (MPS, "mps:0")], ids=["cuda", "cpu", "mps"])
@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_quantized_checkpoint_is_taken_as_it_is(word: str, machine: Machine, devices: Any, tmp_path: Path) -> None:
    """What lmkit quantized and saved is planned for any device, and other quantizations of them are refused."""
    wrapper = quantized("llama", word)
    wrapper.model.save_pretrained(tmp_path)
    wrapper.tokenizer.save_pretrained(tmp_path)
    for precision in ("auto", word, "float32"):
        found = planned("causal", tmp_path, machine, precision, devices)
        assert found.precision.name == word
        assert found.precision.quantization is None
        assert "quantized already" in found.precision.reason
        assert found.weights_bytes == wrapper.plan.weights_bytes
    for other in {"int8", "int4", "nf4"} - {word}:
        with pytest.raises(PrecisionError) as caught:
            planned("causal", tmp_path, machine, other, devices)
        assert f"precision={other!r} would quantize weights that the file holds quantized already" in str(caught.value)
        assert all(f"'{one}'" in str(caught.value) for one in ("auto", "float32", "bfloat16", "float16", word))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_checkpoint_of_bitsandbytes_is_taken_as_it_is(precision: str, tmp_path: Path) -> None:
    """What bitsandbytes saved is planned with the bytes that it has, and refuses every quantization."""
    auto = hf.AutoModelForCausalLM
    config = BitsAndBytesConfig(**SETTINGS[precision])
    model = auto.from_pretrained(
        checkpoint("llama"), quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    found = planned("causal", tmp_path, CUDA, "auto", ONE)
    assert (found.precision.name, found.precision.quantization) == ("bitsandbytes", None)
    assert found.weights_bytes == pytest.approx(weights_only(model), rel=0.02)
    for word in ("int8", "int4", "nf4"):
        with pytest.raises(PrecisionError, match=r"quantized already \(bitsandbytes\)"):
            planned("causal", tmp_path, CUDA, word, ONE)
