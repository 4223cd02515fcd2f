"""What weight files hold, read from their headers alone: nothing in a file is believed unchecked.

Here is what the readers of both formats share: how a file is opened, what a tensor is, how faults are told.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lmkit.errors import WeightsError, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_MOST_ELEMENTS = 2**63 - 1  # a tensor's size in torch is an int64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor.

    Attributes:
        dtype: The type as the file's format writes it: `"BF16"`, `"F8_E4M3"`, `"Q4_1"`.
        shape: Its sizes in torch's order, the outermost first (a GGUF file has them the other way round).
        nbytes: How many bytes it takes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Stream(Protocol):
    """What a header is read from: an open file, or one on the Hub whose bytes are fetched as they are read."""

    def read(self, size: int, /) -> bytes:
        """Return the next `size` bytes; fewer at the end."""
        ...

    def seek(self, offset: int, /) -> int:
        """Go to a place."""
        ...


def is_regular(file: Path) -> bool:
    """Whether this is a file, or a link to one, that can be read without waiting for another process."""
    return os.path.isfile(file)  # noqa: PTH113 - Path.is_file raises where a name is too long


def check_regular(file: Path) -> None:
    """Refuse what is not a file; a link to one, as in the Hub's cache, is one.

    Raises:
        WeightsError: It is absent, a broken link, a folder, a pipe or a device; the message says which.
    """
    try:
        kind = stat.S_IFMT(file.stat().st_mode)
    except (OSError, ValueError) as error:
        # Path.is_symlink raises where a name is too long.
        what = "a link that leads nowhere" if os.path.islink(file) else "not there"  # noqa: PTH114
        raise WeightsError(f"{file} is {what} ({error}): fetch it again.") from error
    if kind != stat.S_IFREG:
        what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(kind, "a device")
        raise WeightsError(f"{file} is {what}, not a file: put the file itself, or a link, there.")


def check_fetched(file: Path) -> None:
    """Refuse what Git leaves in the place of a large file that it was not told to fetch.

    Raises:
        WeightsError: It is such a pointer.
    """
    start = b""
    with contextlib.suppress(OSError), file.open("rb") as stream:  # who reads it tells what is wrong with it
        start = stream.read(len(_POINTER))
    if start == _POINTER:
        raise WeightsError(f"{file} is a Git LFS pointer, not the file itself: run 'git lfs pull', or fetch it again.")


_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[Stream, int]]:
    """Open a file, and tell its size in bytes."""
    check_regular(file)  # opening a pipe would wait for its writer
    check_fetched(file)
    try:
        with file.open("rb") as stream:
            yield stream, file.stat().st_size
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}): check its permissions and its disk.") from error


def broken(file: object, what: str) -> WeightsError:
    """Return the error for a file that is not whole, or not what it says it is."""
    return WeightsError(f"{file} is truncated or corrupt: {what}. Fetch it again.")


def named(name: str) -> str:
    """Write a tensor's name for a message, which a name of a megabyte would drown."""
    return repr(name if len(name) <= 100 else f"{name[:100]}...")  # noqa: PLR2004 - as much as helps to find it


def too_many(shape: tuple[int, ...]) -> bool:
    """Whether some of the sizes multiply to more than any tensor has; a 0 among them does not excuse it."""
    return math.prod(max(length, 1) for length in shape) > _MOST_ELEMENTS


def shown(shape: tuple[int, ...]) -> str:
    """Write a shape for a message."""
    return " x ".join(map(str, shape[:8])) + (" x ..." if len(shape) > 8 else "") if shape else "1"  # noqa: PLR2004


def unknown(file: object, what: str, known: Iterable[str], library: str = "lmkit") -> WeightsError:
    """Return the error for a type that is in a file, and not among those that lmkit or another library knows."""
    return WeightsError(f"{file}: {what}, which {library} does not know. It knows {listed(known)}: update {library}.")
