"""Attention in bfloat16 on a CPU by two matrix products, where torch's own kernel is far from the processor's speed.

Everything else goes to transformers' function for torch's kernel, with the same results.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmkit.packing import packs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["attend", "put_on"]

NAME = "lmkit"
"""What transformers knows `attend` by."""

WORTH = 32
"""How many keys' heads, in all rows of one token, make two matrix products faster than torch's kernel. Measured with
2 cores: 0.7 times its speed at 24 heads, 1.7 times at 192, up to 3.7 times where no heads share a key."""

WORTH_SCORES = 2**15
"""How many scores make them faster for rows of several tokens. Measured with 2 cores and 9 heads: half the speed of
torch's kernel at 30 tokens, as fast at 64, 1.9 times at 250, 1.7 times at 2,000, and 2.1 times at 10 rows of 200."""

SCORES = 2**20
"""How many scores are held at a time, but for a token's own: 10 MiB in all, which stay in a processor's last cache."""

HIDDEN = -1e30
"""The score of what is hidden: finite, so that padding, which sees nothing, attends to everything and is a number. NaN
in a key would reach all tokens, hidden or not."""

_rooms: list[Room] = []
"""Those that no call uses: memory that is asked for anew at every call costs as much as the products."""


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
        key: *Shape:* `(rows, groups, columns, size)`, where `groups` divides `heads`. For one token, `rows` may be a
            part of the query's: those that lie side by side then share a row of keys.
        value: The same, or of another size.
        attention_mask: What each token sees. *Shape:* `(rows, 1, tokens, columns)`, bool, or added to the scores.
        scaling: What the scores are multiplied with; None is one over the root of `size`.
        position_bias: Added to the scores. *Shape:* `(1 or rows, heads, tokens, columns)`.
        **kwargs: What else transformers gives to `sdpa`.

    Returns:
        The attended values. *Shape:* `(rows, tokens, heads, size)`; and None, for the weights.
    """
    rows, heads, tokens, size = query.shape
    sources, groups = key.shape[:2]
    width = rows // sources
    scale = size**-0.5 if scaling is None else scaling
    near = key.device.type == "cpu"
    unusual = kwargs.get("dropout") or any(kwargs.get(name) for name in ("softcap", "output_attentions", "cache"))
    fast = near and not unusual and query.dtype is torch.bfloat16 and packs()
    if tokens > 1 and fast and rows * heads * tokens * key.shape[2] >= WORTH_SCORES and not _trained(query, key, value):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        unseen = Unseen(attention_mask, position_bias, causal=causal and attention_mask is None)
        return _in_blocks((query, key, value), unseen, scale), None
    products = fast and rows * groups >= WORTH
    if width == 1 and (tokens > 1 or not near or unusual or (position_bias is not None and not products)):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        attended, _ = _sdpa()(module, query, key, value, attention_mask, **kwargs)
        return attended, None
    # Heads and rows that share a key as so many tokens of one head: nothing is copied for each of them.
    together = width * (heads // groups)
    grouped = query.reshape(sources, width, groups, -1, size).transpose(1, 2).reshape(sources, groups, together, size)
    if attention_mask is not None:
        attention_mask = attention_mask[::width]
    bias = None if position_bias is None else _shared(position_bias, width, (groups, heads // groups))
    kernel = _products if products else _torch_kernel
    attended = kernel((grouped, key, value), attention_mask, bias, scale)
    apart = attended.view(sources, groups, width, -1, value.shape[-1])
    return apart.transpose(1, 2).reshape(rows, 1, heads, -1), None


def _shared(bias: torch.Tensor, width: int, heads: tuple[int, int]) -> torch.Tensor:
    """Lay a bias out as queries are that share a key. *Shape:* `(1 or sources, groups, tokens, columns)`."""
    columns = bias.shape[-1]
    each = bias.expand(width, -1, -1, -1) if len(bias) == 1 else bias
    return each.reshape(-1, width, *heads, columns).transpose(1, 2).reshape(-1, heads[0], width * heads[1], columns)


def _torch_kernel(
    states: Sequence[torch.Tensor], mask: torch.Tensor | None, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attend with torch's own kernel. *Shape:* of query, key and value as in `attend`, all tokens see the same."""
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask
    added = bias if mask is None else mask
    query, key, value = states
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scaling)


def _products(
    states: Sequence[torch.Tensor], mask: torch.Tensor | None, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attend with two matrix products."""
    query, key, value = states
    # Keys are copied out of the larger buffer that they lie in, which is faster than a product with parts of one.
    scores = (query @ key.contiguous().transpose(2, 3)).float() * scaling
    if bias is not None:
        scores += bias
    if mask is not None:
        if mask.dtype is torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask
    return scores.softmax(-1).to(value.dtype) @ value


def _trained(*states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(state.requires_grad for state in states)


@dataclass(frozen=True, slots=True)
class Unseen:
    """What keeps tokens from seeing columns, and what else is added to their scores.

    Attributes:
        mask: What each token sees. *Shape:* `(1 or rows, 1 or heads, tokens, columns)`, bool, or added to the scores.
        bias: Added to the scores. *Shape:* the same.
        causal: Whether a token sees no column behind its own.
    """

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    causal: bool

    def added(self, rows: slice, tokens: slice, columns: int) -> torch.Tensor:
        """Return it for some rows and tokens, in float32. *Shape:* one that broadcasts to that of their scores."""
        added = torch.zeros(1, dtype=torch.float32, device="cpu")  # a dimension, so that its dtype wins
        for given in (self.mask, self.bias):
            if given is not None:
                part = given[rows if len(given) > 1 else slice(None), :, tokens, :columns]
                added = added + (torch.where(part, 0.0, HIDDEN) if part.dtype is torch.bool else part)
        if self.causal:
            added = added + added.new_full((tokens.stop - tokens.start, columns), HIDDEN).triu(tokens.start + 1)
        return added


class Room:
    """Memory for the scores of one call, used again by later ones."""

    def __init__(self, size: int) -> None:
        """Take memory for `size` scores: as a product, with what is added, and as probabilities."""
        with torch.inference_mode(mode=False):  # else calls outside of that mode could not write there
            self.parts = [
                torch.empty(size, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.float32, torch.float32)
            ]

    def shaped(self, *shape: int) -> list[torch.Tensor]:
        """Return the beginning of each part in this shape."""
        return [part[: math.prod(shape)].view(shape) for part in self.parts]


def _in_blocks(states: Sequence[torch.Tensor], unseen: Unseen, scaling: float) -> torch.Tensor:
    """Attend with two matrix products, `SCORES` scores at a time. *Shape:* of all as in `attend`."""
    query, key, value = states
    rows, heads, tokens, size = query.shape
    groups, columns = key.shape[1:3]
    grouped = query.reshape(rows, groups, -1, tokens, size)  # heads that share a key lie side by side
    attended = query.new_empty(rows, tokens, heads, value.shape[-1])
    most_rows = max(SCORES // (heads * tokens * columns), 1)
    most_tokens = min(max(SCORES // (heads * columns), 1), tokens)
    room = _rooms.pop() if _rooms and heads * columns <= SCORES else Room(max(SCORES, heads * columns))
    for some in _slices(rows, most_rows):
        for part in _slices(tokens, most_tokens):
            seen = min(part.stop, columns) if unseen.causal else columns
            asked = grouped[some, :, :, part].flatten(2, 3)
            scored, shaped, probable = room.shaped(len(asked), heads, part.stop - part.start, seen)
            together = scored.view(len(asked), groups, -1, seen)
            torch.matmul(asked, key[some, :, :seen].transpose(2, 3), out=together)
            torch.add(unseen.added(some, part, seen), scored, alpha=scaling, out=shaped)
            scored.copy_(torch.softmax(shaped, -1, out=probable))
            found = together @ value[some, :, :seen]
            attended[some, part] = found.view(*scored.shape[:3], -1).transpose(1, 2)
    if heads * columns <= SCORES:
        _rooms.append(room)
    return attended


def _slices(count: int, most: int) -> list[slice]:
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


@functools.cache
def _sdpa() -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    function: Callable[..., Any] = sdpa_attention_forward
    return function
