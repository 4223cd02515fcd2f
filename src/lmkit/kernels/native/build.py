"""Compiling the kernels: once per machine, with whichever compiler is there, into lmkit's cache folder.

The sources include torch's stable headers alone, which takes a second where `torch/library.h` takes six.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_AVX512: Final = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")

INSTRUCTIONS: Final[Mapping[str, Sequence[str]]] = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "fma3"),
    "avx512bf16": (*_AVX512, "avx512_bf16", "fma3"),
    "avx512vnni": (*_AVX512, "fma3"),
    "avxvnni": ("avx2", "avx_vnni", "fma3"),
    "avx2": ("avx2", "fma3"),
}
"""The sets of instructions that kernels are written for, the best first, and what torch must say of the processor."""

FLAG: Final = {"fma3": "fma"} | {f"amx_{one}": f"amx-{one}" for one in ("tile", "int8", "bf16")}
"""What compilers call instructions where that is not torch's name without a line."""

FLAGS: Final = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"),
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
)
"""For gcc and clang. With the version, torch's headers offer what 2.13 has, lmkit's oldest."""

COMPILERS: Final = ("c++", "g++", "clang++")
"""Which compilers are looked for, unless the variable CXX names one."""

KNOWS_AMX: Final = 11
"""The first version of gcc and of clang that does."""

LIBRARY: Final = "kernels.so"
"""What the kernels' folder in the cache holds."""

MOST_SECONDS: Final = 300
"""How long a compiler may take: one that hangs must not hold a load for ever."""


class NoKernelsError(Exception):
    """Kernels are not to be had; its text says why."""


def cache_folder(kind: str) -> Path:
    """Return where compiled code is kept: in the user's cache, where nobody else should be able to write.

    Raises:
        NoKernelsError: There is no home, as in a container with another user's number.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmkit" / kind
    except RuntimeError as error:
        raise NoKernelsError("there is no home folder to keep compiled code in: set XDG_CACHE_HOME") from error


def instructions() -> str:
    """Choose the best set of instructions that this processor has.

    Raises:
        NoKernelsError: It has none of them.
    """
    has = torch.cpu.get_capabilities()
    for name, needed in INSTRUCTIONS.items():
        if all(has.get(one) for one in needed) and (name != "amx" or _tiles()):
            return name
    raise NoKernelsError("this processor has neither AVX2 nor AVX512-VNNI")


def _tiles() -> bool:
    """Say whether the system lets this process use AMX, and the compiler, if there is one, knows it."""
    allow = getattr(torch.cpu, "_init_amx", None)
    if allow is None or not allow():
        return False
    try:
        told = re.search(r"\b(\d+)\.\d+", _version(compiler()[0]))
    except NoKernelsError:
        return True  # which is said elsewhere
    return told is None or int(told[1]) >= KNOWS_AMX


def compiler() -> list[str]:
    """Find the compiler, as a command's first words.

    Raises:
        NoKernelsError: There is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(words[0]):
            return [path, *words[1:]]
    raise NoKernelsError(f"no C++ compiler is here ({named[0] if named else ', '.join(COMPILERS)})")


def library(isa: str, name: str, accept: Callable[[Path], None]) -> None:
    """Load the kernels for a set of instructions; compile them first, where they are not in the cache.

    Args:
        isa: One of `INSTRUCTIONS`.
        name: What torch is to call the library of their operators.
        accept: Loads a file that was compiled just now, and tries it. What it raises keeps the file out of the cache.

    Raises:
        NoKernelsError: There is no compiler, it fails, or what it made cannot be loaded.
    """
    allowed = [f"-m{FLAG.get(one, one.replace('_', ''))}" for one in INSTRUCTIONS[isa]]
    command = [*compiler(), *FLAGS, *allowed, f"-DLMKIT_OPERATORS={name}"]
    there = Path(torch.__file__).parent
    command += [f"-I{there / 'include'}", f"-L{there / 'lib'}"]
    folder = cache_folder("kernels") / _key(command)
    with contextlib.suppress(OSError):  # absent or damaged
        read(folder / LIBRARY)
        return
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise NoKernelsError(f"the folder for compiled code cannot be written ({error})") from error
    try:
        _compile(command, unfinished / LIBRARY)
        accept(unfinished / LIBRARY)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(path: Path) -> None:
    """Load a library of operators; an OSError where that fails."""
    ops: Any = torch.ops  # it is untyped
    ops.load_library(str(path))


def sources() -> list[Path]:
    """Return the kernels' source files, headers among them."""
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cpp"))


def _compile(command: Sequence[str], target: Path) -> None:
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    words = [*command, *files, "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(target)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelsError(f"{words[0]} does not compile them ({error})") from error
    if done.returncode:
        told = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NoKernelsError(f"{words[0]} does not compile them ({told})")


def _key(command: Sequence[str]) -> str:
    """Name what compiled kernels depend on: the sources, the compiler, what it is told, and torch."""
    told = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources()]
    words = json.dumps([told, [path.name for path in sources()], command, _version(command[0]), torch.__version__])
    return hashlib.sha256(words.encode()).hexdigest()[:32]


@functools.cache
def _version(path: str) -> str:
    try:
        said: Any = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernelsError(f"{path} does not run ({error})") from error
    return str(said.stdout)
