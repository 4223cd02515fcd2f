import gc
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import checkpoints
import lmkit
from checkpoints import logits
from lmkit.errors import PrecisionError
from lmkit.kernels.quantized import Int4Linear, Int8Linear, QuantizedLinear

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


def test_an_adapter_is_read_without_threads(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model is: an interrupt inside of a pool's own locks would leave workers that Python waits for."""
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread)))
    lmkit.load("causal", base, "float32", "cpu", adapter=adapter).close()
    assert started == []


def test_several_adapters_add_up(base: Path, make: Make) -> None:
    """Several adapters by name are all active, and change what peft's own combination of them changes."""
    named: dict[str, Path] = {"one": make("llama", 0), "two": make("llama", 1)}
    given = dict(named)
    with lmkit.load("causal", base, "float32", "cpu", adapter=named) as generator:
        model: Any = generator.model
        active = [module.active_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)]
        assert active == [["one", "two"]] * len(active) != []
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
    took_kb = f"{took / 1000:.1f} kB"
    assert plan.reasons["adapter"] == f"{took_kb} beside the model's own weights; the tokenizer is the model's"
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
    monkeypatch.setattr("lmkit.planning.skeleton.Skeleton._without_traps", lambda _, given: given)  # these are tiny
    for do in (lmkit.plan, lmkit.load):
        with pytest.raises(PrecisionError, match=f"replaces '{whole}', which {word} would quantize"):
            do("causal", checkpoints.folder(name), word, "cpu", adapter=adapter)


@pytest.mark.parametrize("module, word", [("lm_head", "int8"), ("wte", "int4")])
def test_a_tied_embedding_is_not_replaced(module: str, word: Any, replacing: Callable[..., Path]) -> None:
    """An embedding that is the output layer's weight is int8 and cannot be replaced, under either name."""
    with pytest.raises(PrecisionError, match=f"replaces '.*{module}', .*pass precision='bfloat16'"):
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


# Adapters whose tokens are not the model's ---------------------------------------------------------

EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Make an adapter with its tokenizer as a trainer saves them, on a model with more or fewer tokens."""

    def make(name: str, more: int, *targets: str, **options: Any) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("trained")
        plain, tokenizer = checkpoints.plain("causal", checkpoints.folder(name))
        tokenizer.add_tokens([f"<new{number}>" for number in range(max(more, 0))])
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about tied weights
            torch.manual_seed(0)
            if more:
                plain.resize_token_embeddings(plain.config.vocab_size + more, mean_resizing=False)
            known: Any = {"r": 2, "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
            config = LoraConfig(target_modules=[*TARGETS[name], *targets], **known, **options)
            model: Any = get_peft_model(plain, config)
            with torch.no_grad():
                for path, weight in model.named_parameters():
                    if "modules_to_save" in path or "magnitude" in path:
                        weight.mul_(1.5)
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, folder

    return make


def behaves_as(model: Any, name: str, folder: Path, word: Any = "float32") -> Any:
    """Check that lmkit's model with an adapter scores as peft's own, and takes what its plan said; return the plan."""
    with lmkit.load("causal", checkpoints.folder(name), word, "cpu", adapter=folder) as generator:
        ids = torch.tensor([[*range(5, 24), generator.model.config.vocab_size - 1]])
        with torch.no_grad():
            found, expected = (one(ids).logits.float() for one in (generator.model, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert generator.memory_bytes == generator.plan.weights_bytes + generator.plan.beside_bytes
        return generator.plan


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("more", [3, -1])
@pytest.mark.parametrize("how", ["automatic", "whole", "embeddings", "changed"])
def test_an_adapter_brings_the_tokens_that_it_was_trained_with(
    name: str, more: int, how: str, trained: Callable[..., tuple[Any, Path]]
) -> None:
    """Embeddings of another vocabulary, saved by themselves or as modules_to_save, tied or not, give peft's scores."""
    ways: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "automatic": ((), {}),
        "whole": ((), {"modules_to_save": [EMBEDDINGS[name], "lm_head"]}),
        "embeddings": ((), {"modules_to_save": [EMBEDDINGS[name]]}),
        "changed": ((EMBEDDINGS[name], "lm_head"), {}),
    }
    targets, options = ways[how]
    model, folder = trained(name, more, *targets, **options)
    rows = model.get_input_embeddings().weight.shape[0]
    assert f"embeddings of {rows} tokens" in behaves_as(model, name, folder).reasons["adapter"]


def test_the_new_tokens_of_an_adapter_are_read(trained: Callable[..., tuple[Any, Path]]) -> None:
    """A prompt with a token that the adapter added is encoded by the adapter's tokenizer, and continued as by peft."""
    model, folder = trained("llama", 3)
    prompt = "The old <new1> sailor"
    with lmkit.load("causal", checkpoints.folder("llama"), "float32", "cpu", adapter=folder) as generator:
        result = generator(prompt, max_new_tokens=8)
    encoded = hf.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    assert 480 in encoded["input_ids"]
    expected = model.generate(**encoded, do_sample=False, max_new_tokens=8)[0]
    assert list(result.token_ids) == expected[encoded["input_ids"].shape[1] :].tolist()


def test_an_adapter_without_the_rows_of_its_tokens_is_refused(trained: Callable[..., tuple[Any, Path]]) -> None:
    """Where the file has no output layer for the tokens that were added, no other values are made up for it."""
    _, folder = trained("llama", 3, "embed_tokens")
    for do in (lmkit.plan, lmkit.load):
        with pytest.raises(lmkit.WeightsError, match=r"trained with 482 tokens, this model has 479, and"):
            do("causal", checkpoints.folder("llama"), adapter=folder)


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_a_resized_output_layer_is_not_quantized(word: Any, trained: Callable[..., tuple[Any, Path]]) -> None:
    """An adapter with an output layer of its own wants a precision that leaves that one wide, as the error says."""
    for name in EMBEDDINGS:
        with pytest.raises(PrecisionError, match=f"replaces 'lm_head', which {word} would quantize"):
            lmkit.plan("causal", checkpoints.folder(name), word, "cpu", adapter=trained(name, 3)[1])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_dora_is_what_peft_makes_of_it(name: str, trained: Callable[..., tuple[Any, Path]]) -> None:
    """A DoRA adapter gives peft's scores; on layers in few bits, whose size it would measure, it is refused."""
    model, folder = trained(name, 0, use_dora=True)
    behaves_as(model, name, folder)
    with pytest.raises(PrecisionError, match=r"is a DoRA of '.*', whose weights it measures, and int8 would quantize"):
        lmkit.plan("causal", checkpoints.folder(name), "int8", "cpu", adapter=folder)


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": {"wte": [3, 4]}}], ids=["lora", "tokens"])
def test_a_tied_embedding_in_int8_is_not_changed(options: Any, trained: Callable[..., tuple[Any, Path]]) -> None:
    """LoRA on an embedding that is the output layer's weight works wide, and is a PrecisionError in int8 and int4."""
    model, folder = trained("gpt2", 0, *([] if options else ["wte"]), **options)
    behaves_as(model, "gpt2", folder)
    for word in ("int8", "int4"):
        with pytest.raises(PrecisionError, match=r"changes 'transformer.wte', the embedding that is the"):
            lmkit.plan("causal", checkpoints.folder("gpt2"), word, "cpu", adapter=folder)


def test_lora_on_a_quantized_output_layer_is_refused(trained: Callable[..., tuple[Any, Path]]) -> None:
    """Peft saves the layer below LoRA on an output layer: it cannot be read into integers."""
    model, folder = trained("llama", 0, "lm_head")
    behaves_as(model, "llama", folder)
    with pytest.raises(PrecisionError, match=r"replaces 'lm_head', which int8 would quantize"):
        lmkit.load("causal", checkpoints.folder("llama"), "int8", "cpu", adapter=folder)


# Adapters beside the weights, and what lies beside an adapter --------------------------------------


def test_an_adapter_beside_the_weights_is_not_put_on_unless_asked(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A model's folder with an adapter in it is the model alone, and the plan says what would put it on."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    plain = logits(checkpoints.plain("causal", base)[0])
    with lmkit.load("causal", tmp_path, "float32", "cpu") as generator:
        assert torch.equal(logits(generator.model), plain)
        assert generator.plan.reasons["adapter"].startswith("one beside the weights is not put on: ")
    with lmkit.load("causal", tmp_path, "float32", "cpu", adapter=tmp_path) as generator:
        assert not torch.allclose(logits(generator.model), plain, atol=1e-2)


def test_the_tokenizer_and_template_of_an_adapter_are_used(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A tokenizer in an adapter's folder is the one that it was trained with; of several adapters', none is."""
    shutil.copytree(adapter, tmp_path / "one")
    tokenizer = checkpoints.plain("causal", base)[1]
    tokenizer.chat_template = "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "one")
    with lmkit.load("causal", base, "float32", "cpu", adapter=str(tmp_path / "one")) as generator:
        assert "<user>" in generator.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2).prompt
        told = generator.plan.reasons["adapter"]
        assert f"the tokenizer is that of '{tmp_path / 'one'}', with its chat template" in told
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    both = {"one": tmp_path / "one", "two": tmp_path / "two"}
    assert "the tokenizer is the model's" in lmkit.plan("causal", base, adapter=both).reasons["adapter"]
    (tmp_path / "two" / "tokenizer.json").unlink()
    with lmkit.load("causal", base, "float32", "cpu", adapter=str(tmp_path / "two")) as generator:
        assert "<user>" in generator.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2).prompt
        assert f"the chat template is that of '{tmp_path / 'two'}'" in generator.plan.reasons["adapter"]
    (tmp_path / "two" / "chat_template.jinja").unlink()
    settings = tmp_path / "two" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": tokenizer.chat_template}))
    with lmkit.load("causal", base, "float32", "cpu", adapter=str(tmp_path / "two")) as generator:
        assert "<user>" in generator.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2).prompt
        assert f"the chat template is that of '{tmp_path / 'two'}'" in generator.plan.reasons["adapter"]


def test_an_adapters_tokenizer_without_a_template_has_the_models(tmp_path: Path) -> None:
    """A chat goes on with the model's template where the adapter's tokenizer has none."""
    plain, tokenizer = checkpoints.plain("causal", checkpoints.folder("qwen3"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(plain, config)
    model.save_pretrained(tmp_path)
    written, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    with lmkit.load("causal", checkpoints.folder("qwen3"), "float32", "cpu", adapter=tmp_path) as generator:
        its: Any = generator.tokenizer
        assert its.chat_template == written
        assert "with the model's chat template" in generator.plan.reasons["adapter"]


KINDS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "layer-norm": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
    "norm-beside": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False
    ),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4, init_weights=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters_are_what_peft_makes_of_them(kind: str, tmp_path: Path) -> None:
    """An adapter of another kind than LoRA gives peft's scores: none is taken for one of another base model."""
    plain = checkpoints.plain("causal", checkpoints.folder("llama"))[0]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: Any = get_peft_model(plain, KINDS[kind]())
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if "modules_to_save" in path or "ln_tuning" in path:
                    weight.mul_(1.5)
        model.save_pretrained(tmp_path)
    ids = torch.tensor([[*range(5, 24)]])
    with lmkit.load("causal", checkpoints.folder("llama"), "float32", "cpu", adapter=tmp_path) as generator:
        with torch.no_grad():
            found, expected = (one(ids).logits for one in (generator.model, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if kind == "norm-beside":  # "norm" is the end of every norm's name, and peft saves all of those
            assert generator.memory_bytes == generator.plan.weights_bytes + generator.plan.beside_bytes


SLOW = "(.*)" * 10 + r"\1\2\3\4\5\6y"


def patterned(adapter: Path, where: Path, **settings: Any) -> Path:
    """Copy an adapter, with other values in its config."""
    shutil.copytree(adapter, where)
    config = where / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return where


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "((x{1000}){1000}){1000}"},
        {"target_modules": "("},
        *({key: [".*" * 9 + "x"]} for key in ("modules_to_save", "layers_pattern")),
        *({key: {pattern: 8}} for key in ("rank_pattern", "alpha_pattern") for pattern in ("(.*)*x", "(.|.)" * 40)),
        {"modules_to_save": ["("]},
    ],
    ids=str,
)
def test_patterns_that_take_for_ever_are_refused(
    settings: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What is no pattern, or one that could be tried for ever, is refused before it is tried, in a plan too."""
    where = patterned(adapter, tmp_path / "copy", **settings)
    for do in (lmkit.plan, lmkit.load):
        with pytest.raises(lmkit.WeightsError, match="has the pattern"):
            do("causal", base, "float32", "cpu", adapter=where)  # type: ignore[operator]


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", ".*" * 30 + "(q|v)_proj", ".*?self_attn.*?(?:q|v)_proj.*?"])
def test_patterns_of_whole_names_choose_the_modules_that_peft_chooses(
    pattern: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """However many repetitions a pattern has, it is matched, and gives the answer of the adapter with the names."""
    where = patterned(adapter, tmp_path / "copy", target_modules=pattern)
    with (
        lmkit.load("causal", base, "float32", "cpu", adapter=where) as found,
        lmkit.load("causal", base, "float32", "cpu", adapter=adapter) as expected,
    ):
        assert found(PROMPT, max_new_tokens=6).token_ids == expected(PROMPT, max_new_tokens=6).token_ids


def test_a_pattern_that_takes_longer_than_a_second_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    """What the names of the modules cannot be matched with in bounded time is refused in a plan and a load."""
    where = patterned(adapter, tmp_path / "copy", target_modules=SLOW)
    for do in (lmkit.plan, lmkit.load):
        with pytest.raises(lmkit.WeightsError, match=r"longer than a second to match the names of .* modules"):
            do("causal", base, "float32", "cpu", adapter=where)  # type: ignore[operator]
