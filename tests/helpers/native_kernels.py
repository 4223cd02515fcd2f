"""lmkit's own kernels for tests: built once on a machine, in a folder of the tests' own."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkit.kernels.native.build import INSTRUCTIONS
from lmkit.kernels.native.operators import operators, refusal

CACHE = Path(tempfile.gettempdir()) / f"lmkit-tests-{os.getuid() if hasattr(os, 'getuid') else 0}"
NEEDED = pytest.mark.skipif(refusal() is not None, reason=f"no kernels of lmkit's own: {refusal()}")
HERE = [
    isa
    for isa, needed in INSTRUCTIONS.items()
    if refusal() is None and all(torch.cpu.get_capabilities().get(one) for one in needed)
]
"""The sets of instructions that this processor has."""


def kernels(isa: str | None = None) -> Any:
    """Return the kernels for a set of instructions, the best by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(CACHE))
        return operators(isa)
