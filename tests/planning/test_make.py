import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import checkpoints
import hub_stub
import lmkit
from hub_stub import Hub
from lmkit.engine.cache import KeyValues
from lmkit.errors import UnknownTaskError
from lmkit.kernels.packed import packs
from machines import CPU, OLD_CUDA, TWO_CUDA, planned

hf: Any = transformers  # Its annotations are narrower than what it accepts.
plan: Any = lmkit.plan  # What these tests pass is often not what is accepted.
REPO = "someone/tiny-llama"
ROOMY = {"cpu": "4GiB"}
EVERY = [*checkpoints.CAUSAL, *checkpoints.SEQ2SEQ, *checkpoints.MASKED]


def of(name: str, precision: Any = "float32", devices: Any = None, **options: Any) -> lmkit.LoadPlan:
    """Plan to load a family's tiny checkpoint."""
    found: lmkit.LoadPlan = plan(
        checkpoints.FAMILIES[name].task, checkpoints.folder(name), precision, devices or ROOMY, **options
    )
    return found


def header(folder: Path) -> dict[str, Any]:
    """Read a safetensors header as its format is documented."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    described: dict[str, Any] = json.loads(content[8 : 8 + length])
    described.pop("__metadata__", None)
    return described


# What a plan says -------------------------------------------------------------------------------


def test_a_plan_says_what_will_be_loaded() -> None:
    """The plan holds task, name, class, precision and place, and is made without the weights."""
    found = plan("text-generation", checkpoints.folder("llama"), "fp16", ROOMY)
    assert (found.task, found.name) == ("causal", str(checkpoints.folder("llama")))
    assert found.architecture == found.model_class == "LlamaForCausalLM"
    assert (found.precision.name, found.precision.asked) == ("float16", "fp16")
    assert found.placement.max_memory == {"cpu": 4 * 2**30}
    assert found.device_map == {"": "cpu"}
    assert found.context_length == 128
    assert found.fits
    assert [module.name for module in found.modules] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head",
    ]  # fmt: skip
    assert {(module.device, module.dtype) for module in found.modules} == {("cpu", "float16")}


def test_every_choice_of_a_plan_has_a_reason() -> None:
    """Each automatic choice comes with a sentence; a choice of the caller's says that it was asked."""
    reasons = planned("causal", checkpoints.folder("llama"), CPU).reasons
    assert reasons == {
        "precision": "the checkpoint's float32",
        "devices": "no accelerator on this machine",
        "engine": "lmkit's own loop: rows begin one by one and end one by one, each with its own options",
        "attention": "lmkit's: heads that share keys read them once",
    }
    found = planned("causal", checkpoints.folder("llama"), CPU, "bf16", "cpu")
    reasons = dict(found.reasons)
    assert reasons.pop("engine").startswith("lmkit's own loop")
    assert ("bfloat16 kernel" in reasons.pop("attention")) == packs()
    assert found.kernels == ("packed" if packs() else "torch")
    assert ("matrix kernel" in reasons.pop("kernels", "")) == packs()
    assert ("read the same input" in reasons.pop("together", "")) == packs()
    assert reasons == {"precision": "as asked", "devices": "as asked"}


def test_a_plan_is_frozen() -> None:
    """A plan cannot be changed after it was made."""
    found = of("llama")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_load_executes_the_plan_that_plan_makes(name: str) -> None:
    """`wrapper.plan` is what `plan` says of the same arguments, and the weights are where and what it says."""
    task = checkpoints.FAMILIES[name].task
    with lmkit.load(task, checkpoints.folder(name), "float32", ROOMY, reserve_tokens=3) as wrapper:
        assert wrapper.plan == of(name, reserve_tokens=3)
        held = {module.name: module for module in wrapper.modules}
        unsaved = dict.fromkeys(held, 0)
        for key, buffer in wrapper.model.named_buffers():
            if key not in wrapper.model.state_dict():
                unsaved[max((part for part in held if f"{key}.".startswith(f"{part}.")), key=len)] += buffer.nbytes
        for module in wrapper.plan.modules:
            found = held.pop(module.name)
            assert (found.device, found.dtype.split(", ")[0]) == (module.device, module.dtype)
            assert found.bytes - unsaved[module.name] == module.bytes
        assert all(module.bytes == unsaved[module.name] for module in held.values())  # rotary positions
        assert wrapper.memory_bytes == wrapper.plan.weights_bytes + sum(unsaved.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY)
def test_weights_take_what_the_header_says_at_the_planned_dtype(name: str, precision: str) -> None:
    """The bytes are those of the file's numbers in the dtype, tied weights once; the parameters those of torch."""
    found = of(name, precision)
    model = checkpoints.reference(name)[0]
    tensors = header(checkpoints.folder(name))
    strict = model._keep_in_fp32_modules_strict or ()  # what transformers keeps in float32, whatever is asked for
    # DeBERTa makes some biases in float32, whatever is asked for.
    wide = {key for key in tensors if key.endswith((".q_bias", ".v_bias"))}
    wide |= {key for key in tensors if any(f".{part}." in f".{key}." for part in strict)}
    expected = 0
    for key, told in tensors.items():
        size = 4 if key in wide or precision == "float32" else 2
        expected += math.prod(told["shape"]) * (size if told["dtype"] == "F32" else 8)
    # Marian does not save its sinusoidal positions, and holds them as weights.
    unsaved = [
        tensor
        for key, tensor in model.named_parameters()
        if "embed_positions" in key and key not in tensors and "Marian" in found.model_class
    ]
    expected += sum(tensor.numel() for tensor in unsaved) * (4 if precision == "float32" else 2)
    assert found.weights_bytes == expected == sum(found.bytes_per_device.values())
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


# Before a byte is read --------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List each attempt to read weights or to build a model with them, and refuse it."""
    seen: list[str] = []

    def refuse(what: str) -> Any:
        def refused(*_arguments: Any, **_options: Any) -> Any:
            seen.append(what)
            pytest.fail(f"{what} was called")

        return refused

    for where in ("safetensors.safe_open", "transformers.modeling_utils.safe_open", "torch.load"):
        monkeypatch.setattr(where, refuse(where))
    for kind in (hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM, hf.AutoModelForMaskedLM, hf.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse(f"{kind.__name__}.from_pretrained"))
    return seen


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_plan_of_a_folder_reads_no_weights_and_asks_no_network(
    name: str, opened: list[str], network: list[str]
) -> None:
    """A plan for a local folder opens no tensor file, builds no model with weights, and makes no network call."""
    assert of(name).fits
    assert (opened, network) == ([], [])


def test_what_a_plan_refuses_is_refused_before_weights_are_read(opened: list[str]) -> None:
    """A wrong word, device or task, and what does not fit, is refused by `load` with no tensor file opened."""
    load: Any = lmkit.load
    folder = checkpoints.folder("llama")
    with pytest.raises(lmkit.PrecisionError):
        load("causal", folder, "fp17")
    with pytest.raises(lmkit.PlacementError):
        load("causal", folder, devices="here")
    with pytest.raises(UnknownTaskError):
        load("masked", folder)
    with pytest.raises(lmkit.PlacementError):
        load("causal", folder, "float32", {"cpu": 1000})
    assert opened == []


@pytest.mark.parametrize("option", ["load_in_8bit", "load_in_4bit", "torch_dtype", "quantization_config"])
def test_options_of_from_pretrained_name_the_line_to_write(option: str, opened: list[str]) -> None:
    """A keyword that transformers has for precision is a TypeError, in `load` and `plan`, with what to write here."""
    for call in (lmkit.load, plan):
        verb: Any = call
        with pytest.raises(TypeError, match=rf"takes no {option}=: write load\(task, name, "):
            verb("causal", checkpoints.folder("llama"), **{option: True})
    assert opened == []


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Run a hub with a tiny Llama on it."""
    with hub_stub.serving() as running:
        running.repositories[REPO] = {"main": checkpoints.folder("llama")}
        yield running


@pytest.mark.usefixtures("opened")
def test_a_plan_of_a_hub_id_fetches_the_headers_alone(hub: Hub, tmp_path: Path) -> None:
    """A plan for a Hub id asks for ranges of the weight file, never for all of it, and says what a folder's does."""
    found = plan("causal", REPO, "float32", ROOMY, cache_dir=tmp_path)
    assert "model.safetensors" not in hub.downloads()
    assert {path.rpartition("/")[2] for path, _ in hub.ranges} == {"model.safetensors"}
    assert dataclasses.replace(found, name=str(checkpoints.folder("llama"))) == of("llama")


@pytest.mark.parametrize("machine", [TWO_CUDA, OLD_CUDA], ids=["two", "old"])
def test_a_plan_is_for_any_machine(machine: Any) -> None:
    """On a machine with CUDA cards a small model is planned onto the first, unless it is split by name."""
    found = planned("causal", checkpoints.folder("llama"), machine, devices="cuda:0")
    assert found.bytes_per_device == {"cuda:0": found.weights_bytes}
    assert found.kernels == "torch"
    assert "cuda:0" in planned("causal", checkpoints.folder("llama"), machine).bytes_per_device


# Keys and values --------------------------------------------------------------------------------


def live(cache: KeyValues) -> int:
    """Sum the bytes of the keys and values that are attended to, not of what is reserved."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


@torch.no_grad()
def measured(name: str, tokens: int, source_tokens: int = 6, *, at_once: bool = True) -> int:
    """Run the plain model over the engine's cache, and measure what is kept of one row."""
    model = checkpoints.reference(name)[0]
    own = KeyValues(model.config.get_text_config(decoder=True))
    ids = torch.full((1, tokens), 7)
    cache: Any = own.cache
    across, source = 0, {}
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(input_ids=torch.full((1, source_tokens), 9), return_dict=True)
        source = {"encoder_outputs": encoded}
        cache = EncoderDecoderCache(own.cache, DynamicCache())
    for part in [ids] if at_once else ids.split(1, dim=1):
        inputs = {"decoder_input_ids" if source else "input_ids": part, **source}
        model(**inputs, **{checkpoints.cache_name(model): cache}, use_cache=True)
    if source:
        across = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)
    return live(own) + across


KEPT = [name for name in (*checkpoints.CAUSAL, *checkpoints.SEQ2SEQ) if name != "mamba"]
WINDOWED = ["mistral", "gemma2"]


@pytest.mark.parametrize("name", KEPT)
def test_keys_and_values_take_what_the_engines_cache_holds(name: str) -> None:
    """Bytes per token times tokens are the bytes that the engine's cache keeps of a row, grouped heads and all."""
    found = of(name)
    assert found.key_values is not None
    source = found.key_values.per_source_token * 6
    assert (source > 0) == (found.task == "seq2seq")
    assert found.kv_bytes_per_token is not None
    for tokens in (1, 5):  # shorter than every window
        assert found.kv_bytes_per_token * tokens + source == measured(name, tokens)
        assert found.key_values.of(tokens, 6) == measured(name, tokens)


@pytest.mark.parametrize("tokens", [6, 7, 8, 9, 30])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_keep_no_more_than_they_show(name: str, tokens: int) -> None:
    """Beyond a window of 8 tokens the layers that have one keep no more, read at once or token by token."""
    found = of(name).key_values
    assert found is not None
    assert found.of(tokens) == measured(name, tokens)
    assert found.of(tokens) == measured(name, tokens, at_once=False)
    whole = found.of(1) * tokens
    assert (found.of(tokens) < whole) == (tokens > 7)


def test_a_hybrid_model_keeps_all_in_some_layers() -> None:
    """Of Gemma 2's layers every other has a window, so that a longer row takes half as much more."""
    found = of("gemma2").key_values
    assert found is not None
    assert found.of(101) - found.of(100) == found.per_token == found.of(1) // 2


def test_grouped_queries_keep_their_groups_alone() -> None:
    """Two heads of keys and values for four of queries take half of what four would, by the config's own numbers."""
    config = checkpoints.reference("qwen3")[0].config
    expected = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert of("qwen3").kv_bytes_per_token == expected
    assert config.num_key_value_heads * 2 == config.num_attention_heads


def test_half_precision_keeps_half() -> None:
    """Keys and values are held in what is computed in, quantized weights or not."""
    whole = of("llama").kv_bytes_per_token
    assert whole is not None
    assert of("llama", "bfloat16").kv_bytes_per_token == whole // 2
    quantized = of("llama", "int8")
    assert quantized.kv_bytes_per_token == whole * quantized.precision.dtype.itemsize // 4


def test_a_recurrent_model_keeps_a_state_that_does_not_grow() -> None:
    """Mamba keeps the same bytes however long a text is: those of the states that plain transformers keeps."""
    found = of("mamba")
    model = checkpoints.reference("mamba")[0]
    with torch.no_grad():
        (cache,) = (model(input_ids=torch.full((1, 5), 7), use_cache=True)[key] for key in ["cache_params"])
    kept = sum(part.nbytes for part in _tensors([vars(layer) for layer in cache.layers]))
    assert found.key_values is not None
    assert found.kv_bytes_per_token == 0
    assert found.key_values.of(1) == found.key_values.of(1000) == kept


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (dict, list, tuple)):
        for one in held.values() if isinstance(held, dict) else held:
            yield from _tensors(one)


@pytest.mark.parametrize("name", checkpoints.MASKED)
def test_masked_models_keep_nothing(name: str) -> None:
    """A masked model reads a text at once and keeps no keys and values, so that rows are not counted by them."""
    found = of(name)
    assert (found.key_values, found.kv_bytes_per_token, found.max_rows(100)) == (None, None, None)


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_row_has_tokens(tokens: int) -> None:
    """Rows of no tokens are refused instead of counted."""
    with pytest.raises(lmkit.OptionError, match="pass a number of tokens, 1 or more"):
        lmkit.plan("causal", checkpoints.folder("llama"), "float32", "cpu").max_rows(tokens)


@pytest.mark.parametrize("word", ["float32", "int8", "int4", "nf4"])
def test_a_plan_can_be_a_key(word: Any) -> None:
    """Plans of the same load are equal and have one hash, so that sets and dicts hold them; other loads differ."""
    where = checkpoints.folder("llama")
    one, again = (lmkit.plan("causal", where, word, {"cpu": "1GiB"}) for _ in range(2))
    assert one == again
    assert len({one, again}) == 1
    assert {one: word}[again] == word
    others = {plan("causal", where, word, {"cpu": "1KiB"}), plan("causal", checkpoints.folder("gpt2"), word, "cpu")}
    assert one not in others
    assert len({one, again, *others}) == 3


def test_scaled_positions_and_an_asked_context_have_reasons(tmp_path: Path) -> None:
    """The plan says why its context is not simply the config's, and `context_length=` overrides it."""
    where = _rotary("qwen3", tmp_path / "yarn", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})
    plan = lmkit.plan("causal", where)
    assert (plan.context_length, plan.reasons["context"]) == (512, "yarn scales 128 positions by 4")
    asked = lmkit.plan("causal", where, context_length=77)
    assert asked.context_length == 77
    assert "as asked" in asked.reasons["context"]
    with pytest.raises(lmkit.OptionError, match="context_length=0 is not accepted: pass a whole number of tokens, 1"):
        lmkit.plan("causal", where, context_length=0)


def test_an_unknown_scaling_of_positions_is_named(tmp_path: Path) -> None:
    """A rotary type that transformers does not know is an error that names it and what is known."""
    where = _rotary("llama", tmp_path / "unknown", {"rope_type": "foo", "rope_theta": 1e4})
    with pytest.raises(lmkit.WeightsError, match=r"scales its rotary positions by 'foo'.*update transformers.*'yarn'"):
        lmkit.plan("causal", where)


def _rotary(name: str, where: Path, settings: dict[str, Any]) -> Path:
    """Copy a checkpoint, with other settings of rotary positions in its config."""
    shutil.copytree(checkpoints.folder(name), where)
    content = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(content | {"rope_parameters": settings}))
    return where
