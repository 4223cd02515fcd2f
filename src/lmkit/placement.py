"""`devices=` to a placement: one policy for all three wrappers, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from lmkit.errors import PlacementError, listed

if TYPE_CHECKING:
    import torch

__all__ = ["Devices", "Placement"]

Devices: TypeAlias = (
    "str | int | torch.device | Sequence[str | int | torch.device] | Mapping[str, str | int] | Placement"
)
"""What `devices=` accepts."""

ACCEPTED = (
    "'auto', 'cpu', a device such as 'cuda:0' or 0, a list of devices, a dict of budgets such as "
    "{'cuda:0': '20GiB', 'cpu': '48GiB', 'disk': 'offload/'}, or an lmkit.Placement"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the modules of a model go.

    Attributes:
        device_map: A device per module name, where `""` is the whole model; or `"auto"`, which
            lets accelerate divide the model among the budgets.
        max_memory: Bytes, or a text such as `"20GiB"`, per device; empty means all there is.
        offload_folder: Where modules go that no budget holds; None allows none.
        reason: Why.
    """

    device_map: Mapping[str, str] | str
    max_memory: Mapping[str | int, str | int] = field(default_factory=dict)
    offload_folder: str | None = None
    reason: str = "as asked"

    @property
    def device_type(self) -> str:
        """The kind of device that computes: the first one that is an accelerator, else the CPU."""
        named = self.device_map.values() if isinstance(self.device_map, Mapping) else self.max_memory
        kinds = [accelerator() or "cpu" if isinstance(name, int) else name.split(":")[0] for name in named]
        if not kinds:
            return accelerator() or "cpu"
        return next((kind for kind in kinds if kind not in ("cpu", "disk")), "cpu")


def resolve_placement(devices: Devices) -> Placement:
    """Turn `devices=` into a placement on this machine.

    Raises:
        PlacementError: `devices` is not written as accepted, or names a device that is not here.
    """
    import torch

    if isinstance(devices, Placement):
        mapped = devices.device_map.values() if isinstance(devices.device_map, Mapping) else ()
        for device in {*mapped, *devices.max_memory} - {"disk"}:
            present(device)
        return devices
    if isinstance(devices, Mapping):
        return _budgets(devices)
    if isinstance(devices, (str, int, torch.device)) and not isinstance(devices, bool):
        if devices == "auto":
            return _automatic()
        return Placement({"": present(devices)})
    if isinstance(devices, Sequence) and devices:
        names = [present(device) for device in devices]
        if len(names) == 1:
            return Placement({"": names[0]})
        return Placement(
            "auto",
            {_key(name): _free_bytes(name) for name in names},
            None,
            f"split over {listed(names)}",
        )
    msg = f"devices={devices!r} is not accepted: pass {ACCEPTED}."
    raise PlacementError(msg)


def accelerator() -> str | None:
    """Return the kind of accelerator this machine has, such as `"cuda"`, or None."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def present(device: str | int | torch.device) -> str:
    """Return the full name of a device that is here, such as `"cuda:0"`.

    Raises:
        PlacementError: It is written in a way torch does not know, or is not on this machine.
    """
    import torch

    kind = accelerator()
    here = ["cpu", *(f"{kind}:{n}" for n in range(torch.accelerator.device_count() if kind else 0))]
    if isinstance(device, int):
        name = f"{kind or 'cuda'}:{device}"
    else:
        if isinstance(device, str) and not re.fullmatch(r"[a-z]+(:\d+)?", device):
            msg = f"devices={device!r} is not accepted: pass {ACCEPTED}."
            raise PlacementError(msg)
        name = str(device)
    if name.split(":")[0] == "cpu":
        name = "cpu"
    elif ":" not in name:
        name = f"{name}:0"
    if name not in here:
        msg = f"the device {device!r} is not on this machine, which has {listed(here)}: pass one of those, or 'auto'."
        raise PlacementError(msg)
    return name


def _automatic() -> Placement:
    import torch

    kind = accelerator()
    if kind is None:
        return Placement({"": "cpu"}, reason="no accelerator on this machine")
    count = torch.accelerator.device_count()
    return Placement("auto", reason=f"{count} {kind} device(s), then the CPU for what they cannot hold")


def _budgets(budgets: Mapping[str, str | int]) -> Placement:
    """Turn bytes per device into a placement; only a folder under `"disk"` allows offloading to disk."""
    folder = budgets.get("disk")
    if folder is not None and not isinstance(folder, str):
        msg = f"the budget {{'disk': {folder!r}}} is not accepted: 'disk' takes a folder's path."
        raise PlacementError(msg)
    limits: dict[str | int, str | int] = {}
    for device, budget in budgets.items():
        if device == "disk":
            continue
        limits[_key(present(device))] = _bytes(device, budget)
    if not limits:
        msg = f"devices={dict(budgets)!r} names no device that computes: add one, such as 'cpu'."
        raise PlacementError(msg)
    return Placement("auto", limits, folder, "divided by the budgets given")


def _bytes(device: str, budget: object) -> int:
    """Turn a budget into bytes: a whole number, or a text in powers of 1000 (GB) or of 1024 (GiB)."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return budget
    written = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", budget) if isinstance(budget, str) else None
    if written is None:
        msg = f"the budget {{{device!r}: {budget!r}}} is not accepted: write bytes, or a text such as '20GiB'."
        raise PlacementError(msg)
    number, prefix, binary = written.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1))


def _key(name: str) -> str | int:
    """Write a device as accelerate's budgets do: accelerators by number."""
    return name if name == "cpu" else int(name.split(":")[1])


def _free_bytes(name: str) -> int:
    """Return how much of a device is free, less a tenth for what a forward pass needs."""
    import torch

    if name == "cpu":
        import psutil

        return int(psutil.virtual_memory().available * 0.9)
    return int(torch.accelerator.get_memory_info(torch.device(name))[0] * 0.9)
