"""Attention on a CPU for rows that read one token each, where torch's own kernel is far from the processor's speed.

Everything else goes to transformers' function for torch's kernel, with the same results.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from lmkit.packing import packs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attend", "put_on"]

NAME = "lmkit"
"""What transformers knows `attend` by."""

WORTH = 32
"""How many keys' heads, in all rows, make two matrix products faster than torch's kernel. Measured in bfloat16 with
2 cores: 0.7 times its speed at 24 heads, 1.7 times at 192, up to 3.7 times where no heads share a key."""


def put_on(model: torch.nn.Module) -> None:
    """Have a model on a CPU call `attend`, if all its parts leave attention to transformers' interface.

    A family whose code asks whether the implementation is named "sdpa" does something else under any other name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    parts: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        if part.config._attn_implementation != "sdpa" or not part._can_set_attn_implementation():  # noqa: SLF001
            return
        if '"sdpa"' in inspect.getsource(sys.modules[type(part).__module__]):
            return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for part in parts[:1]:  # it sets the others'
        part.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa` does.

    Args:
        module: The attention layer.
        query: *Shape:* `(rows, heads, tokens, size)`.
        key: *Shape:* `(rows, groups, columns, size)`, where `groups` divides `heads`.
        value: The same, or of another size.
        attention_mask: What each token sees. *Shape:* `(rows, 1, tokens, columns)`, bool, or added to the scores.
        scaling: What the scores are multiplied with; None is one over the root of `size`.
        position_bias: Added to the scores. *Shape:* `(1 or rows, heads, tokens, columns)`.
        **kwargs: What else transformers gives to `sdpa`.

    Returns:
        The attended values. *Shape:* `(rows, tokens, heads, size)`; and None, for the weights.
    """
    rows, heads, tokens, size = query.shape
    groups, columns = key.shape[1:3]
    alone = tokens == 1 and key.device.type == "cpu" and key.shape[0] == rows
    unusual = kwargs.get("dropout") or any(kwargs.get(name) for name in ("softcap", "output_attentions", "cache"))
    products = rows * groups >= WORTH and query.dtype is torch.bfloat16 and packs()
    if not alone or unusual or (position_bias is not None and not products):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        attended, _ = _sdpa()(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    # Heads that share a key as so many tokens of one head: nothing is copied for each of them.
    grouped = query.reshape(rows, groups, heads // groups, size)
    if not products:
        attend_torch = torch.nn.functional.scaled_dot_product_attention
        attended = attend_torch(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return attended.reshape(rows, 1, heads, -1), None
    shape = (-1, groups, heads // groups, columns)
    # Keys on the left: the kernel would copy a right operand into an order of its own, and keys are the larger one.
    scored = key @ grouped.transpose(2, 3)
    scores = scored.transpose(2, 3).float() * (size**-0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores += position_bias.view(shape)
    if attention_mask is not None:
        if attention_mask.dtype is torch.bool:
            scores.masked_fill_(~attention_mask, -torch.inf)
        else:
            scores += attention_mask
    attended = scores.softmax(-1).to(value.dtype) @ value
    return attended.view(rows, 1, heads, -1), None


@functools.cache
def _sdpa() -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    function: Callable[..., Any] = sdpa_attention_forward
    return function
