"""Where a checkpoint is found by its name: a folder, a GGUF file, the cache, then the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmkit.errors import LmkitError, ModelNotFoundError, WeightsError, listed
from lmkit.weights import VOCABULARY_FILES, Source, check_tokenizer, pickled, read_header, weight_files

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HubOptions", "Wanted"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.bpe", *VOCABULARY_FILES)


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
    bins = [name for name in top if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    if wanted.weights and bins and not (safe or wanted.pickle):
        raise pickled(repo, bins[0])
    if wanted.weights:
        chosen += safe or bins
    if wanted.code:
        chosen += [name for name in top if name.endswith(".py")]
    return chosen
