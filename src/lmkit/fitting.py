"""What fits where: a layout of a model on devices, what it lacks, what it offloads, and what would fit instead."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmkit.errors import PlacementError, listed, nearest
from lmkit.placement import BYTES_PER_SECOND
from lmkit.results.base import Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.keyvalues import KeyValueBytes
    from lmkit.placement import Placement
    from lmkit.skeleton import Skeleton

__all__ = ["Layout", "ModulePlan"]


@dataclass(frozen=True, slots=True)
class ModulePlan(Result):
    """A part of a model that stays whole: a block, or what is in none.

    Attributes:
        name: The module's name.
        device: Where it is, or `"disk"`.
        dtype: What its weights are held in, the most of them first, such as `"int4, bfloat16"`.
        bytes: What its weights take, scales included.
    """

    name: str
    device: str
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A model on devices.

    Attributes:
        device_map: A device, or `"disk"`, per module name, as transformers takes it.
        modules: The parts, each with its place.
        limits: How many bytes each device may hold.
        beside: Bytes that are needed on the first device beside the weights.
        shares: Of the keys and values, what share each device that computes will hold.
    """

    device_map: Mapping[str, str]
    modules: tuple[ModulePlan, ...]
    limits: Mapping[str, int]
    beside: int
    shares: Mapping[str, float]

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """Sum the weights on each device, the disk among them."""
        sums: Counter[str] = Counter()
        for module in self.modules:
            sums[module.device] += module.bytes
        return dict(sums)

    @property
    def main(self) -> str:
        """The device that computes: the first accelerator, else the CPU."""
        return computing(self.device_map.values())

    def left(self, key_values: int = 0) -> dict[str, int]:
        """Return what is left of each budget beside the weights and so many bytes of keys and values."""
        used = self.bytes_per_device
        return {
            name: int(limit - used.get(name, 0) - (self.beside if name == self.main else 0)
                      - key_values * self.shares.get(name, 0.0))
            for name, limit in self.limits.items()
        }  # fmt: skip

    def fits(self, key_values: int = 0) -> bool:
        """Say whether no device holds more than it may, and all of them so many bytes of keys and values."""
        return min(self.left(key_values).values(), default=0) >= 0

    def rows(self, key_values: int) -> int:
        """Return how many rows of so many bytes of keys and values fit beside the weights."""
        left = self.left()
        return max(int(min(left[name] / (key_values * share) for name, share in self.shares.items() if share)), 0)


def computing(devices: object) -> str:
    """Return which of some devices computes: the first accelerator, else the CPU."""
    names = [str(name) for name in devices]  # type: ignore[attr-defined]
    return next((name for name in names if name not in ("cpu", "disk")), "cpu")


def lay_out(skeleton: Skeleton, placed: Placement, *, beside: int = 0) -> Layout:
    """Decide where each part of a model goes.

    Raises:
        PlacementError: An explicit map names a module that is not there, leaves one out, or divides what stays whole.
    """
    limits = {name: size for name, size in placed.max_memory.items() if isinstance(size, int)}
    if isinstance(placed.device_map, str):
        main = computing(limits)
        room = max(limits[main] - beside, 0)
        alone = sum(name != "cpu" for name in limits) <= 1  # several accelerators share a model that one could hold
        whole = alone and sum(part.bytes for part in skeleton.parts()) <= room
        device_map = {"": main} if whole else skeleton.divided({**limits, main: room})
        where: Mapping[str, str] = device_map
    else:
        where = placed.device_map
        _check_map(where, skeleton)
        device_map = _flat(where, skeleton)
    if len(set(device_map.values())) == 1:
        device_map = where = {"": next(iter(device_map.values()))}
    if "" not in where and (own := [name for name in skeleton.own() if name in where]):
        where = {**where, "": where[own[0]]}  # accelerate gives weights of the model itself places by their own names
    main = computing(device_map.values())
    blocks = [name for name in skeleton.blocks() if not skeleton.reads_only(name)]
    # What is offloaded is computed by the main device, which keeps its keys and values.
    counts = Counter(_computes(placed_at(name, where), main) for name in blocks) or Counter([main])
    shares = {name: count / counts.total() for name, count in counts.items()}
    return Layout(device_map, _placed(skeleton, where), limits, beside, shares)


def measured_again(layout: Layout, skeleton: Skeleton) -> Layout:
    """Return a layout with the same places, and what the parts of another skeleton take there."""
    return replace(layout, modules=_placed(skeleton, {module.name: module.device for module in layout.modules}))


def _placed(skeleton: Skeleton, where: Mapping[str, str]) -> tuple[ModulePlan, ...]:
    return tuple(
        ModulePlan(part.name, placed_at(part.name, where), ", ".join(part.dtypes), part.bytes)
        for part in skeleton.parts()
    )


def _flat(device_map: Mapping[str, str], skeleton: Skeleton) -> dict[str, str]:
    """Name each part by itself: accelerate cannot carry out a map in which one module is inside of another."""
    homes = skeleton.homes()
    flat: dict[str, str] = {}
    for name in homes:
        inside = f"{name}." if name else ""
        names = [name]
        if any(other != name and other.startswith(inside) for other in homes):  # weights beside the parts below
            names = [f"{inside}{leaf}" for leaf in skeleton.own(name)]
        flat |= dict.fromkeys(names, placed_at(name, device_map))
    return flat


def placed_at(name: str, device_map: Mapping[str, str]) -> str:
    """Return the device that a map sends a module to: by its own name, or the longest one above it."""
    names = [one for one in device_map if not one or name == one or name.startswith(f"{one}.")]
    return device_map[max(names, key=len)] if names else next(iter(device_map.values()))


def _computes(device: str, main: str) -> str:
    return main if device in ("cpu", "disk") else device


def _check_map(device_map: Mapping[str, str], skeleton: Skeleton) -> None:
    known = {name for name, _ in skeleton.model.named_modules()}
    if unknown := [name for name in device_map if name not in known]:
        parts = listed(part.name for part in skeleton.parts()[:4])
        msg = f"the model has no module {listed(unknown[:3])}.{nearest(unknown[0], known)} Its parts are {parts}, …"
        raise PlacementError(msg)
    homes = [part.name for part in skeleton.parts()]
    out = [name for name in homes if not any(not one or f"{name}.".startswith(f"{one}.") for one in device_map)]
    inside = {one: next((home for home in homes if one.startswith(f"{home}.") and home), None) for one in device_map}
    divided = [home for one, home in inside.items() if home and device_map[one] != _outer(home, device_map)]
    if divided:
        msg = f"the map divides {listed(divided[:1])}, which stays whole: give it one device, by that name."
        raise PlacementError(msg)
    if out:
        more = f" and {len(out) - 5} more" if len(out) > 5 else ""  # noqa: PLR2004 - enough to see what they are
        msg = f"the map leaves out {listed(out[:5])}{more}: give each a device, or all of them one by the name ''."
        raise PlacementError(msg)
    for group in skeleton.groups():
        if len(places := {placed_at(name, device_map) for name in group}) > 1:
            msg = f"{listed(group)} share a weight and cannot be on {listed(sorted(places))}: give them one device."
            raise PlacementError(msg)


def _outer(home: str, device_map: Mapping[str, str]) -> str | None:
    names = [one for one in device_map if not one or home == one or home.startswith(f"{one}.")]
    return device_map[max(names, key=len)] if names else None


def size(count: float) -> str:
    """Write bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:  # noqa: PLR2004 - the unit's own
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def on_devices(layout: Layout) -> bool:
    """Say whether the weights fit, and none of them is on a disk."""
    return layout.fits() and "disk" not in layout.bytes_per_device


def shortage(layout: Layout, placed: Placement, precision: str, key_values: int) -> str | None:
    """Say what does not fit, in a sentence; None if all fits."""
    if layout.fits(key_values) and (placed.offload_folder is not None or "disk" not in layout.bytes_per_device):
        return None
    largest = max(layout.modules, key=lambda part: part.bytes)
    most = max(layout.limits.values(), default=0)
    tail = f"; the largest part is {largest.name!r} with {size(largest.bytes)}"
    if largest.bytes > most:
        tail += ", which no device can hold"
    weights = sum(layout.bytes_per_device.values()) + layout.beside
    # The first device that is too small, if the caller chose where parts go; else all of them together.
    for name, left in layout.left(key_values).items():
        if left < 0:
            need = layout.limits[name] - left
            there = f"{size(key_values * layout.shares.get(name, 0.0))} of it for keys and values"
            extra = f", {there}" if key_values else ""
            return f"{name} has room for {size(layout.limits[name])}, and {size(need)} are needed there{extra}{tail}"
    room = f"{' and '.join(f'{name} {size(limit)}' for name, limit in layout.limits.items())}"
    extra = f" and {size(key_values)} for keys and values" if key_values else ""
    return f"{precision} needs {size(weights)} for the weights{extra}, and there is room for: {room}{tail}"


def offload(layout: Layout, placed: Placement) -> str | None:
    """Say which weights cross to the device that computes for each token, and what that costs; None if none do."""
    main = layout.main
    told = []
    for place in ("cpu", "disk"):
        parts = [part for part in layout.modules if part.device == place]
        if not parts or place == main or (place == "disk" and placed.offload_folder is None):
            continue
        crossing = sum(part.bytes for part in parts)
        speed = {**BYTES_PER_SECOND, **placed.bytes_per_second}[place]
        told.append(
            f"{len(parts)} of {len(layout.modules)} parts are on {place}: {size(crossing)} cross to {main} for each "
            f"token, {crossing / speed:.2g} s at {size(speed)}/s"
        )
    return "; ".join(told) or None


def longest(key_values: KeyValueBytes | None, layout: Layout, most: int) -> int:
    """Return the most tokens of one row whose keys and values fit beside the weights, up to `most`."""
    if key_values is None:
        return most
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if layout.fits(key_values.of(middle, middle)) else (low, middle - 1)
    return low


def summed_names(modules: Sequence[ModulePlan]) -> str:
    """Name parts briefly: neighbours whose names only differ by a number as a range."""
    runs: list[tuple[str, list[str]]] = []
    for module in modules:
        stem, _, last = module.name.rpartition(".")
        key = f"{stem}." if last.isdecimal() else module.name
        if runs and runs[-1][0] == key and last.isdecimal():
            runs[-1][1].append(last)
        else:
            runs.append((key, [last]))
    names = [
        stem + (numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}") if stem.endswith(".") else stem
        for stem, numbers in runs
    ]
    return ", ".join(name or "(the model's own)" for name in names)
