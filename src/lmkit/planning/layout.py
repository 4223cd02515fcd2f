"""What fits where: a layout of a model on devices, what it lacks, what it offloads, and what would fit instead."""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lmkit.errors import PlacementError, listed, nearest
from lmkit.planning.placement import BYTES_PER_SECOND, Placement, home, main_device
from lmkit.results.base import Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmkit.planning.keyvalues import KeyValueBytes
    from lmkit.planning.skeleton import Skeleton


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
    limits: Mapping[str, int] = field(compare=False)  # what is free differs from moment to moment
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
        """The device that computes."""
        return main_device(self.device_map.values())

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


def lay_out(skeleton: Skeleton, placed: Placement, *, beside: int = 0) -> Layout:
    """Decide where each part of a model goes.

    Raises:
        PlacementError: An explicit map names a module that is not there, leaves one out, or divides what stays whole.
    """
    limits = {name: size for name, size in placed.max_memory.items() if isinstance(size, int)}
    if isinstance(placed.device_map, str):
        main = main_device(limits)
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
    main = main_device(device_map.values())
    places = [placed_at(name, where) for name in skeleton.blocks() if not skeleton.reads_only(name)]
    # What is offloaded is computed by the main device, which keeps its keys and values.
    counts = Counter(main if place in ("cpu", "disk") else place for place in places) or Counter([main])
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
    return device_map.get(home(name, device_map), next(iter(device_map.values())))


def _check_map(device_map: Mapping[str, str], skeleton: Skeleton) -> None:
    known = {name for name, _ in skeleton.model.named_modules()}
    if unknown := [name for name in device_map if name not in known]:
        parts = listed(part.name for part in skeleton.parts()[:4])
        raise PlacementError(
            f"the model has no module {listed(unknown[:3])}.{nearest(unknown[0], known)} Its parts are {parts}, …"
        )
    homes = [part.name for part in skeleton.parts()]
    out = [name for name in homes if home(name, device_map) not in device_map]
    for name, device in device_map.items():
        whole = home(name, homes)
        if whole and whole != name and device != device_map.get(home(whole, device_map)):
            raise PlacementError(f"the map divides {whole!r}, which stays whole: give it one device, by that name.")
    if out:
        more = f" and {len(out) - 5} more" if len(out) > 5 else ""  # noqa: PLR2004 - enough to see what they are
        raise PlacementError(
            f"the map leaves out {listed(out[:5])}{more}: give each a device, or all of them one by the name ''."
        )
    for group in skeleton.groups():
        if len(places := {placed_at(name, device_map) for name in group}) > 1:
            raise PlacementError(
                f"{listed(group)} share a weight and cannot be on {listed(sorted(places))}: give them one device."
            )


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
    # Those that fit come first and count as 0.
    return bisect(range(1, most + 1), 0, key=lambda tokens: not layout.fits(key_values.of(tokens, tokens)))


def summed_names(modules: Sequence[ModulePlan]) -> str:
    """Name parts briefly: neighbours whose names only differ by a number as a range."""
    names = []
    for stem, run in groupby((module.name for module in modules), lambda name: re.sub(r"(?<=\.)\d+$", "", name)):
        first, *others = (name.removeprefix(stem) for name in run)
        names.append(f"{stem}{first}-{others[-1]}" if others else f"{stem}{first}" or "(the model's own)")
    return ", ".join(names)


def embedded_rows(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where they are no plain table, as of bytes."""
    table = model.get_input_embeddings()
    weight = getattr(table, "weight", None)
    return None if weight is None else getattr(table, "num_embeddings", len(weight))
