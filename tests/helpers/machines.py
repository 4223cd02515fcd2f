"""Recorded machines, and plans for them: what a test says of a device, it says whatever this machine has."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lmkit.checkpoint.files import tensors_of
from lmkit.checkpoint.find import Access, find
from lmkit.planning.machine import Device, Machine
from lmkit.planning.make import Wish, make_plan
from lmkit.planning.plan import LoadPlan

GB, GIB = 10**9, 2**30

CPU = Machine({"cpu": Device(64 * GIB, 40 * GIB, bfloat16=True)})
"""A server whose processor has bfloat16 units."""

OLD_CPU = Machine({"cpu": Device(16 * GIB, 10 * GIB, bfloat16=False)})
"""A laptop whose processor has none."""

TWO_CUDA = Machine(
    {
        "cuda:0": Device(80 * GB, 70 * GB, bfloat16=True),
        "cuda:1": Device(80 * GB, 80 * GB, bfloat16=True),
        "cpu": Device(512 * GIB, 400 * GIB, bfloat16=True),
    }
)
"""Two cards of 80 GB, some of the first one in use."""

OLD_CUDA = Machine(
    {"cuda:0": Device(16 * GB, 15 * GB, bfloat16=False), "cpu": Device(64 * GIB, 40 * GIB, bfloat16=False)}
)
"""A card of a generation without bfloat16 units."""

MPS = Machine({"mps:0": Device(32 * GIB, 20 * GIB, bfloat16=True), "cpu": Device(32 * GIB, 20 * GIB, bfloat16=True)})
"""A laptop whose graphics share its memory."""


def planned(
    task: Any, folder: str | Path, machine: Machine, precision: Any = "auto", devices: Any = "auto", **wish: Any
) -> LoadPlan:
    """Plan to load a local checkpoint on a machine, its own devices only."""
    source = find(str(folder), Access())
    tensors = tensors_of(source, allow_pickle=False)
    read = functools.partial(AutoTokenizer.from_pretrained, folder)
    return make_plan(Wish(task, precision, devices, **wish), source, tensors, machine, read)[0]
