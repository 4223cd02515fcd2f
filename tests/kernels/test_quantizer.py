"""Quantized models: loaded, compared with plain transformers on the same weights widened, saved, and counted."""

import copy
import logging
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import checkpoints
import lmkit
from lmkit.errors import PrecisionError
from lmkit.kernels.packed import PackedLinear
from lmkit.kernels.quantized import GROUP, Int4Linear, Int8Linear, QuantizedLinear
from lmkit.kernels.quantizer import METHOD, WeightOnlyConfig
from lmkit.kernels.tied import Int8Embedding, TiedHead
from lmkit.planning.machine import computes_bfloat16
from quantized_layers import known, widened
from quantized_models import by_hand, layers, quantized, wide

load: Any = lmkit.load  # What these tests pass is often not what is accepted.
hf: Any = transformers
NAMES = ("llama", "gpt2", "gemma2", "opt", "t5", "bart", "m2m100", "bert", "roberta")
BITS = ("int8", "int4")
EVERY = pytest.mark.parametrize("name", NAMES)
EVERY_WORD = pytest.mark.parametrize("word", BITS)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
LLM_INT8 = BitsAndBytesConfig(load_in_8bit=True)
WORDS: dict[str, Any] = {
    **{word: word for word in ("float32", "bfloat16", "float16", "int8", "int4", "nf4")},
    "fp4": FP4,
    "bnb8": LLM_INT8,
}
"""Every precision that runs on a CPU."""


def auto(name: str) -> Any:
    """Return the auto class of a family's task."""
    return getattr(hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])


@torch.no_grad()
def logits(name: str, model: Any, rows: int = 3) -> torch.Tensor:
    """Return the scores of a family's first texts; those of padding left out."""
    ids, mask = checkpoints.inputs(name, checkpoints.texts(name)[:rows])
    if model.config.is_encoder_decoder:
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5]).logits
        return found.flatten(0, 1).float()
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()


def answers(name: str, wrapper: Any) -> list[Any]:
    """Return what a wrapper says to a family's texts: tokens, or ids with their probabilities."""
    texts = checkpoints.texts(name)[:3]
    if checkpoints.FAMILIES[name].task == "masked":
        candidates = [one for result in wrapper(texts) for mask in result.masks for one in mask.candidates]
        return [(one.token_ids, one.score) for one in candidates]
    options = {"max_new_tokens": 8} | checkpoints.languages(name)
    return [list(result.token_ids) for result in wrapper(texts, **options)]


@torch.no_grad()
def with_widened(name: str, model: Any) -> Any:
    """Return the plain float32 model with the weights that the quantized one stands for."""
    plain, _ = checkpoints.plain(checkpoints.FAMILIES[name].task, checkpoints.folder(name))
    for path, module in layers(model).items():
        own = plain.get_submodule(path)
        weight = widened(module.state_dict())[0].float()
        own.weight.copy_(weight.T if isinstance(own, Conv1D) else weight)
    return plain


# Loading ----------------------------------------------------------------------------------------


@EVERY
@EVERY_WORD
def test_scores_are_those_of_the_widened_weights(name: str, word: str) -> None:
    """Plain transformers, with each weight replaced by what the integers stand for, has the same scores."""
    model = quantized(name, word).model
    # Sums are in another order on each processor: on one with AMX a score of 38,475 was off by 1.3e-4.
    torch.testing.assert_close(logits(name, model), logits(name, with_widened(name, model)), rtol=1e-4, atol=2e-4)


@EVERY
@EVERY_WORD
def test_one_row_has_the_scores_of_the_widened_weights(name: str, word: str) -> None:
    """So has a single short row, which goes through the kernels."""
    model = quantized(name, word).model
    found, expected = (logits(name, one, rows=1) for one in (model, with_widened(name, model)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("word, most", [("int8", 0.15), ("int4", 0.9)])
def test_scores_are_near_those_of_the_checkpoint(name: str, word: str, most: float) -> None:
    """The scores are off by less than a seventh of their spread in 8 bits, and by less than it in 4.

    The weights are random, as wide as training never makes them; what a trained model loses is measured elsewhere.
    """
    exact = logits(name, checkpoints.reference(name)[0])
    assert (logits(name, quantized(name, word).model) - exact).std() < most * exact.std()


@EVERY
@EVERY_WORD
def test_weights_are_those_of_the_checkpoint(name: str, word: str) -> None:
    """Each weight stands for the checkpoint's own of that name, to half a step; everything else is the checkpoint's."""
    model, plain = quantized(name, word).model, checkpoints.reference(name)[0]
    inside = layers(model)
    for path, module in inside.items():
        own = plain.get_submodule(path)
        weight = own.weight.T if isinstance(own, Conv1D) else own.weight
        scales = module.state_dict()["scales"]
        step = scales[..., 0].T.repeat_interleave(GROUP, 1) if isinstance(module, Int4Linear) else scales[:, None]
        assert ((widened(module.state_dict())[0] - weight).abs() <= step * 0.501).all(), path
    theirs = plain.state_dict()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in inside or key.endswith(".bias"):
            assert torch.equal(tensor, theirs[key]), key


@EVERY
@EVERY_WORD
def test_all_linear_layers_are_quantized(name: str, word: str) -> None:
    """Every linear layer is in the bits that were asked for, but the head and T5's delicate ones, which have 8."""
    model, plain = quantized(name, word).model, checkpoints.reference(name)[0]
    linear = {path for path, module in plain.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    head = next(path for path, module in plain.named_modules() if module is plain.get_output_embeddings())
    delicate = {path for path in linear if name == "t5" and path.endswith(".wo")}
    for path in linear - {head}:
        kind = Int8Linear if word == "int8" or path in delicate else Int4Linear
        assert type(model.get_submodule(path)) is kind, path


@EVERY
@EVERY_WORD
def test_tied_weights_stay_tied(name: str, word: str) -> None:
    """A head whose weight is the embedding's shares it, and it is counted, and saved, once."""
    wrapper = quantized(name, word)
    model = wrapper.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = checkpoints.reference(name)[0].config.tie_word_embeddings
    assert (head.weight is embedding.weight) == tied
    assert isinstance(head, (TiedHead, Int8Linear)) or name in {"t5", "bart", "m2m100"}  # shared by two stacks: wide
    if tied and isinstance(head, TiedHead):
        assert isinstance(embedding, Int8Embedding)
        assert head.scales is embedding.scales
    pointers = [tensor.data_ptr() for tensor in model.parameters()]
    assert len(pointers) == len(set(pointers))
    assert wrapper.memory_bytes == by_hand(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bert"])
@EVERY_WORD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_too(name: str, word: str, dtype: torch.dtype) -> None:
    """In bfloat16 and float16 the scores are as near to the widened weights' as those dtypes are."""
    config = WeightOnlyConfig(int(word.removeprefix("int")))
    model = auto(name).from_pretrained(checkpoints.folder(name), dtype=dtype, quantization_config=config).eval()
    assert model.dtype is dtype
    exact = logits(name, with_widened(name, model))
    wide = logits(name, auto(name).from_pretrained(checkpoints.folder(name), dtype=dtype).eval())
    own = (wide - logits(name, checkpoints.reference(name)[0])).std()  # what the dtype itself costs
    assert (logits(name, model) - exact).std() < 3 * own


def test_a_name_that_a_family_keeps_wide_stays_wide() -> None:
    """In float16, T5's `wo` is in float32, as transformers has it, and is not quantized."""
    config = WeightOnlyConfig(4)
    model = auto("t5").from_pretrained(checkpoints.folder("t5"), dtype=torch.float16, quantization_config=config)
    kept = [module for path, module in model.named_modules() if path.endswith(".wo")]
    assert kept
    assert all(type(module) is torch.nn.Linear and module.weight.dtype is torch.float32 for module in kept)


def test_modules_can_be_left_out() -> None:
    """What `skip` names keeps its dtype."""
    config = WeightOnlyConfig(4, skip=["down_proj", "model.layers.0.self_attn.q_proj"])
    model = auto("llama").from_pretrained(checkpoints.folder("llama"), dtype=torch.float32, quantization_config=config)
    plain = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert plain == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)} | {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("settings", [{"bits": 3}, {"bits": 4, "group_size": 128}])
def test_other_settings_are_refused(settings: dict[str, int]) -> None:
    """There are 8 and 4 bits, in groups of 32; the error says so."""
    with pytest.raises(ValueError, match=r"4 or 8 bits, in groups of 32"):
        WeightOnlyConfig(**settings)


@EVERY_WORD
def test_a_mamba_is_quantized(word: str) -> None:
    """A state space model computes in 8 and 4 bits: it multiplies with one of its weights itself."""
    model = quantized("mamba", word).model
    assert logits("mamba", model).isfinite().all()


@EVERY_WORD
def test_loading_is_quiet(
    word: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Nothing is printed, warned of or logged above INFO."""
    checkpoints.folder("llama")
    capfd.readouterr()
    with caplog.at_level(logging.WARNING), load("causal", checkpoints.folder("llama"), word, "cpu") as wrapper:
        wrapper("She", max_new_tokens=3)
    assert (caplog.records, list(recwarn)) == ([], [])
    assert capfd.readouterr() == ("", "")


# Saving -----------------------------------------------------------------------------------------


@EVERY
@EVERY_WORD
def test_a_saved_model_is_read_again(name: str, word: str, tmp_path: Path) -> None:
    """A saved quantized model loads without the original, from safetensors, with equal state and equal answers."""
    wrapper = quantized(name, word)
    shutil.copytree(checkpoints.folder(name), tmp_path, dirs_exist_ok=True, ignore=checkpoints._only_vocabularies)
    wrapper.model.save_pretrained(tmp_path)
    wrapper.tokenizer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not [path for pattern in ("*.bin", "*.pt", "*.pth") for path in tmp_path.glob(pattern)]
    stored = load_file(tmp_path / "model.safetensors")
    for precision in ("auto", word):
        with load(checkpoints.FAMILIES[name].task, tmp_path, precision, "cpu") as again:
            assert again.precision == word
            assert again.memory_bytes == wrapper.memory_bytes
            assert again.plan.weights_bytes == wrapper.plan.weights_bytes
            mine, theirs = wrapper.model.state_dict(), again.model.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
            assert all(torch.equal(stored[key], mine[key]) for key in stored)
            assert answers(name, again) == answers(name, wrapper)


@EVERY_WORD
def test_a_saved_model_refuses_other_quantizations(word: str, tmp_path: Path) -> None:
    """What is quantized already may be loaded as it is, computing in any dtype, and not quantized otherwise."""
    saved(word, tmp_path)
    for other in {"int8", "int4", "nf4"} - {word}:
        with pytest.raises(PrecisionError) as caught:
            load("causal", tmp_path, other, "cpu")
        message = str(caught.value)
        assert f"precision={other!r} would quantize weights that the file holds quantized already ({word})" in message
        assert (
            f"pass 'auto', 'float32', 'bfloat16', 'float16', {word!r}, or load the unquantized one"
            in message.replace("checkpoint", "one")
        )
    with pytest.raises(PrecisionError, match="quantized already"):
        load("causal", tmp_path, LLM_INT8, "cpu")


@EVERY_WORD
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_model_computes_in_any_dtype(word: str, dtype: str, tmp_path: Path) -> None:
    """A dtype asked of a quantized checkpoint is what is computed in; the integers stay."""
    saved(word, tmp_path)
    with load("causal", tmp_path, dtype, "cpu") as wrapper:
        assert wrapper.precision == word
        assert wrapper.model.dtype is getattr(torch, dtype)
        assert layers(wrapper.model).keys() == layers(quantized("llama", word).model).keys()
        assert wrapper("She", max_new_tokens=3).generated_tokens > 0
        found, exact = logits("llama", wrapper.model), logits("llama", quantized("llama", word).model)
        assert (found - exact).std() < (1e-5 if dtype == "float32" else 0.2) * exact.std()


def saved(word: str, where: Path) -> None:
    """Save a Llama in 8 or 4 bits."""
    wrapper = quantized("llama", word)
    wrapper.model.save_pretrained(where)
    wrapper.tokenizer.save_pretrained(where)


@EVERY_WORD
def test_plain_transformers_reads_a_saved_model(word: str, tmp_path: Path) -> None:
    """`import lmkit.kernels.quantizer` is all that transformers needs to load one by itself."""
    saved(word, tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits("llama", model), logits("llama", quantized("llama", word).model))
    assert model.config.quantization_config.quant_method == METHOD


def test_another_process_reads_a_saved_model(tmp_path: Path) -> None:
    """So it is in a process that has seen neither lmkit nor the original."""
    saved("int4", tmp_path)
    code = (
        "import sys, torch, lmkit.kernels.quantizer\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.tensor([[5, 6, 7]])).logits.double().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        here = quantized("llama", "int4").model(torch.tensor([[5, 6, 7]])).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(here, abs=1e-2)


def test_a_saved_model_is_saved_again(tmp_path: Path) -> None:
    """A model that was loaded quantized saves the same file."""
    saved("int4", tmp_path / "first")
    with load("causal", tmp_path / "first", "int4", "cpu") as wrapper:
        wrapper.model.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_saved_model_without_a_weight_is_refused(tmp_path: Path) -> None:
    """A quantized file that lacks scales is refused: they would be random."""
    from safetensors.torch import save_file

    saved("int4", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.scales"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lmkit.WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.scales"):
        load("causal", tmp_path, "int4", "cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
@EVERY_WORD
def test_a_model_can_be_copied(name: str, word: str) -> None:
    """A deep copy has the same scores, and its head is tied to its own embedding."""
    model = quantized(name, word).model
    again = copy.deepcopy(model)
    assert torch.equal(logits(name, again), logits(name, model))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


# bitsandbytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [0, 16], ids=["even", "odd"])
@pytest.mark.parametrize("word", ["nf4", "fp4", "bnb8"])
def test_bitsandbytes_is_quiet(
    word: str,
    odd: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """nf4 and configs use bitsandbytes, its layers compute, and nothing is printed, warned of or logged."""
    folder = wide(odd=odd)
    capfd.readouterr()
    recwarn.clear()
    with caplog.at_level(logging.WARNING), load("causal", folder, WORDS[word], "cpu") as wrapper:
        result = wrapper("The old sailor", max_new_tokens=4)
        linear = [m for m in wrapper.model.modules() if isinstance(m, torch.nn.Linear)]
    assert result.generated_tokens > 0
    theirs = bitsandbytes.nn.Linear8bitLt if word == "bnb8" else bitsandbytes.nn.Linear4bit
    kinds = {id(m): isinstance(m, theirs) for m in linear}
    assert sum(kinds.values()) == (14 if not odd or word == "bnb8" or not computes_bfloat16() else 8)
    assert not any(isinstance(m, QuantizedLinear) for m in linear)
    assert (caplog.records, [str(warning.message) for warning in recwarn]) == ([], [])
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not computes_bfloat16(), reason="bitsandbytes has that kernel on bfloat16 processors only")
@pytest.mark.parametrize("word", ["nf4", "fp4"])
def test_layers_that_bitsandbytes_cannot_multiply_are_left_out(word: str) -> None:
    """Its 4-bit kernel wants outputs in 32s and inputs in 64s; other layers, and the head, keep the dtype."""
    with load("causal", wide(odd=16), WORDS[word], "cpu") as wrapper:
        plain = {path for path, module in wrapper.model.named_modules() if type(module) is torch.nn.Linear}
    awkward = {f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")}
    assert plain == awkward | {"lm_head"}


def test_nf4_is_bitsandbytes_with_sound_defaults() -> None:
    """The word is nf4 with double quantization, computed in the model's dtype."""
    with load("causal", wide(), "nf4", "cpu") as wrapper:
        settings = wrapper.model.config.quantization_config
        layer = wrapper.model.model.layers[0].mlp.up_proj
        assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
        assert settings.bnb_4bit_compute_dtype is torch.float32
        assert layer.weight.quant_state.quant_type == "nf4"
        assert wrapper.precision == "nf4"


# Memory -----------------------------------------------------------------------------------------


def held_beside(wrapper: Any) -> int:
    """Return what a packed head that is tied takes: a plan has it beside the model's own."""
    model = wrapper.model
    head = model.get_output_embeddings()
    twice = isinstance(head, PackedLinear) and head.weight is model.get_input_embeddings().weight
    return 2 * head.in_features * head.out_features if twice else 0


WIDE = pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])


@WIDE
@pytest.mark.parametrize("word", WORDS)
def test_a_plan_counts_what_a_model_holds(name: str, word: str) -> None:
    """A plan's bytes are within 2 % of what the loaded model holds by its own count, and by that of this test."""
    task, folder = checkpoints.FAMILIES[name].task, str(wide(name))
    planned = lmkit.plan(task, folder, WORDS[word], "cpu")
    with load(task, folder, WORDS[word], "cpu") as wrapper:
        assert wrapper.memory_bytes == sum(module.bytes for module in wrapper.modules) == by_hand(wrapper.model)
        assert planned.weights_bytes == pytest.approx(wrapper.memory_bytes - held_beside(wrapper), rel=0.02)
        assert wrapper.plan.weights_bytes == planned.weights_bytes


@WIDE
@pytest.mark.parametrize("word", WORDS)
def test_a_plan_counts_what_a_model_holds_when_it_has_run(name: str, word: str, request: pytest.FixtureRequest) -> None:
    """So they are after a call: bitsandbytes changes what it holds at the first forward pass."""
    odd = word in {"nf4", "fp4"} and (name, word) not in {
        ("llama", "nf4"),
        ("llama", "fp4"),
        ("gpt2", "nf4"),
        ("t5", "fp4"),
    }
    known(request, "bitsandbytes packs again for bfloat16 processors", where=odd and computes_bfloat16())
    task, folder = checkpoints.FAMILIES[name].task, str(wide(name))
    with load(task, folder, WORDS[word], "cpu") as wrapper:
        wrapper(checkpoints.texts(name)[0], **({} if name == "bert" else {"max_new_tokens": 2}))
        assert wrapper.memory_bytes == sum(module.bytes for module in wrapper.modules) == by_hand(wrapper.model)
        assert wrapper.plan.weights_bytes == pytest.approx(wrapper.memory_bytes - held_beside(wrapper), rel=0.02)


@pytest.mark.skipif(not computes_bfloat16(), reason="bitsandbytes packs weights on bfloat16 processors only")
@WIDE
@pytest.mark.parametrize("word", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_bitsandbytes_holds_when_it_has_run(name: str, word: str, *, nested: bool) -> None:
    """On such a processor it then has half a byte for a weight, two for 64 of them, a table, and an idle offset."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=word, bnb_4bit_use_double_quant=nested)
    task, folder = checkpoints.FAMILIES[name].task, str(wide(name))
    with load(task, folder, config, "cpu") as wrapper:
        wrapper(checkpoints.texts(name)[0], **({} if name == "bert" else {"max_new_tokens": 2}))
        ran = [m for m in wrapper.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        for module in ran:
            weights = module.in_features * module.out_features
            bias = 0 if module.bias is None else module.bias.nbytes
            assert by_hand(module) == weights // 2 + 2 * weights // 64 + 4 * 16 + (4 if nested else 0) + bias


@pytest.mark.parametrize("name", ["gpt_neo", "m2m100"])
def test_a_plan_counts_buffers(name: str) -> None:
    """What a model computes once and keeps, masks and positions, is counted though it is not in the file."""
    wrapper = quantized(name, "int4")
    assert wrapper.plan.weights_bytes + wrapper.plan.beside_bytes == pytest.approx(wrapper.memory_bytes, rel=0.02)


PEAK = """
import gc, sys, threading, time
from pathlib import Path
import lmkit

def now():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}

tiny, folder, word = sys.argv[1:]
lmkit.load("causal", tiny, word, "cpu")("She", max_new_tokens=2)  # what is imported and set up once is not the model's
gc.collect()
before, most, over = now(), 0, threading.Event()

def watch():
    global most
    while not over.is_set():
        most = max(most, now()["RssAnon:"])
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
wrapper = lmkit.load("causal", folder, word, "cpu")
over.set()
thread.join()
after = now()
print(most - before["RssAnon:"], after["RssFile:"] - before["RssFile:"], wrapper.memory_bytes)
"""


@cache
def peak(word: str) -> tuple[int, int, int, int, int]:
    """Load a Llama of 150 MB in a process of its own; return its file's bytes, its widest module's, and `PEAK`'s."""
    folder = checkpoints.ROOT / "large"
    if not folder.exists():
        shutil.copytree(checkpoints.folder("llama"), folder)
        size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=4000, **size)).bfloat16().save_pretrained(folder)
    arguments = [sys.executable, "-c", PEAK, str(checkpoints.folder("llama")), str(folder), word]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    file = (folder / "model.safetensors").stat().st_size
    return file, (2 if computes_bfloat16() else 4) * 4000 * 768, *map(int, done.stdout.split())


PROC = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="what is resident is read from /proc")


@PROC
@pytest.mark.slow
@EVERY_WORD
def test_a_load_stays_under_the_wide_checkpoint(word: str) -> None:
    """While a model is quantized, its memory stays under that of the 16-bit checkpoint and one module.

    Counted is memory of the process's own (RssAnon), every millisecond, beyond what a first small model left. Pages of
    the mapped file (RssFile) are left out: they are the system's cache, which it takes back whenever it needs room.
    """
    file, module, most, _, held = peak(word)
    assert most < file + module
    assert most < held + file / 4 + module  # and not by far: the quantized model, and some of the wide one


@PROC
@pytest.mark.slow
@EVERY_WORD
def test_a_loaded_model_lets_go_of_its_file(word: str) -> None:
    """After the load, no page of the wide file is resident."""
    file, _, _, mapped, _ = peak(word)
    assert mapped < file / 10


def test_nf4_on_gpt2_is_bitsandbytes_own_of_the_turned_weights() -> None:
    """GPT-2 keeps its weights the other way round: in nf4 they are what bitsandbytes itself makes of them turned."""
    folder = wide("gpt2")
    plain, _ = checkpoints.plain("causal", folder)
    count = 0
    for module in plain.modules():
        if isinstance(module, Conv1D):
            turned = module.weight.data.T.contiguous()
            packed, state = bitsandbytes.functional.quantize_4bit(turned, quant_type="nf4", compress_statistics=True)
            module.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state).T.contiguous()
            count += 1
    with lmkit.load("causal", folder, "nf4", "cpu") as generator, torch.no_grad():
        layers = {name: one for name, one in generator.model.named_modules() if type(one).__name__ == "Linear4bit"}
        assert len(layers) == count == 8
        for name, layer in layers.items():
            rows = torch.randn(20, layer.in_features)
            expected = plain.get_submodule(name)(rows)
            # Where the processor multiplies bfloat16, bitsandbytes does so whatever the dtype.
            torch.testing.assert_close(layer(rows), expected, rtol=0, atol=float(expected.abs().max()) / 100)
        assert generator("The old sailor", max_new_tokens=3).token_ids
