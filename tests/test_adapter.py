import gc
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import checkpoints
import lmkit
from lmkit.errors import PrecisionError
from lmkit.quantized import Int4Linear, Int8Linear, QuantizedLinear

hf: Any = transformers
PROMPT = "The old sailor"
SAVED = "adapter_model.safetensors"
TARGETS = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "bert": ["query", "value"], "gpt2": ["c_attn"]}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base() -> Path:
    """The folder of a tiny Llama."""
    return checkpoints.folder("llama")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make LoRA adapters with random weights that change the answer, each once."""

    def make(name: str, seed: int = 0, *, wider: bool = False) -> Path:
        return made(name, seed, wider=wider)

    @cache
    def made(name: str, seed: int, *, wider: bool) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / f"{name}-{seed}"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = checkpoints.plain(checkpoints.FAMILIES[name].task, checkpoints.folder(name))[0]
            if wider:
                model.config.hidden_size, model.config.head_dim = 64, 16
                model = type(model)(model.config)
            options: Any = {"fan_in_fan_out": name == "gpt2"}
            config = LoraConfig(
                r=4 + seed, lora_alpha=6, target_modules=TARGETS[name], init_lora_weights=False, **options
            )
            get_peft_model(model, config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def adapter(make: Make) -> Path:
    """A LoRA adapter for the tiny Llama."""
    return make("llama")


@pytest.fixture(scope="module")
def replacing(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make an adapter that replaces whole modules beside its LoRA weights."""

    def make(name: str, *modules: str) -> Path:
        folder = tmp_path_factory.mktemp("replacing")
        plain = checkpoints.plain(checkpoints.FAMILIES[name].task, checkpoints.folder(name))[0]
        options: Any = {"modules_to_save": list(modules), "fan_in_fan_out": name == "gpt2"}
        config = LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about tied weights
            model: Any = get_peft_model(plain, config)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if "modules_to_save" in path:
                    weight.mul_(1.5)
        model.save_pretrained(folder)
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    """Return the scores of a model for a fixed input."""
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found.float()


def test_an_adapter_gives_the_tokens_that_peft_gives(base: Path, adapter: Path) -> None:
    """`adapter=` puts a LoRA adapter on the model, with the tokens of peft's own model."""
    with lmkit.load("causal", base, adapter=str(adapter)) as generator:
        result = generator(PROMPT, max_new_tokens=8)
        encoded = generator.tokenizer(PROMPT, return_tensors="pt")
    reference = PeftModel.from_pretrained(checkpoints.plain("causal", base)[0], str(adapter))
    expected = reference.generate(**encoded, do_sample=False, max_new_tokens=8)[0]
    assert list(result.token_ids) == expected[encoded["input_ids"].shape[1] :].tolist()
    assert checkpoints.wrapper("llama")(PROMPT, max_new_tokens=8).token_ids != result.token_ids


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_is_for_every_task(name: str, make: Make) -> None:
    """Adapters of each task's models give the scores of peft's own model; a path may be a `Path`."""
    task = checkpoints.FAMILIES[name].task
    with lmkit.load(task, checkpoints.folder(name), "float32", "cpu", adapter=make(name)) as wrapper:
        found = logits(wrapper.model)
    plain = checkpoints.plain(task, checkpoints.folder(name))[0]
    before = logits(plain)
    reference = PeftModel.from_pretrained(plain, str(make(name)))
    torch.testing.assert_close(found, logits(reference), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


def test_several_adapters_add_up(base: Path, make: Make) -> None:
    """Several adapters by name are all active, and change what peft's own combination of them changes."""
    named: dict[str, Path] = {"one": make("llama", 0), "two": make("llama", 1)}
    given = dict(named)
    with lmkit.load("causal", base, "float32", "cpu", adapter=named) as generator:
        model: Any = generator.model
        assert sorted(model.active_adapters()) == ["one", "two"]
        found = logits(model)
    assert named == given
    reference: Any = PeftModel.from_pretrained(checkpoints.plain("causal", base)[0], str(named["one"]), "one")
    reference.load_adapter(str(named["two"]), "two")
    alone = logits(reference)
    reference.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")
    reference.set_adapter("both")
    torch.testing.assert_close(found, logits(reference), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, alone, atol=1e-2)


def elements(*folders: Path) -> int:
    """Count the numbers in adapter files."""
    files = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    return sum(tensor.numel() for file in files for tensor in file.values())


@pytest.mark.parametrize("word, itemsize", [("float32", 4), ("bfloat16", 2), ("int8", 4), ("int4", 4)])
def test_adapters_count_in_the_plan(base: Path, make: Make, word: Any, itemsize: int) -> None:
    """What adapters take is stated, and needs room beside the model's own weights."""
    named = {"one": make("llama", 0), "two": make("llama", 1)}
    took = elements(*named.values()) * itemsize
    plan = lmkit.plan("causal", base, word, {"cpu": "1GiB"}, adapter=named)
    alone = lmkit.plan("causal", base, word, {"cpu": "1GiB"})
    assert plan.reasons["adapter"] == f"{took / 1000:.1f} kB beside the model's own weights"
    assert plan.weights_bytes == alone.weights_bytes
    assert "adapter" not in alone.reasons
    budget = {"cpu": alone.weights_bytes + alone.beside_bytes + took}
    assert lmkit.plan("causal", base, word, budget, adapter=named).fits
    assert not lmkit.plan("causal", base, word, {"cpu": budget["cpu"] - 1}, adapter=named).fits
    assert lmkit.plan("causal", base, word, {"cpu": budget["cpu"] - 1}).fits


def test_what_an_adapter_takes_is_what_the_plan_said(base: Path, adapter: Path) -> None:
    """The loaded model holds as many bytes more as the plan counted for the adapter."""
    with lmkit.load("causal", base, "float32", "cpu", adapter=adapter) as generator:
        assert generator.memory_bytes == checkpoints.wrapper("llama").memory_bytes + elements(adapter) * 4


def test_a_precision_that_is_named_holds_the_adapter_too(base: Path, make: Make) -> None:
    """Where the model fits and its adapter does not, what the error says would fit has room for both."""
    named = {"one": make("llama", 0), "two": make("llama", 1)}
    budget = {"cpu": lmkit.plan("causal", base, "bfloat16", {"cpu": "1GiB"}).weights_bytes}
    reason = lmkit.plan("causal", base, "float32", budget, adapter=named).reasons["fits"]
    for word in ("bfloat16", "int8", "int4"):
        fits = lmkit.plan("causal", base, word, budget, adapter=named).fits
        if f"precision='{word}' would fit" in reason:
            assert fits
            return
        assert not fits
    assert "No precision makes it fit" in reason


@pytest.mark.parametrize("word, kind", [("int8", Int8Linear), ("int4", Int4Linear)])
@pytest.mark.parametrize("several", [False, True])
def test_an_adapter_works_on_quantized_layers(base: Path, make: Make, word: Any, kind: Any, *, several: bool) -> None:
    """On lmkit's own layers an adapter adds what it adds to the widened weights, computed by hand."""
    folders = [make("llama", 0), make("llama", 1)][: 2 if several else 1]
    plain, _ = checkpoints.plain("causal", base)
    with lmkit.load("causal", base, word, "cpu", adapter={str(n): one for n, one in enumerate(folders)}) as generator:
        quantized = {n: m for n, m in generator.model.named_modules() if isinstance(m, QuantizedLinear)}
        assert sum(isinstance(module, kind) for module in quantized.values()) > 10
        found = logits(generator.model)
        for name, module in quantized.items():
            widened = module(torch.eye(module.in_features))
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = widened.T.contiguous()
        generator(PROMPT, max_new_tokens=3)
    before = logits(plain)
    for seed, folder in enumerate(folders):
        parts = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in parts if ".lora_A." in key]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = 6 / (4 + seed) * parts[key.replace("lora_A", "lora_B")] @ parts[key]
            plain.get_submodule(name).weight.data += delta
    torch.testing.assert_close(found, logits(plain), rtol=1e-2, atol=2e-2)
    assert not torch.allclose(found, before, atol=0.2)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """Fail where weights are read; the adapters of these tests are made before."""
    for name, wider in (("gpt2", False), ("llama", False), ("llama", True)):
        make(name, wider=wider)

    def fail(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", fail)


@pytest.mark.usefixtures("unread")
def test_an_adapter_of_another_architecture_is_refused_before_weights_are_read(base: Path, make: Make) -> None:
    """An adapter for modules that the model does not have is a WeightsError that names the first, in plan and load."""
    for verb in (lmkit.load, lmkit.plan):
        call: Any = verb
        with pytest.raises(lmkit.WeightsError, match="was made for another base model: it changes") as caught:
            call("causal", base, adapter=str(make("gpt2")))
        message = str(caught.value)
        assert str(make("gpt2")) in message
        assert "'transformer.h.0.attn.c_attn', which this model does not have" in message
        assert "adapter_config.json" in message


@pytest.mark.usefixtures("unread")
def test_an_adapter_of_another_size_is_refused_before_weights_are_read(base: Path, make: Make) -> None:
    """An adapter for a wider model of the same architecture is a WeightsError that gives its shape."""
    with pytest.raises(lmkit.WeightsError, match=r"'model\.layers\.0\.self_attn\.\w+', of another size \(\(4, 64\)"):
        lmkit.load("causal", base, adapter=str(make("llama", wider=True)))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_wrong_adapter_among_several_is_refused(base: Path, make: Make, name: str) -> None:
    """Of several adapters each is checked, quantized layers or not."""
    wrong = make(name, wider=name == "llama")
    for word in ("float32", "int8", "int4"):
        load: Any = lmkit.load
        with pytest.raises(lmkit.WeightsError, match="was made for another base model"):
            load("causal", base, word, adapter={"right": make("llama"), "wrong": wrong})


@pytest.mark.parametrize("given", [{}, 3, ["a", "b"], {"a": 3}, True])
def test_what_names_no_adapter_is_refused(base: Path, given: Any) -> None:
    """Something else than a name, or names, is an OptionError that says what is accepted."""
    with pytest.raises(lmkit.OptionError, match=r"adapter=.* is not accepted: pass a folder or a Hub id, or a dict"):
        lmkit.load("causal", base, adapter=given)


@pytest.mark.parametrize("verb", ["load", "plan"])
def test_an_adapter_that_is_not_there_says_where_lmkit_looked(base: Path, verb: str) -> None:
    """A wrong adapter name is a ModelNotFoundError with the folder that was looked for."""
    with pytest.raises(lmkit.ModelNotFoundError, match=r"no folder .*/nowhere/lora"):
        getattr(lmkit, verb)("causal", base, adapter="/nowhere/lora")


def test_a_truncated_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A truncated adapter file is a WeightsError that names it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes()[: -1 if "model" in name else None])
    with pytest.raises(lmkit.WeightsError, match=r"adapter_model\.safetensors is truncated"):
        lmkit.load("causal", base, adapter=str(tmp_path))


def test_an_adapter_on_a_model_across_cpu_and_disk(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter on a model of which a block is on disk gives the scores of the undivided one."""
    where = lmkit.Placement({"": "cpu", "model.layers.1": "disk"}, offload_folder=str(tmp_path / "off"))
    with lmkit.load("causal", base, "float32", where, adapter=adapter) as generator:
        found = generator(PROMPT, max_new_tokens=8).token_ids
    with lmkit.load("causal", base, "float32", "cpu", adapter=adapter) as generator:
        assert generator(PROMPT, max_new_tokens=8).token_ids == found


def test_a_broken_adapter_leaves_no_model_behind(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter that peft refuses after the model was read leaves no model in memory."""
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NONSENSE"}', encoding="utf-8")

    def models() -> int:
        gc.collect()
        return sum(issubclass(type(found), hf.LlamaForCausalLM) for found in gc.get_objects())

    before = models()
    with pytest.raises(lmkit.WeightsError, match="adapter"):
        lmkit.load("causal", base, adapter=str(tmp_path))
    assert models() == before


@pytest.mark.parametrize("word", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(
    "name, whole", [("llama", "model.layers.0.mlp.down_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
def test_what_is_quantized_is_not_replaced(
    name: str, whole: str, word: Any, replacing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that replaces layers which would be quantized is refused before weights are read, and says why."""
    adapter = replacing(name, "mlp")
    monkeypatch.setattr("lmkit.skeleton.Skeleton._without_traps", lambda _, given: given)  # these are tiny
    for do in (lmkit.plan, lmkit.load):
        with pytest.raises(
            PrecisionError, match=f"replaces '{whole}' .its modules_to_save., which {word} would quantize"
        ):
            do("causal", checkpoints.folder(name), word, "cpu", adapter=adapter)


@pytest.mark.parametrize("module, word", [("lm_head", "int8"), ("wte", "int4")])
def test_a_tied_embedding_is_not_replaced(module: str, word: Any, replacing: Callable[..., Path]) -> None:
    """An embedding that is the output layer's weight is int8 and cannot be replaced, under either name."""
    with pytest.raises(PrecisionError, match=f"replaces '.*{module}' .*pass precision='bfloat16'"):
        lmkit.plan("causal", checkpoints.folder("gpt2"), word, "cpu", adapter=replacing("gpt2", module))


def test_what_stays_wide_is_replaced(replacing: Callable[..., Path]) -> None:
    """Norms and plain embeddings beside quantized layers are the adapter's own, bit by bit."""
    adapter = replacing("llama", "norm", "embed_tokens")
    saved = {name.removeprefix("base_model.model."): one for name, one in load_file(adapter / SAVED).items()}
    with lmkit.load("causal", checkpoints.folder("llama"), "int4", "cpu", adapter=adapter) as generator:
        model: Any = generator.model.model
        for name, module in (("embed_tokens", model.embed_tokens), ("norm", model.norm)):
            assert torch.equal(module.modules_to_save["default"].weight, saved[f"model.{name}.weight"])


def test_a_precision_that_the_adapter_forbids_is_not_advised(base: Path, replacing: Callable[..., Path]) -> None:
    """What does not fit is not told to be int8 where the adapter replaces what would be quantized."""
    small = lmkit.plan("causal", base, "int4", "cpu")
    devices = {"cpu": small.weights_bytes + small.beside_bytes}
    assert "precision='int4' would fit" in lmkit.plan("causal", base, "float32", devices).reasons["fits"]
    told = lmkit.plan("causal", base, "float32", devices, adapter=replacing("llama", "mlp")).reasons["fits"]
    assert "No precision makes it fit" in told
