"""Rotary positions whose factors follow the length of a text (LongRoPE, dynamic NTK): for each row by its own length.

transformers goes by the largest position of a pass, so that a row gets other factors for a longer one beside it, and
keeps in the model what the last pass was.
"""

from __future__ import annotations

import copy
import functools
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from lmkit._interrupts import surely

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ResultT = TypeVar("ResultT")

READ_ANEW: Final = frozenset({"phi3", "phi4_multimodal", "phimoe"})
"""Model types of which `generate` lets the cache go when a row grows past the original length. Others go on with keys
that were computed with the factors of their own time. Of Phi-4-multimodal it then reads the newest token alone, without
the text before it (transformers 5.23); here that is read anew, as without a cache."""

_read_as: ContextVar[Sequence[int] | None] = ContextVar("_read_as", default=None)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the factors of a model's positions follow the length of a text.

    Attributes:
        kind: What transformers calls it; `""` where they do not.
        original: Texts of up to so many tokens have the same factors.
        anew: Whether a row that grows beyond is read anew.
    """

    kind: str = ""
    original: int = sys.maxsize
    anew: bool = False

    @property
    def exact(self) -> bool:
        """Whether each length beyond the original one has factors of its own."""
        return "dynamic" in self.kind

    def of(self, length: int) -> int:
        """Return what texts with the same factors have in common."""
        return max(length, self.original) if self.exact else self.original + (length > self.original)

    def kept(self, length: int) -> bool | None:
        """Return what keys and values that were kept have in common; None if no other row can use them."""
        return False if length <= self.original else self.anew or None

    def read_at(self, prompt: int, so_far: int) -> int:
        """Return how long the text is whose factors a row's first tokens have."""
        return so_far if self.anew else prompt

    def crosses(self, length: int) -> bool:
        """Say whether a row whose newest token is this one has to be read anew."""
        return self.anew and length == self.original + 1

    def room(self, length: int) -> int:
        """Return how many tokens can be read behind so many before a row has to be read anew."""
        return self.original - length if self.anew and length <= self.original else sys.maxsize

    @property
    def reason(self) -> str | None:
        """Say what lmkit does about it."""
        if not self.kind:
            return None
        told = f"{self.kind}: each row has the factors of its own length, whatever is read beside it"
        return f"{told}; one that grows past {self.original:,} tokens is read anew" if self.anew else told


def scaling(model: Any) -> Scaling:
    """Find out how a model's positions follow the length of a text."""
    parts = [part for part in model.modules() if _scaled(part)]
    if not parts:
        return Scaling()
    kind, settings = next((kind, settings) for kind, settings in _kinds(parts[0]) if _follows(kind))
    original = parts[0].original_max_seq_len if "dynamic" in kind else settings["original_max_position_embeddings"]
    return Scaling(kind, int(original), kind == "longrope" and model.config.model_type in READ_ANEW)


def put_on(model: torch.nn.Module) -> None:
    """Have a model's positions follow each row's own length."""
    how = scaling(model)
    for part in model.modules():
        if _scaled(part):
            name = "_old_forward" if hasattr(part, "_old_forward") else "forward"  # below accelerate's hook
            setattr(part, name, functools.partial(_by_row, part, how))


def read_as(lengths: Sequence[int], do: Callable[[], ResultT]) -> ResultT:
    """Call `do`, a pass whose rows are read as the beginnings of texts of these lengths."""

    def read() -> ResultT:
        _read_as.set(lengths)
        return do()

    return surely(read, lambda: _read_as.set(None))


def _follows(kind: object) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _kinds(part: Any) -> list[tuple[str, Any]]:
    """Return the kinds of a module's positions, and the settings of each: one, or one for each type of layers."""
    kinds, settings = part.rope_type, part.config.rope_parameters
    return [(kinds[name], settings[name]) for name in kinds] if isinstance(kinds, dict) else [(kinds, settings)]


def _scaled(part: Any) -> bool:
    kinds = getattr(part, "rope_type", None)
    return any(map(_follows, kinds.values() if isinstance(kinds, dict) else [kinds]))


def _by_row(
    part: Any, how: Scaling, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None, **more: Any
) -> Any:
    """Compute what positions are multiplied with, as the module does where it reads each row alone.

    Args:
        part: The rotary module, whose own state is never changed.
        how: How its factors follow the length.
        x: Says which dtype and device.
        position_ids: *Shape:* `(rows or 1, columns)`; of images and text those of three or four directions before.
        layer_type: Which layers it is for, in families where they differ.
        **more: What else the family passes on.
    """
    named = more if layer_type is None else more | {"layer_type": layer_type}

    def computed(position_ids: torch.Tensor) -> Any:
        own = copy.copy(part)  # it writes into itself what it finds
        own._buffers = {name: buffer.clone() for name, buffer in part._buffers.items()}  # noqa: SLF001
        return type(part).forward(own, x, position_ids, **named)

    if not _follows(part.rope_type if layer_type is None else part.rope_type[layer_type]):
        return computed(position_ids)
    furthest = position_ids.flatten(0, -3).amax(0) if position_ids.ndim > 2 else position_ids  # noqa: PLR2004
    lengths = _lengths(furthest) + torch.zeros_like(furthest)
    position_ids = position_ids.expand(*position_ids.shape[:-2], *lengths.shape)
    new: Any = None
    found: list[torch.Tensor] = []
    for length, chosen in _alike(how, lengths):
        asked = position_ids.clamp(max=length - 1) if how.exact or length == how.original else position_ids
        last = torch.full_like(position_ids[..., :1], length - 1)  # the largest position of the pass, to which it looks
        new = computed(torch.cat([asked, last], -1))
        parts = [part[..., :-1, :] for part in (new if isinstance(new, tuple) else [new])]
        found = [torch.where(chosen[..., None], *both) for both in zip(parts, found or parts, strict=True)]
    return tuple(found) if isinstance(new, tuple) else found[0]


def _lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return how long the text is that each token is read in. *Shape:* `(rows, columns)`, or one of 1."""
    so_far = position_ids + 1
    told = _read_as.get()
    if told is None:
        return so_far.amax(-1, keepdim=True)
    return torch.maximum(so_far, torch.tensor(told, device=so_far.device)[:, None])


def _alike(how: Scaling, lengths: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield lengths, and which tokens have the factors of each."""
    if how.exact:
        clamped = lengths.clamp(min=how.original)
        yield from ((length, clamped == length) for length in sorted(set(clamped.flatten().tolist())))
    else:  # both, for a graph that is compiled knows no values
        yield how.original, lengths <= how.original
        yield how.original + 1, lengths > how.original
