"""The files of a checkpoint: where they are, and whether they are whole, safe and complete."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.errors import LmkitError, MissingExtraError, WeightsError, listed
from lmkit.headers import check_regular, is_regular, read_gguf, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lmkit.headers import TensorInfo

__all__ = ["Source"]

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"

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


@dataclass(frozen=True, slots=True, weakref_slot=True)
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
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = source.folder / f"{stem}.{suffix}"
        index = source.folder / f"{stem}.{suffix}.index.json"
        if not is_regular(single) and not is_regular(index):
            if single.is_symlink() or single.exists():
                check_regular(single)
            continue
        files = [single] if is_regular(single) else _shards(index)
        if suffix == "bin" and not allow_pickle:
            raise pickled(source.name, files[0].name)
        return files
    raise weightless(source.folder)


def _shards(index: Path) -> list[Path]:
    folder = index.parent
    return [folder / name for name in shards(index, folder, lambda name: is_regular(folder / name))]


def weightless(where: object) -> WeightsError:
    """Return the error for a folder or repository that has no weights."""
    return WeightsError(
        f"{where} has no weights: looked for model.safetensors, model.safetensors.index.json and a .gguf file."
    )


def pickled(name: str, file: str) -> WeightsError:
    """Return the error for a checkpoint that has nothing but pickles, where those are not allowed."""
    return WeightsError(
        f"{name!r} has only pickled weights ({file}), and unpickling can run any code its author put in: "
        "load a safetensors version, convert it, or pass allow_pickle=True if you trust it."
    )


def shards(index: Path, where: object, present: Callable[[str], bool]) -> list[str]:
    """Return the names of the shards that an index names, all of them present.

    Raises:
        WeightsError: The index is broken, or `where` it belongs lacks one of its shards.
    """
    names = sorted(set(read_index(index).values()))
    if missing := [name for name in names if not present(name)]:
        msg = f"{where} lacks {listed(missing)}, which {index.name} names: fetch the missing shards."
        raise WeightsError(msg)
    return names


def read_index(index: Path) -> dict[str, str]:
    """Read which shard holds each tensor.

    Raises:
        WeightsError: The index is not JSON, or names what is no shard beside it.
    """
    content = read_json(index)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        msg = f"{index} has no 'weight_map' that names the shards: restore it from where the model came from."
        raise WeightsError(msg)
    names = set(map(str, weights.values()))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(index.name.split(".")[1])]:
        msg = f"{index} names {listed(strange)}, which is no shard beside it: restore it from its source."
        raise WeightsError(msg)
    return {tensor: str(file) for tensor, file in weights.items()}


def tensors_of(source: Source, *, allow_pickle: bool) -> dict[str, TensorInfo] | None:
    """Read what tensors a checkpoint holds, and check that its weight files are there and whole; by headers alone.

    Returns:
        The tensors of all its shards by name; None for pickles, which cannot be read without running them.

    Raises:
        WeightsError: A file is absent, truncated, corrupt or refused, or the shards and their index disagree.
    """
    if source.gguf_file is not None:
        return read_gguf(source.folder / source.gguf_file).tensors
    files = weight_files(source, allow_pickle=allow_pickle)
    if files[0].suffix != ".safetensors":
        return None
    if files[0].name == SINGLE:
        return read_safetensors(files[0])
    return merged(source.folder / INDEX, {file.name: read_safetensors(file) for file in files})


def merged(index: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Put the tensors of all shards together.

    Raises:
        WeightsError: Two shards hold a tensor of the same name, or one lacks what the index says it holds.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard, held in shards.items():
        if twice := sorted(tensors.keys() & held.keys())[:3]:
            msg = (
                f"{index.parent / shard} holds {listed(twice)}, which another shard holds too: fetch the shards again."
            )
            raise WeightsError(msg)
        tensors |= held
    for name, shard in read_index(index).items():
        if name not in shards[shard]:
            msg = f"{index.parent / shard} lacks {name!r}, which {index.name} says it holds: fetch both again."
            raise WeightsError(msg)
    return tensors


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
    if file.exists():
        check_regular(file)  # a pipe would be waited for
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{file.parent} has no {file.name}, so it is not a checkpoint: pass the folder that holds one."
        raise WeightsError(msg) from error
    except OSError as error:
        msg = f"{file} cannot be read ({error}): restore it from where the model came from."
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


_READING = (
    OSError,
    ArithmeticError,
    AssertionError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
)
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
