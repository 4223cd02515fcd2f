import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

import checkpoints
import families
import lmkit
from lmkit.errors import PrecisionError
from lmkit.kernels.packed import PackedLinear
from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.quantizer import WeightOnlyConfig
from lmkit.planning.machine import Machine, computes_bfloat16
from lmkit.planning.precision import PRECISION_WORDS, possible_words, resolve_precision
from machines import CPU, MPS, OLD_CPU, OLD_CUDA, TWO_CUDA, planned

load: Any = lmkit.load  # What these tests pass is often not what is accepted.
PROMPTS = ["The old sailor", "She"]
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "8bit": "int8", "4bit": "int4"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def test_the_words_are_these() -> None:
    """Seven names and five short forms are all the words there are."""
    names = {"auto", "float32", "bfloat16", "float16", "int8", "int4", "nf4"}
    assert dict(PRECISION_WORDS) == {name: name for name in names} | SHORT


@pytest.mark.parametrize("word", [*DTYPES, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dtype_is_taken_as_asked(word: str, device: str) -> None:
    """A word that names a dtype gives it on every device, whatever the checkpoint was saved in."""
    chosen = resolve_precision(word, "bfloat16", device, bfloat16=True)
    name = SHORT.get(word, word)
    assert (chosen.name, chosen.dtype, chosen.quantization) == (name, DTYPES[name], None)
    assert chosen.reason == "as asked"


@pytest.mark.parametrize(
    "saved, device, bfloat16, dtype, part",
    [
        ("float32", "cpu", True, "float32", "the checkpoint's float32"),
        ("float32", "cpu", False, "float32", "the checkpoint's float32"),
        ("float32", "cuda", False, "float32", "the checkpoint's float32"),
        ("bfloat16", "cpu", True, "bfloat16", "computes bfloat16 natively"),
        ("bfloat16", "cpu", False, "float32", "no native half precision"),
        ("bfloat16", "cuda", True, "bfloat16", "the checkpoint's bfloat16"),
        ("bfloat16", "cuda", False, "float32", "this device only emulates bfloat16"),
        ("float16", "cpu", True, "bfloat16", "computes bfloat16 natively"),
        ("float16", "cpu", False, "float32", "no native half precision"),
        ("float16", "cuda", False, "float16", "the checkpoint's float16"),
        (None, "cpu", True, "bfloat16", "the file has no dtype of its own"),
        (None, "cpu", False, "float32", "the file has no dtype of its own"),
        ("bfloat16", "mps", True, "bfloat16", "the checkpoint's bfloat16"),
        ("float64", "cpu", True, "float32", "the checkpoint's float64"),
        (None, "cuda", True, "bfloat16", "the file has no dtype of its own"),
        (None, "cuda", False, "float32", "this device only emulates bfloat16"),
    ],
)
def test_auto_keeps_the_checkpoints_dtype_where_the_device_computes_it(
    saved: str | None, device: str, dtype: str, part: str, *, bfloat16: bool
) -> None:
    """`"auto"` is the saved dtype, unless the device would compute that half precision slowly."""
    given = [saved] if saved is None else [saved, f"torch.{saved}", getattr(torch, saved)]
    for way in given:
        chosen = resolve_precision("auto", way, device, bfloat16=bfloat16)
        assert (chosen.name, chosen.dtype, chosen.quantization) == (dtype, DTYPES[dtype], None)
        assert part in chosen.reason
        assert str(chosen) == f"{dtype} ({chosen.reason})"


@pytest.mark.parametrize("word", ["int8", "8bit", "int4", "4bit"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_int8_and_int4_are_lmkits_own_on_a_cpu(device: str, word: str) -> None:
    """On a CPU, and beside one, the quantized words are lmkit's quantizer, computed in what `"auto"` would choose."""
    for bfloat16 in (True, False):
        chosen = resolve_precision(word, "bfloat16", device, bfloat16=bfloat16)
        quantization: Any = chosen.quantization
        assert (chosen.name, chosen.asked) == (SHORT.get(word, word), word)
        assert chosen.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        assert isinstance(quantization, WeightOnlyConfig)
        assert quantization.bits == int(chosen.name.removeprefix("int"))
        assert chosen.reason.startswith("as asked: lmkit's own weight-only quantizer")


@pytest.mark.parametrize("word, eight", [("int8", True), ("8bit", True), ("int4", False), ("4bit", False)])
def test_int8_and_int4_are_bitsandbytes_on_cuda(word: str, *, eight: bool) -> None:
    """On CUDA the quantized words are a bitsandbytes config, computed in what `"auto"` would choose."""
    chosen = resolve_precision(word, "float16", "cuda", bfloat16=True)
    quantization: Any = chosen.quantization
    assert (chosen.name, chosen.asked) == (SHORT.get(word, word), word)
    assert chosen.dtype == torch.float16
    assert (quantization.load_in_8bit, quantization.load_in_4bit) == (eight, not eight)
    assert "bitsandbytes" in chosen.reason


@pytest.mark.parametrize("word, device", [("int4", "cuda"), ("nf4", "cuda"), ("nf4", "cpu")])
@pytest.mark.parametrize(
    "saved, bfloat16, dtype", [("bfloat16", True, torch.bfloat16), ("bfloat16", False, torch.float32)]
)
def test_bitsandbytes_four_bits_are_nf4(word: str, device: str, saved: str, dtype: Any, *, bfloat16: bool) -> None:
    """Four bits of bitsandbytes are nf4, doubly quantized and computed in the model's dtype, not fp4 in float32."""
    chosen = resolve_precision(word, saved, device, bfloat16=bfloat16)
    quantization: Any = chosen.quantization
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    assert chosen.dtype == quantization.bnb_4bit_compute_dtype == dtype
    assert chosen.reason == "as asked: bitsandbytes nf4, double quantization" + (
        ", the better of its two 4-bit types" if word == "int4" else ""
    )


@pytest.mark.parametrize(
    "device, packed, words",
    [
        ("cpu", None, ["auto", *DTYPES, "int8", "int4", "nf4"]),
        ("cuda", None, ["auto", *DTYPES, "int8", "int4", "nf4"]),
        ("mps", None, ["auto", *DTYPES, "int8", "int4"]),
        ("cpu", "gguf", ["auto", *DTYPES]),
        ("cuda", "bitsandbytes", ["auto", *DTYPES]),
        ("cpu", "int4", ["auto", *DTYPES, "int4"]),
        ("cpu", "int8", ["auto", *DTYPES, "int8"]),
    ],
)
def test_a_device_and_a_checkpoint_can_do_these_words(device: str, packed: str | None, words: list[str]) -> None:
    """Each word that is named as possible resolves; each other one is a `PrecisionError` that names those."""
    assert set(possible_words(device, packed)) == set(words)
    for word in PRECISION_WORDS.values():
        if word in words:
            resolve_precision(word, None, device, bfloat16=True, saved=packed)
            continue
        with pytest.raises(PrecisionError) as caught:
            resolve_precision(word, None, device, bfloat16=True, saved=packed)
        assert f"precision={word!r} " in str(caught.value)
        assert ", ".join(map(repr, possible_words(device, packed))) in str(caught.value)


@pytest.mark.parametrize("packed", ["int8", "int4", "bitsandbytes"])
def test_what_is_quantized_already_stays_so(packed: str) -> None:
    """A checkpoint that was saved quantized is held as it is, whatever word it may have, and the reason says so."""
    for word, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        chosen = resolve_precision(word, "bfloat16", "cpu", bfloat16=True, saved=packed)
        assert (chosen.name, chosen.dtype, chosen.quantization) == (packed, dtype, None)
        assert (chosen.reason, chosen.asked) == (f"the checkpoint is quantized already: {packed}", word)


@pytest.mark.parametrize(
    "machine, auto, int8",
    [
        (CPU, "bfloat16", "lmkit"),
        (OLD_CPU, "float32", "lmkit"),
        (TWO_CUDA, "float16", "bitsandbytes"),
        (OLD_CUDA, "float16", "bitsandbytes"),
        (MPS, "float16", "lmkit"),
    ],
    ids=["cpu", "old cpu", "cuda", "old cuda", "mps"],
)
def test_a_plan_chooses_by_the_machine(half: Path, machine: Machine, auto: str, int8: str) -> None:
    """A float16 checkpoint is planned in what the machine's first accelerator, or its CPU, computes well."""
    chosen = planned("causal", half, machine).precision
    assert (chosen.name, chosen.asked) == (auto, "auto")
    assert "the checkpoint's float16" in chosen.reason
    config: Any = planned("causal", half, machine, "int8").precision.quantization
    assert config.quant_method == int8


def test_a_config_is_passed_through() -> None:
    """A quantization config of the caller's is taken as it is and called custom."""
    mine = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    chosen = resolve_precision(mine, "float32", "cpu", bfloat16=True)
    assert chosen.quantization is mine
    assert (chosen.name, chosen.asked, chosen.dtype) == ("custom", "custom", torch.float32)
    assert "as passed" in chosen.reason


@pytest.mark.parametrize(
    "word, near", [("fp23", "fp32"), ("bfloat", "bfloat16"), ("float-32", "float32"), ("INT8", None)]
)
def test_an_unknown_word_names_the_nearest(word: str, near: str | None) -> None:
    """An unknown precision is refused with what was given, the nearest word and all the words."""
    with pytest.raises(PrecisionError) as caught:
        resolve_precision(word, "float32", "cpu", bfloat16=True)
    message = str(caught.value)
    assert f"unknown precision {word!r}." in message
    assert near is None or f"Did you mean '{near}'?" in message or near in message.partition("?")[0]
    assert "Accepted: 'auto', 'float32', 'fp32'" in message
    assert "or a transformers quantization config" in message


@pytest.mark.parametrize("precision", [None, 8, torch.float16, {"load_in_8bit": True}])
def test_what_is_no_word_is_refused(precision: Any) -> None:
    """Something else, a torch dtype too, is refused with what is accepted."""
    with pytest.raises(PrecisionError) as caught:
        resolve_precision(precision, "float32", "cpu", bfloat16=True)
    assert f"precision={precision!r} is not accepted" in str(caught.value)
    assert "'float16'" in str(caught.value)


@pytest.mark.parametrize("word", ["int8", "int4", "nf4", BitsAndBytesConfig(load_in_8bit=True)], ids=str)
def test_packed_weights_are_not_quantized_again(word: Any) -> None:
    """A file that holds quantized weights, GGUF say, is refused a second quantization, with the ways out."""
    with pytest.raises(PrecisionError) as caught:
        resolve_precision(word, None, "cpu", bfloat16=True, saved="gguf")
    message = str(caught.value)
    assert "quantized already (gguf)" in message
    assert "'auto', 'float32', 'bfloat16', 'float16'" in message


def test_packed_weights_take_a_dtype() -> None:
    """A GGUF file is widened to the dtype that is asked for."""
    assert resolve_precision("float32", None, "cpu", bfloat16=True, saved="gguf").dtype == torch.float32


@pytest.mark.parametrize("word", DTYPES)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_model_loads_in_the_dtype(name: str, word: str) -> None:
    """The weights are held in the dtype that was asked for, half of it takes half the memory, and it runs."""
    with load(checkpoints.FAMILIES[name].task, checkpoints.folder(name), word, "cpu") as wrapper:
        assert wrapper.precision == word
        assert wrapper.model.dtype == DTYPES[word]
        whole = checkpoints.wrapper(name).memory_bytes
        head = wrapper.model.get_output_embeddings()
        # A packed head lies beside the embeddings that it is tied to.
        twice = isinstance(head, PackedLinear) and head.weight is wrapper.model.get_input_embeddings().weight
        expected = whole * DTYPES[word].itemsize / 4 + (2 * head.in_features * head.out_features if twice else 0)
        assert wrapper.memory_bytes == pytest.approx(expected, rel=0.2)  # T5 keeps some float32
        wrapper(checkpoints.texts(name)[0])


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Llama in float16."""
    folder = tmp_path_factory.mktemp("half") / "llama"
    return checkpoints.changed("llama", folder, lambda model, _: model.to(torch.float16))


def test_auto_loads_what_this_processor_computes(half: Path) -> None:
    """A float16 checkpoint loads in bfloat16 or float32 on a CPU, by what that computes, and each module says so."""
    with load("causal", half, devices="cpu") as generator:
        dtype = torch.bfloat16 if computes_bfloat16() else torch.float32
        assert generator.model.dtype == dtype
        assert "the checkpoint's float16" in generator.plan.reasons["precision"]
        assert {module.dtype for module in generator.modules if "rotary" not in module.name} == {
            str(dtype).removeprefix("torch.")
        }


KINDS = {"int8": Int8Linear, "int4": Int4Linear, "nf4": bitsandbytes.nn.Linear4bit}


WIDER: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "bert": {"hidden_size": 64, "intermediate_size": 128},
}
"""Widths that bitsandbytes' 4-bit kernel for bfloat16 processors can multiply; it wants multiples of 64."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a family's checkpoint with such widths, once."""

    @cache
    def save(name: str) -> Path:
        family = checkpoints.FAMILIES[name]

        def build(folder: Path) -> families.Checkpoint:
            model, tokenizer = family.build(folder)
            for field, width in WIDER[name].items():
                setattr(model.config, field, width)
            return type(model)(model.config), tokenizer

        return families.save(dataclasses.replace(family, build=build), tmp_path_factory.mktemp("wide") / name)

    return save


@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("word", KINDS)
def test_a_quantized_model_runs_on_the_cpu(
    name: str,
    word: str,
    wide: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The words load as lmkit's or bitsandbytes' layers, take less memory, run, and print or log nothing."""
    task = checkpoints.FAMILIES[name].task
    with load(task, wide(name), "float32", "cpu") as plain:
        whole = plain.memory_bytes
    capfd.readouterr()  # saving and loading the tiny model may have drawn bars
    # Propagation is what an application's own handlers rely on.
    with caplog.at_level(logging.WARNING), load(task, wide(name), word, "cpu") as wrapper:
        modules = [m for m in wrapper.model.modules() if isinstance(m, KINDS[word])]
        assert len(modules) > 2
        assert wrapper.precision == word
        assert wrapper.memory_bytes < whole
        results = wrapper(checkpoints.texts(name)[:2])
        assert len(results) == 2
        if task != "masked":
            assert all(result.generated_tokens > 0 for result in results)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("narrow", [False, True])
def test_nf4_equals_plain_transformers(wide: Callable[[str], Path], *, narrow: bool) -> None:
    """`"nf4"` writes what plain transformers writes with the same bitsandbytes config and modules."""
    folder = checkpoints.folder("llama") if narrow else wide("llama")
    with load("causal", folder, "nf4", "cpu") as generator:
        results = [result.token_ids for result in generator(PROMPTS, max_new_tokens=8)]
        skipped: Any = generator.model.config
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped.quantization_config.llm_int8_skip_modules,
        )
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert [list(ids) for ids in results] == checkpoints.generated("llama", PROMPTS, plain, max_new_tokens=8)


def test_the_callers_config_is_not_changed() -> None:
    """A config passed in is equal before and after load and call, and the model has its own."""
    mine = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    before = mine.to_dict()
    with load("causal", checkpoints.folder("llama"), mine, "cpu") as generator:
        generator("She", max_new_tokens=3)
        assert generator.precision == "custom"
        assert generator.model.config.quantization_config is not mine
    assert mine.to_dict() == before


def test_a_quantized_checkpoint_says_so(tmp_path: Path) -> None:
    """A folder saved by bitsandbytes loads as it is, says so, and refuses to be quantized again."""
    with load("causal", checkpoints.folder("llama"), BitsAndBytesConfig(load_in_8bit=True), "cpu") as generator:
        generator.model.save_pretrained(tmp_path)
        generator.tokenizer.save_pretrained(tmp_path)
        expected = [result.token_ids for result in generator(PROMPTS, max_new_tokens=8)]
    with load("causal", tmp_path, devices="cpu") as again:
        assert again.precision == "bitsandbytes"
        assert "quantized already" in again.plan.reasons["precision"]
        assert [result.token_ids for result in again(PROMPTS, max_new_tokens=8)] == expected
    with pytest.raises(PrecisionError, match=r"quantized already \(bitsandbytes"):
        load("causal", tmp_path, "int4", "cpu")
