"""The files of a checkpoint: where they are, and whether they are whole, safe and complete."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.errors import LmkitError, MissingExtraError, ModelNotFoundError, WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Source"]

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.codes",
    "*.tokenizer",
    "tekken.json",
    "dict.txt",
)
"""A folder with none of these has no tokenizer, except those that read bytes or characters."""

WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.bpe", *VOCABULARY_FILES)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint's files are on this machine.

    Attributes:
        name: As the caller wrote it.
        folder: The folder that holds the files.
        gguf_file: The file's name in the folder, for a GGUF checkpoint.
    """

    name: str
    folder: Path
    gguf_file: str | None = None

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            WeightsError: It is absent, or not a JSON object.
        """
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            msg = f"{self.folder / 'config.json'} holds a JSON {type(config).__name__}, not an object: restore it."
            raise WeightsError(msg)
        return config


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How the Hub is asked; see `lmkit.load` for the fields."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which files of a checkpoint are needed.

    Attributes:
        weights: The weights; without them only what describes the checkpoint.
        pickle: Pickled weights, where there are no safetensors.
        code: The checkpoint's own Python files.
    """

    weights: bool = True
    pickle: bool = False
    code: bool = False


def find(name: str, hub: HubOptions, wanted: Wanted) -> Source:
    """Find a checkpoint by name: a local folder, a GGUF file, the cache, then the Hub.

    Args:
        name: A folder, a `.gguf` file, a Hub id, or `"repo/id:file.gguf"`.
        hub: How to ask the Hub.
        wanted: Which files to fetch, and which must be in the cache to use it.

    Raises:
        ModelNotFoundError: It is in none of those places; the message says where lmkit looked.
        WeightsError: The Hub has it as pickled weights alone, and those are not wanted.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Source(name, path)
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, path.parent, path.name)
    if path.is_file():
        msg = f"{path.absolute()} is one file: pass the folder that holds it, {str(path.parent)!r}, or a .gguf file."
        raise ModelNotFoundError(msg)
    repo, _, file = name.partition(":")
    if not _HUB_ID.fullmatch(repo) or (name.endswith((".gguf", "/")) and not file) or repo.startswith("."):
        msg = f"{name!r} is not here: no such file or folder as {path.absolute()}, and not a Hub id (owner/name)."
        raise ModelNotFoundError(msg)
    try:
        return _from_cache(name, repo, file, hub, wanted)
    except (FileNotFoundError, WeightsError, ValueError) as absent:
        return _from_hub(name, hub, wanted, absent)


def _from_cache(name: str, repo: str, file: str, hub: HubOptions, wanted: Wanted) -> Source:
    """Use what was fetched before, without a network call; raise if any of it is absent."""
    from huggingface_hub import try_to_load_from_cache

    # Not snapshot_download: it wants every file of the repository, and lmkit fetches only those it needs.
    wanted_file = file or "config.json"
    found = try_to_load_from_cache(repo, wanted_file, revision=hub.revision, cache_dir=hub.cache_dir)
    if not isinstance(found, str):
        msg = f"no {wanted_file}"
        raise FileNotFoundError(msg)
    folder = Path(found.removesuffix(file)) if file else Path(found).parent
    source = Source(name, folder, file or None)
    if not file:
        config = source.read_config()
        check_tokenizer(source)
        if wanted.weights:
            weight_files(source, allow_pickle=True)
        if wanted.code and "auto_map" in config and not list(folder.glob("*.py")):
            raise FileNotFoundError(folder / "*.py")
    return source


def _from_hub(name: str, hub: HubOptions, wanted: Wanted, absent: Exception) -> Source:
    """Fetch the files a load needs, and no others."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    repo, _, file = name.partition(":")
    cache = hub.cache_dir or constants.HF_HUB_CACHE
    where = f"no folder {Path(name).absolute()}, nothing whole in the cache {cache} ({absent})"
    if hub.local_files_only or constants.HF_HUB_OFFLINE:
        msg = f"{name!r} was not found: {where}, and the Hub was not asked (offline was asked for)."
        raise ModelNotFoundError(msg) from absent
    try:
        # Asked first and once: unlike a download, this does not retry for 23 seconds without a network.
        info = HfApi(token=hub.token).model_info(repo, revision=hub.revision, timeout=20)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        if file and file not in names:
            there = listed(name for name in names if name.endswith(".gguf")) or "none"
            msg = f"{repo!r} has no file {file!r}; its GGUF files: {there}."
            raise ModelNotFoundError(msg)
        patterns = [file] if file else wanted_files(name, names, wanted)
        folder = snapshot_download(
            repo,
            revision=hub.revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            allow_patterns=patterns,
        )
    except LmkitError:
        raise
    except (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        HFValidationError,
        OSError,
        _network_error(),
    ) as error:
        revision = f" at revision {hub.revision!r}" if hub.revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        msg = (
            f"{name!r}{revision} was not found: {where}, and {constants.ENDPOINT} answered: {reason.rstrip('.')}. "
            "Check the spelling and the connection; a private or gated model needs token=."
        )
        raise ModelNotFoundError(msg) from error
    return Source(name, Path(folder), file or None)


def find_adapter(name: str, hub: HubOptions) -> Path:
    """Find a PEFT adapter by the name of a folder or a Hub id, and check its safetensors file.

    Raises:
        ModelNotFoundError: It is neither here nor reachable.
        WeightsError: Its weights are absent, truncated or corrupt.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if not folder.is_dir():
        files = ["adapter_config.json", ADAPTER_WEIGHTS]
        try:
            found = _cached_adapter(name, files, hub) or snapshot_download(
                name,
                allow_patterns=files,
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
            )
        except (OSError, ValueError, _network_error()) as error:
            msg = f"the adapter {name!r} was not found: no folder {folder.absolute()}, and the Hub answered: {error}"
            raise ModelNotFoundError(msg) from error
        folder = Path(str(found))
    if not (folder / ADAPTER_WEIGHTS).is_file():
        msg = f"{folder} has no {ADAPTER_WEIGHTS}, so it is no adapter that lmkit reads: save one as safetensors."
        raise WeightsError(msg)
    read_header(folder / ADAPTER_WEIGHTS)
    return folder


def _cached_adapter(name: str, files: Sequence[str], hub: HubOptions) -> str | None:
    """Return an adapter's folder in the cache, if all its files are there; no network call is made."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(name, file, cache_dir=hub.cache_dir) for file in files]
    found = [path for path in paths if isinstance(path, str)]
    return str(Path(found[0]).parent) if len(found) == len(files) else None


def _network_error() -> type[Exception]:
    """Return what huggingface_hub's HTTP client raises when nobody answers; which client it is has changed."""
    from huggingface_hub.utils._http import get_session

    client = __import__(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = getattr(client, "TransportError", OSError)
    return found


def wanted_files(repo: str, names: Sequence[str], wanted: Wanted) -> list[str]:
    """Choose from a repository's files the ones that are wanted: no second format of the same weights.

    Raises:
        WeightsError: It has pickled weights alone, and those are not wanted.
    """
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if any(Path(name).match(pattern) for pattern in _SIDE_FILES)]
    safe = [name for name in top if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    pickled = [name for name in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    if wanted.weights and pickled and not (safe or wanted.pickle):
        raise _pickled(repo, pickled[0])
    if wanted.weights:
        chosen += safe or pickled
    if wanted.code:
        chosen += [name for name in top if name.endswith(".py")]
    return chosen


def weight_files(source: Source, *, allow_pickle: bool) -> list[Path]:
    """Return a folder's weight files, all of them there.

    Raises:
        WeightsError: There are none, a shard is absent, or they are pickles and those are not allowed.
    """
    folder = source.folder
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        files = _shards(index) if index.is_file() and not single.is_file() else [single]
        if files == [single] and not single.is_file():
            continue
        if suffix == "bin" and not allow_pickle:
            raise _pickled(source.name, files[0].name)
        return files
    msg = f"{folder} has no weights: looked for model.safetensors, model.safetensors.index.json and a .gguf file."
    raise WeightsError(msg)


def _pickled(name: str, file: str) -> WeightsError:
    return WeightsError(
        f"{name!r} has only pickled weights ({file}), and unpickling can run any code its author put in: "
        "load a safetensors version, convert it, or pass allow_pickle=True if you trust it."
    )


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        msg = f"{index} has no 'weight_map' that names the shards: restore it from where the model came from."
        raise WeightsError(msg)
    names = set(map(str, weights.values()))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(index.name.split(".")[1])]:
        msg = f"{index} names {listed(strange)}, which is no shard beside it: restore it from its source."
        raise WeightsError(msg)
    files = [index.parent / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        msg = f"{index.parent} lacks {listed(missing)}, which {index.name} names: fetch the missing shards."
        raise WeightsError(msg)
    return files


def check_weights(source: Source, *, allow_pickle: bool) -> None:
    """Check that the weight files are there and whole, by their headers alone.

    Raises:
        WeightsError: A file is absent, truncated or corrupt; the message names it.
    """
    if source.gguf_file is not None:
        _check_gguf(source.folder / source.gguf_file)
        return
    for file in weight_files(source, allow_pickle=allow_pickle):
        if file.suffix == ".safetensors":
            read_header(file)
            _check_tensors(file)


def _check_tensors(file: Path) -> None:
    """Let safetensors check what the header says of each tensor; no data is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise _broken(file, str(error)) from error


def read_header(file: Path) -> dict[str, Any]:
    """Read a safetensors file's header and check that the data it describes is all there.

    Returns:
        The header: per tensor its `dtype`, `shape` and `data_offsets`.

    Raises:
        WeightsError: The file is truncated or corrupt.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size  # noqa: PLR2004 - the format's own
        if 8 + length > size:
            raise _broken(file, f"it has {size:,} bytes, fewer than its header says")
        try:
            header = json.loads(opened.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise _broken(file, "its header is not safetensors JSON") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _broken(file, f"it has {size:,} bytes where its header describes {expected:,}")
    return dict(header)


def _broken(file: Path, what: str) -> WeightsError:
    return WeightsError(f"{file} is truncated or corrupt: {what}. Fetch it again.")


def _check_gguf(file: Path) -> None:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        msg = f"{file} is not a GGUF file: it begins with {magic!r}. Fetch it again."
        raise WeightsError(msg)


def check_tokenizer(source: Source) -> None:
    """Check that a folder has a tokenizer with its vocabulary.

    Raises:
        WeightsError: It has none of `VOCABULARY_FILES`, and its tokenizer needs one.
    """
    if source.gguf_file is not None or any(next(source.folder.glob(name), None) for name in VOCABULARY_FILES):
        return
    settings = source.folder / "tokenizer_config.json"
    content = read_json(settings) if settings.is_file() else {}
    if isinstance(content, dict) and content.get("tokenizer_class") in WITHOUT_VOCABULARY:
        return
    msg = f"{source.folder} has no tokenizer: looked for {listed(VOCABULARY_FILES)}. Save one beside the model."
    raise WeightsError(msg)


def check_code(source: Source, config: dict[str, Any], *, trusted: bool) -> None:
    """Refuse a checkpoint that transformers can only load by running the checkpoint's own code.

    Raises:
        WeightsError: It needs its own code and `trusted` is False.
    """
    from transformers import CONFIG_MAPPING

    brought, kind = config.get("auto_map"), config.get("model_type")
    if trusted or not brought or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return
    code = sorted(map(str, brought.values() if isinstance(brought, dict) else [brought]))
    msg = (
        f"{source.name!r} needs its own code ({listed(code)}), which could do anything on this machine: "
        "read it, and pass trust_remote_code=True if you trust it."
    )
    raise WeightsError(msg)


def read_json(file: Path) -> object:
    """Read a JSON file.

    Raises:
        WeightsError: It is absent or not JSON; the message names it.
    """
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{file.parent} has no {file.name}, so it is not a checkpoint: pass the folder that holds one."
        raise WeightsError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{file} is not JSON: {error}. Restore it from where the model came from."
        raise WeightsError(msg) from error
    return content


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what the libraries below raise while reading a file into errors that name it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except LmkitError:
        raise
    except ImportError as error:
        raise _missing(what, error) from error
    except (*_READING, SafetensorError, StrictDataclassError) as error:
        msg = f"{what} cannot be read: {type(error).__name__}: {error}"
        raise WeightsError(msg) from error


_READING = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error)
"""What the libraries below raise when a file is not what they take it for."""

EXTRAS = {
    "gguf": "lmkit[gguf]",
    "sentencepiece": "lmkit[translate]",
    "sacremoses": "lmkit[translate]",
    "protobuf": "lmkit[translate]",
    "peft": "peft",
}


def _missing(what: str, error: ImportError) -> MissingExtraError:
    named = next((name for name in EXTRAS if name in str(error).lower()), None)
    package = EXTRAS[named] if named else (error.name or "the package that it names")
    return MissingExtraError(f'{what} needs a package that is not installed: pip install "{package}" ({error})')
