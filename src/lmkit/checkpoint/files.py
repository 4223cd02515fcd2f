"""The files of a checkpoint: where they are, and whether they are whole, safe and complete."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkit.checkpoint.headers import TensorInfo, check_fetched, check_regular, is_regular
from lmkit.checkpoint.headers.gguf import read_gguf
from lmkit.checkpoint.headers.safetensors import metadata_of, read_safetensors
from lmkit.errors import LmkitError, MissingExtraError, WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch


SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"

VOCABULARY_FILES = "tokenizer.json vocab* *.model *.spm *.tiktoken *.codes *.tokenizer tekken.json dict.txt".split()
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

    @property
    def pickled(self) -> bool:
        """Whether its weights are pickles."""
        return self.gguf_file is None and not any((self.folder / name).exists() for name in (SINGLE, INDEX))

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            WeightsError: It is absent, or not a JSON object.
        """
        return read_object(self.folder / "config.json")


def weight_files(source: Source, *, allow_pickle: bool) -> list[Path]:
    """Return a folder's weight files, all of them there.

    Raises:
        WeightsError: There are none, a shard is absent, or they are pickles and those are not allowed.
    """
    folder = source.folder
    for name in (SINGLE, "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if is_regular(single):
            names = [single.name]
        elif is_regular(index):
            names = shards(index, folder, lambda shard: is_regular(folder / shard))
        else:
            if single.is_symlink() or single.exists():
                check_regular(single)
            continue
        if name != SINGLE and not allow_pickle:
            raise pickled(source.name, names[0])
        return [folder / name for name in names]
    raise weightless(folder, [file.name for file in folder.iterdir()])


def weightless(where: object, names: Iterable[str]) -> WeightsError:
    """Return the error for a folder or repository that has no weights, by the names of its files."""
    if "adapter_config.json" in names:
        settings = read_object(where / "adapter_config.json") if isinstance(where, Path) else {}
        base = settings.get("base_model_name_or_path") or "the model that its adapter_config.json names"
        return WeightsError(f"{where} is an adapter, not a model: load {base!r}, with this as adapter=.")
    told = f"{where} has no weights: looked for model.safetensors, model.safetensors.index.json and a .gguf file."
    if ggufs := sorted(name for name in names if name.endswith(".gguf")):
        return WeightsError(f"{told} It has several: pass one of {listed(ggufs)}, with its folder.")
    if others := sorted(name for name in names if name.endswith(_OTHER_WEIGHTS)):
        return WeightsError(f"{told} It has {listed(others[:5])}, which transformers does not read: convert it.")
    return WeightsError(told)


_OTHER_WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".ckpt", ".bin", ".h5", ".msgpack", ".onnx")
"""How files of other libraries end: MLX, PyTorch without transformers, Keras, Flax, ONNX."""


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
        raise WeightsError(f"{where} lacks {listed(missing)}, which {index.name} names: fetch the missing shards.")
    return names


def read_index(index: Path) -> dict[str, str]:
    """Read which shard holds each tensor.

    Raises:
        WeightsError: The index is not JSON, or names what is no shard beside it.
    """
    content = read_json(index)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise WeightsError(
            f"{index} has no 'weight_map' that names the shards: restore it from where the model came from."
        )
    names = set(map(str, weights.values()))
    if strange := [name for name in names if Path(name).name != name or not name.endswith(index.name.split(".")[1])]:
        raise WeightsError(f"{index} names {listed(strange)}, which is no shard beside it: restore it from its source.")
    return {tensor: str(file) for tensor, file in weights.items()}


def tensors_of(source: Source, *, allow_pickle: bool) -> dict[str, TensorInfo] | None:
    """Read what tensors a checkpoint holds, and check that its weight files are there and whole; by headers alone.

    Returns:
        The tensors of all its shards by name; None for pickles, which cannot be read without running them.

    Raises:
        MissingExtraError: It is a GGUF file, and the package that knows its types is not installed.
        WeightsError: A file is absent, truncated, corrupt or refused, or the shards and their index disagree.
    """
    if source.gguf_file is not None:
        with reading(source.name):
            return read_gguf(source.folder / source.gguf_file)
    files = weight_files(source, allow_pickle=allow_pickle)
    if files[0].suffix != ".safetensors":
        return None
    each = {file.name: read_safetensors(file) for file in files}
    check_saving(source, files)
    return each[SINGLE] if SINGLE in each else merged(source.folder / INDEX, each)


def check_saving(source: Source, files: Iterable[Path]) -> None:
    """Refuse what is left where lmkit's quantizer was killed while it saved over something: files of both, each whole.

    Raises:
        WeightsError: A weight file is of another saving than the config.
    """
    if not (source.folder / "config.json").exists():
        return  # which is told where it is read
    settings = source.read_config().get("quantization_config")
    saving = settings.get("saving") if isinstance(settings, dict) else None
    for file in files:
        if metadata_of(file, "lmkit_saving") not in (None, saving):
            raise WeightsError(
                f"{file} was not saved with the config.json beside it: the saving was interrupted, or one of them "
                "is another model's. Save the model again, into an empty folder."
            )


def mapped_weights(source: Source) -> dict[str, torch.Tensor]:
    """Map a checkpoint's weights into memory, of which none is read for it; none of a checkpoint that is elsewhere.

    Pickles are opened too: that they may be is to be known before.
    """
    from transformers.modeling_utils import load_state_dict

    try:
        files = weight_files(source, allow_pickle=True)
    except WeightsError:  # those of the Hub, of which the headers are enough for a plan
        return {}
    with reading_weights(source):
        return {name: tensor for file in files for name, tensor in load_state_dict(file).items()}


def merged(index: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Put the tensors of all shards together.

    Raises:
        WeightsError: Two shards hold a tensor of the same name, or one lacks what the index says it holds.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard, held in shards.items():
        if twice := sorted(tensors.keys() & held.keys())[:3]:
            raise WeightsError(
                f"{index.parent / shard} holds {listed(twice)}, which another shard holds too: fetch the shards again."
            )
        tensors |= held
    for name, shard in read_index(index).items():
        if name not in shards[shard]:
            raise WeightsError(
                f"{index.parent / shard} lacks {name!r}, which {index.name} says it holds: fetch both again."
            )
    return tensors


def check_tokenizer(source: Source) -> None:
    """Check that a folder has a tokenizer with its vocabulary.

    Raises:
        WeightsError: It has none of `VOCABULARY_FILES`, and its tokenizer needs one.
    """
    found = [file for name in VOCABULARY_FILES for file in source.folder.glob(name)]
    for file in (*found, source.folder / "chat_template.jinja"):
        check_fetched(file)
    if source.gguf_file is not None or found:
        return
    settings = source.folder / "tokenizer_config.json"
    content = read_json(settings) if settings.is_file() else {}
    if isinstance(content, dict) and content.get("tokenizer_class") in WITHOUT_VOCABULARY:
        return
    raise WeightsError(
        f"{source.folder} has no tokenizer: looked for {listed(VOCABULARY_FILES)}. Save one beside the model."
    )


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        WeightsError: It is absent, not JSON, or something else; the message names it.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise WeightsError(f"{file} holds a JSON {type(found).__name__}, not an object: restore it.")
    return found


def read_json(file: Path) -> object:
    """Read a JSON file.

    Raises:
        WeightsError: It is absent or not JSON; the message names it.
    """
    if file.exists():
        check_regular(file)  # a pipe would be waited for
        check_fetched(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{file.parent} has no {file.name}, so it is not a checkpoint: pass the folder that holds one."
        ) from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}): restore it from where the model came from.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}. Restore it from where the model came from.") from error


@contextlib.contextmanager
def reading_weights(source: Source) -> Iterator[None]:
    """Do as `reading` does; of a pickle, say what is read of one, and not what torch advises: to have its code run."""
    try:
        with reading(f"the weights of {source.name!r}"):
            yield
    except WeightsError as error:
        if not source.pickled or error.__cause__ is None:
            raise
        raise WeightsError(
            f"{str(error).partition('. ')[0]}. Of pickles, those are read that hold a dict of plain tensors by name, "
            "and nothing in them is run: fetch the file again, or have it saved as safetensors."
        ) from error.__cause__


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever the libraries below raise while reading a file into errors that name it."""
    try:
        yield
    except LmkitError:
        raise
    except ImportError as error:
        raise _missing(what, error) from error
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None  # it came in between two steps of theirs, and broke the second one
        if type(error) is not Exception:
            raise WeightsError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
        raise WeightsError(  # tokenizers raises bare ones
            f"{what} cannot be read: {error}. A newer version of the package tokenizers may have written it: "
            "pip install --upgrade tokenizers."
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of what is written in Rust; it has no public class
            raise
        raise WeightsError(f"{what} cannot be read: {error}") from error


EXTRAS = {"gguf": "lmkit[gguf]", "peft": "peft", "hqq": "hqq", "gptq quantized": "optimum gptqmodel"} | dict.fromkeys(
    ("sentencepiece", "sacremoses", "protobuf"), "lmkit[translate]"
)
"""Words in what transformers says of a package that is not there, and what to install for it."""


def _missing(what: str, error: ImportError) -> LmkitError:
    told = str(error)
    if "FlashAttention" in told:
        return MissingExtraError(
            f"{what} asks for an attention whose package is not installed: pass attn_implementation='sdpa', or "
            f'pip install "flash-attn" ({told})'
        )
    packages = next((EXTRAS[word] for word in EXTRAS if word in told.lower()), None)
    if packages is None:
        named = re.search(r"pip install (?:-U |--upgrade )?([^\s`]+)", told)
        packages = named[1] if named else error.name
    if packages is None:  # transformers raises it for other things as well
        return WeightsError(f"{what} cannot be read: {told}")
    quoted = " ".join(f'"{package}"' for package in packages.split())
    return MissingExtraError(f"{what} needs a package that is not installed: pip install {quoted} ({told})")
