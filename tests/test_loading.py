import builtins
import dataclasses
import gc
import json
import os
import pickle
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
import lmkit
from lmkit.checkpoint.tasks import TASK_WORDS
from lmkit.errors import LmkitError, ModelNotFoundError, UnknownOptionError, UnknownTaskError, WeightsError

hf: Any = transformers  # Its annotations are narrower than what it accepts.
load: Any = lmkit.load  # What these tests pass is often not what is accepted.

CLASSES = {"causal": "Generator", "seq2seq": "Translator", "masked": "Unmasker"}
FOLDERS = {"causal": "gpt2", "seq2seq": "t5", "masked": "bert"}
SAFE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def copied(name: str, where: Path) -> Path:
    """Copy a family's checkpoint to change it."""
    return Path(shutil.copytree(checkpoints.folder(name), where / name))


def edit_config(folder: Path, **values: Any) -> Path:
    """Put other values into a checkpoint's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Save a checkpoint's weights again after `edit` changed them."""
    weights = load_file(folder / SAFE)
    edit(weights)
    save_file(weights, folder / SAFE, {"format": "pt"})
    return folder


def pickled(folder: Path) -> Path:
    """Turn a checkpoint's weights into a pickle."""
    torch.save(load_file(folder / SAFE), folder / "pytorch_model.bin")
    (folder / SAFE).unlink()
    return folder


def sharded(name: str, where: Path) -> Path:
    """Save a family's checkpoint in several shards."""
    model, _ = checkpoints.reference(name)
    model.save_pretrained(where, max_shard_size="20KB")
    for path in checkpoints.folder(name).iterdir():
        if not (where / path.name).exists() and path.name != SAFE:
            shutil.copy(path, where)
    assert (where / INDEX).exists()
    return where


def tokens(wrapper: Any) -> list[tuple[int, ...]]:
    """Continue two prompts."""
    return [result.token_ids for result in wrapper(["The old sailor", "She"], max_new_tokens=8)]


# Tasks and names


@pytest.mark.parametrize("word", TASK_WORDS)
def test_each_task_and_alias_returns_its_class(word: str) -> None:
    """A task's name and its pipelines' names give the wrapper of that task, with the plan's facts."""
    task = TASK_WORDS[word]
    folder = checkpoints.folder(FOLDERS[task])
    with load(word, str(folder)) as wrapper:
        assert type(wrapper) is getattr(lmkit, CLASSES[task])
        assert wrapper.plan.task == task
        assert wrapper.name == wrapper.plan.name == str(folder)
        assert wrapper.plan.model_class == type(wrapper.model).__name__
        assert not wrapper.model.training
        assert wrapper.tokenizer is not None
        assert wrapper.device == torch.device("cpu")
        assert wrapper.memory_bytes == wrapper.model.get_memory_footprint()
        assert repr(wrapper) == f"<lmkit.{CLASSES[task]} {str(folder)!r}, float32 on cpu>"


def test_a_path_is_a_name_too() -> None:
    """A name may be a `Path`, and the wrapper's name is its text."""
    folder = checkpoints.folder("gpt2")
    with load("causal", folder) as generator:
        assert generator.name == str(folder)


@pytest.mark.parametrize(
    "task, name, fitting",
    [
        ("causal", "bert", "masked"),
        ("seq2seq", "bert", "masked"),
        ("masked", "t5", "seq2seq"),
        ("causal", "t5", "seq2seq"),
        ("masked", "gpt2", "causal"),
        ("translation", "llama", "causal"),
        ("fill-mask", "m2m100", "seq2seq"),
    ],
)
def test_the_wrong_task_names_the_one_that_fits(task: str, name: str, fitting: str) -> None:
    """A checkpoint loaded for another task is refused with what it is and the call to write."""
    with pytest.raises(UnknownTaskError) as caught:
        load(task, checkpoints.folder(name))
    message = str(caught.value)
    assert f"made for {fitting!r}, not {TASK_WORDS[task]!r}: load({fitting!r}" in message


def test_an_unknown_task_names_the_nearest() -> None:
    """A misspelt task is refused before the name is looked at."""
    with pytest.raises(UnknownTaskError, match=r"unknown task 'casual'. Did you mean 'causal'"):
        load("casual", "no/such")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    """A model type that transformers does not know is an `UnknownTaskError` that names it."""
    folder = edit_config(copied("llama", tmp_path), model_type="llama99")
    with pytest.raises(UnknownTaskError, match=r"model type 'llama99'.*does not know"):
        load("causal", folder)


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another kind is refused with its class, whatever the task."""
    hf.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    save_file({"classifier.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownTaskError, match=r"ViTForImageClassification .*does none of lmkit's tasks"):
        load("causal", tmp_path)


def test_a_name_that_is_nowhere_is_not_found(network: list[str]) -> None:
    """A Hub id without a network says where lmkit looked, and how to go on."""
    with pytest.raises(ModelNotFoundError) as caught:
        load("causal", "owner/no-such-model")
    message = str(caught.value)
    assert "'owner/no-such-model' was not found" in message
    assert str(Path("owner/no-such-model").absolute()) in message
    assert f"the cache {os.environ['HF_HOME']}" in message
    assert "https://huggingface.co answered" in message
    assert "Check the spelling and the connection" in message
    assert "token=" in message
    assert network


def test_a_name_that_is_nowhere_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error comes within two seconds, though a download would try for longer."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", time)  # undo the patch of conftest
    started = time.perf_counter()
    with pytest.raises(ModelNotFoundError):
        load("causal", "owner/no-such-model")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("name", ["", "a b", "../no-such", "absent.gguf"])
def test_a_weird_name_is_not_found(name: str, network: list[str]) -> None:
    """A name that can be nothing is a `ModelNotFoundError` that repeats it, without asking the Hub."""
    with pytest.raises(ModelNotFoundError) as caught:
        load("causal", name)
    assert f"{name!r} is not here" in str(caught.value)
    assert network == []


@pytest.mark.parametrize("name", [None, 3, b"bytes", ["a"]])
def test_a_name_is_a_text_or_a_path(name: Any) -> None:
    """Something that cannot be a name is refused, by a load and by a plan, with what can be one."""
    for ask in (load, lmkit.plan):
        with pytest.raises(lmkit.OptionError, match=r"name=.* is not accepted: pass a Hub id, a folder"):
            ask("causal", name)


# Pickles and code


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of pickles alone is refused before any of it is unpickled."""
    folder = pickled(copied("gpt2", tmp_path))
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("the pickle was opened"))
    with pytest.raises(WeightsError) as caught:
        load("causal", folder)
    message = str(caught.value)
    assert f"{str(folder)!r} has only pickled weights (pytorch_model.bin)" in message
    assert "allow_pickle=True" in message


def test_an_allowed_pickle_gives_the_same_tokens(tmp_path: Path) -> None:
    """With `allow_pickle=True` the pickle loads, and writes what the safetensors did."""
    folder = pickled(copied("gpt2", tmp_path))
    threads = threading.active_count()
    with load("causal", folder, allow_pickle=True) as generator:
        assert tokens(generator) == tokens(checkpoints.wrapper("gpt2"))
    assert threading.active_count() == threads  # transformers may start one that converts


def test_a_pickle_is_not_read_beside_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both formats are there the safetensors are read, with and without `allow_pickle`."""
    folder = copied("gpt2", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("the pickle was opened"))
    for allowed in (False, True):
        load("causal", folder, allow_pickle=allowed).close()


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
from pathlib import Path
Path(__file__).with_name("ran").touch()
class NewConfig(GPT2Config):
    model_type = "brand-new"
class NewForCausalLM(GPT2LMHeadModel):
    config_class = NewConfig
"""


def with_code(folder: Path, model_type: str) -> Path:
    """Give a checkpoint code of its own, which leaves a mark where it runs."""
    (folder / "new.py").write_text(CODE.replace("Path(__file__).with_name", f"Path({str(folder)!r}).joinpath"))
    auto = {"AutoConfig": "new.NewConfig", "AutoModelForCausalLM": "new.NewForCausalLM"}
    return edit_config(folder, model_type=model_type, auto_map=auto, architectures=["NewForCausalLM"])


@pytest.fixture
def _no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompted(*_: object) -> str:
        pytest.fail("something prompted")

    monkeypatch.setattr(builtins, "input", prompted)
    monkeypatch.setattr("sys.stdin", None)


@pytest.mark.usefixtures("_no_prompt")
def test_code_is_refused_without_a_prompt(tmp_path: Path) -> None:
    """A checkpoint that needs its own code is refused with its names, and the code does not run."""
    folder = with_code(copied("gpt2", tmp_path), "brand-new")
    with pytest.raises(WeightsError) as caught:
        load("causal", folder)
    message = str(caught.value)
    assert "needs its own code ('new.NewConfig', 'new.NewForCausalLM')" in message
    assert "could do anything on this machine" in message
    assert "trust_remote_code=True" in message
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("_no_prompt")
def test_code_that_is_trusted_runs(tmp_path: Path) -> None:
    """With `trust_remote_code=True` the checkpoint's own class loads and generates."""
    folder = with_code(copied("gpt2", tmp_path), "brand-new")
    with load("causal", folder, trust_remote_code=True) as generator:
        assert (folder / "ran").exists()
        assert type(generator.model).__name__ == "NewForCausalLM"
        assert tokens(generator) == tokens(checkpoints.wrapper("gpt2"))


@pytest.mark.usefixtures("_no_prompt")
def test_code_that_is_not_needed_does_not_run(tmp_path: Path) -> None:
    """A type that transformers knows loads by its own class although the checkpoint brings code."""
    folder = edit_config(with_code(copied("gpt2", tmp_path), "gpt2"), architectures=["GPT2LMHeadModel"])
    with load("causal", folder) as generator:
        assert type(generator.model) is transformers.GPT2LMHeadModel
        assert tokens(generator) == tokens(checkpoints.wrapper("gpt2"))
    assert not (folder / "ran").exists()


# Broken files


def _truncate(folder: Path) -> str:
    path = folder / SAFE
    path.write_bytes(path.read_bytes()[:-100])
    return SAFE


def _corrupt_header(folder: Path) -> str:
    path = folder / SAFE
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)
    return SAFE


def _garble(folder: Path) -> str:
    (folder / SAFE).write_bytes(b"<html>Not Found</html>" * 100)
    return SAFE


def _lie_about_a_shape(folder: Path) -> str:
    path = folder / SAFE
    content = path.read_bytes()
    assert content.count(b'"shape":[32]') > 0
    path.write_bytes(content.replace(b'"shape":[32]', b'"shape":[31]', 1))
    return SAFE


def _lie_about_a_type(folder: Path) -> str:
    path = folder / SAFE
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    return SAFE


def _remove_weights(folder: Path) -> str:
    (folder / SAFE).unlink()
    return SAFE


def _break_index(folder: Path) -> str:
    (folder / SAFE).unlink()
    (folder / INDEX).write_text("{not json")
    return INDEX


def _break_config(folder: Path) -> str:
    (folder / "config.json").write_text("{not json")
    return "config.json"


def _list_config(folder: Path) -> str:
    (folder / "config.json").write_text("[1, 2]")
    return "config.json"


def _remove_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _remove_tokenizer(folder: Path) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return "tokenizer.json"


def _keep_only_the_tokenizers_config(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer"


def _break_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{not json")
    return "tokenizer"


def _empty_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer"


def _break_tokenizer_config(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text("{not json")
    return "tokenizer"


def _break_generation_config(folder: Path) -> str:
    (folder / "generation_config.json").write_text("{not json")
    return "generation_config.json"


BREAK = [
    _truncate,
    _corrupt_header,
    _garble,
    _lie_about_a_shape,
    _lie_about_a_type,
    _remove_weights,
    _break_index,
    _break_config,
    _list_config,
    _remove_config,
    _remove_tokenizer,
    _keep_only_the_tokenizers_config,
    _break_tokenizer,
    _empty_tokenizer,
    _break_tokenizer_config,
    _break_generation_config,
]


def alive(kind: type) -> int:
    """Count the objects of a class after the garbage is collected."""
    gc.collect()
    return sum(1 for item in gc.get_objects() if issubclass(type(item), kind))  # isinstance wakes lazy objects


@pytest.mark.parametrize("damage", BREAK, ids=lambda damage: damage.__name__[1:])
def test_a_broken_file_is_named(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    """A file that is absent or broken is a `WeightsError` that says which one."""
    folder = copied("llama", tmp_path)
    file = damage(folder)
    with pytest.raises(WeightsError) as caught:
        load("causal", folder)
    message = str(caught.value)
    assert file in message
    assert str(folder) in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """A checkpoint in shards loads; without one of them the error names that one."""
    folder = sharded("llama", tmp_path)
    with load("causal", folder) as generator:
        assert tokens(generator) == tokens(checkpoints.wrapper("llama"))
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=f"lacks '{gone.name}', which {INDEX} names"):
        load("causal", folder)


# Weights that do not match


def test_a_masked_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """BERT saved without the head that fills masks is refused with the names of what is missing."""
    _, tokenizer = checkpoints.reference("bert")
    hf.BertModel(hf.AutoConfig.from_pretrained(checkpoints.folder("bert"))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeightsError) as caught:
        load("masked", tmp_path)
    message = str(caught.value)
    assert "lacks weights that BertForMaskedLM needs" in message
    assert "'cls.predictions." in message
    assert "They would be random" in message
    assert "load a checkpoint that was saved with this head" in message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """One tensor absent from the file is an error that names it, not a warning."""
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = edit_weights(copied("llama", tmp_path), lambda weights: weights.pop(name))
    with pytest.raises(WeightsError, match=f"lacks weights that LlamaForCausalLM needs: '{name}'"):
        load("causal", folder)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    """Of many missing tensors a few are named and the others counted."""
    folder = edit_config(copied("llama", tmp_path), num_hidden_layers=4)
    with pytest.raises(WeightsError, match="and 13 more"):
        load("causal", folder)


@pytest.mark.parametrize(
    "name, value, where", [("intermediate_size", 96, "mlp.up_proj.weight"), ("vocab_size", 999, "embed_tokens.weight")]
)
def test_other_shapes_are_named(tmp_path: Path, name: str, value: int, where: str) -> None:
    """Weights of another shape than the config says are an error that names them."""
    folder = edit_config(copied("llama", tmp_path), **{name: value})
    with pytest.raises(WeightsError) as caught:
        load("causal", folder)
    assert where in str(caught.value)
    assert "LlamaForCausalLM" in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "bart", "opt", "marian", "m2m100", "gemma2"])
def test_tied_weights_are_not_missing(name: str) -> None:
    """A head that is tied to the embeddings is not in the file, and that is fine."""
    stored = load_file(checkpoints.folder(name) / SAFE)
    wrapper = checkpoints.wrapper(name)
    assert set(wrapper.model.state_dict()) - set(stored)  # or there would be nothing to show
    assert torch.equal(wrapper.model.get_output_embeddings().weight, wrapper.model.get_input_embeddings().weight)


# What a failure leaves


def _drop_a_tensor(folder: Path) -> str:
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    return SAFE


@pytest.mark.parametrize(
    "damage",
    [_truncate, _drop_a_tensor, _lie_about_a_type, _break_tokenizer, _break_generation_config],
    ids=lambda damage: damage.__name__[1:],
)
def test_a_failed_load_leaves_nothing(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    """After a failure no model is alive, no thread runs, and no file is open or mapped."""
    checkpoints.wrapper("llama")
    folder = copied("llama", tmp_path)
    damage(folder)
    models, threads = alive(transformers.LlamaForCausalLM), threading.active_count()
    error = None
    try:
        load("causal", folder)
    except LmkitError as caught:
        error = caught.with_traceback(None)  # as a program that keeps the error for its report
    assert isinstance(error, WeightsError)
    if error.__cause__ is not None:
        error.__cause__.__traceback__ = None
        error.__cause__.__context__ = None
    assert alive(transformers.LlamaForCausalLM) == models
    assert threading.active_count() == threads
    maps, opened = Path("/proc/self/maps"), Path("/proc/self/fd")
    if maps.exists():
        assert str(folder) not in maps.read_text()
        assert not [link for link in opened.iterdir() if str(folder) in _target(link)]
    shutil.rmtree(folder)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_an_error_that_is_held_holds_no_model(tmp_path: Path) -> None:
    """A notebook keeps the last error with its frames: the refused model is not in them."""
    checkpoints.wrapper("llama")
    folder = copied("llama", tmp_path)
    weights = load_file(folder / SAFE)
    (folder / SAFE).unlink()
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")  # what a pickle holds is known when it has been read
    before = alive(transformers.LlamaForCausalLM)
    with pytest.raises(WeightsError, match=r"lacks weights .*'model\.norm\.weight'") as caught:
        load("causal", folder, allow_pickle=True)
    assert alive(transformers.LlamaForCausalLM) == before
    assert caught.value.__traceback__ is not None


def test_a_model_that_cannot_be_wrapped_is_not_kept(tmp_path: Path) -> None:
    """A masked model whose tokenizer has no mask is refused with its name, and let go."""
    checkpoints.wrapper("bert")
    folder = copied("bert", tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"mask_token": None}
    path.write_text(json.dumps(settings))
    before = alive(transformers.BertForMaskedLM)
    with pytest.raises(LmkitError, match="has no mask token") as caught:
        load("masked", folder)
    assert str(folder) in str(caught.value)
    del caught
    assert alive(transformers.BertForMaskedLM) == before


def test_closing_gives_the_memory_back() -> None:
    """After `close` the model is gone from memory and using the wrapper says so."""
    generator = checkpoints.fresh("gpt2")
    before = alive(transformers.GPT2LMHeadModel)
    generator.close()
    assert alive(transformers.GPT2LMHeadModel) == before - 1
    generator.close()  # twice is fine
    assert "closed" in repr(generator)
    with pytest.raises(lmkit.EngineError, match=r"was closed .*call lmkit.load"):
        generator.model  # noqa: B018


# Options


@pytest.mark.parametrize(
    "options, line",
    [
        ({"load_in_8bit": True}, 'load(task, name, "int8")'),
        ({"load_in_4bit": True}, 'load(task, name, "int4")'),
        ({"torch_dtype": torch.float16}, 'load(task, name, "bfloat16")'),
        ({"dtype": "auto"}, 'load(task, name, "bfloat16")'),
        ({"quantization_config": None}, "load(task, name, quantization_config)"),
        ({"device_map": "auto"}, 'load(task, name, "auto", devices)'),
        ({"device": 0}, 'load(task, name, "auto", "cuda:0")'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_old_keyword_is_answered_with_the_line_to_write(options: dict[str, Any], line: str) -> None:
    """Keywords of from_pretrained are a `TypeError` that shows what to write instead."""
    with pytest.raises(TypeError) as caught:
        load("causal", "no/such", **options)
    assert isinstance(caught.value, UnknownOptionError)
    assert str(caught.value) == f"load() takes no {next(iter(options))}=: write {line}."


@pytest.mark.parametrize(
    "name, near",
    [
        ("revison", "revision"),
        ("tokens", "token"),
        ("cachedir", "cache_dir"),
        ("local_file_only", "local_files_only"),
        ("trust_remote", "trust_remote_code"),
        ("allow_pickles", "allow_pickle"),
    ],
)
def test_a_misspelt_keyword_names_the_nearest(name: str, near: str) -> None:
    """An unknown keyword is a `TypeError` that names the nearest, and all there are."""
    with pytest.raises(UnknownOptionError) as caught:
        load("causal", "no/such", **{name: True})
    message = str(caught.value)
    assert f"load() takes no {name}=. Did you mean {near!r}?" in message
    assert "Accepted: 'revision', 'token', 'cache_dir'" in message


def test_a_keyword_like_no_other_lists_them_all() -> None:
    """An unknown keyword that is near nothing lists what is accepted, and guesses nothing."""
    with pytest.raises(UnknownOptionError, match=r"takes no zzz=. Accepted: ") as caught:
        load("causal", "no/such", zzz=1)
    assert "Did you mean" not in str(caught.value)


def test_everything_after_devices_is_a_keyword() -> None:
    """A fifth positional argument is refused."""
    with pytest.raises(TypeError, match="positional"):
        load("causal", "no/such", "auto", "cpu", "main")


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_pickled_wrapper_loads_again(name: str) -> None:
    """Pickling keeps how the model was loaded, not its weights, and gives an equal wrapper back."""
    wrapper = checkpoints.wrapper(name)
    content = pickle.dumps(wrapper)
    assert len(content) < 2_000
    with pickle.loads(content) as again:  # noqa: S301 - made just above
        assert type(again) is type(wrapper)
        assert set(again.plan.placement.max_memory) == {"cpu"}  # how much of it is free differs from moment to moment
        assert dataclasses.replace(again.plan, placement=wrapper.plan.placement) == wrapper.plan
        text = checkpoints.texts(name)[0]
        if name == "bert":
            assert again(text).candidates == wrapper(text).candidates
        else:
            assert again(text, max_new_tokens=5).token_ids == wrapper(text, max_new_tokens=5).token_ids


def test_a_pickle_keeps_no_token() -> None:
    """The Hub token a model was loaded with is a secret and is left out of its pickle."""
    with load("causal", checkpoints.folder("gpt2"), token="hf_secret", local_files_only=True) as generator:
        content = pickle.dumps(generator)
    assert b"hf_secret" not in content
    assert b"local_files_only" in content


@pytest.mark.parametrize("name", ["gpt2", "t5", "m2m100", "marian", "xlm", "bert"])
def test_a_local_folder_asks_no_network(name: str, network: list[str]) -> None:
    """Loading and calling a local checkpoint, a sentencepiece tokenizer's too, looks up no host."""
    with checkpoints.fresh(name) as wrapper:
        wrapper(checkpoints.texts(name)[0], **checkpoints.languages(name))
    assert network == []


def test_threads_may_plan_and_load_at_once(network: list[str]) -> None:
    """Loads in several precisions at a time each hold what they planned, and leave nothing changed behind."""
    del network
    words: list[Any] = ["float32", "bfloat16", "int8", "int4"] * 2
    filters = list(warnings.filters)

    def work(word: Any) -> tuple[int, int, bool]:
        planned = lmkit.plan("causal", checkpoints.folder("llama"), word, "cpu").weights_bytes
        with lmkit.load("causal", checkpoints.folder("llama"), word, "cpu") as generator:
            ended = generator("She", max_new_tokens=2).generated_tokens > 0
            return planned, generator.plan.weights_bytes, ended

    alone = {word: lmkit.plan("causal", checkpoints.folder("llama"), word, "cpu").weights_bytes for word in words}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, words))
    assert found == [(alone[word], alone[word], True) for word in words]
    assert torch.get_default_dtype() is torch.float32
    assert warnings.filters == filters
