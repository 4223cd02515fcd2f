"""The header of a safetensors file: JSON of one form."""

from __future__ import annotations

import json
import math
import re
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

from lmkit.checkpoint.headers import Stream, TensorInfo, broken, named, opened, shown, too_many, unknown

if TYPE_CHECKING:
    from pathlib import Path


_Entry: TypeAlias = "tuple[str, tuple[int, ...], tuple[int, int]]"

MOST_HEADER_BYTES = 100_000_000
"""The longest header that is read: safetensors' own limit."""

_NUMBERED = """
    F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ
    I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64
"""
SAFETENSORS_BITS = {"BOOL": 8} | {name: int(name.partition("_")[0].lstrip("BCFIU")) for name in _NUMBERED.split()}
"""Bits per element of every type that safetensors 0.8 has: but for one, the number that its name begins with."""

_ = r"[ \t\n\r]*+"
_INT = r"(?:0|[1-9][0-9]{0,18})"
_FIELD = (
    rf'(?:"dtype"{_}:{_}"\w{{1,40}}"'
    rf'|"shape"{_}:{_}\[{_}(?:{_INT}(?:{_},{_}{_INT}){{0,63}}{_})?\]'
    rf'|"data_offsets"{_}:{_}\[{_}{_INT}{_},{_}{_INT}{_}\])'
)
_HEX = "[0-9a-fA-F]"
_PAIR = rf"[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}"
_TEXT = rf'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?:{_PAIR}|(?![dD][89a-fA-F]){_HEX}{{4}}))*+"'  # no half a pair


def _object(member: str) -> str:
    """Return the pattern of a JSON object with any number of such members."""
    return rf"\{{{_}(?:{member}(?:{_},{_}{member})*+{_})?+\}}"


_ENTRY = rf"\{{{_}{_FIELD}{_},{_}{_FIELD}{_},{_}{_FIELD}{_}\}}|{_object(f'{_TEXT}{_}:{_}{_TEXT}')}|null"
_HEADER = re.compile(rf"{_}{_object(f'{_TEXT}{_}:{_}(?:{_ENTRY})')}{_}", re.ASCII)
"""A header with tensors and metadata, whichever has which name."""


def read_safetensors(file: Path) -> dict[str, TensorInfo]:
    """Read the tensors that a safetensors file holds.

    Raises:
        WeightsError: It is no file, truncated, corrupt, or has a type that lmkit does not know.
    """
    with opened(file) as (stream, size):
        return parse_safetensors(stream, size, file)


def metadata_of(file: Path, key: str) -> str | None:
    """Return a text that was saved beside the tensors of a file that `read_safetensors` has read."""
    with opened(file) as (stream, _):
        header = stream.read(struct.unpack("<Q", stream.read(8))[0])
    # Headers of large models have megabytes, and few have what is looked for.
    found = json.loads(header).get("__metadata__") if key.encode() in header else None
    return (found or {}).get(key)


def parse_safetensors(stream: Stream, size: int, file: object) -> dict[str, TensorInfo]:
    """Read the tensors of a safetensors file of `size` bytes from a stream that is at its start.

    Everything that safetensors itself demands is checked, and a little more: no name and no field twice, no
    field beyond the format's three. Only the header is read.

    Args:
        stream: The file, or as much of it as its header takes.
        size: How many bytes the whole file has.
        file: What messages call it.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        WeightsError: It is truncated, corrupt, or has a type that lmkit does not know.
    """
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size  # noqa: PLR2004 - the format's own
    if 8 + length > size:
        raise broken(file, f"it has {size:,} bytes, fewer than its header says")
    if length > MOST_HEADER_BYTES:
        raise broken(file, f"its header says that it takes {length:,} bytes, more than safetensors allows")
    try:
        entries = _entries(stream.read(length).decode())
    except ValueError as error:
        raise broken(file, "its header is not safetensors JSON") from error
    tensors, end = _in_a_row(file, entries)
    if size != 8 + length + end:
        raise broken(file, f"it has {size:,} bytes where its header describes {8 + length + end:,}")
    return tensors


def _entries(header: str) -> dict[str, _Entry]:
    """Return what a header says of each tensor: its dtype, its shape, and where its data is.

    Without the pattern, a JSON parser would build whatever is there before anything could be checked: lists in lists
    until the stack ends, or thirty times the header's size in memory.
    """
    if _HEADER.fullmatch(header) is None:
        raise ValueError("something else than tensors and metadata")
    entries = json.loads(header, object_pairs_hook=_unique)
    tensors = {name: entry for name, entry in entries.items() if type(entry) is tuple}
    if tensors.keys() != entries.keys() - {"__metadata__"}:
        raise ValueError("metadata in the place of a tensor, or the other way round")
    return tensors


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    """Return an object; what is said of a tensor as tuples: so many lists would keep the garbage collector busy."""
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a name or a field twice")
    if list not in map(type, found.values()):
        return found
    return found["dtype"], tuple(found["shape"]), tuple(found["data_offsets"])


def _in_a_row(file: object, entries: dict[str, _Entry]) -> tuple[dict[str, TensorInfo], int]:
    """Check that the tensors follow each other without holes; return them, and where the last one ends."""
    tensors: dict[str, TensorInfo] = {}
    known: dict[object, TensorInfo] = {}  # most are like another
    end = 0
    for name, (dtype, shape, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != end:
            raise broken(file, f"{named(name)} has bytes {begin:,} to {stop:,} of its data, where {end:,} comes next")
        size = stop - begin
        tensors[name] = known.get((dtype, shape, size)) or _safetensor(file, name, dtype, shape, size)
        known[dtype, shape, size] = tensors[name]
        end = stop
    return tensors, end


def _safetensor(file: object, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> TensorInfo:
    bits = SAFETENSORS_BITS.get(dtype)
    if bits is None:
        raise unknown(file, f"{named(name)} has the type {dtype!r}", SAFETENSORS_BITS)
    if too_many(shape) or math.prod(shape) * bits != nbytes * 8:
        raise broken(file, f"{named(name)} has {nbytes:,} bytes, which are not {shown(shape)} of {dtype}")
    return TensorInfo(dtype, shape, nbytes)
