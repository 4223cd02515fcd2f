"""What is wrong with a checkpoint's files, told in words that lead to what to do; each text is what a user reads."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
import gguf_tiny
import lmkit

hf: Any = transformers
load: Any = lmkit.load
plan: Any = lmkit.plan
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 90\n"
Copy = Callable[..., Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Copy a tiny Llama, with other values in its config."""

    def copy(**values: Any) -> Path:
        shutil.copytree(checkpoints.folder("llama"), tmp_path / "copy")
        write(tmp_path / "copy" / "config.json", values)
        return tmp_path / "copy"

    return copy


def write(file: Path, values: Any) -> None:
    """Write other values into a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def told(where: Path, kind: type[Exception] = lmkit.WeightsError, **options: Any) -> str:
    """Return what a load says against a checkpoint, which a plan says too."""
    with pytest.raises(kind) as planned:
        plan("causal", where, devices={"cpu": "1GiB"}, **options)
    with pytest.raises(kind) as loaded:
        load("causal", where, devices="cpu", **options)
    assert str(planned.value) == str(loaded.value)
    return str(loaded.value)


@pytest.mark.parametrize(
    "config, package",
    [
        ({"quant_method": "gptq", "bits": 4}, '"optimum" "gptqmodel"'),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, '"gptqmodel"'),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, '"compressed-tensors'),
        ({"quant_method": "hqq", "quant_config": {}}, '"hqq"'),
        ({"quant_method": "quanto", "weights": "int8"}, '"optimum-quanto"'),
        ({"quant_method": "aqlm"}, '"aqlm[gpu,cpu]"'),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_a_quantized_checkpoint_names_its_package(config: dict[str, Any], package: str, copy: Copy) -> None:
    """The package that reads GPTQ, AWQ and others is named as pip takes it."""
    said = told(copy(quantization_config=config), lmkit.MissingExtraError)
    assert f"needs a package that is not installed: pip install {package}" in said


def test_an_attention_without_its_package_names_it_and_the_way_round(copy: Copy) -> None:
    """A config that asks for flash attention says which package that is, and `attn_implementation=` does without."""
    where = copy(attn_implementation="flash_attention_2")
    said = told(where, lmkit.MissingExtraError)
    assert "pass attn_implementation='sdpa', or pip install \"flash-attn\"" in said
    ids = torch.arange(5, 25)[None]
    for name in ("sdpa", "eager"):
        with load("causal", where, "float32", "cpu", attn_implementation=name) as generator:
            assert (generator.plan.attention, generator.plan.reasons["attention"]) == (name, "as asked")
            assert generator.model.config._attn_implementation == name
            with torch.no_grad():
                found, expected = (one(ids).logits for one in (generator.model, checkpoints.reference("llama")[0]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "attn_implementation='flashy' is not to be had" in told(
        where, lmkit.OptionError, attn_implementation="flashy"
    )


def test_a_tokenizer_of_a_newer_version_says_so(copy: Copy) -> None:
    """A tokenizer.json with parts that the installed tokenizers does not know is no bare exception."""
    where = copy()
    write(where / "tokenizer.json", {"pre_tokenizer": {"type": "Newer"}})
    with pytest.raises(lmkit.WeightsError, match=r"the tokenizer of .* pip install --upgrade tokenizers"):
        load("causal", where)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_told(file: str, copy: Copy) -> None:
    """A pointer in the place of any file says what it is and how to fetch the file."""
    where = copy()
    (where / file).write_text(POINTER)
    with pytest.raises(lmkit.WeightsError, match=rf"{re.escape(file)} is a Git LFS pointer, .* run 'git lfs pull'"):
        load("causal", where)


@pytest.mark.parametrize("said", [[2, None], "2", 1.5, [], True], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_number_is_told(said: Any, file: str, copy: Copy) -> None:
    """Whatever stands for an end token is shown as the file has it, with the file; an empty list is none."""
    where = copy()
    if file == "config.json":
        (where / "generation_config.json").unlink()
    write(where / file, {"eos_token_id": said})
    if said == []:
        assert plan("causal", where, devices="cpu").fits
    else:
        assert f"{file} has eos_token_id {json.dumps(said)}, which is not the number of a token" in told(where)


@pytest.mark.parametrize("dtype", ["bf16", "auto", {"": "bfloat16"}, "nn"], ids=str)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_torch_does_not_have_is_told(dtype: Any, key: str, copy: Copy) -> None:
    """What a config has for a dtype is shown, with what it may have."""
    said = told(copy(**{"dtype": None, key: dtype}))
    assert f'config.json has dtype {json.dumps(dtype)}: write "bfloat16", "float16" or "float32" there' in said


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_plain_weights_under_a_config_of_bitsandbytes_are_told(bits: str, copy: Copy) -> None:
    """A quantization_config that was left over plain weights fails in the plan, not at the first step."""
    said = told(copy(quantization_config={"quant_method": "bitsandbytes", bits: True}))
    assert "has a quantization_config of bitsandbytes, and its weights are plain: take it out" in said


def test_a_quantization_config_without_its_method(copy: Copy, tmp_path: Path) -> None:
    """That of bitsandbytes is known by its other keys, and of others it is told that it lacks the method."""
    where = copy()
    with load("causal", where, "nf4", "cpu") as generator:
        generator.model.save_pretrained(tmp_path / "nf4")
        generator.tokenizer.save_pretrained(tmp_path / "nf4")
        expected = generator("The old sailor", max_new_tokens=6).token_ids
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    with load("causal", tmp_path / "nf4", devices="cpu") as generator:
        assert generator("The old sailor", max_new_tokens=6).token_ids == expected
    write(where / "config.json", {"quantization_config": {"bits": 4}})
    assert "config.json has a quantization_config without quant_method" in told(where)


@pytest.mark.parametrize("word", ["float32", "int8"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_names_of_a_wrapper_are_told(prefix: str, word: str, copy: Copy) -> None:
    """Weights that were saved from a compiled or wrapped model say so, and not that they would be random."""
    where = copy()
    tensors = {prefix + key: tensor for key, tensor in load_file(where / "model.safetensors").items()}
    save_file(tensors, where / "model.safetensors", {"format": "pt"})
    said = told(where, precision=word)
    assert "which a wrapper put there (of torch.compile, data parallel training or peft)" in said
    assert "random" not in said


def test_mlx_files_are_told(copy: Copy) -> None:
    """Weights that MLX has quantized, and a file of its own name, say what they are."""
    where = copy(quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64, "bits": 4})
    assert "is quantized for Apple's MLX" in told(where)
    (where / "model.safetensors").rename(where / "weights.00.safetensors")
    assert "It has 'weights.00.safetensors', which transformers does not read: convert it." in told(where)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    """A folder is loaded by its only GGUF file; of several, the error names them."""
    gguf_tiny.save(tmp_path / "one.gguf")
    with (
        load("causal", tmp_path, "float32", "cpu") as of_folder,
        load("causal", tmp_path / "one.gguf", "float32", "cpu") as of_file,
    ):
        assert of_folder("The old", max_new_tokens=4).token_ids == of_file("The old", max_new_tokens=4).token_ids
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert "has no weights" in (said := told(tmp_path))
    assert "It has several: pass one of 'one.gguf', 'two.gguf'" in said


def test_an_adapter_as_the_model_is_told(tmp_path: Path) -> None:
    """A folder with an adapter alone names the base model and how to load both."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "is an adapter, not a model: load 'org/base', with this as adapter=" in told(tmp_path)


def test_a_token_without_an_embedding_is_told(copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    """A load names the tokens that the model has no embeddings for; a text with one says so, and others run."""
    where = copy()
    tokenizer = hf.AutoTokenizer.from_pretrained(where)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(where)
    with caplog.at_level("WARNING", "lmkit"), load("causal", where, "float32", "cpu") as generator:
        assert "tokens without an embedding, 479 are there: '<extra>'" in caplog.text
        for do in (generator, generator.score):
            with pytest.raises(lmkit.OptionError, match=r"token '<extra>' .number 479., for which the model has no"):
                do("The <extra> sailor")
        assert generator("The sailor", max_new_tokens=2).token_ids


def test_words_of_other_libraries_are_answered() -> None:
    """`tokenizer=` in a load, and a wrapper that is made by hand, say what to call."""
    with pytest.raises(
        lmkit.UnknownOptionError, match=r"takes no tokenizer=: write tokenizer.save_pretrained\(folder\)"
    ):
        load("causal", "any/name", tokenizer="other/name")
    for kind in (lmkit.Generator, lmkit.Translator, lmkit.Unmasker):
        made: Any = kind
        with pytest.raises(
            lmkit.OptionError, match=rf"{kind.__name__}\('path'\) loads nothing: call lmkit.load\(task, name\)"
        ):
            made("path")


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "5", '"x"', "null"])
def test_json_that_is_no_object_is_told(file: str, content: str, copy: Copy) -> None:
    """A file with a list or a number in place of settings is an error of lmkit's, that names the file or its kind."""
    where = copy()
    (where / file).write_text(content)
    with pytest.raises(lmkit.LmkitError) as caught:
        load("causal", where, devices="cpu")
    assert file.removesuffix(".json").partition("_")[0] in str(caught.value)


@pytest.mark.parametrize("said", ["q4", [1], True])
def test_a_word_that_means_nothing_to_transformers_is_left_alone(said: Any, copy: Copy) -> None:
    """`quantization` is MLX's only where it has what MLX writes."""
    load("causal", copy(quantization=said), devices="cpu").close()


@pytest.mark.parametrize("option", [{"attn_implementation": 5}, {"context_length": True}, {"context_length": 0}])
def test_options_of_other_kinds_are_refused(option: dict[str, Any], copy: Copy) -> None:
    """What is no word and no number is named."""
    name, value = next(iter(option.items()))
    assert f"{name}={value!r} is not accepted" in told(copy(), lmkit.OptionError, **option)


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("token", ["", {"__type": "AddedToken"}], ids=["empty", "nothing"])
def test_an_unknown_token_that_is_none_is_told(token: Any, file: str, copy: Copy) -> None:
    """A tokenizer whose token for the unknown is itself unknown would look for it for ever."""
    where = copy()
    (where / "special_tokens_map.json").write_text("{}")
    write(where / file, {"unk_token": token})
    with pytest.raises(lmkit.WeightsError, match=r"the tokenizer of .* cannot be read: .*unk_token '' is not"):
        load("causal", where, devices="cpu")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Save a tiny Llama in shards."""
    shutil.copytree(
        checkpoints.folder("llama"), tmp_path / "shards", ignore=shutil.ignore_patterns("model.safetensors")
    )
    checkpoints.plain("causal", checkpoints.folder("llama"))[0].save_pretrained(
        tmp_path / "shards", max_shard_size="40KB"
    )
    return tmp_path / "shards"


FIRST = "model.embed_tokens.weight"
INDEX: dict[str, Callable[[dict[str, str]], Any]] = {
    "none": lambda _: {},
    "a list": list,
    "a number": lambda _: 5,
    "a number for a shard": lambda held: held | {FIRST: 5},
    "a list for a shard": lambda held: held | {FIRST: [held[FIRST]]},
    "a folder": lambda held: held | {FIRST: ".."},
    "outside": lambda held: held | {FIRST: "../outside.safetensors"},
    "absolute": lambda held: held | {FIRST: "/etc/model.safetensors"},
    "no shard": lambda held: held | {FIRST: "config.json"},
    "a shard that is missing": lambda held: held | {FIRST: "model-9.safetensors"},
    "another shard": lambda held: held | {FIRST: next(one for one in held.values() if one != held[FIRST])},
    "a weight more": lambda held: held | {"more": held[FIRST]},
    "other names": lambda held: {f"other.{name}": shard for name, shard in held.items()},
    "half a character": lambda held: held | {FIRST: "a\ud800.safetensors"},
}


@pytest.mark.parametrize("name", INDEX)
def test_an_index_that_is_false_is_told(name: str, sharded: Path) -> None:
    """Whatever an index says that its shards do not is an error that names it; nothing outside the folder is read."""
    index = sharded / "model.safetensors.index.json"
    held = json.loads(index.read_text())["weight_map"]
    assert len(set(held.values())) > 1
    write(index, {"weight_map": INDEX[name](held)})
    assert "model.safetensors.index.json" in told(sharded)


def test_a_true_index_loads_whatever_else_it_says(sharded: Path) -> None:
    """The tokens are those of plain transformers: an index's sizes are not read, and a shard may be a link."""
    index = sharded / "model.safetensors.index.json"
    write(index, {"metadata": {"total_size": "x"}, "more": [None]})
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (sharded / shard).rename(sharded.parent / "elsewhere")
    (sharded / shard).symlink_to(sharded.parent / "elsewhere")
    with load("causal", sharded, "float32", "cpu") as generator:
        found = list(generator("She", max_new_tokens=4).token_ids)
    assert found == checkpoints.generated("llama", ["She"], max_new_tokens=4)[0]
