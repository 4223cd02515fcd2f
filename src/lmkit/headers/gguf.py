"""The header of a GGUF file: little-endian values, the vocabulary among them skipped."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lmkit.errors import WeightsError
from lmkit.headers.files import TensorInfo, broken, named, opened, shown, too_many, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lmkit.headers.files import Stream

MOST_HEADER_BYTES = 2**27
"""The longest header that is read: some ten times what the largest vocabularies take."""

GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Per number of a GGML type (ggml.h): its name, the elements in a block, and the bytes of a block."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_PAIRS, _MOST_TENSORS = 2**16, 2**18  # real files have some 50 and, with every expert apart, 50,000
_MOST_DIMENSIONS = 4  # ggml's own
_FEW = 64  # elements of an array that are read, as a list of languages; a vocabulary is not


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file's header holds.

    Attributes:
        version: Of the format: 2 or 3.
        metadata: The values by key: numbers, strings, and tuples of at most 64; None for a longer array, such
            as the vocabulary.
        tensors: The tensors by name, in the order of their data.
    """

    version: int
    metadata: Mapping[str, object]
    tensors: dict[str, TensorInfo]


def read_gguf(file: Path) -> GgufHeader:
    """Read the header of a GGUF file, without its vocabulary.

    Raises:
        WeightsError: It is no file, no little-endian GGUF file of version 2 or 3, truncated, corrupt, or has a
            type that lmkit does not know.
    """
    with opened(file) as (stream, size):
        return parse_gguf(stream, size, file)


def parse_gguf(stream: Stream, size: int, file: object) -> GgufHeader:
    """Read the header of a GGUF file of `size` bytes from a stream that is at its start.

    Args:
        stream: The file, or as much of it as its header takes.
        size: How many bytes the whole file has.
        file: What messages call it.

    Raises:
        WeightsError: As for `read_gguf`.
    """
    reader = _Values(stream, size, file)
    version = _version(reader)
    tensor_count, pair_count = reader.number("Q"), reader.number("Q")
    if tensor_count > _MOST_TENSORS or pair_count > _MOST_PAIRS:
        what = f"its header says that it holds {tensor_count:,} tensors and {pair_count:,} metadata values"
        raise broken(file, what)
    metadata = dict(reader.once((reader.text(), reader.value()) for _ in range(pair_count)))
    places = dict(reader.once((reader.text(), _place(reader)) for _ in range(tensor_count)))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise broken(file, f"its alignment is {str(alignment)[:100]}, not a power of two")
    start = -(-reader.position // alignment) * alignment
    tensors = _apart(file, places, alignment, size - start)
    return GgufHeader(version, MappingProxyType(metadata), tensors)


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
        kind = self.number("I")
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        return self.plain(kind)

    def plain(self, kind: int) -> object:
        return self.text("replace") if kind == _STRING else self.number(self.code(kind))

    def array(self, kind: int, count: int) -> tuple[object, ...] | None:
        if count <= _FEW:
            return tuple(self.plain(kind) for _ in range(count))
        if kind != _STRING:
            self.skip(count * struct.calcsize(f"<{self.code(kind)}"))
            return None
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def code(self, kind: int) -> str:
        """Return how `struct` writes a kind of number."""
        if kind not in _SCALARS:
            raise unknown(self.file, f"a metadata value has the type {kind}", map(str, (*_SCALARS, _STRING, _ARRAY)))
        return _SCALARS[kind]

    def once(self, pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pass pairs on, and refuse a key that has come before."""
        seen: set[str] = set()
        for name, value in pairs:
            if name in seen:
                raise broken(self.file, f"{named(name)} is in its header twice")
            seen.add(name)
            yield name, value


def _version(reader: _Values) -> int:
    magic = reader.stream.read(4)
    if magic != b"GGUF":
        msg = f"{reader.file} is not a GGUF file: it begins with {magic!r}. Fetch it again."
        raise WeightsError(msg)
    reader.position = 4
    version: int = reader.number("I")
    if version in {2, 3}:
        return version
    if version and version & 0xFFFF == 0:
        msg = f"{reader.file} is a big-endian GGUF file: fetch or convert a little-endian one."
    elif version == 1:
        msg = f"{reader.file} is a GGUF file of version 1: convert it with llama.cpp to version 3, or fetch such a one."
    else:
        msg = f"{reader.file} is a GGUF file of version {version}, and lmkit reads 2 and 3: update lmkit."
    raise WeightsError(msg)


def _place(reader: _Values) -> tuple[tuple[int, ...], int, int]:
    """Read a tensor's shape, outermost first, its GGML type, and where its data begins."""
    count = reader.number("I")
    if count > _MOST_DIMENSIONS:
        raise broken(reader.file, f"a tensor has {count:,} dimensions, more than the {_MOST_DIMENSIONS} of GGML")
    shape = tuple(reader.number("Q") for _ in range(count))
    return shape[::-1], reader.number("I"), reader.number("Q")


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
    if kind not in GGML_TYPES:
        raise unknown(file, f"{named(name)} has the GGML type {kind}", [kind[0] for kind in GGML_TYPES.values()])
    dtype, block, block_bytes = GGML_TYPES[kind]
    if too_many(shape):
        raise broken(file, f"{named(name)} has {shown(shape)} elements, more than any tensor")
    if (shape or (1,))[-1] % block:
        raise broken(file, f"{named(name)} has {shown(shape)} elements, whose rows are not whole blocks of {block}")
    return TensorInfo(dtype, shape, math.prod(shape) // block * block_bytes)
