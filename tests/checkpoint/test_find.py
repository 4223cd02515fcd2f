import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import checkpoints
import hub_stub
import lmkit
from hub_stub import TOKEN, Hub
from lmkit.checkpoint.files import SINGLE
from lmkit.checkpoint.find import Access, find_headers
from lmkit.checkpoint.headers import TensorInfo
from lmkit.checkpoint.headers.gguf import read_gguf
from lmkit.errors import ModelNotFoundError, WeightsError

load: Any = lmkit.load
REPO = "someone/tiny-gpt2"
WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
UNWANTED = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "modeling_new.py", "README.md", "model.Q4_0.gguf"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Run a hub."""
    with hub_stub.serving() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a folder for what is fetched."""
    return tmp_path / "cache"


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Path:
    """Put a GPT-2 on the hub, beside other formats and files that a load does not need."""
    folder = Path(shutil.copytree(checkpoints.folder("gpt2"), tmp_path / "repository"))
    for name in UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    hub.repositories[REPO] = {"main": folder}
    return folder


def tokens(generator: Any) -> list[tuple[int, ...]]:
    """Continue two prompts, and close the generator."""
    with generator:
        return [result.token_ids for result in generator(["The old sailor", "She"], max_new_tokens=6)]


def expected() -> list[tuple[int, ...]]:
    """Return what the local folder's model writes."""
    return [r.token_ids for r in checkpoints.wrapper("gpt2")(["The old sailor", "She"], max_new_tokens=6)]


@pytest.mark.usefixtures("repository")
def test_a_hub_id_loads_and_fetches_only_what_it_needs(hub: Hub, cache: Path) -> None:
    """By its id a checkpoint writes what its folder does; no second format, code or subfolder is fetched."""
    generator = load("causal", REPO, cache_dir=cache)
    assert generator.name == REPO
    assert tokens(generator) == expected()
    assert hub.downloads() == WANTED


@pytest.mark.usefixtures("repository")
def test_the_second_load_makes_no_request(hub: Hub, cache: Path) -> None:
    """What is in the cache is loaded without asking the hub anything."""
    load("causal", REPO, cache_dir=cache).close()
    hub.requests.clear()
    assert tokens(load("causal", REPO, cache_dir=cache)) == expected()
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_calls_make_no_request(hub: Hub, cache: Path) -> None:
    """Once the model is loaded nothing is asked."""
    generator = load("causal", REPO, cache_dir=cache)
    hub.requests.clear()
    tokens(generator)
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_local_files_only_uses_the_cache(hub: Hub, cache: Path) -> None:
    """With `local_files_only` a fetched checkpoint loads, and the hub is not asked."""
    load("causal", REPO, cache_dir=cache).close()
    hub.requests.clear()
    assert tokens(load("causal", REPO, cache_dir=cache, local_files_only=True)) == expected()
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_local_files_only_fetches_nothing(hub: Hub, cache: Path) -> None:
    """With `local_files_only` and an empty cache the checkpoint is not found, and the hub is not asked."""
    with pytest.raises(ModelNotFoundError, match="the Hub was not asked"):
        load("causal", REPO, cache_dir=cache, local_files_only=True)
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_the_offline_switch_of_the_hub_is_obeyed(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `HF_HUB_OFFLINE` the cache is used, what it lacks is not found, and the hub is not asked."""
    load("causal", REPO, cache_dir=cache).close()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tokens(load("causal", REPO, cache_dir=cache)) == expected()
    with pytest.raises(ModelNotFoundError, match="offline was asked for"):
        load("causal", "someone/other", cache_dir=cache)
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_lost_from_the_cache_is_fetched_again(hub: Hub, cache: Path, name: str) -> None:
    """One deleted file is fetched again, and only that one."""
    load("causal", REPO, cache_dir=cache).close()
    lost = next(cache.glob(f"*/snapshots/*/{name}"))
    lost.resolve().unlink()
    lost.unlink()
    hub.requests.clear()
    assert tokens(load("causal", REPO, cache_dir=cache)) == expected()
    assert hub.downloads() == {name}


@pytest.mark.usefixtures("repository")
def test_a_lost_file_cannot_be_had_offline(hub: Hub, cache: Path) -> None:
    """With `local_files_only` an incomplete checkpoint is an error that names what is missing."""
    load("causal", REPO, cache_dir=cache).close()
    next(cache.glob("*/snapshots/*/model.safetensors")).unlink()
    hub.requests.clear()
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        load("causal", REPO, cache_dir=cache, local_files_only=True)
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("options", [{}, {"token": TOKEN}])
def test_an_absent_repository_is_not_found(cache: Path, options: dict[str, str]) -> None:
    """What the hub does not have, or hides, is not found, with where lmkit looked and what may help."""
    with pytest.raises(ModelNotFoundError) as caught:
        load("causal", "someone/absent", cache_dir=cache, **options)
    message = str(caught.value)
    assert "'someone/absent' was not found" in message
    assert str(cache) in message
    assert f"{constants.ENDPOINT} answered" in message
    assert "Check the spelling" in message
    assert "needs token=" in message
    assert TOKEN not in message


@pytest.mark.usefixtures("repository")
def test_a_gated_repository_needs_the_token(hub: Hub, cache: Path) -> None:
    """A gated model is refused with the hint to pass a token, and loads with the right one."""
    hub.gated.add(REPO)
    with pytest.raises(ModelNotFoundError, match="a private or gated model needs token="):
        load("causal", REPO, cache_dir=cache)
    with pytest.raises(ModelNotFoundError):
        load("causal", REPO, cache_dir=cache, token="hf_wrong")
    generator = load("causal", REPO, cache_dir=cache, token=TOKEN)
    assert set(hub.tokens) == {"hf_wrong", TOKEN}
    content = pickle.dumps(generator)
    assert TOKEN.encode() not in content
    assert tokens(generator) == expected()


@pytest.mark.usefixtures("repository")
def test_a_pickled_wrapper_comes_back_from_the_cache(hub: Hub, cache: Path) -> None:
    """Unpickling a wrapper of a hub model loads it from the same cache, without the token."""
    hub.gated.add(REPO)
    content = pickle.dumps(load("causal", REPO, cache_dir=cache, token=TOKEN))
    hub.requests.clear()
    assert tokens(pickle.loads(content)) == expected()  # noqa: S301 - made just above
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_a_revision_is_the_one_that_loads(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """`revision=` takes a branch or a commit, from the hub first and then from the cache."""

    def halve(model: Any, _tokenizer: Any) -> None:
        model.lm_head.weight.data.neg_()

    other = checkpoints.changed("gpt2", tmp_path / "other", halve)
    hub.repositories[REPO]["v2"] = other
    of_main = tokens(load("causal", REPO, cache_dir=cache))
    of_branch = tokens(load("causal", REPO, cache_dir=cache, revision="v2"))
    assert of_main == expected()
    assert of_branch == tokens(checkpoints.fresh("gpt2", other)) != of_main
    at_commit = load("causal", REPO, cache_dir=cache, revision=hub_stub.commit(REPO, "v2"))
    assert tokens(at_commit) == of_branch
    hub.requests.clear()
    assert tokens(load("causal", REPO, cache_dir=cache, revision="v2")) == of_branch
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_an_absent_revision_is_told(cache: Path) -> None:
    """A branch the repository does not have is not found, with its name."""
    with pytest.raises(ModelNotFoundError, match="v99"):
        load("causal", REPO, cache_dir=cache, revision="v99")


def test_a_repository_of_pickles_is_refused_before_they_are_fetched(hub: Hub, repository: Path, cache: Path) -> None:
    """Without `allow_pickle` a repository of pickles is refused with that reason, and none is fetched."""
    (repository / "model.safetensors").unlink()
    with pytest.raises(WeightsError) as caught:
        load("causal", REPO, cache_dir=cache)
    message = str(caught.value)
    assert "has only pickled weights (pytorch_model.bin)" in message
    assert "allow_pickle=True" in message
    assert "pytorch_model.bin" not in hub.downloads()


def test_an_allowed_pickle_is_fetched(hub: Hub, repository: Path, cache: Path) -> None:
    """With `allow_pickle` the pickle is fetched and read; nothing but its files is asked for."""
    from safetensors.torch import load_file

    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    assert tokens(load("causal", REPO, cache_dir=cache, allow_pickle=True)) == expected()
    assert hub.downloads() == WANTED - {"model.safetensors"} | {"pytorch_model.bin"}


def test_pickles_can_be_allowed_after_they_were_refused(repository: Path, cache: Path) -> None:
    """A refused load leaves a cache from which the allowed one still works."""
    from safetensors.torch import load_file

    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    with pytest.raises(WeightsError):
        load("causal", REPO, cache_dir=cache)
    assert tokens(load("causal", REPO, cache_dir=cache, allow_pickle=True)) == expected()


def test_a_repository_without_weights_is_told(repository: Path, cache: Path) -> None:
    """A repository with a config and no weights is a `WeightsError`."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        (repository / name).unlink()
    with pytest.raises(WeightsError, match="has no weights"):
        load("causal", REPO, cache_dir=cache)


def test_shards_are_fetched(hub: Hub, repository: Path, cache: Path) -> None:
    """A checkpoint in shards is fetched whole, with its index."""
    (repository / "model.safetensors").unlink()
    checkpoints.reference("gpt2")[0].save_pretrained(repository, max_shard_size="30KB")
    shards = {path.name for path in repository.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert tokens(load("causal", REPO, cache_dir=cache)) == expected()
    assert hub.downloads() >= shards | {"model.safetensors.index.json"}


@pytest.mark.parametrize("name", ["m2m100", "marian", "xlm"])
def test_tokenizers_of_several_files_are_fetched(hub: Hub, cache: Path, name: str) -> None:
    """The files of slow tokenizers, sentencepiece models too, are among those fetched."""
    hub.repositories[f"someone/{name}"] = {"main": checkpoints.folder(name)}
    with load(checkpoints.FAMILIES[name].task, f"someone/{name}", cache_dir=cache) as wrapper:
        text, languages = checkpoints.texts(name)[0], checkpoints.languages(name)
        mine, local = wrapper(text, **languages), checkpoints.wrapper(name)(text, **languages)
    assert str(mine) == str(local)


def test_one_gguf_file_of_a_repository_is_fetched(hub: Hub, repository: Path, cache: Path) -> None:
    """`"repo/id:file.gguf"` fetches that file alone, and reads it."""
    (repository / "tiny.gguf").write_bytes(b"not GGUF after all")
    with pytest.raises(WeightsError, match=r"tiny\.gguf.* not a GGUF file"):
        load("causal", f"{REPO}:tiny.gguf", cache_dir=cache)
    assert hub.downloads() == {"tiny.gguf"}
    hub.requests.clear()
    with pytest.raises(WeightsError, match=r"tiny\.gguf.* not a GGUF file"):
        load("causal", f"{REPO}:tiny.gguf", cache_dir=cache)
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_an_absent_gguf_file_of_a_repository_is_told(cache: Path) -> None:
    """A file that the repository does not have is not found, and its .gguf files are named."""
    with pytest.raises(ModelNotFoundError) as caught:
        load("causal", f"{REPO}:absent.gguf", cache_dir=cache)
    assert "absent.gguf" in str(caught.value)
    assert "model.Q4_0.gguf" in str(caught.value)


def test_code_is_fetched_only_when_trusted(hub: Hub, repository: Path, cache: Path) -> None:
    """A repository's Python files are fetched with `trust_remote_code` alone."""
    load("causal", REPO, cache_dir=cache).close()
    assert not [name for name in hub.downloads() if name.endswith(".py")]
    (repository / "modeling_new.py").write_text("# nothing")
    load("causal", REPO, cache_dir=cache.with_name("other"), trust_remote_code=True).close()
    assert "modeling_new.py" in hub.downloads()


@pytest.mark.usefixtures("hub")
def test_a_hub_that_fails_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers with an error of its own is a `ModelNotFoundError` with that answer."""
    monkeypatch.setattr(hub_stub._Handler, "_respond", lambda self: self._refuse(500, "", "out of order"))
    with pytest.raises(ModelNotFoundError, match="500"):
        load("causal", REPO, cache_dir=cache)


def big_shards(repository: Path, count: int) -> dict[str, TensorInfo]:
    """Put a megabyte of weights on the hub, in one file or in shards, and return what is in them."""
    (repository / "model.safetensors").unlink()
    names = {f"part.{number}": (2**18 // count,) for number in range(count)}
    files = [SINGLE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for file, (name, shape) in zip(files, names.items(), strict=True):
        save_file({name: torch.zeros(shape)}, repository / file)
    if count > 1:
        index = {"weight_map": dict(zip(names, files, strict=True))}
        (repository / f"{SINGLE}.index.json").write_text(json.dumps(index))
    return {name: TensorInfo("F32", shape, shape[0] * 4) for name, shape in names.items()}


def asked(cache: Path, **options: Any) -> Access:
    """Ask the hub, and keep what it sends in the test's own cache."""
    return Access(cache_dir=str(cache), **options)


def assert_only_headers_were_sent(hub: Hub, suffix: str, *, most: int) -> None:
    """Check that no weight file was asked for without a range, and how many bytes of them were sent."""
    assert not [name for name in hub.downloads() if name.endswith(suffix)]
    assert 0 < sum(sent for name, sent in hub.sent.items() if name.endswith(suffix)) <= most


@pytest.mark.parametrize("count", [1, 2])
def test_the_headers_of_a_checkpoint_are_fetched_alone(hub: Hub, repository: Path, cache: Path, count: int) -> None:
    """Of safetensors on the Hub, in one file or in shards, the headers are fetched; of the rest what describes it."""
    expected_tensors = big_shards(repository, count)
    source, tensors = find_headers(REPO, asked(cache))
    assert tensors == expected_tensors
    assert source.read_config()["model_type"] == "gpt2"
    assert hub.downloads() >= WANTED - {SINGLE}
    assert_only_headers_were_sent(hub, ".safetensors", most=count * 2**17)


@pytest.mark.parametrize("name", [REPO, f"{REPO}:model.Q4_0.gguf"])
def test_parts_are_asked_for_as_they_lie_in_the_file(hub: Hub, repository: Path, cache: Path, name: str) -> None:
    """No request for a part lets the Hub compress: the bytes it counts would be others than the file's."""
    gguf_file(repository / "model.Q4_0.gguf")
    _, tensors = find_headers(name, asked(cache))
    assert tensors
    assert hub.encodings
    assert set(hub.encodings) == {"identity"}


def test_a_header_longer_than_the_first_request_is_fetched_whole(hub: Hub, repository: Path, cache: Path) -> None:
    """A header of a quarter of a megabyte takes a second request, and no third."""
    names = [f"a.long.name.of.a.tensor.{number}" for number in range(3000)]
    save_file({name: torch.zeros(1000, dtype=torch.int8) for name in names}, repository / SINGLE)
    _, tensors = find_headers(REPO, asked(cache))
    assert set(names) == set(tensors or ())
    assert len(hub.ranges) == 2
    assert_only_headers_were_sent(hub, ".safetensors", most=2**19)


def test_headers_of_a_cached_checkpoint_ask_nobody(hub: Hub, repository: Path, cache: Path) -> None:
    """What a load has fetched tells its tensors without a request; after headers alone a load fetches the rest."""
    _, remote = find_headers(REPO, asked(cache))
    with pytest.raises(ModelNotFoundError, match="offline was asked for"):
        find_headers(REPO, asked(cache, local_files_only=True))
    load("causal", REPO, cache_dir=cache).close()
    hub.requests.clear()
    source, cached = find_headers(REPO, asked(cache, local_files_only=True))
    assert cached == remote == find_headers(str(repository), asked(cache))[1]
    assert (source.folder / SINGLE).is_file()
    assert hub.requests == []


@pytest.mark.usefixtures("repository")
def test_headers_are_not_asked_for_offline(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `local_files_only` or `HF_HUB_OFFLINE` an empty cache is all there is, and the hub is not asked."""
    with pytest.raises(ModelNotFoundError, match="offline was asked for"):
        find_headers(REPO, asked(cache, local_files_only=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (REPO, f"{REPO}:model.Q4_0.gguf"):
        with pytest.raises(ModelNotFoundError, match="offline was asked for"):
            find_headers(name, asked(cache))
    assert hub.requests == []


def test_headers_are_those_of_the_revision(hub: Hub, repository: Path, tmp_path: Path, cache: Path) -> None:
    """The headers come from the revision that is asked for, and from a gated repository with the token alone."""
    older = Path(shutil.copytree(repository, tmp_path / "older"))
    save_file({"older": torch.zeros(1)}, older / SINGLE)
    hub.repositories[REPO]["v1"] = older
    hub.gated.add(REPO)
    _, tensors = find_headers(REPO, asked(cache, revision="v1", token=TOKEN))
    assert set(tensors or ()) == {"older"}
    assert {path.split("/resolve/")[1].split("/")[0] for path, _ in hub.ranges} == {hub_stub.commit(REPO, "v1")}
    with pytest.raises(ModelNotFoundError, match="token="):
        find_headers(REPO, asked(cache, token="hf_a_wrong_one"))
    with pytest.raises(ModelNotFoundError, match="v99"):
        find_headers(REPO, asked(cache, revision="v99", token=TOKEN))


def test_headers_of_pickles_are_refused_or_left(hub: Hub, repository: Path, cache: Path) -> None:
    """Pickles are refused as `load` refuses them; where they are allowed nothing of them is fetched."""
    (repository / SINGLE).unlink()
    with pytest.raises(WeightsError, match=r"has only pickled weights \(pytorch_model\.bin\)"):
        find_headers(REPO, asked(cache))
    source, tensors = find_headers(REPO, asked(cache, allow_pickle=True))
    assert tensors is None
    assert source.read_config()["model_type"] == "gpt2"
    assert "pytorch_model.bin" not in hub.sent


def test_a_repository_without_headers_is_told(repository: Path, cache: Path) -> None:
    """No weights, or an index whose shards are not there, is a `WeightsError` that names the repository."""
    big_shards(repository, 2)
    (repository / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"'someone/tiny-gpt2' lacks 'model-00002-of-00002\.safetensors'"):
        find_headers(REPO, asked(cache))
    for path in [*repository.glob("model*"), *repository.glob("*.bin")]:
        path.unlink()
    with pytest.raises(WeightsError, match="'someone/tiny-gpt2' has no weights"):
        find_headers(REPO, asked(cache.with_name("other")))


@pytest.mark.parametrize("content", [b"", b"short", b"<html>" * 100])
def test_a_broken_file_on_the_hub_is_told(repository: Path, cache: Path, content: bytes) -> None:
    """A file that is no safetensors is a `WeightsError` with the repository and the file."""
    (repository / SINGLE).write_bytes(content)
    with pytest.raises(WeightsError, match=r"someone/tiny-gpt2/model\.safetensors is truncated or corrupt"):
        find_headers(REPO, asked(cache))


@pytest.mark.usefixtures("repository")
def test_a_hub_that_sends_no_parts_is_told(hub: Hub, cache: Path) -> None:
    """A server that answers a range with the whole file is a `WeightsError`, and the file is not read."""
    hub.unranged = True
    with pytest.raises(WeightsError, match="was asked for a part"):
        find_headers(REPO, asked(cache))


def test_the_header_of_a_gguf_file_is_fetched_alone(hub: Hub, repository: Path, cache: Path) -> None:
    """A GGUF file on the Hub becomes one of its size that holds its header; it is gone with its source."""
    path = repository / "sub" / "big.gguf"
    path.parent.mkdir()
    gguf_file(path)
    size = path.stat().st_size
    source, tensors = find_headers(f"{REPO}:sub/big.gguf", asked(cache))
    assert tensors == read_gguf(path)
    assert source.gguf_file == "big.gguf"
    local = source.folder / source.gguf_file
    assert local.stat().st_size == size
    assert local.stat().st_blocks * 512 < size
    assert [tensor.n_bytes for tensor in gguf.GGUFReader(local).tensors] == [info.nbytes for info in tensors.values()]
    assert len(hub.ranges) == 2
    assert_only_headers_were_sent(hub, ".gguf", most=2**23)
    del source
    gc.collect()
    assert not local.parent.exists()


def gguf_file(path: Path) -> None:
    """Write a GGUF file of 5 MB of vocabulary and 32 MiB of weights, which take no room on the disk."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a long token " * 4000] * 100)
    writer.add_tensor_info("a", (2**21,), np.dtype(np.float32), 2**23)
    writer.add_tensor_info("b", (2, 3 * 2**20), np.dtype(np.float32), 3 * 2**23)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    os.truncate(path, -(-header // 32) * 32 + 2**25)


def test_a_gguf_file_on_the_hub_that_is_none_is_told(repository: Path, cache: Path) -> None:
    """What is no GGUF file is a `WeightsError` with its name, and one that is not there a `ModelNotFoundError`."""
    (repository / "model.Q4_0.gguf").write_bytes(b"not GGUF after all")
    with pytest.raises(WeightsError, match=r"tiny-gpt2:model\.Q4_0\.gguf is not a GGUF file"):
        find_headers(f"{REPO}:model.Q4_0.gguf", asked(cache))
    with pytest.raises(ModelNotFoundError, match=r"'model\.Q4_0\.gguf'"):
        find_headers(f"{REPO}:absent.gguf", asked(cache))


@pytest.mark.usefixtures("repository")
def test_a_hub_that_fails_at_a_header_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that a request for a part is answered with is a `ModelNotFoundError` with that answer."""
    monkeypatch.setattr(hub_stub._Handler, "_part", lambda self, *_: self._refuse(500, "", "out of order"))
    with pytest.raises(ModelNotFoundError, match="500"):
        find_headers(REPO, asked(cache))


SCRIPT = """
import sys, lmkit
from lmkit import ModelNotFoundError
try:
    with lmkit.load("causal", sys.argv[1]) as generator:
        print(list(generator("She", max_new_tokens=4).token_ids))
except ModelNotFoundError as error:
    print("not found:", error)
"""


def run(hub: Hub, home: Path, name: str, **environment: str) -> str:
    """Load in another process, whose environment names the hub, and return what it printed."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **environment}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, name],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    return ran.stdout.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_the_environments_settings_are_obeyed(hub: Hub, tmp_path: Path) -> None:
    """`HF_ENDPOINT` and `HF_HOME` say where to ask and keep; with `HF_HUB_OFFLINE` nothing is asked."""
    online = run(hub, tmp_path / "home", REPO)
    assert online == str(list(checkpoints.wrapper("gpt2")("She", max_new_tokens=4).token_ids))
    assert hub.downloads() == WANTED
    hub.requests.clear()
    assert run(hub, tmp_path / "home", REPO, HF_HUB_OFFLINE="1") == online
    assert run(hub, tmp_path / "empty", REPO, HF_HUB_OFFLINE="1").startswith(f"not found: {REPO!r} was not found")
    assert hub.requests == []
