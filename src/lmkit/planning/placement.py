"""`devices=` to a placement: one policy for all three wrappers, with the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from lmkit.errors import PlacementError, listed
from lmkit.planning.machine import Machine, accelerator

if TYPE_CHECKING:
    import torch


Budget: TypeAlias = "str | int | float"
Budgets: TypeAlias = "Mapping[Any, Budget]"
"""By a device's name or number. A union of two mappings would keep mypy from reading sizes of several kinds."""

Devices: TypeAlias = "str | int | torch.device | Sequence[str | int | torch.device] | Budgets | Placement"
"""What `devices=` accepts."""

ACCEPTED = (
    "'auto', 'cpu', a device such as 'cuda:0' or 0, a list of devices, a dict of budgets such as "
    "{'cuda:0': '20GiB', 'cpu': 0.8, 'disk': 'offload/'}, or an lmkit.Placement"
)

ACCELERATORS: Final = ("cuda", "hpu", "mlu", "mps", "musa", "npu", "xpu")
"""Kinds of devices that a plan may be made for where they are absent."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B")

SHARE: Final = 0.9
"""How much of a device's free memory weights, keys and values may take, where no budget says: the rest is for what a
forward pass needs."""

BYTES_PER_SECOND: Final = {"cpu": 16e9, "disk": 2e9}
"""How fast weights are assumed to reach an accelerator from the CPU (a PCIe 4.0 slot with 16 lanes moves 32 GB/s at
most, about half of that from pageable memory), and the processor from a disk (an NVMe drive)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the modules of a model go.

    Attributes:
        device_map: A device or `"disk"` per module name, where `""` is the whole model; or `"auto"`, which
            divides the model among the budgets, as accelerate does.
        max_memory: Per device, bytes, a text such as `"20GiB"`, or a fraction of its memory such as `0.8`. Devices
            of an explicit map that have none may use what is free.
        offload_folder: Where modules on `"disk"` are kept; None allows none.
        bytes_per_second: How fast offloaded weights come from the `"cpu"` and from the `"disk"`, for the plan's
            estimate of what that costs; `BYTES_PER_SECOND` where nobody says.
        reason: Why.
    """

    device_map: Mapping[str, str] | str
    max_memory: Mapping[str, Budget] = field(default_factory=dict)
    offload_folder: str | None = None
    bytes_per_second: Mapping[str, float] = field(default_factory=dict)
    reason: str = "as asked"

    @property
    def device_type(self) -> str:
        """The kind of device that computes, such as `"cuda"`."""
        named = self.device_map.values() if isinstance(self.device_map, Mapping) else self.max_memory
        return main_device(named).partition(":")[0]


def home(name: str, homes: Iterable[str]) -> str:
    """Return which of some modules a weight or module is in, the innermost of them; `""` if it is in none."""
    return max((one for one in homes if not one or f"{name}.".startswith(f"{one}.")), key=len, default="")


def main_device(names: Iterable[str]) -> str:
    """Return which of some devices computes: the first accelerator, else the CPU."""
    return next((name for name in names if name not in ("cpu", "disk")), "cpu")


def resolve_placement(devices: Devices, machine: Machine, *, absent: bool = False) -> Placement:
    """Turn `devices=` into a placement with a budget in bytes for each of its devices.

    Args:
        devices: What the caller wrote; it is not changed.
        machine: What is here.
        absent: Accept a device that is not here, if it has a budget in bytes.

    Raises:
        PlacementError: `devices` is not written as accepted, or names a device that is not here.
    """
    import torch

    if isinstance(devices, Placement):
        return _explicit(devices, machine, absent=absent)
    if isinstance(devices, Mapping):
        return _budgets(devices, machine, absent=absent)
    if devices == "auto":
        return _automatic(machine)
    if isinstance(devices, (str, int, torch.device)) and not isinstance(devices, bool):
        devices = [devices]
    if isinstance(devices, Sequence) and devices:
        names = list(dict.fromkeys(present(device, machine, planned=absent) for device in devices))
        if len(names) == 1:
            return Placement({"": names[0]}, _free(machine, names))
        return Placement("auto", _free(machine, names), reason=f"split over {listed(names)}")
    raise PlacementError(f"devices={devices!r} is not accepted: pass {ACCEPTED}.")


def present(device: str | int | torch.device, machine: Machine, *, absent: bool = False, planned: bool = False) -> str:
    """Return the full name of a device, such as `"cuda:0"`.

    Raises:
        PlacementError: It is written in a way torch does not know, or is not on this machine and may not be `absent`.
    """
    if isinstance(device, str) and not re.fullmatch(r"[a-z]+(:\d+)?", device):
        raise PlacementError(f"devices={device!r} is not accepted: pass {ACCEPTED}.")
    kind, _, number = str(device).partition(":")
    if isinstance(device, int):
        first = machine.accelerators[0] if machine.accelerators else accelerator() or "cuda"
        kind, number = first.partition(":")[0], str(device)
    name = "cpu" if kind == "cpu" else f"{kind}:{number or 0}"
    if name not in machine.devices and not (absent and kind in ACCELERATORS):
        there = listed(sorted(machine.devices))
        msg = f"the device {device!r} is not on this machine, which has {there}: pass one of those, or 'auto'."
        if absent or planned:
            others = listed(f"{kind}:0" for kind in ACCELERATORS)
            msg += f" A plan also takes devices that are not here, with budgets in bytes: {others}, …"
        raise PlacementError(msg)
    return name


def _automatic(machine: Machine) -> Placement:
    if not machine.accelerators:
        return Placement({"": "cpu"}, _free(machine, ["cpu"]), reason="no accelerator on this machine")
    names = [*machine.accelerators, "cpu"]
    reason = f"{listed(machine.accelerators)}, then the CPU for what they cannot hold"
    return Placement("auto", _free(machine, names), reason=reason)


def _free(machine: Machine, names: Sequence[str]) -> dict[str, int]:
    return {name: int(machine.devices[name].free_bytes * SHARE) for name in names}


def _explicit(given: Placement, machine: Machine, *, absent: bool) -> Placement:
    """Complete the caller's own placement."""
    if isinstance(given.device_map, str):
        if given.device_map != "auto":
            raise PlacementError(
                f"device_map={given.device_map!r} is not accepted: pass 'auto', or a device per module name."
            )
        budgets: dict[str, Budget] = dict(given.max_memory or _free(machine, list(machine.devices)))
        if given.offload_folder is not None:
            budgets["disk"] = given.offload_folder
        found = _budgets(budgets, machine, absent=absent)
        return Placement("auto", found.max_memory, found.offload_folder, given.bytes_per_second, given.reason)
    limits = _limits(given.max_memory, machine, absent=absent)
    where: dict[str, str] = {}
    for module, device in given.device_map.items():
        where[module] = known = "disk" if device == "disk" else present(device, machine, absent=absent)
        if known != "disk" and known not in limits:
            limits |= _free(machine, [present(device, machine)])  # an absent device has no memory that is known
    if {*where.values()} == {"disk"} and "cpu" not in limits:
        limits |= _free(machine, ["cpu"])  # which computes
    if "disk" in where.values() and given.offload_folder is None:
        raise PlacementError(
            "the device_map sends modules to 'disk', and no folder is named for them: pass offload_folder=."
        )
    return Placement(where, limits, given.offload_folder, given.bytes_per_second, given.reason)


def _budgets(budgets: Budgets, machine: Machine, *, absent: bool) -> Placement:
    """Turn budgets into a placement; only a folder under `"disk"` allows offloading to disk."""
    named: dict[str | int, Budget] = dict(budgets.items())
    folder = named.pop("disk", None)
    path = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if folder is not None and (path is None or _SIZE.fullmatch(path)):
        raise PlacementError(f"the budget {{'disk': {folder!r}}} is not accepted: 'disk' takes a folder's path.")
    limits = _limits(named, machine, absent=absent)
    if not limits:
        raise PlacementError(f"devices={dict(budgets)!r} names no device that computes: add one, such as 'cpu'.")
    if path is None and len(limits) == 1:
        (name,) = limits
        return Placement({"": name}, limits, reason="the one device with a budget")
    # Accelerators first, as accelerate fills them.
    ordered = dict(sorted(limits.items(), key=lambda item: (item[0] == "cpu", int(item[0].partition(":")[2] or 0))))
    return Placement("auto", ordered, path, reason="divided by the budgets given")


def _limits(budgets: Budgets, machine: Machine, *, absent: bool) -> dict[str, int]:
    limits: dict[str, int] = {}
    for device, budget in budgets.items():
        name = present(device, machine, absent=absent)
        if name in limits:
            raise PlacementError(f"{name!r} has two budgets in {dict(budgets)!r}: give it one.")
        limits[name] = _bytes(device, name, budget, machine)
    return limits


def _bytes(device: str | int, name: str, budget: object, machine: Machine) -> int:
    """Turn a budget into bytes: a whole number, a text in powers of 1000 (GB) or of 1024 (GiB), or a fraction."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return budget
    if isinstance(budget, float) and 0 < budget <= 1:
        if name in machine.devices:
            return int(machine.devices[name].total_bytes * budget)
        raise PlacementError(
            f"{device!r} is not on this machine, so {budget!r} of its memory is unknown: write a size, as '24GiB'."
        )
    written = _SIZE.fullmatch(budget) if isinstance(budget, str) else None
    if written is None:
        raise PlacementError(
            f"the budget {{{device!r}: {budget!r}}} is not accepted: write bytes, a text such as '20GiB', "
            "or a fraction of its memory such as 0.8."
        )
    number, prefix, binary = written.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1))
