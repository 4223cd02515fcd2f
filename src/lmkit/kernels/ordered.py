"""Integers of a layer, which may lie in the order that a kernel reads and are always saved in the documented one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from lmkit.kernels.native import linear
from lmkit.kernels.native.operators import operators

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES: Final = (torch.float32, torch.bfloat16)
"""What lmkit's own kernels compute in."""


class Ordered(torch.nn.Module):
    """A module with a weight of integers, and scales.

    Attributes:
        native: The set of instructions whose kernels of lmkit's own read the weight; None where none does.
        in_features: How many numbers a row of the weight has.
        out_features: How many rows it has. In the order of lmkit's own kernels more lie behind them, as padding.
        weight: The integers.
        scales: What turns them into weights, in the dtype that is computed in.
    """

    BITS: ClassVar[int] = 8

    native: str | None = None
    in_features: int
    out_features: int
    weight: torch.Tensor
    scales: torch.nn.Parameter

    @property
    def reordered(self) -> bool:
        """Whether the weight lies in a kernel's order."""
        return self.native is not None

    def saved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the scales as they are saved."""
        weight, scales = self.weight.data, self.scales.data
        if self.native is None:
            return weight, scales.contiguous()
        if self.BITS == 8:  # noqa: PLR2004
            return linear.unpack8(weight)[: self.out_features, : self.in_features].contiguous(), scales
        return linear.unpack4(weight)[: self.out_features], linear.unpack_scales(scales)[:, : self.out_features]

    def to_native(self, isa: str) -> bool:
        """Bring weight and scales into the order of lmkit's own kernels, where they have one; return whether."""
        if self.native is None and self.scales.dtype in DTYPES and self.scales.device.type == "cpu":
            weight, scales = self.saved()
            if self.BITS == 8:  # noqa: PLR2004
                hold(self, linear.pack8(weight), scales)
            else:
                hold(self, linear.pack4(weight), linear.pack_scales(scales))
            self.native = isa
        return self.native is not None

    def to_saved(self) -> Callable[[], object]:
        """Bring weight and scales into the order in which they are saved; return what undoes it."""
        if self.native is None:
            return lambda: None
        hold(self, *self.saved())
        isa, self.native = self.native, None
        return functools.partial(self.to_native, isa)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "weight" in self._parameters and (self.reordered or not self.scales.is_contiguous()):
            destination[f"{prefix}weight"], destination[f"{prefix}scales"] = self.saved()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        back = self.to_saved() if "weight" in self._parameters else lambda: None
        super()._load_from_state_dict(*args, **kwargs)
        back()


def hold(module: torch.nn.Module, weight: torch.Tensor, scales: torch.Tensor) -> None:
    """Make a weight and its scales parameters, so that they are placed, moved, counted and saved as any weight is."""
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.scales = torch.nn.Parameter(scales, requires_grad=False)


@functools.cache
def native_linear(isa: str) -> Callable[..., torch.Tensor]:
    """Return lmkit's own kernel for a set of instructions."""
    kernel: Callable[..., torch.Tensor] = operators(isa).linear.default
    return kernel


def put_on(model: torch.nn.Module, isa: str) -> int:
    """Bring the quantized layers of a model into the order of lmkit's own kernels; return how many."""
    return sum(module.to_native(isa) for module in model.modules() if isinstance(module, Ordered))
