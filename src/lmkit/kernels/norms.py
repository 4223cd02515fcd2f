"""Norms by the root mean square, in one kernel in place of seven operations, which is a tenth of a row's step."""

from __future__ import annotations

import functools
from typing import Any

import torch

from lmkit.kernels.ordered import DTYPES

ALIKE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""How far the kernel's numbers may be from a module's own, as a share of the largest: sums have another order."""


def put_on(model: torch.nn.Module, kernels: Any) -> int:
    """Have those norms of a model that a kernel reproduces use it; return how many.

    Args:
        model: The model.
        kernels: As `kernels.native.operators` returns them.
    """
    norms = [module for module in model.modules() if _fits(module) and _agrees(module, kernels)]
    for module in norms:
        name = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # below accelerate's hook
        setattr(module, name, functools.partial(_normed, module, kernels.rms_norm.default))
    return len(norms)


def _fits(module: Any) -> bool:
    """Say whether a module may be such a norm: a weight for each number, transformers' name of the epsilon, no more."""
    weights = [one for name, one in module.named_parameters() if name == "weight" and one.ndim == 1]
    alone = len(weights) == 1 == len([*module.parameters()]) and not [*module.buffers()]
    return (
        alone and hasattr(module, "variance_epsilon") and weights[0].device.type == "cpu" and weights[0].dtype in DTYPES
    )


def _agrees(module: Any, kernels: Any) -> bool:
    weight = module.weight.detach()
    rows = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    own = type(module).forward(module, rows)
    off = (kernels.rms_norm(rows, weight, module.variance_epsilon).float() - own.float()).abs().max()
    return own.dtype is weight.dtype and bool(off <= ALIKE[weight.dtype] * own.abs().max())


def _normed(module: Any, kernel: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    trained = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    plain = type(hidden_states) is torch.Tensor and hidden_states.dtype is weight.dtype and not trained
    if not plain or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        traced: torch.Tensor = type(module).forward(module, hidden_states)
        return traced
    found: torch.Tensor = kernel(hidden_states, weight, module.variance_epsilon)
    return found
