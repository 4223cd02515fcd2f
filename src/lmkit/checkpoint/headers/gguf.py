"""The header of a GGUF file: little-endian values, the vocabulary among them skipped."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from lmkit.checkpoint.headers import Stream, TensorInfo, broken, named, opened, shown, too_many, unknown
from lmkit.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MOST_HEADER_BYTES = 2**27
"""The longest header that is read: some ten times what the largest vocabularies take."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_PAIRS, _MOST_TENSORS = 2**16, 2**18  # real files have some 50 and, with every expert apart, 50,000
_MOST_DIMENSIONS = 4  # ggml's own


def read_gguf(file: Path) -> dict[str, TensorInfo]:
    """Read the tensors that a GGUF file holds.

    Raises:
        ImportError: The package `gguf` is not installed, which knows the types.
        WeightsError: It is no file, no little-endian GGUF file of version 2 or 3, truncated, corrupt, or has a
            type that lmkit or `gguf` does not know.
    """
    with opened(file) as (stream, size):
        return parse_gguf(stream, size, file)


def parse_gguf(stream: Stream, size: int, file: object) -> dict[str, TensorInfo]:
    """Read the tensors of a GGUF file of `size` bytes from a stream that is at its start.

    Args:
        stream: The file, or as much of it as its header takes.
        size: How many bytes the whole file has.
        file: What messages call it.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        ImportError: As for `read_gguf`.
        WeightsError: As for `read_gguf`.
    """
    reader = _Values(stream, size, file)
    _check_version(reader)
    tensor_count, pair_count = reader.number("Q"), reader.number("Q")
    if tensor_count > _MOST_TENSORS or pair_count > _MOST_PAIRS:
        what = f"its header says that it holds {tensor_count:,} tensors and {pair_count:,} metadata values"
        raise broken(file, what)
    metadata = reader.by_name(pair_count, reader.value)
    places = reader.by_name(tensor_count, reader.place)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise broken(file, f"its alignment is {str(alignment)[:100]}, not a power of two")
    start = -(-reader.position // alignment) * alignment
    return _apart(file, places, alignment, size - start)


class _Values:
    """The values of a GGUF header, one after another; no length is believed that the file could not hold."""

    def __init__(self, stream: Stream, size: int, file: object) -> None:
        self.stream, self.size, self.file, self.position = stream, size, file, 0
        self.limit = min(size, MOST_HEADER_BYTES)

    def advance(self, length: int) -> None:
        self.position += length
        if self.position > self.limit:
            more = f"fewer than its header says, or a header of more than {MOST_HEADER_BYTES:,} bytes"
            raise broken(self.file, f"it has {self.size:,} bytes, {more}")

    def take(self, length: int) -> bytes:
        self.advance(length)
        data = self.stream.read(length)
        if len(data) < length:
            raise broken(self.file, "it became shorter while it was read")
        return data

    def skip(self, length: int) -> None:
        self.advance(length)
        self.stream.seek(self.position)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, errors: str = "strict") -> str:
        try:
            return self.take(self.number("Q")).decode(errors=errors)
        except UnicodeDecodeError as error:
            raise broken(self.file, f"a name before byte {self.position:,} is not UTF-8") from error

    def value(self) -> object:
        """Read a number or a text; an array, such as the vocabulary, is skipped."""
        kind = self.number("I")
        if kind == _ARRAY:
            self.skip_array(self.number("I"), self.number("Q"))
            return None
        return self.text("replace") if kind == _STRING else self.number(self.code(kind))

    def skip_array(self, kind: int, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{self.code(kind)}"))

    def place(self) -> tuple[tuple[int, ...], int, int]:
        """Read a tensor's shape, outermost first, its GGML type, and where its data begins."""
        count = self.number("I")
        if count > _MOST_DIMENSIONS:
            raise broken(self.file, f"a tensor has {count:,} dimensions, more than the {_MOST_DIMENSIONS} of GGML")
        shape = tuple(self.number("Q") for _ in range(count))
        return shape[::-1], self.number("I"), self.number("Q")

    def code(self, kind: int) -> str:
        """Return how `struct` writes a kind of number."""
        if kind not in _SCALARS:
            raise unknown(self.file, f"a metadata value has the type {kind}", map(str, (*_SCALARS, _STRING, _ARRAY)))
        return _SCALARS[kind]

    def by_name(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """Read names, each with what `read` finds behind it, and refuse one that has come before."""
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text()
            if name in found:
                raise broken(self.file, f"{named(name)} is in its header twice")
            found[name] = read()
        return found


def _check_version(reader: _Values) -> None:
    magic = reader.stream.read(4)
    if magic != b"GGUF":
        raise WeightsError(f"{reader.file} is not a GGUF file: it begins with {magic!r}. Fetch it again.")
    reader.position = 4
    version: int = reader.number("I")
    if version in {2, 3}:
        return
    if version and version & 0xFFFF == 0:
        msg = f"{reader.file} is a big-endian GGUF file: fetch or convert a little-endian one."
    elif version == 1:
        msg = f"{reader.file} is a GGUF file of version 1: convert it with llama.cpp to version 3, or fetch such a one."
    else:
        msg = f"{reader.file} is a GGUF file of version {version}, and lmkit reads 2 and 3: update lmkit."
    raise WeightsError(msg)


def _apart(
    file: object, places: dict[str, tuple[tuple[int, ...], int, int]], alignment: int, room: int
) -> dict[str, TensorInfo]:
    """Check that the tensors' data is aligned, in the file, and no two's the same; return them in its order."""
    tensors: dict[str, TensorInfo] = {}
    end = 0
    # Of two that begin at one place, the one without elements comes first.
    for name, (shape, kind, begin) in sorted(places.items(), key=lambda item: (item[1][2], math.prod(item[1][0]))):
        tensors[name] = _ggml_tensor(file, name, shape, kind)
        nbytes = tensors[name].nbytes
        if begin % alignment or begin < end or begin + nbytes > room:
            what = f"{named(name)} has {nbytes:,} bytes at byte {begin:,} of {max(room, 0):,}, where {end:,} are taken"
            raise broken(file, what)
        end = begin + nbytes
    return tensors


def _ggml_tensor(file: object, name: str, shape: tuple[int, ...], kind: int) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGML_QUANT_SIZES:
        known = [one.name for one in GGML_QUANT_SIZES]
        raise unknown(file, f"{named(name)} has the GGML type {kind}", known, "the package gguf")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if too_many(shape):
        raise broken(file, f"{named(name)} has {shown(shape)} elements, more than any tensor")
    if (shape or (1,))[-1] % block:
        raise broken(file, f"{named(name)} has {shown(shape)} elements, whose rows are not whole blocks of {block}")
    return TensorInfo(GGMLQuantizationType(kind).name, shape, math.prod(shape) // block * block_bytes)
