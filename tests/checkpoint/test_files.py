import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmkit.checkpoint.files import VOCABULARY_FILES, Source, check_tokenizer, read_json, tensors_of, weight_files
from lmkit.checkpoint.find import Access, find, wanted_files
from lmkit.checkpoint.headers import TensorInfo
from lmkit.errors import ModelNotFoundError, WeightsError

OFFLINE = Access(local_files_only=True)
SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"


def folder_with(folder: Path, *names: str) -> Source:
    """Make empty files of these names; an index names two shards."""
    for name in names:
        stem, _, kind = name.partition(".")
        kind = kind.removesuffix(".index.json")
        shards = {"a": f"{stem}-00001-of-00002.{kind}", "b": f"{stem}-00002-of-00002.{kind}"}
        (folder / name).write_text(json.dumps({"weight_map": shards}) if name.endswith("index.json") else "")
    return Source("some/name", folder)


@pytest.mark.parametrize(
    "names, chosen",
    [
        ([SAFE], [SAFE]),
        ([SAFE, PICKLE], [SAFE]),
        ([PICKLE], [PICKLE]),
        (
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                PICKLE,
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ),
        ([SAFE, "model.safetensors.index.json"], [SAFE]),
    ],
)
def test_the_weights_of_a_folder_are_chosen(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    """Safetensors come before pickles, and one file before shards, as in transformers."""
    found = weight_files(folder_with(tmp_path, *names), allow_pickle=True)
    assert [path.name for path in found] == chosen


@pytest.mark.parametrize("names", [[PICKLE], ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]])
def test_pickles_are_refused(tmp_path: Path, names: list[str]) -> None:
    """Without `allow_pickle` a pickled checkpoint is refused with the danger and the ways out."""
    folder_with(tmp_path, *names)
    if len(names) > 1:
        (tmp_path / "pytorch_model-00002-of-00002.bin").touch()
    with pytest.raises(WeightsError) as caught:
        weight_files(Source("some/name", tmp_path), allow_pickle=False)
    message = str(caught.value)
    assert "'some/name' has only pickled weights (pytorch_model" in message
    assert "unpickling can run any code" in message
    assert "safetensors" in message
    assert "allow_pickle=True" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """A shard that the index names and the folder lacks is named, with the index."""
    source = folder_with(tmp_path, "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError) as caught:
        weight_files(source, allow_pickle=False)
    assert "lacks 'model-00002-of-00002.safetensors'" in str(caught.value)
    assert "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}']
)
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    """An index that is no JSON, or does not map names to files, is a `WeightsError` that names it."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(WeightsError) as caught:
        weight_files(Source("some/name", tmp_path), allow_pickle=False)
    assert str(index) in str(caught.value)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    """No weights at all is a `WeightsError` with the names that would do."""
    with pytest.raises(WeightsError) as caught:
        weight_files(Source("some/name", tmp_path), allow_pickle=True)
    for part in (str(tmp_path), "model.safetensors", "model.safetensors.index.json", ".gguf"):
        assert part in str(caught.value)


def sharded(folder: Path, index: dict[str, int], *shards: dict[str, torch.Tensor]) -> Source:
    """Save shards, and an index that says which of them, counted from 1, holds each tensor."""
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weights = {tensor: names[number - 1] for tensor, number in index.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return Source("some/name", folder)


def test_the_tensors_of_one_file_are_told(tmp_path: Path) -> None:
    """Of a checkpoint in one file each tensor's type, shape and bytes are told."""
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.float16)}, tmp_path / SAFE)
    found = tensors_of(Source("some/name", tmp_path), allow_pickle=False)
    assert found == {"a": TensorInfo("F32", (3, 4), 48), "b": TensorInfo("F16", (5,), 10)}


def test_the_tensors_of_all_shards_are_put_together(tmp_path: Path) -> None:
    """A checkpoint in shards holds what all of them hold, also what the index does not name."""
    source = sharded(tmp_path, {"a": 1, "b": 2}, {"a": torch.ones(4)}, {"b": torch.ones(2), "c": torch.ones(1)})
    found = tensors_of(source, allow_pickle=False)
    assert found == {"a": TensorInfo("F32", (4,), 16), "b": TensorInfo("F32", (2,), 8), "c": TensorInfo("F32", (1,), 4)}


def test_every_shard_is_checked(tmp_path: Path) -> None:
    """The second of two shards is found truncated before anything is read."""
    source = sharded(tmp_path, {"a": 1, "b": 2}, {"a": torch.ones(4)}, {"b": torch.ones(4)})
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=f"{second.name} is truncated or corrupt"):
        tensors_of(source, allow_pickle=False)


def test_a_tensor_is_in_one_shard_only(tmp_path: Path) -> None:
    """Two shards that hold a tensor of the same name are refused, with the name."""
    source = sharded(tmp_path, {"a": 1, "b": 2}, {"a": torch.ones(4)}, {"a": torch.ones(4), "b": torch.ones(4)})
    with pytest.raises(WeightsError, match=r"00002-of-00002\.safetensors holds 'a', which another shard holds too"):
        tensors_of(source, allow_pickle=False)


def test_a_shard_holds_what_the_index_says(tmp_path: Path) -> None:
    """An index that names a tensor which its shard lacks is refused, with the name and the shard."""
    source = sharded(tmp_path, {"a": 1, "b": 1}, {"a": torch.ones(4)}, {"b": torch.ones(4)})
    with pytest.raises(WeightsError, match=r"00001-of-00002\.safetensors lacks 'b', which model\.safetensors\.index"):
        tensors_of(source, allow_pickle=False)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin"])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    """An index that leads out of its folder, or to another kind of file, is refused with the name."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=re.escape(f"names {name!r}, which is no shard beside it")):
        tensors_of(Source("some/name", tmp_path), allow_pickle=False)


@pytest.mark.parametrize("name", ["\0.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors"])
def test_a_shard_of_an_impossible_name_is_missing(tmp_path: Path, name: str) -> None:
    """A name that no file system takes is a shard that is not there."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="fetch the missing shards"):
        tensors_of(Source("some/name", tmp_path), allow_pickle=False)


def test_a_pickles_tensors_are_not_told(tmp_path: Path) -> None:
    """Pickles that are allowed are found, and not opened."""
    (tmp_path / PICKLE).write_bytes(b"anything")
    assert tensors_of(Source("some/name", tmp_path), allow_pickle=True) is None


@pytest.mark.parametrize("name", [SAFE, "model-00001-of-00001.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "link to itself"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe is not waited for, and a link that leads nowhere not followed: the name is told."""
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("absent" if kind == "dangling link" else name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    source = Source("some/name", tmp_path)
    with pytest.raises(WeightsError, match=re.escape(name)):
        tensors_of(source, allow_pickle=False) if name != "config.json" else source.read_config()


@pytest.mark.parametrize("content", [b"", b"GG", b"\x00" * 64, b"PK\x03\x04"])
def test_a_gguf_file_begins_with_its_magic(tmp_path: Path, content: bytes) -> None:
    """A file named .gguf that is something else is named, with how it begins."""
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        tensors_of(Source("x", tmp_path, "x.gguf"), allow_pickle=False)
    assert f"{tmp_path / 'x.gguf'} is not a GGUF file: it begins with {content[:4]!r}" in str(caught.value)


@pytest.mark.parametrize("name", VOCABULARY_FILES)
def test_any_tokenizer_file_will_do(tmp_path: Path, name: str) -> None:
    """Each file that a family's tokenizer is saved in counts as one."""
    (tmp_path / name).touch()
    check_tokenizer(Source("some/name", tmp_path))


def test_an_absent_tokenizer_is_told(tmp_path: Path) -> None:
    """A folder with no tokenizer is a `WeightsError` that says what was looked for."""
    (tmp_path / "config.json").touch()
    with pytest.raises(WeightsError) as caught:
        check_tokenizer(Source("some/name", tmp_path))
    assert f"{tmp_path} has no tokenizer" in str(caught.value)
    assert "'tokenizer.json'" in str(caught.value)
    assert "Save one beside the model" in str(caught.value)


def test_a_gguf_file_carries_its_tokenizer(tmp_path: Path) -> None:
    """A GGUF file needs no tokenizer beside it."""
    check_tokenizer(Source("x.gguf", tmp_path, "x.gguf"))


@pytest.mark.parametrize("content", ["", "{", "{'a': 1}", "NaN,"])
def test_what_is_not_json_is_named(tmp_path: Path, content: str) -> None:
    """A broken JSON file is a `WeightsError` with its path and the place of the fault."""
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(WeightsError) as caught:
        read_json(path)
    assert f"{path} is not JSON: " in str(caught.value)
    assert "line 1" in str(caught.value)


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    """A JSON file of other bytes is a `WeightsError` with its path."""
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match=r"config\.json is not JSON"):
        read_json(path)


@pytest.mark.parametrize("content, kind", [("[]", "list"), ("null", "NoneType"), ('"a"', "str")])
def test_a_config_is_an_object(tmp_path: Path, content: str, kind: str) -> None:
    """A config that holds something else is a `WeightsError` that says what."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=rf"config\.json holds a JSON {kind}, not an object"):
        Source("some/name", tmp_path).read_config()


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    """A folder that lacks config.json is named, with what to pass."""
    with pytest.raises(WeightsError) as caught:
        Source("some/name", tmp_path).read_config()
    assert f"{tmp_path} has no config.json, so it is not a checkpoint" in str(caught.value)


def test_of_a_repository_only_what_a_load_needs_is_wanted() -> None:
    """Safetensors, config and tokenizer are wanted; other formats, code and subfolders are not."""
    needed = ["config.json", "generation_config.json", "tokenizer.json", "vocab.txt", "spiece.model", "source.spm"]
    needed += ["chat_template.jinja", SAFE]
    other = [PICKLE, "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "onnx/model.onnx"]
    other += ["onnx/config.json", "modeling_new.py", "README.md", "model.Q4_0.gguf", "consolidated.safetensors"]
    other += ["model.fp16.safetensors", "training_args.bin", "original/tokenizer.model", "adapter_model.safetensors"]
    assert sorted(wanted_files("some/name", needed + other, Access(allow_pickle=True))) == sorted(needed)


def test_pickles_are_fetched_only_when_allowed() -> None:
    """Where a repository has only pickles they are wanted if allowed, and a `WeightsError` if not."""
    names = ["config.json", PICKLE, "pytorch_model-00001-of-00002.bin", "training_args.bin"]
    assert wanted_files("some/name", names, Access(allow_pickle=True)) == names[:3]
    assert wanted_files("some/name", names, Access(), weights=False) == names[:1]
    with pytest.raises(WeightsError, match=r"'some/name' has only pickled weights \(pytorch_model\.bin\)"):
        wanted_files("some/name", names, Access())


def test_code_is_fetched_only_when_trusted() -> None:
    """The checkpoint's own Python files are wanted if `trust_remote_code` says so."""
    names = ["config.json", "modeling_new.py", SAFE, "scripts/other.py"]
    assert "modeling_new.py" not in wanted_files("some/name", names, Access())
    assert set(wanted_files("some/name", names, Access(trust_remote_code=True))) == set(names[:3])


def test_a_folder_is_found_as_it_is(tmp_path: Path) -> None:
    """A local folder is taken before anything else, and keeps the name it was given by."""
    assert find(str(tmp_path), OFFLINE) == Source(str(tmp_path), tmp_path)


def test_a_gguf_file_is_found_in_its_folder(tmp_path: Path) -> None:
    """A path to a .gguf file is that file, in its folder."""
    path = tmp_path / "x.gguf"
    path.touch()
    assert find(str(path), OFFLINE) == Source(str(path), tmp_path, "x.gguf")


def test_a_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder, as in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert find("~/models", OFFLINE).folder == tmp_path / "models"


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "../x", "./x", "x.gguf", "/no/such/folder", "a/b/c", "~/no-such-folder", "a\nb"]
)
def test_a_name_that_can_be_no_hub_id_is_looked_for_here_only(
    name: str, network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is neither here nor a Hub id says where lmkit looked, and asks nobody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as caught:
        find(name, Access())
    message = str(caught.value)
    assert repr(name) in message
    assert "not a Hub id (owner/name)" in message
    assert network == []


@pytest.mark.parametrize("name", ["a--b", "x/y.git", "-a/b", "a/b-", "a..b", "a/" + 100 * "b", "a/b:", ":x"])
def test_a_name_that_the_hub_would_not_have_is_not_found(name: str) -> None:
    """What the Hub's own rules for ids refuse is a `ModelNotFoundError` too."""
    with pytest.raises(ModelNotFoundError) as caught:
        find(name, OFFLINE)
    assert repr(name) in str(caught.value)


def test_a_file_that_is_no_gguf_is_told_apart_from_an_absent_one(tmp_path: Path) -> None:
    """The path of a weights file is refused with the advice to pass its folder."""
    path = tmp_path / SAFE
    path.touch()
    with pytest.raises((ModelNotFoundError, WeightsError)) as caught:
        find(str(path), OFFLINE)
    assert "no such file" not in str(caught.value)
    assert "folder" in str(caught.value)


@pytest.mark.parametrize("name", ["owner/no-such-model", "no-such-model", "owner/name:file.gguf"])
def test_offline_a_name_is_looked_for_here_and_in_the_cache(name: str, tmp_path: Path, network: list[str]) -> None:
    """With `local_files_only` the message names the folder, the cache, and that nobody was asked."""
    with pytest.raises(ModelNotFoundError) as caught:
        find(name, Access(cache_dir=str(tmp_path), local_files_only=True))
    message = str(caught.value)
    assert repr(name) in message
    assert str(Path(name).absolute()) in message
    assert str(tmp_path) in message
    assert "the Hub was not asked (offline was asked for)" in message
    assert network == []
