"""Attention on a CPU, where torch's own kernel is far from the processor's speed; elsewhere by torch's own.

By kernels of lmkit's own in C++ where they are asked for. Else in bfloat16 by two matrix products, whose scores are
rounded to bfloat16 before the softmax, as in transformers' `eager`; what is not in bfloat16, not on a CPU, or too
little to be worth it goes to torch's kernel.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch._subclasses import FakeTensor

from lmkit.kernels import unpadded
from lmkit.kernels.packed import packs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NAME = "lmkit"
"""What transformers knows `attend` by."""

WORTH = 32
"""How many keys' heads, in all rows of one token, make two matrix products faster than torch's kernel. Measured with
2 cores: 0.7 times its speed at 24 heads, 1.7 times at 192, up to 3.7 times where no heads share a key."""

WORTH_SCORES = 2**16
"""How many scores do that for rows of several tokens. Measured with 2 cores and 9 heads: half the speed of torch's
kernel at 30 tokens (8,100 scores), 1.4 times at 128, 1.9 times at 250, 1.4 times at 2,000, twice at 10 rows of 200."""

SCORES = 2**20
"""How many scores are held at a time, which a processor's last cache takes; those of a token are never divided."""

HIDDEN = -1e30
"""What hides a column, when added to its score. A token that sees nothing, as padding may, attends to all alike: with
-inf it would be NaN, and that spreads, since the next layer multiplies hidden values too, if by nothing."""

UNKNOWN = "dropout", "output_attentions", "cache"
"""Arguments that only transformers' own function knows."""

ADDITIONS, FAMILYS = ("softcap", "s_aux"), "eager_attention_forward"
"""Arguments for soft caps and sinks, and what a family that has them calls its own attention."""

ALIGNED = 16
"""Of how many columns' size lines of a mask are a multiple, so that no kernel of CUDA's copies it in each layer."""

ROOMS = 4
"""How many rooms are kept, of 10 MiB each: as many calls at a time find memory that is there already."""


def fits(model: torch.nn.Module, *, kernels: bool = False) -> bool:
    """Say whether all parts of a model leave attention to transformers' interface, so that it can be `attend`.

    A family whose code asks whether the implementation is named "sdpa" does something else under any other name. One
    with soft caps or sinks, which torch's kernel has not, is worth it where lmkit's own `kernels` are asked for.
    """
    from transformers import PreTrainedModel

    def may(part: Any) -> bool:
        chosen, code = part.config._attn_implementation, inspect.getsource(sys.modules[type(part).__module__])  # noqa: SLF001
        capped = kernels and chosen == "eager" and FAMILYS in code and any(f"{one}=" in code for one in ADDITIONS)
        return (chosen == "sdpa" or capped) and part._can_set_attn_implementation() and '"sdpa"' not in code  # noqa: SLF001

    return all(may(part) for part in model.modules() if isinstance(part, PreTrainedModel))


def put_on(model: Any, kernels: Any = None) -> None:
    """Have a model that `fits` call `attend`, with lmkit's own `kernels` if they are given.

    Args:
        model: The model.
        kernels: As `kernels.native.operators` returns them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = NAME if kernels is None else str(kernels.name)
    own = attend if kernels is None else functools.partial(attend, kernels=kernels)
    AttentionInterface.register(name, unpadded.spreading(own))
    AttentionMaskInterface.register(name, hiding)
    model.set_attn_implementation(name)  # all its parts'


def hiding(
    *,
    q_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **rest: Any,
) -> torch.Tensor | None:
    """Make the mask of a forward pass, as transformers' `sdpa_mask` does, whose arguments these are.

    On a CPU it is that one. Elsewhere it is made once in the dtype that is added to scores, where torch would convert
    and copy one of bools in each layer; and at a step of one token nobody waits to hear whether it hides anything:
    lmkit gives one where it does.
    """
    from transformers.masking_utils import sdpa_mask

    here = torch.device(device).type == "cpu"
    asks = here or attention_mask is None or q_length > 1
    found = sdpa_mask(
        q_length=q_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and asks,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and asks,
        device=device,
        dtype=dtype,
        **rest,
    )
    return found if here or found is None else to_add(found, dtype)


def to_add(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn what tokens see into what is added to their scores. *Shape:* `(..., columns)` both."""
    lines = torch.zeros(*seen.shape[:-1], -(-seen.shape[-1] // ALIGNED) * ALIGNED, dtype=dtype, device=seen.device)
    # Half of the least number: what it is added to may be negative.
    return lines[..., : seen.shape[-1]].masked_fill_(~seen, torch.finfo(dtype).min / 2)


def is_on(model: Any) -> bool:
    """Say whether a model calls `attend`."""
    return str(model.config._attn_implementation).startswith(NAME)  # noqa: SLF001 - it has no public name


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    kernels: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa` does.

    Args:
        module: The attention layer.
        query: *Shape:* `(rows, heads, tokens, size)`.
        key: *Shape:* `(rows, groups, columns, size)`, where `groups` divides `heads`. For one token, `rows` may be a
            part of the query's: those that lie side by side then share a row of keys.
        value: The same, or of another size.
        attention_mask: What each token sees, bool, or added to the scores. *Shape:* any that broadcasts to
            `(rows, heads, tokens, columns)`.
        scaling: What the scores are multiplied with; None is one over the root of `size`.
        position_bias: Added to the scores. *Shape:* `(1 or rows, heads, tokens, columns)`.
        kernels: lmkit's own, where they are asked for; also for what is traced.
        **kwargs: What else transformers gives to `sdpa`.

    Returns:
        The attended values. *Shape:* `(rows, tokens, heads, size)`; and None, for the weights.
    """
    rows, heads, tokens, size = query.shape
    sources, groups = key.shape[:2]
    width = rows // sources
    scale = size**-0.5 if scaling is None else scaling
    near = key.device.type == "cpu"
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if kernels is not None and near and not any(kwargs.get(name) for name in UNKNOWN):
        added = Added(attention_mask, position_bias, causal=bool(causal) and attention_mask is None)
        attended = _by_kernel(kernels, (query, key, value), added, scale, kwargs)
        if attended is not None:
            return attended, None
    if any(kwargs.get(name) is not None for name in ADDITIONS):
        key, value = (part.repeat_interleave(width, 0) if width > 1 else part for part in (key, value))
        return _as_family(module, query, key, value, attention_mask, causal=bool(causal), scaling=scaling, **kwargs)
    unusual = any(kwargs.get(name) for name in UNKNOWN)
    half = all(state.dtype is torch.bfloat16 for state in (query, key, value))
    fast = near and half and not unusual and not torch.compiler.is_compiling() and packs()
    worth = tokens > 1 and width == 1 and rows * heads * tokens * key.shape[2] >= WORTH_SCORES
    if fast and worth and _given(query, key, value, attention_mask, position_bias, traced=False):
        added = Added(attention_mask, position_bias, causal=causal and attention_mask is None)
        return _in_blocks((query, key, value), added, scale), None
    products = fast and rows * groups >= WORTH
    biased = position_bias is not None and not products
    if not width or (width == 1 and (tokens > 1 or not near or unusual or biased)):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        return _sdpa()(module, query, key, value, attention_mask, **kwargs)
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


def _by_kernel(
    kernels: Any, states: Sequence[torch.Tensor], added: Added, scale: float, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """Attend with lmkit's own kernels; None where they do not take that. *Shape:* as in `attend`."""
    query, key, value = states
    rows, heads, tokens = query.shape[:3]
    sources, groups, columns = key.shape[:3]  # not len(), which would fix a number that is traced
    mask, bias = (None if given is None else given[(None,) * (4 - given.ndim)] for given in (added.mask, added.bias))
    whole = rows >= sources > 0 and rows % sources == 0 and heads % groups == 0 and columns > 0
    fits = all(given is None or given.shape[3] == columns for given in (mask, bias))
    if not (whole and fits and _given(query, key, value, mask, bias)):
        return None
    dtypes = {state.dtype for state in states}
    sinks, cap = options.get("s_aux"), options.get("softcap") or 0.0
    if tokens == 1 and dtypes in ({torch.float32}, {torch.bfloat16}) and (mask is None or mask.shape[1] == 1):
        one: torch.Tensor = kernels.attend_one(query, key, value, mask, bias, sinks, scale, cap)
        return one
    if not hasattr(kernels, "attend_many") or rows != sources or dtypes != {torch.bfloat16} or sinks is not None or cap:
        return None
    many: torch.Tensor = kernels.attend_many(query, key, value, mask, bias, added.causal, scale)
    return many


def _as_family(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with the family's own function, which wants masks to add. *Shape:* as in `attend`."""
    tokens, columns = query.shape[2], key.shape[2]
    if mask is None and causal and tokens > 1:
        mask = torch.ones(tokens, columns, dtype=torch.bool, device=query.device).tril(columns - tokens)
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    attended = getattr(sys.modules[type(module).__module__], FAMILYS)(module, query, key, value, mask, **options)[0]
    return attended, None


def _given(*tensors: torch.Tensor | None, traced: bool = True) -> bool:
    """Say whether some tensors are ordinary ones, or stand in for such while they are `traced`, and none is trained."""
    given = [tensor for tensor in tensors if tensor is not None]
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return not trained and all(
        type(tensor) is torch.Tensor or (traced and isinstance(tensor, FakeTensor)) for tensor in given
    )


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


@dataclass(frozen=True, slots=True)
class Added:
    """What is added to scores: what hides columns from tokens, and a bias.

    Attributes:
        mask: What each token sees, bool, or added. *Shape:* any that broadcasts to `(rows, heads, tokens, columns)`.
        bias: Added. *Shape:* the same.
        causal: Whether a token sees no column behind its own.
    """

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    causal: bool

    def to(self, rows: slice, tokens: slice, columns: int) -> torch.Tensor:
        """Return what is added to the scores of some rows and tokens, in float32, to be broadcast."""
        added = torch.zeros(1, dtype=torch.float32, device="cpu")  # one dimension: a number would take on any dtype
        for given in (self.mask, self.bias):
            if given is not None:
                whole = given[(None,) * (4 - given.ndim)]
                whole = whole[rows] if len(whole) > 1 else whole
                part = (whole[:, :, tokens] if whole.shape[2] > 1 else whole)[..., :columns]
                added = added.masked_fill(~part, HIDDEN) if part.dtype is torch.bool else added + part
        if self.causal:
            added = added + added.new_full((tokens.stop - tokens.start, columns), HIDDEN).triu(tokens.start + 1)
        return added.clamp_(min=HIDDEN)


class Room:
    """Memory for the scores of a call, which later ones use again: to ask for it anew costs as much as the products."""

    _free: ClassVar[list[Room]] = []

    def __init__(self, size: int) -> None:
        """Take memory for `size` scores: as rounded products, in full, and as probabilities."""
        with torch.inference_mode(mode=False):  # else calls outside of that mode could not write there
            self._parts = [
                torch.empty(size, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.float32, torch.float32)
            ]

    @classmethod
    @contextmanager
    def of(cls, size: int) -> Iterator[Room]:
        """Lend a room for `SCORES` scores, or make one for `size`, if that is more."""
        if size > SCORES:
            yield cls(size)
            return
        try:
            room = cls._free.pop()
        except IndexError:
            room = cls(SCORES)
        yield room
        if len(cls._free) < ROOMS:
            cls._free.append(room)

    def views(self, *shape: int) -> list[torch.Tensor]:
        """Return the beginning of each part in this shape."""
        return [part[: math.prod(shape)].view(shape) for part in self._parts]


def _in_blocks(states: Sequence[torch.Tensor], added: Added, scaling: float) -> torch.Tensor:
    """Attend with two matrix products, `SCORES` scores at a time. *Shape:* of all as in `attend`."""
    query, key, value = states
    rows, heads, tokens, size = query.shape
    groups, columns = key.shape[1:3]
    grouped = query.reshape(rows, groups, -1, tokens, size)  # heads that share a key lie side by side
    key = _less_common(key)
    attended = query.new_empty(rows, tokens, heads, value.shape[-1])
    row_scores = heads * tokens * columns
    with Room.of(heads * columns) as room:
        for some in _slices(rows, SCORES // row_scores):
            for part in _slices(tokens, SCORES // (heads * columns)):  # all of them, if several rows fit
                seen = min(part.stop, columns) if added.causal else columns
                asking = grouped[some, :, :, part].flatten(2, 3)
                rounded, scores, shares = room.views(len(asking), heads, part.stop - part.start, seen)
                as_groups = rounded.view(len(asking), groups, -1, seen)
                torch.matmul(asking, key[some, :, :seen].transpose(2, 3), out=as_groups)
                torch.add(added.to(some, part, seen), rounded, alpha=scaling, out=scores)
                rounded.copy_(torch.softmax(scores, -1, out=shares))  # from here on the probabilities
                found = as_groups @ value[some, :, :seen]
                attended[some, part] = found.view(*rounded.shape[:3], -1).transpose(1, 2)
    return attended


def _less_common(key: torch.Tensor) -> torch.Tensor:
    """Subtract what all keys of a head have in common: where all have one sign, the least of them, else nothing.

    That moves all scores of a token alike, so its probabilities stay. But scores are rounded, the more coarsely the
    larger they are: keys with a large bias would leave no digit of what tells them apart. To subtract the mean would
    round keys that have nothing in common, and cost digits there.
    """
    return key - (key.amin(2, keepdim=True).clamp(min=0) + key.amax(2, keepdim=True).clamp(max=0))


def _slices(count: int, most: int) -> list[slice]:
    """Divide `count` into parts of `most`, or of one."""
    return [slice(first, min(first + max(most, 1), count)) for first in range(0, count, max(most, 1))]


@functools.cache
def _sdpa() -> Callable[..., tuple[torch.Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward
