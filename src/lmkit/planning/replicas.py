"""Several copies of a model on one machine: where each goes, and whether all of them fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError, PrecisionError, listed, shown
from lmkit.planning.layout import size
from lmkit.planning.machine import Machine
from lmkit.planning.placement import present

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedConfig

    from lmkit.planning.plan import LoadPlan
    from lmkit.planning.trial import Wish


def places(replicas: object, devices: object, machine: Machine) -> list[str]:
    """Return the device of each replica.

    Args:
        replicas: As `load` takes them.
        devices: The argument of `load` beside it.
        machine: What is here.

    Raises:
        OptionError: `replicas` is not accepted, or contradicts `devices`.
        PlacementError: A device is not on this machine.
    """
    count = isinstance(replicas, int) and not isinstance(replicas, bool)
    if not (devices == "auto" or (count and devices == "cpu")):
        raise OptionError(f"replicas= and devices={shown(devices)} contradict: name the devices in replicas= alone.")
    if count and replicas > 0:  # type: ignore[operator]  # a number
        if machine.accelerators and devices != "cpu":
            given: Any = machine.accelerators
            raise OptionError(f"replicas={replicas} is for a CPU: name the devices, such as replicas={given!r}.")
        return ["cpu"] * replicas  # type: ignore[operator]
    if isinstance(replicas, (list, tuple)) and replicas:
        return [present(device, machine) for device in replicas]
    raise OptionError(
        f"replicas={shown(replicas)} is not accepted: pass a list of devices, one for each, or on a CPU a number."
    )


def shared(machine: Machine, found: Sequence[str]) -> Machine:
    """Return the machine as one of several replicas may use it: its share of what is free where they are."""
    counts = Counter(found)
    free = {name: device.free_bytes // max(counts[name], 1) for name, device in machine.devices.items()}
    return Machine({name: replace(device, free_bytes=free[name]) for name, device in machine.devices.items()})


def threads(found: Sequence[str]) -> int | None:
    """Return how many threads each replica on the CPU computes with: its share of those that torch has here."""
    import torch

    return max(torch.get_num_threads() // found.count("cpu"), 1) if "cpu" in found else None


def together(
    found: Sequence[str], make: Callable[[Wish], tuple[LoadPlan, PreTrainedConfig]], wish: Wish
) -> tuple[LoadPlan, PreTrainedConfig]:
    """Make the plan of all replicas of those for one on each device; what no device decides is said of the first.

    Raises:
        PrecisionError: `"auto"` is another precision on another device.
    """
    made = {device: make(replace(wish, devices=device)) for device in dict.fromkeys(found)}
    plans = {device: plan for device, (plan, _) in made.items()}
    counts, (first, config) = Counter(found), made[found[0]]
    if len(words := dict.fromkeys(plan.precision.name for plan in plans.values())) > 1:
        raise PrecisionError(f"replicas would be in {listed(words)}, and answers differ: name one precision.")
    layout = first._layout  # noqa: SLF001 - of a plan that is made here
    modules = tuple(
        replace(module, bytes=module.bytes * count)
        for device, count in counts.items()
        for module in plans[device].modules
    )
    limits = {name: limit * counts[name] for plan in plans.values() for name, limit in plan._layout.limits.items()}  # noqa: SLF001
    shares = {name: count / len(found) for name, count in counts.items()}
    held = size(first.weights_bytes + first.beside_bytes)
    told = f"{len(found)} processes, each with {held}: " + ", ".join(
        f"{count} on {name}" + (f" with {threads(found)} threads each" if name == "cpu" else "")
        for name, count in counts.items()
    )
    lacking = [f"{name}: {plan.reasons['fits']}" for name, plan in plans.items() if not plan.fits]
    fits = {"fits": f"of {len(found)} replicas, each in its share of what is free: {'; '.join(lacking)}"}
    plan = replace(
        first,
        fits=not lacking,
        reasons=first.reasons | {"replicas": told} | (fits if lacking else {}),  # type: ignore[operator]  # a dict
        _layout=replace(layout, modules=modules, limits=limits, beside=layout.beside * counts[found[0]], shares=shares),
    )
    return plan, config
