"""The machine and the versions that numbers were measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from _context import WIDE

BUSY = 0.5
"""A load average above this, before anything was started, means that something else is running."""

TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("lmkit", "torch", "transformers", "tokenizers")
GIB = 1024**3


def facts() -> dict[str, str]:
    """Describe the machine: its processor, its memory, and the versions of what runs on it."""
    import torch

    processor = cpu_info()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = set(processor.get("flags", "").split())
    return {
        "processor": processor.get("model name", platform.processor() or platform.machine()),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "instructions": " ".join(flag for flag in TELLING_FLAGS if flag in flags) or "unknown",
        "memory": f"{memory / GIB:.0f} GiB",
        "wide precision": WIDE,
        "torch threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {installed(name)}" for name in PACKAGES),
    }


def cpu_info() -> dict[str, str]:
    """Read what the kernel says of the first processor; nothing where there is no such file."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return {}
    first, _, _ = file.read_text(encoding="utf-8").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def installed(name: str) -> str:
    """Return the version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def load_warning() -> str | None:
    """Say so if the machine is busy, which makes every number below worthless."""
    load, *_ = os.getloadavg()
    if load <= BUSY:
        return None
    return f"WARNING: the load average is {load:.2f}: something else is running, and these numbers mean little"


def resident_bytes(field: str = "VmRSS") -> int:
    """Return a resident size of this process, `VmHWM` for its peak, as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
