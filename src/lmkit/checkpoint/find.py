"""Where a checkpoint is found by its name: a folder, a GGUF file, the cache, then the Hub."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lmkit.checkpoint.files import (
    INDEX,
    SINGLE,
    VOCABULARY_FILES,
    Source,
    check_tokenizer,
    merged,
    pickled,
    reading,
    shards,
    tensors_of,
    weight_files,
    weightless,
)
from lmkit.checkpoint.headers.gguf import parse_gguf
from lmkit.checkpoint.headers.safetensors import parse_safetensors, read_safetensors
from lmkit.errors import LmkitError, ModelNotFoundError, WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmkit.checkpoint.headers import TensorInfo


ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ABSENT = (FileNotFoundError, WeightsError, ValueError)  # the cache lacks something, or the name can be no id
_FIRST_BYTES = 2**17  # as huggingface_hub asks for: nearly every safetensors header is shorter
_FIRST_GGUF_BYTES = 2**22  # the vocabulary stands in the header
_NOTHING_THERE = 416  # HTTP's answer where an empty file is asked for a part
_PICKLES = r"pytorch_model(-\d+-of-\d+)?\.bin"
_SECONDS = 20  # for an answer of the Hub
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.bpe", *VOCABULARY_FILES)


@dataclass(frozen=True, slots=True)
class Access:
    """How files are found, and which of them are wanted; see `lmkit.load` for the fields."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False


def find(name: str, access: Access, *, weights: bool = True) -> Source:
    """Find a checkpoint by name: a local folder, a GGUF file, the cache, then the Hub.

    Args:
        name: A folder, a `.gguf` file, a Hub id, or `"repo/id:file.gguf"`.
        access: How to ask the Hub, and which files to fetch.
        weights: Whether weights are wanted, or only what describes the checkpoint.

    Raises:
        ModelNotFoundError: It is in none of those places; the message says where lmkit looked.
        WeightsError: The Hub has it as pickled weights alone, and those are not wanted.
    """
    if (source := _here(name)) is not None:
        return source
    try:
        return _from_cache(name, access, weights=weights)
    except _ABSENT as absent:
        return _from_hub(name, access, absent, weights=weights)


def find_headers(name: str, access: Access) -> tuple[Source, dict[str, TensorInfo] | None]:
    """Find a checkpoint as `find` does, but of the weights on the Hub fetch their headers alone.

    What describes the checkpoint is kept in the cache. Of a GGUF file on the Hub the source is a temporary file of
    the whole file's size that holds its header and takes no room for the rest; it is deleted with the `Source`.

    Returns:
        Where the checkpoint's other files are, and its tensors by name; None for pickles.

    Raises:
        ModelNotFoundError: It is nowhere; the message says where lmkit looked.
        WeightsError: Its weights are absent, truncated, corrupt, or pickles that are not wanted.
    """
    source = _here(name)
    if source is None:
        try:
            source = _from_cache(name, access)
        except _ABSENT as absent:
            return _headers_from_hub(name, access, absent)
    return source, tensors_of(source, allow_pickle=access.allow_pickle)


def _here(name: str) -> Source | None:
    """Return the folder or file of this name; None if it could be on the Hub."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        ggufs = [file.name for file in path.glob("*.gguf")]
        alone = len(ggufs) == 1 and not any(next(path.glob(f"{kind}*"), None) for kind in (SINGLE, "pytorch_model.bin"))
        return Source(name, path, ggufs[0] if alone else None)
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, path.parent, path.name)
    if path.is_file():
        raise ModelNotFoundError(
            f"{path.absolute()} is one file: pass the folder that holds it, {str(path.parent)!r}, or a .gguf file."
        )
    repo, _, file = name.partition(":")
    if not _HUB_ID.fullmatch(repo) or (name.endswith((".gguf", "/")) and not file) or repo.startswith("."):
        raise ModelNotFoundError(
            f"{name!r} is not here: no such file or folder as {path.absolute()}, and not a Hub id (owner/name)."
        )
    return None


def _from_cache(name: str, access: Access, *, weights: bool = True) -> Source:
    """Use what was fetched before, without a network call; raise if any of it is absent."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, file = name.partition(":")
    # Not snapshot_download: it wants every file of the repository, and lmkit fetches only those it needs.
    wanted_file = file or "config.json"
    found = try_to_load_from_cache(repo, wanted_file, revision=access.revision, cache_dir=access.cache_dir)
    if not isinstance(found, str):
        raise FileNotFoundError(f"no {wanted_file}")
    folder = Path(found.removesuffix(file)) if file else Path(found).parent
    source = Source(name, folder, file or None)
    if not file:
        config = source.read_config()
        check_tokenizer(source)
        if weights:
            weight_files(source, allow_pickle=True)
        if access.trust_remote_code and "auto_map" in config and not list(folder.glob("*.py")):
            raise FileNotFoundError(folder / "*.py")
    return source


@contextlib.contextmanager
def _asking_hub(name: str, access: Access, absent: Exception) -> Iterator[None]:
    """Turn what goes wrong with the Hub into errors that say where lmkit looked; refuse to ask it offline."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    cache = access.cache_dir or constants.HF_HUB_CACHE
    where = f"no folder {Path(name).absolute()}, nothing whole in the cache {cache} ({absent})"
    if access.local_files_only or constants.HF_HUB_OFFLINE:
        raise ModelNotFoundError(
            f"{name!r} was not found: {where}, and the Hub was not asked (offline was asked for)."
        ) from absent
    try:
        yield
    except LmkitError:
        raise
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError, _network_error()) as error:
        revision = f" at revision {access.revision!r}" if access.revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{name!r}{revision} was not found: {where}, and {constants.ENDPOINT} answered: {reason.rstrip('.')}. "
            "Check the spelling and the connection; a private or gated model needs token= or `hf auth login`."
        ) from error


def _listing(name: str, access: Access) -> tuple[str | None, list[str]]:
    """Return a repository's commit and the names of its files; the one that is asked for is among them."""
    from huggingface_hub import HfApi

    repo, _, file = name.partition(":")
    # Asked first and once: unlike a download, this does not retry for 23 seconds without a network.
    info = HfApi(token=access.token).model_info(repo, revision=access.revision, timeout=_SECONDS)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if file and file not in names:
        there = listed(name for name in names if name.endswith(".gguf")) or "none"
        raise ModelNotFoundError(f"{repo!r} has no file {file!r}; its GGUF files: {there}.")
    return info.sha or access.revision, names


def _fetch(repo: str, access: Access, patterns: Sequence[str]) -> Path:
    """Fetch files, weights last: where they are in the cache the others are too, though a process was killed."""
    from huggingface_hub import snapshot_download

    folder = ""
    light = tuple(pattern for pattern in patterns if not pattern.endswith(_WEIGHTS))
    for some in filter(None, dict.fromkeys([light, tuple(patterns)])):
        folder = snapshot_download(
            repo,
            revision=access.revision,
            cache_dir=access.cache_dir,
            token=access.token,
            local_files_only=access.local_files_only,
            allow_patterns=list(some),
        )
    return Path(folder)


def _from_hub(name: str, access: Access, absent: Exception, *, weights: bool) -> Source:
    """Fetch the files a load needs, and no others."""
    repo, _, file = name.partition(":")
    with _asking_hub(name, access, absent):
        _, names = _listing(name, access)
        folder = _fetch(repo, access, [file] if file else wanted_files(name, names, access, weights=weights))
    return Source(name, folder, file or None)


def _headers_from_hub(name: str, access: Access, absent: Exception) -> tuple[Source, dict[str, TensorInfo] | None]:
    """Fetch what describes a checkpoint, and of its weights the headers."""
    repo, _, file = name.partition(":")
    with _asking_hub(name, access, absent):
        commit, names = _listing(name, access)
        if file:
            return _gguf_from_hub(name, access, commit)
        wanted_files(name, names, access)  # refuses pickles before anything is fetched
        source = Source(name, _fetch(repo, access, wanted_files(name, names, access, weights=False)))
        return source, _tensors_from_hub(source, access, commit, names)


def _tensors_from_hub(
    source: Source, access: Access, commit: str | None, names: Sequence[str]
) -> dict[str, TensorInfo] | None:
    """Read the headers of a repository's weights, which are chosen as `weight_files` chooses a folder's."""

    def read(file: str) -> dict[str, TensorInfo]:
        stream = _RangedFile(_url(source.name, file, commit), access, io.BytesIO(), _FIRST_BYTES)
        return parse_safetensors(stream, stream.size, f"{source.name}/{file}")

    if SINGLE in names:
        return read(SINGLE)
    if INDEX in names:
        index = source.folder / INDEX
        files = shards(index, repr(source.name), set(names).__contains__)
        with ThreadPoolExecutor(max_workers=8) as pool:
            return merged(index, dict(zip(files, pool.map(read, files), strict=True)))
    if any(re.fullmatch(_PICKLES, name) for name in names):
        return None
    raise weightless(repr(source.name), names)


def _gguf_from_hub(name: str, access: Access, commit: str | None) -> tuple[Source, dict[str, TensorInfo]]:
    """Put the header of a GGUF file into a temporary file of the whole file's size."""
    repo, _, file = name.partition(":")
    folder = Path(tempfile.mkdtemp(prefix="lmkit-"))
    source = Source(name, folder, Path(file).name)
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    with (folder / Path(file).name).open("w+b") as kept:
        stream = _RangedFile(_url(repo, file, commit), access, kept, _FIRST_GGUF_BYTES)
        kept.truncate(stream.size)
        with reading(name):
            return source, parse_gguf(stream, stream.size, name)


def _url(repo: str, file: str, commit: str | None) -> str:
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(repo, file, revision=commit, endpoint=constants.ENDPOINT)


class _RangedFile:
    """A file on the Hub that is fetched from its start by range requests, as far as it is read.

    Attributes:
        size: How many bytes the whole file has.
    """

    def __init__(self, url: str, access: Access, kept: BinaryIO, first: int) -> None:
        """Fetch the first bytes.

        Args:
            url: Where it is.
            access: How to ask the Hub.
            kept: Holds what has been fetched.
            first: How many bytes to fetch at first; each later request doubles them.
        """
        from huggingface_hub.utils._headers import build_hf_headers

        self.url, self.headers = url, build_hf_headers(token=access.token) | {"Accept-Encoding": "identity"}
        self.kept, self.fetched, self.position = kept, 0, 0
        self.size = self._fetch(first)

    def read(self, size: int, /) -> bytes:
        end = min(self.position + size, self.size)
        if end > self.fetched:
            self._fetch(min(max(end, 2 * self.fetched), self.size))
        self.kept.seek(self.position)
        data = self.kept.read(size)
        self.position += len(data)
        return data

    def seek(self, offset: int, /) -> int:
        self.position = offset
        return offset

    def _fetch(self, end: int) -> int:
        """Fetch up to a byte, and return the size of the file."""
        from huggingface_hub.utils._http import get_session, hf_raise_for_status

        headers = self.headers | {"Range": f"bytes={self.fetched}-{end - 1}"}
        with get_session().stream("GET", self.url, headers=headers, timeout=_SECONDS) as response:
            said = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
            if said and response.status_code == _NOTHING_THERE:
                return int(said[2])
            hf_raise_for_status(response)
            if not said or said[1] != str(self.fetched):
                raise WeightsError(
                    f"{self.url} was asked for a part and answers with something else: fetch the model with load()."
                )
            self.kept.seek(self.fetched)
            self.fetched += self.kept.write(response.read())
        return int(said[2])


def find_adapter(name: str, access: Access) -> Path:
    """Find a PEFT adapter by the name of a folder or a Hub id, and check its safetensors file.

    Raises:
        ModelNotFoundError: It is neither here nor reachable.
        WeightsError: Its weights are absent, truncated or corrupt.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        wanted = [ADAPTER_WEIGHTS, *_SIDE_FILES]  # its config, and its tokenizer if it brings one
        try:
            cached = try_to_load_from_cache(name, ADAPTER_WEIGHTS, cache_dir=access.cache_dir)
            there = isinstance(cached, str) and (Path(cached).parent / "adapter_config.json").is_file()
            folder = Path(str(cached)).parent if there else _fetch(name, replace(access, revision=None), wanted)
        except (OSError, ValueError, _network_error()) as error:
            raise ModelNotFoundError(
                f"the adapter {name!r} was not found: no folder {folder.absolute()}, and the Hub answered: {error}"
            ) from error
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise WeightsError(
            f"{folder} has no {ADAPTER_WEIGHTS}, so it is no adapter that lmkit reads: save one as safetensors."
        )
    read_safetensors(folder / ADAPTER_WEIGHTS)
    return folder


def _network_error() -> type[Exception]:
    """Return what huggingface_hub's HTTP client raises when nobody answers; which client it is has changed."""
    from huggingface_hub.utils._http import get_session

    client = __import__(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = getattr(client, "TransportError", OSError)
    return found


def wanted_files(repo: str, names: Sequence[str], access: Access, *, weights: bool = True) -> list[str]:
    """Choose from a repository's files the ones that are wanted: no second format of the same weights.

    Raises:
        WeightsError: It has pickled weights alone, and those are not wanted.
    """
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if any(Path(name).match(pattern) for pattern in _SIDE_FILES)]
    safe = [name for name in top if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    bins = [name for name in top if re.fullmatch(_PICKLES, name)]
    if weights and bins and not (safe or access.allow_pickle):
        raise pickled(repo, bins[0])
    if weights:
        chosen += safe or bins
    if access.trust_remote_code:
        chosen += [name for name in top if name.endswith(".py")]
    return chosen
