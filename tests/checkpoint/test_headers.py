import contextlib
import io
import json
import os
import random
import re
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lmkit
import smollm2
from lmkit.checkpoint.headers import TensorInfo
from lmkit.checkpoint.headers.gguf import parse_gguf, read_gguf
from lmkit.checkpoint.headers.safetensors import SAFETENSORS_BITS, parse_safetensors, read_safetensors
from lmkit.errors import WeightsError

READERS: dict[str, Callable[[Path], Any]] = {"safetensors": read_safetensors, "gguf": read_gguf}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write a safetensors file of two tensors."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.float16)}, path, {"format": "pt"})
    return path


def laid_out(header: bytes, data: bytes = b"") -> bytes:
    """Lay a header and data out as safetensors does, whatever they hold."""
    return struct.pack("<Q", len(header)) + header + data


def written(folder: Path, header: object, data_bytes: int = 0) -> Path:
    """Write a file that is laid out as safetensors, of a header as bytes or as what JSON writes."""
    path = folder / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(laid_out(text, bytes(data_bytes)))
    return path


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    """Describe a tensor as a safetensors header does."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def accepted_by_safetensors(path: Path) -> bool:
    """Whether safetensors itself opens a file."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def test_a_header_tells_each_tensors_type_shape_and_bytes(file: Path) -> None:
    """The tensors of a whole file are told, without its metadata and without their data."""
    found = read_safetensors(file)
    assert found == {"a": TensorInfo("F32", (3, 4), 48), "b": TensorInfo("F16", (5,), 10)}
    assert found["a"].elements == 12


def test_a_scalar_has_one_element(tmp_path: Path) -> None:
    """A tensor without dimensions is one number."""
    found = read_safetensors(written(tmp_path, {"a": entry("F32", [], 0, 4)}, 4))
    assert found["a"].elements == 1


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    """A header that describes no data needs none."""
    assert read_safetensors(written(tmp_path, b"{}")) == {}


def test_the_header_alone_is_enough(file: Path) -> None:
    """The bytes of the header and the size of the file give the same as the file."""
    content = file.read_bytes()
    header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    assert parse_safetensors(io.BytesIO(header), len(content), "x") == read_safetensors(file)


def test_every_truncation_is_named(file: Path) -> None:
    """Wherever a download stopped, the file is named, with its size and what to do."""
    content = file.read_bytes()
    for keep in range(len(content)):
        file.write_bytes(content[:keep])
        with pytest.raises(WeightsError) as caught:
            read_safetensors(file)
        message = str(caught.value)
        assert message.startswith(f"{file} is truncated or corrupt: ")
        assert f"it has {keep:,} bytes" in message
        assert "Fetch it again." in message


def test_a_file_with_something_behind_its_data_is_named(file: Path) -> None:
    """A file longer than its header describes is corrupt, and both sizes are told."""
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(WeightsError, match=f"{size + 4:,} bytes where its header describes {size:,}"):
        read_safetensors(file)


def test_a_garbage_file_is_named(tmp_path: Path) -> None:
    """A file of anything else, such as an error page saved under the name, is named."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html>Not Found</html>" * 10)
    with pytest.raises(WeightsError, match="fewer than its header says"):
        read_safetensors(path)


def test_a_header_of_any_length_is_not_read_to_find_out(tmp_path: Path) -> None:
    """A header that says it is longer than safetensors allows is refused before a byte of it is read."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as opened:
        opened.write(struct.pack("<Q", 2**40))
        opened.truncate(2**41)  # two terabytes that take no room
    assert_refused_within_bounds(read_safetensors, path, "more than safetensors allows")


A = entry("F32", [1], 0, 4)
NOT_JSON = {
    "words": b"not JSON",
    "UTF-16": b"\xff\xfe{}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "zeros": b"\0" * 8,
    "array": b"[]",
    "number": b"3",
    "null": b"null",
    "something behind": b"{}{}",
    "zero behind": b"{}\0",
    "comma behind": b'{"__metadata__":{},}',
    "NaN": b'{"a":NaN}',
    "number for an entry": {"a": 1},
    "list for an entry": {"a": ["F32", [1], [0, 4]]},
    "no field": {"a": {}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "no type": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "one more field": {"a": A | {"x": 1}},
    "a field twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[1]}}',
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a name twice, once escaped": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
    "metadata of a number": {"__metadata__": {"a": 1}},
    "metadata of metadata": {"__metadata__": {"a": {}}},
    "metadata as text": {"__metadata__": "a"},
    "half a character": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a control character": b'{"\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a type that is a number": {"a": entry(32, [1], 0, 4)},
    "a type that is null": {"a": entry(None, [1], 0, 4)},
    "a shape that is a number": {"a": entry("F32", 1, 0, 4)},
    "a shape that is text": {"a": entry("F32", "1", 0, 4)},
    "a shape of text": {"a": entry("F32", ["1"], 0, 4)},
    "a shape of floats": {"a": entry("F32", [1.0], 0, 4)},
    "a shape of exponents": b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}',
    "a shape of booleans": {"a": entry("F32", [True], 0, 4)},
    "a shape of null": {"a": entry("F32", [None], 0, 4)},
    "a shape of shapes": {"a": entry("F32", [[1]], 0, 4)},
    "a negative shape": {"a": entry("F32", [-1, -1], 0, 4)},
    "a shape beyond 64 bits": {"a": entry("F32", [10**30, 0], 0, 0)},
    "a shape of many digits": b'{"a":{"dtype":"F32","shape":[' + b"1" * 10_000 + b'],"data_offsets":[0,4]}}',
    "a shape of 100 dimensions": {"a": entry("F32", [1] * 100, 0, 4)},
    "no offset": {"a": entry("F32", [1])},
    "one offset": {"a": entry("F32", [1], 0)},
    "three offsets": {"a": entry("F32", [1], 0, 4, 4)},
    "offsets as text": {"a": entry("F32", [1], "0", "4")},
    "offsets as floats": {"a": entry("F32", [1], 0.0, 4.0)},
    "offsets as booleans": {"a": A | {"data_offsets": [False, 4]}},
    "offsets of null": {"a": entry("F32", [1], 0, None)},
    "negative offsets": {"a": entry("F32", [1], -4, 0)},
    "minus zero": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    "offsets by name": {"a": A | {"data_offsets": {"0": 0, "1": 4}}},
    "lists in lists": b"[" * 100_000,
    "lists in lists in a shape": b'{"a":{"dtype":"F32","shape":' + b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "text without end": b'{"' + b"\\n" * 100_000,
}


@pytest.mark.parametrize("header", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_header_that_is_not_one_is_named(tmp_path: Path, header: object) -> None:
    """A header that is no JSON of the format is a `WeightsError`, whatever it holds instead."""
    path = written(tmp_path, header, 4)
    with pytest.raises(WeightsError) as caught:
        read_safetensors(path)
    assert f"{path} is truncated or corrupt: its header is not safetensors JSON" in str(caught.value)


NOT_IN_PLACE: dict[str, tuple[dict[str, object], int]] = {
    "overlapping": ({"a": A, "b": entry("F32", [1], 2, 6)}, 6),
    "the same data": ({"a": A, "b": A}, 4),
    "a hole": ({"a": A, "b": entry("F32", [1], 8, 12)}, 12),
    "a hole at the start": ({"a": entry("F32", [1], 4, 8)}, 8),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, 4),
    "too few bytes": ({"a": entry("F32", [2], 0, 4)}, 4),
    "too many bytes": ({"a": entry("F32", [1], 0, 8)}, 8),
    "bytes for no element": ({"a": entry("F32", [0], 0, 4)}, 4),
    "half a byte": ({"a": entry("F4", [3], 0, 2)}, 2),
    "a product of 2**64": ({"a": entry("F32", [2**32, 2**32], 0, 0)}, 0),
    "a product that wraps to 2": ({"a": entry("U8", [3, 6148914691236517206], 0, 2)}, 2),
    "a product of 2**64 and 0": ({"a": entry("F32", [2**62, 4, 0], 0, 0)}, 0),
    "terabytes": ({"a": entry("F32", [2**40], 0, 2**42)}, 8),
    "data behind the end": ({"a": entry("F32", [4], 0, 16)}, 8),
    "data that no tensor has": ({"__metadata__": {"format": "pt"}}, 8),
}


@pytest.mark.parametrize("header, data_bytes", NOT_IN_PLACE.values(), ids=NOT_IN_PLACE.keys())
def test_tensors_that_do_not_fill_the_file_are_named(
    tmp_path: Path, header: dict[str, object], data_bytes: int
) -> None:
    """Tensors stand one behind another, each as long as its type and shape, up to the end of the file."""
    path = written(tmp_path, header, data_bytes)
    with pytest.raises(WeightsError, match="is truncated or corrupt: "):
        read_safetensors(path)
    assert not accepted_by_safetensors(path)


def test_two_tensors_out_of_place_are_told_apart(tmp_path: Path) -> None:
    """The message names the tensor, where it is said to be, and where it should be."""
    path = written(tmp_path, {"a": A, "b": entry("F32", [1], 2, 6)}, 8)
    with pytest.raises(WeightsError, match="'b' has bytes 2 to 6 of its data, where 4 comes next"):
        read_safetensors(path)


@pytest.mark.parametrize("name", SAFETENSORS_BITS)
def test_every_type_of_safetensors_is_known(tmp_path: Path, name: str) -> None:
    """Safetensors reads the same file, so its types' sizes are the same: 8-, 6- and 4-bit floats too."""
    nbytes = SAFETENSORS_BITS[name]  # of eight elements
    path = written(tmp_path, {"a": entry(name, [2, 4], 0, nbytes)}, nbytes)
    assert read_safetensors(path) == {"a": TensorInfo(name, (2, 4), nbytes)}
    assert accepted_by_safetensors(path)


def test_no_type_of_safetensors_is_missing(tmp_path: Path) -> None:
    """The types that safetensors lists when it meets an unknown one are those that lmkit knows."""
    path = written(tmp_path, {"a": entry("F7", [8], 0, 7)}, 7)
    with pytest.raises(SafetensorError) as caught, safe_open(path, framework="pt"):
        pass
    listing = str(caught.value).split("expected one of")[1].split(" at line")[0]
    assert {name.strip(" `") for name in listing.split(",")} == set(SAFETENSORS_BITS)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    """A type of a later format is named with the tensor, those that are known, and what to do."""
    with pytest.raises(WeightsError) as caught:
        read_safetensors(written(tmp_path, {"a.weight": entry("F7_NEW", [8], 0, 7)}, 7))
    message = str(caught.value)
    assert "'a.weight' has the type 'F7_NEW', which lmkit does not know" in message
    assert "'BF16'" in message
    assert "update lmkit" in message


LAID_OUT_OTHERWISE = [
    b' \n{"a" :\t{ "shape":[ 1 ],\n"data_offsets": [0 ,4 ], "dtype":"F32" } } \n',
    b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"k": "v", "l":"{}[]\\"\\\\"}}',
    b'{"\\u00e9\\ud83d\\ude00\\"":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
    b'{"":{"dtype":"F32","shape":[1,1,1],"data_offsets":[0,4]}}',
    b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[5,0],"data_offsets":[0,0]}}',
]


@pytest.mark.parametrize("header", LAID_OUT_OTHERWISE)
def test_json_may_be_laid_out_in_any_way(tmp_path: Path, header: bytes) -> None:
    """Spaces, escapes and the order of fields are JSON's, as safetensors takes it."""
    path = written(tmp_path, header, 4)
    with safe_open(path, framework="pt") as opened:
        assert set(read_safetensors(path)) == set(opened.keys())


# GGUF -------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    """Write a GGUF string."""
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Write a GGUF header's description of a tensor; the shape is innermost first, as in the file."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(
    tensors: list[bytes], pairs: list[bytes] | None = None, /, *, data_bytes: int = 0, version: int = 3, **counts: int
) -> bytes:
    """Write a GGUF file, whatever it is told to claim."""
    pairs = pairs or []
    count = struct.pack("<QQ", counts.get("tensors", len(tensors)), counts.get("pairs", len(pairs)))
    header = b"GGUF" + struct.pack("<I", version) + count + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data_bytes)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """Write a GGUF metadata value under its key."""
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    """Write a GGUF array."""
    return struct.pack("<IQ", kind, count) + values


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """Write a GGUF file with the gguf package: three tensors, a vocabulary and values of several kinds."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_languages(["en", "de"])
    writer.add_token_list([f"token {number}" for number in range(1000)])
    writer.add_token_scores([0.5] * 1000)
    writer.add_bool("a.flag", val=True)
    writer.add_float64("a.float", 0.25)
    writer.add_tensor("a", np.ones((3, 64), np.float32))
    writer.add_tensor("b", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_header_tells_its_tensors(gguf_file: Path) -> None:
    """Behind numbers, texts and arrays short and long stand the tensors; shapes are as torch has them."""
    assert read_gguf(gguf_file) == {
        "a": TensorInfo("F32", (3, 64), 768),
        "b": TensorInfo("Q8_0", (4, 32), 136),
        "c": TensorInfo("F16", (5,), 10),
    }


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_of_the_gguf_package_is_known(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A tensor of two rows of one block has the name, shape and bytes that the package finds."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor(b"a", (block, 2), int(kind), 0)], data_bytes=2 * block_bytes))
    (theirs,) = gguf.GGUFReader(path).tensors
    assert read_gguf(path) == {"a": TensorInfo(theirs.tensor_type.name, (2, block), int(theirs.n_bytes))}


def test_a_type_that_the_gguf_package_does_not_know_is_named(tmp_path: Path) -> None:
    """A type of a later format is named with the tensor, those that are known, and what to update."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor(b"a.weight", (32,), 999, 0)], data_bytes=64))
    with pytest.raises(WeightsError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert "'a.weight' has the GGML type 999, which the package gguf does not know" in message
    assert "'Q4_0'" in message
    assert "update the package gguf" in message


@pytest.mark.parametrize("ask", [lmkit.plan, lmkit.load])
def test_without_the_gguf_package_a_gguf_file_names_its_extra(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str, Path], object]
) -> None:
    """Where the package that knows the types is not installed, the line that installs it is told."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(lmkit.MissingExtraError, match=re.escape('pip install "lmkit[gguf]"')):
        ask("causal", gguf_file)


@pytest.mark.slow
def test_a_real_gguf_file_is_read_as_its_own_package_reads_it() -> None:
    """Of SmolLM2-135M-Instruct every tensor is what the gguf package finds."""
    assert read_gguf(smollm2.path()) == {
        found.name: TensorInfo(found.tensor_type.name, tuple(map(int, found.shape[::-1])), int(found.n_bytes))
        for found in gguf.GGUFReader(smollm2.path()).tensors
    }


def test_every_truncation_of_gguf_is_named(gguf_file: Path) -> None:
    """Wherever a download stopped, the file is named with what to do."""
    content = gguf_file.read_bytes()
    last = max(range(len(content)), key=lambda place: content[place] != 0)  # padding may follow the last tensor
    for keep in (*range(600), *range(600, last, 97), last):
        gguf_file.write_bytes(content[:keep])
        with pytest.raises(WeightsError) as caught:
            read_gguf(gguf_file)
        assert str(gguf_file) in str(caught.value)
        assert "Fetch it again." in str(caught.value)


VOCABULARY = b"".join(text(b"x") for _ in range(65))
HOSTILE_GGUF = {
    "version 1": (gguf_bytes([], version=1), "version 1"),
    "version 4": (gguf_bytes([], version=4), "version 4, and lmkit reads 2 and 3: update lmkit"),
    "version 0": (gguf_bytes([], version=0), "version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors without number": (gguf_bytes([], tensors=2**63), "9,223,372,036,854,775,808 tensors"),
    "values without number": (gguf_bytes([], pairs=2**64 - 1), "metadata values"),
    "more tensors than there are": (gguf_bytes([tensor(b"a", (1,), 0, 0)], tensors=9), "fewer than its header says"),
    "more values than there are": (gguf_bytes([], pairs=9), "fewer than its header says"),
    "a key without end": (gguf_bytes([], [struct.pack("<Q", 2**60)]), "fewer than its header says"),
    "a text without end": (gguf_bytes([], [pair(b"k", 8, struct.pack("<Q", 2**64 - 1))]), "fewer than its"),
    "a key that is no text": (gguf_bytes([], [pair(b"\xff", 4, bytes(4))]), "not UTF-8"),
    "a key twice": (gguf_bytes([], [pair(b"k", 4, bytes(4))] * 2), "'k' is in its header twice"),
    "a value of unknown type": (gguf_bytes([], [pair(b"k", 13, bytes(64))]), "has the type 13"),
    "an array of unknown type": (gguf_bytes([], [pair(b"k", 9, array(77, 1, bytes(64)))]), "has the type 77"),
    "a long array of unknown type": (gguf_bytes([], [pair(b"k", 9, array(77, 100, bytes(64)))]), "the type 77"),
    "an array of arrays": (gguf_bytes([], [pair(b"k", 9, array(9, 1, array(9, 1)))]), "has the type 9"),
    "an array of terabytes": (gguf_bytes([], [pair(b"k", 9, array(10, 2**60))]), "fewer than its header says"),
    "an array of texts without end": (gguf_bytes([], [pair(b"k", 9, array(8, 2**60, VOCABULARY))]), "fewer than"),
    "alignment 0": (gguf_bytes([], [pair(b"general.alignment", 4, bytes(4))]), "its alignment is 0"),
    "alignment 3": (gguf_bytes([], [pair(b"general.alignment", 4, b"\3\0\0\0")]), "its alignment is 3"),
    "alignment as text": (gguf_bytes([], [pair(b"general.alignment", 8, text(b"32"))]), "its alignment is 32"),
    "an unknown type": (gguf_bytes([tensor(b"a", (32,), 4, 0)], data_bytes=64), "'a' has the GGML type 4"),
    "a tensor twice": (gguf_bytes([tensor(b"a", (8,), 0, 0)] * 2, data_bytes=64), "'a' is in its header twice"),
    "a name that is no text": (gguf_bytes([tensor(b"\xff", (8,), 0, 0)], data_bytes=64), "not UTF-8"),
    "dimensions without number": (gguf_bytes([text(b"a") + b"\xff" * 40], data_bytes=64), "4,294,967,295 dimensions"),
    "a product of 2**64": (gguf_bytes([tensor(b"a", (2**32, 2**32), 0, 0)]), "more than any tensor"),
    "a product of 2**64 and 0": (gguf_bytes([tensor(b"a", (2**62, 4, 0), 0, 0)]), "more than any tensor"),
    "half a block": (gguf_bytes([tensor(b"a", (48,), 2, 0)], data_bytes=64), "not whole blocks of 32"),
    "a block of a scalar": (gguf_bytes([tensor(b"a", (), 2, 0)], data_bytes=64), "not whole blocks of 32"),
    "beyond the end": (gguf_bytes([tensor(b"a", (9,), 0, 0)], data_bytes=35), "'a' has 36 bytes at byte 0 of 35"),
    "begun beyond the end": (gguf_bytes([tensor(b"a", (1,), 0, 2**62)], data_bytes=32), "'a' has 4 bytes"),
    "overlapping": (
        gguf_bytes([tensor(b"a", (16,), 0, 0), tensor(b"b", (8,), 0, 32)], data_bytes=64),
        "'b' has 32 bytes at byte 32 of 64, where 64 are taken",
    ),
    "not aligned": (gguf_bytes([tensor(b"a", (8,), 0, 4)], data_bytes=64), "'a' has 32 bytes at byte 4"),
}


@pytest.mark.parametrize("content, message", HOSTILE_GGUF.values(), ids=HOSTILE_GGUF.keys())
def test_a_gguf_header_is_not_believed(tmp_path: Path, content: bytes, message: str) -> None:
    """Whatever a GGUF file claims, it is refused with what is wrong, at once and in little memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_refused_within_bounds(read_gguf, path, message)


def test_tensors_without_elements_take_no_place(tmp_path: Path) -> None:
    """An empty tensor may begin where another one does."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor(b"a", (8,), 0, 0), tensor(b"b", (0,), 0, 0)], data_bytes=32, version=2))
    assert {name: info.nbytes for name, info in read_gguf(path).items()} == {"b": 0, "a": 32}


def test_a_vocabulary_without_end_is_not_read_to_the_end(tmp_path: Path) -> None:
    """In a file of terabytes a header ends where no real one goes on."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as opened:
        opened.write(gguf_bytes([], [pair(b"k", 9, array(10, 2**36))]))
        opened.truncate(2**41)
    assert_refused_within_bounds(read_gguf, path, "or a header of more than 134,217,728 bytes")


# Both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_link_to_a_file_is_followed(kind: str, file: Path, gguf_file: Path, tmp_path: Path) -> None:
    """The Hub's cache holds links to files, and links to those are read as well."""
    real = file if kind == "safetensors" else gguf_file
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "link to it").symlink_to(tmp_path / "link")
    assert READERS[kind](tmp_path / "link to it") == READERS[kind](real)


def link_to_a_pipe(path: Path) -> None:
    """Make a pipe beside the path, and there a link to it."""
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: path, "not there"),
    "dangling": (lambda path: path.symlink_to("absent"), "a link that leads nowhere"),
    "loop": (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
    "folder": (lambda path: path.mkdir(), "a folder, not a file"),
    "pipe": (os.mkfifo, "a pipe, not a file"),
    "link to a pipe": (link_to_a_pipe, "a pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("make, message", NO_FILES.values(), ids=NO_FILES.keys())
@pytest.mark.timeout(10)
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], object], message: str
) -> None:
    """A pipe is not waited for and a device not read: each is told for what it is, with its path."""
    path = tmp_path / "model"
    make(path)
    with pytest.raises(WeightsError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def assert_refused_within_bounds(read: Callable[[Path], object], path: Path, message: str) -> None:
    """Check that a file is refused with a message, within a second and a few megabytes."""
    with pytest.raises(WeightsError) as caught:
        within_bounds(read, path, 0)
    assert message in str(caught.value)


def within_bounds(read: Callable[[Path], object], path: Path, size: int) -> object:
    """Read a file, and check that it took less than a second and four times its size in memory.

    It is read twice, since to trace memory slows reading down several times.
    """
    begun = time.process_time()
    with contextlib.suppress(WeightsError):
        read(path)
    assert time.process_time() - begun < 1
    tracemalloc.start()
    try:
        return read(path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * size + 2**22


@pytest.mark.parametrize(
    "piece", [b"[", b"[],", b"{},", b'"ab",', b"1000,", b'"a":{},', b'"a":"b",', b"\\n", b" ", b'"'], ids=repr
)
@pytest.mark.parametrize("before", [b'{"a":{"dtype":"F32","shape":[', b'{"', b"{", b'{"__metadata__":{'], ids=repr)
def test_a_bomb_in_json_is_not_built(tmp_path: Path, before: bytes, piece: bytes) -> None:
    """Two megabytes of anything repeated are refused before they become a hundred."""
    path = written(tmp_path, before + piece * (2**21 // len(piece)))
    with pytest.raises(WeightsError):
        within_bounds(read_safetensors, path, path.stat().st_size)


INTS = st.one_of(st.sampled_from([0, 1, 4, 8, 48, 58, 2**31, 2**62, 2**63, 2**64, 10**30]), st.integers(-9, 99))
VALUES = st.recursive(
    st.none() | st.booleans() | INTS | st.floats() | st.text(max_size=3) | st.sampled_from([*SAFETENSORS_BITS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SAFETENSORS_BITS]) | VALUES,
        "shape": st.lists(INTS, max_size=4) | VALUES,
        "data_offsets": st.lists(INTS, min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "", "__metadata__", "é"]) | st.text(), ENTRIES | VALUES, max_size=4
)
fuzzed = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def sound_headers(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    """Draw a header whose tensors stand in a row, and how many bytes they take."""
    header: dict[str, object] = {}
    end = 0
    for name in draw(
        st.lists(st.text(max_size=4).filter(lambda name: name != "__metadata__"), unique=True, max_size=5)
    ):
        dtype, shape = draw(st.sampled_from([*SAFETENSORS_BITS])), draw(st.lists(st.integers(0, 5), max_size=4))
        nbytes = SAFETENSORS_BITS[dtype] * int(np.prod(shape, dtype=int)) // 8
        header[name] = entry(dtype, shape, end, end + nbytes)
        end += nbytes
    return header, end


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, delete, insert, repeat or cut bytes here and there."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = at + draw(st.integers(0, 9))
        new = draw(st.binary(max_size=9) | st.sampled_from([content[at:end] * 2, *map(str.encode, '0"[]{},:-.e')]))
        content = content[:at] + new + content[draw(st.sampled_from([at, end, at + len(new)])) :]
    return content


def assert_no_less_strict_than_safetensors(path: Path) -> None:
    """Check that lmkit refuses a file, or tells of it what safetensors does."""
    try:
        found: Any = within_bounds(read_safetensors, path, path.stat().st_size)
    except WeightsError:
        return
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(found)
        for name, info in found.items():
            piece = opened.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == (info.dtype, info.shape)


@fuzzed
@given(HEADERS, st.integers(0, 64))
def test_any_json_is_refused_or_read_as_safetensors_reads_it(
    tmp_path: Path, header: dict[str, object], data_bytes: int
) -> None:
    """What lmkit makes of a header of anything is an error or what safetensors makes of it."""
    assert_no_less_strict_than_safetensors(written(tmp_path, header, data_bytes))


@fuzzed
@given(sound_headers(), st.integers(0, 2**32))
def test_what_safetensors_reads_is_read(tmp_path: Path, header: tuple[dict[str, object], int], seed: int) -> None:
    """Whatever order and types its tensors have, a file that safetensors accepts is accepted here, and only such."""
    items = list(header[0].items())
    random.Random(seed).shuffle(items)  # noqa: S311 - the order of keys, no secret
    path = written(tmp_path, dict(items), header[1])
    if accepted_by_safetensors(path):  # not where 4-bit numbers end within a byte
        assert set(read_safetensors(path)) == set(header[0])
    assert_no_less_strict_than_safetensors(path)


@fuzzed
@given(st.data())
def test_a_damaged_safetensors_file_is_refused_or_still_sound(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes flipped, lost, added or repeated are noticed wherever safetensors would notice them."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + length], content[8 + length :]
    damaged = data.draw(damage(content) | damage(header).map(lambda header: laid_out(header, rest)))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    assert_no_less_strict_than_safetensors(path)


@fuzzed
@given(st.data())
def test_a_damaged_gguf_file_is_refused_or_still_sound(gguf_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes flipped, lost, added or repeated in a GGUF file never make anything but a `WeightsError`."""
    content = gguf_file.read_bytes()
    path = tmp_path / "damaged.gguf"
    # Damage falls on the vocabulary mostly, so a file without one is damaged too.
    small = gguf_bytes(
        [tensor(b"a", (8, 2), 0, 0), tensor(b"b", (32,), 2, 64)],
        [pair(b"general.alignment", 4, struct.pack("<I", 32)), pair(b"k", 9, array(8, 65, VOCABULARY))],
        data_bytes=96,
    )
    path.write_bytes(data.draw(damage(content) | damage(small)))
    try:
        tensors: Any = within_bounds(read_gguf, path, path.stat().st_size)
    except WeightsError:
        return
    assert sum(info.nbytes for info in tensors.values()) <= path.stat().st_size


def test_the_header_of_a_gguf_file_alone_is_enough(gguf_file: Path) -> None:
    """The first bytes and the size of the file give the same as the file."""
    size = gguf_file.stat().st_size
    assert parse_gguf(io.BytesIO(gguf_file.read_bytes()), size, "x") == read_gguf(gguf_file)
