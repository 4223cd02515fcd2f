"""What this machine has: its devices, their memory, and whether they compute bfloat16 natively."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class Device:
    """What one device has.

    Attributes:
        total_bytes: Its memory.
        free_bytes: What of it nobody uses.
        bfloat16: Whether it multiplies bfloat16 matrices natively.
    """

    total_bytes: int
    free_bytes: int
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that can compute, by name: accelerators such as `"cuda:0"`, in order, and `"cpu"`."""

    devices: Mapping[str, Device]

    @property
    def accelerators(self) -> list[str]:
        """The names of all devices but the CPU."""
        return [name for name in self.devices if name != "cpu"]

    def bfloat16(self, kind: str) -> bool:
        """Say whether a kind of device computes bfloat16 natively; one that is not here is taken to do so."""
        return all(device.bfloat16 for name, device in self.devices.items() if name.partition(":")[0] == kind)


def this_machine() -> Machine:
    """Ask torch and the system what is here now."""
    import torch

    found: dict[str, Device] = {}
    if (kind := accelerator()) is not None:
        for number in range(torch.accelerator.device_count()):
            free, total = memory(torch.device(kind, number))
            # Of CUDA's devices, those before compute capability 8.0 have no units for bfloat16.
            old = kind == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(number) < (8, 0)
            found[f"{kind}:{number}"] = Device(total, free, not old)
    free, total = memory(torch.device("cpu"))
    found["cpu"] = Device(total, free, computes_bfloat16())
    return Machine(found)


def memory(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of a device are free, and how many it has; blocks that torch keeps for itself are free."""
    import psutil
    import torch

    if device.type == "cpu":
        system = psutil.virtual_memory()
        return int(system.available), int(system.total)
    if device.type == "mps":  # a part of the system's, of which torch tells what it may take
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.current_allocated_memory(), total
    free, total = torch.accelerator.get_memory_info(device)
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return free + kept, total


def give_back() -> None:
    """Let other processes have the memory of accelerators that torch keeps for itself."""
    import torch

    if torch.accelerator.is_available():
        gc.collect()  # modules refer to each other
        with contextlib.suppress(RuntimeError):  # of a device that an error has left unusable
            torch.accelerator.empty_cache()


def accelerator() -> str | None:
    """Return the kind of accelerator this machine has, such as `"cuda"`, or None."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def computes_bfloat16() -> bool:
    """Ask the processor whether it multiplies bfloat16 matrices natively (AMX, AVX512-BF16 or Arm BF16)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))
