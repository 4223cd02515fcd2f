"""The kernels as operators of torch: found or compiled, tried once, and described to whoever traces them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from lmkit.kernels.native import attention, linear, norms
from lmkit.kernels.native.build import NoKernelsError, compiler, instructions, library, read

if TYPE_CHECKING:
    from pathlib import Path

PARTS: Final = (linear, attention, norms)
"""Modules of a kind of kernels each: `describe` tells torch their shapes, `check` tries them."""


def refusal() -> str | None:
    """Say why there are no kernels, as far as it shows without a build; None where nothing speaks against them."""
    try:
        instructions()
        compiler()
    except NoKernelsError as error:
        return str(error)
    return None


@functools.cache
def operators(isa: str | None = None) -> Any:
    """Return the kernels, as a namespace of torch's operators.

    Args:
        isa: The set of instructions; None takes the best that the processor has.

    Raises:
        NoKernelsError: They are not to be had; the text says why.
    """
    chosen = isa or instructions()
    if isa is None:
        return operators(chosen)
    name = f"lmkit_{chosen}"
    found = getattr(torch.ops, name)

    def accept(path: Path) -> None:
        try:
            read(path)
            for part in PARTS:
                part.check(found, chosen)
        except (OSError, RuntimeError, AttributeError) as error:
            raise NoKernelsError(f"what was compiled does not run ({error.__cause__ or error})") from error

    library(chosen, name, accept)
    for part in PARTS:
        part.describe(name)
    return found
