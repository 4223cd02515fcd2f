"""bfloat16 copies of quantized layers, kept for batches of more rows than torch's quantized kernels are good for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from lmkit._forks import renew, share
from lmkit._interrupts import locked
from lmkit.kernels.packed import multiply_packed, pack_weight, packed_bytes, packs
from lmkit.kernels.quantized import QuantizedLinear
from lmkit.kernels.together import wholes

if TYPE_CHECKING:
    from collections.abc import Callable


class Copies:
    """Copies of layers' weights in the order of the CPU's own kernel, each made when it is first needed.

    Attributes:
        most_bytes: How many bytes they may take in all; layers that come too late have none.
    """

    def __init__(self, most_bytes: int) -> None:
        """Hold none yet."""
        self.most_bytes = most_bytes
        self._made: WeakKeyDictionary[QuantizedLinear, tuple[object, torch.Tensor]] = WeakKeyDictionary()
        self._lock = threading.RLock()
        share(self)

    def forked(self) -> bool:
        """Make ready for a process that was forked; see `lmkit._forks`."""
        return renew(self._lock)

    @property
    def held_bytes(self) -> int:
        """How many bytes they take."""
        return sum(packed_bytes(copy) for _, copy in list(self._made.values()))

    def __call__(self, layer: QuantizedLinear, rows: torch.Tensor) -> torch.Tensor | None:
        """Multiply by a layer's copy; None if there is no room for one. *Shape:* as the layer's, without its bias."""
        state = (layer.weight.data_ptr(), _version(layer.weight), layer.scales.data_ptr(), _version(layer.scales))
        made, copy = self._made.get(layer, (None, None))
        if copy is None or made != state:  # a weight that was read into the layer since makes its copy anew
            copy = self._make(layer, state)
        return None if copy is None else multiply_packed(rows, copy)

    @locked
    def _make(self, layer: QuantizedLinear, state: object) -> torch.Tensor | None:
        more = 0 if layer in self._made else copy_bytes(layer)
        if self.held_bytes + more > self.most_bytes:
            return None
        copy = pack_weight(torch.cat([block.T for block in layer.factors(torch.bfloat16)]))
        self._made[layer] = state, copy
        return copy

    @locked
    def release(self) -> None:
        """Give the memory back, and make no more copies."""
        self.most_bytes = 0
        self._made.clear()

    def __reduce__(self) -> tuple[Callable[[int], Copies], tuple[int]]:
        """Copy and pickle without the copies: packed tensors know neither."""
        return Copies, (self.most_bytes,)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no public one


def copy_bytes(layer: QuantizedLinear) -> int:
    """Count the most bytes of a layer's copy: some processors' kernels pad it to blocks of 64 outputs and 32 inputs."""
    return 2 * 64 * -(-layer.out_features // 64) * 32 * -(-layer.in_features // 32)


def copies_bytes(model: torch.nn.Module) -> int:
    """Count what copies of all layers take that can have one on a CPU; on the meta device too."""
    return sum(copy_bytes(layer) for layer in _layers(model))


def _layers(model: torch.nn.Module) -> list[QuantizedLinear]:
    layers = [module for module in [*model.modules(), *wholes(model)] if isinstance(module, QuantizedLinear)]
    return [layer for layer in layers if layer.scales.dtype is torch.bfloat16] if packs() else []


def keep_copies(model: torch.nn.Module, most_bytes: int) -> Copies:
    """Let the quantized layers of a model that are on a CPU keep copies."""
    copies = Copies(most_bytes)
    for layer in _layers(model):
        if layer.weight.device.type == "cpu":
            layer.copies = copies
    return copies
