"""The files of a checkpoint: where they are, and whether they are whole, safe and complete."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.errors import LmkitError, MissingExtraError, WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

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
            raise pickled(source.name, files[0].name)
        return files
    msg = f"{folder} has no weights: looked for model.safetensors, model.safetensors.index.json and a .gguf file."
    raise WeightsError(msg)


def pickled(name: str, file: str) -> WeightsError:
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
