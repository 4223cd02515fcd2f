"""Linear layers whose weights are held in 8 or 4 bits, on kernels of lmkit's own for CPUs, or torch's.

lmkit's own take any number of rows, and round them (`native.linear.rounding`). With torch's, what is multiplied keeps
its dtype. Few rows then go through torch's packed kernels. More rows go through matrix products on weights that are
widened block by block: the kernels widen a weight anew for every four rows, so from `FEW` rows on doing it once is
cheaper. Where torch lacks a kernel, all rows go that way.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch._subclasses import FakeTensor

from lmkit.kernels import cuda
from lmkit.kernels.native import linear as native
from lmkit.kernels.ordered import DTYPES, Ordered, hold, native_linear
from lmkit.kernels.together import Joinable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GROUP: Final = 32
"""How many weights of a row share a scale and an offset in 4 bits. Chosen by perplexity: docs/performance.md."""

BLOCK: Final = 2**20
"""How many weights are widened at once: 2 MiB in bfloat16, so that a core's cache holds them."""

TINY: Final = 1e-8
"""The least scale, for weights that are all zero."""


class QuantizedLinear(Ordered, Joinable):
    """A linear layer whose weight is integers; a `torch.nn.Linear`, so that adapters can be put on it.

    Attributes:
        in_features: How many numbers a row has.
        out_features: How many numbers come out for it.
        weight: The integers, in the order in which they are saved, or in that of a kernel.
        transposed: Whether the checkpoint has the weight the other way round, as GPT-2 does.
        scales: What turns them into weights, in the dtype that is computed in.
        bias: Added to the product, or None.
    """

    FEW: ClassVar[int]
    NAME: ClassVar[str]
    OUTPUTS: ClassVar[Mapping[str, int]] = {"weight": 0, "scales": 0, "bias": 0}

    transposed = False

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool) -> None:
        """Make a layer without values, for weights to be loaded into."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        hold(self, *self.empty(in_features, out_features, dtype))
        self.bias = torch.nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @staticmethod
    def empty(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight and scales without values."""
        raise NotImplementedError

    @staticmethod
    def quantize(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a weight into integers and scales. *Shape:* `(out_features, in_features)`."""
        raise NotImplementedError

    def pack(self) -> None:
        """Bring the weight into the kernel's order, where it has one of its own, and to where it can read it."""
        self.weight.data = aligned(self.weight.data)

    def blocks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Widen the weight, `BLOCK` weights at a time. *Shape:* `(in_features, some of out_features)`."""
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by this layer alone. *Shape:* `(…, in_features)` to `(…, out_features)`."""
        if rows.dtype is not self.scales.dtype:
            raise RuntimeError(
                f"the layer computes in dtype {self.scales.dtype}, and was given {rows.dtype}: convert it first."
            )
        trained = rows.requires_grad and torch.is_grad_enabled()  # the kernels have no derivative
        if (isa := self.native) is not None and not trained and self._native_takes(rows):
            return native_linear(isa)(rows, self.weight, self.scales, self.bias, self.BITS, self.out_features)
        leading, rows = rows.shape[:-1], rows.reshape(-1, self.in_features)
        if rows.shape[0] <= self.most and not trained and self._has_kernel(rows.dtype):
            product = self._few(aligned(rows.contiguous()))
        else:
            products = [rows @ block for block in self._factors(rows.dtype)]
            product = self._scaled(products[0] if len(products) == 1 else torch.cat(products, -1))
        if self.bias is not None:
            product = product + self.bias
        return product.view(*leading, self.out_features)

    @property
    def _block(self) -> int:
        """How many weights are widened at once: on an accelerator all, for few kernels."""
        return BLOCK if self.weight.device.type == "cpu" else self.in_features * self.out_features

    @property
    def most(self) -> int:
        """How many rows torch's kernel is taken for."""
        return self.FEW if self.weight.device.type == "cpu" else cuda.FEW[self.BITS]

    @property
    def order(self) -> object:
        """What the order of the weight depends on; whole blocks of lmkit's own kernels can lie side by side alone."""
        whole = self.native is None or self.out_features % native.BLOCK == 0
        return self.native if whole else id(self)

    def _native_takes(self, rows: torch.Tensor) -> bool:
        """Say whether rows are such that lmkit's own kernel multiplies them: a layer may have been moved, or cast."""
        fits = rows.dtype in DTYPES and rows.shape[-1:] == (self.in_features,)
        return fits and self.weight.device.type == "cpu" == rows.device.type

    def _has_kernel(self, dtype: torch.dtype) -> bool:
        raise NotImplementedError

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _factors(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield what many rows are multiplied by, before `_scaled`. *Shape:* as `blocks`."""
        return self.blocks(dtype)

    def _scaled(self, product: torch.Tensor) -> torch.Tensor:
        return product


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that begins at a multiple of 16 bytes: torch's int8 kernel ends the process on any other.

    Memory that torch allocates does; a view into it, or a weight in a mapped file, need not.
    """
    if isinstance(tensor, FakeTensor):  # it is traced, and has no address
        return tensor
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 16 else tensor


class Int8Linear(QuantizedLinear):
    """8 bits a weight: whole numbers of -127 to 127, with one scale for each output."""

    FEW = 12
    NAME = "int8"

    @staticmethod
    def empty(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight and scales without values."""
        return torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features, dtype=dtype)

    @staticmethod
    def quantize(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a weight into integers and scales. *Shape:* `(out_features, in_features)`."""
        low, high = weight.aminmax(dim=1)  # the magnitudes of all would be another wide tensor
        scales = (torch.maximum(-low, high).float() / 127).clamp(min=TINY).to(dtype)
        numbers = torch.empty(weight.shape, dtype=torch.int8)
        rows = max(BLOCK // weight.shape[1], 1)
        for first in range(0, len(weight), rows):
            wide = weight[first : first + rows].float() / scales[first : first + rows, None].float()
            numbers[first : first + rows] = wide.round_().clamp_(-127, 127)
        return numbers, scales

    def blocks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Widen the weight. *Shape:* `(in_features, some of out_features)`."""
        for first, part in self._parts():
            yield (part.to(dtype) * self.scales[first : first + len(part), None].to(dtype)).T

    def _parts(self) -> Iterator[tuple[int, torch.Tensor]]:
        rows = _rows(self.in_features) if self.weight.device.type == "cpu" else self.out_features
        for first in range(0, self.out_features, rows):
            part = self.weight[first : first + rows]
            whole = part if self.native is None else native.unpack8(part)[: self.out_features - first]
            yield first, whole[:, : self.in_features]

    def _has_kernel(self, dtype: torch.dtype) -> bool:
        if self.weight.device.type == "cuda":
            return True
        # Other widths are read beyond their end in half precision, and torch crashes.
        return (
            self.native is None
            and self.in_features % 16 == 0
            and self.weight.device.type == "cpu"
            and _int8_kernel(dtype)
        )

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        return cuda.multiply8(rows, self.weight, self.scales)

    def _factors(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield whole numbers, so that products are scaled and not weights, but for float16, where sums overflow."""
        return self.blocks(dtype) if dtype is torch.float16 else (part.to(dtype).T for _, part in self._parts())

    def _scaled(self, product: torch.Tensor) -> torch.Tensor:
        return product if product.dtype is torch.float16 else product * self.scales


class Int4Linear(QuantizedLinear):
    """4 bits a weight: levels of 0 to 15, with a scale and an offset for each `GROUP` weights of a row.

    Saved, two neighbours of a row share a byte, the first one in the lower half. The kernel wants them in an order that
    depends on the processor.
    """

    BITS = 4
    FEW = 40
    NAME = "int4"
    OUTPUTS: ClassVar[Mapping[str, int]] = {"weight": 0, "scales": 1, "bias": 0}

    @staticmethod
    def fits(in_features: int) -> bool:
        """Say whether rows of this length divide into groups."""
        return in_features % GROUP == 0

    @staticmethod
    def empty(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight and scales without values."""
        weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        return weight, torch.empty(in_features // GROUP, out_features, 2, dtype=dtype)

    @staticmethod
    def quantize(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn a weight into levels, and scales with offsets. *Shape:* `(out_features, in_features)`."""
        rows = max(BLOCK // weight.shape[1], 1)
        found = [_levels(weight[first : first + rows], dtype) for first in range(0, len(weight), rows)]
        levels, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
        return levels[:, ::2] | levels[:, 1::2] << 4, scales.transpose(0, 1).contiguous()

    def pack(self) -> None:
        """Bring the weight into the kernel's order, if there is a kernel for it."""
        if self._width and self.weight.device.type == "cpu" and not self.packed and self.native is None:
            levels = torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)
            self.weight = torch.nn.Parameter(_packed(levels), requires_grad=False)
            self.packed = "cpu"
        elif not self.packed and cuda.takes4(self.out_features, self.in_features, self.scales):
            self.weight = torch.nn.Parameter(cuda.pack4(self.weight.data), requires_grad=False)
            self.packed = "cuda"

    packed = ""
    """The kind of device whose kernel's order the weight has."""

    @property
    def outputs(self) -> Mapping[str, int | None]:
        """Along which dimension of each parameter the outputs lie as it is now; None is as they lie in memory."""
        return self.OUTPUTS if self.native is None else {**self.OUTPUTS, "scales": None}

    @property
    def order(self) -> object:
        """What the order of the weight depends on, and whether torch's kernel has one for this layer."""
        return super().order, self.native is not None or self.packed or self._width > 0

    @property
    def _width(self) -> int:
        """How many outputs the kernel's order has side by side; 0 where there is no kernel for this layer."""
        width = _int4_kernel()
        return width if width and self.out_features % width == 0 else 0

    def _has_kernel(self, dtype: torch.dtype) -> bool:
        return self.packed == self.weight.device.type and (self.packed == "cpu" or dtype is torch.bfloat16)

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        if self.packed == "cuda":
            return cuda.multiply4(rows, self.weight, GROUP, self.scales)
        ops = torch.ops.aten
        product: torch.Tensor = ops._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales.contiguous())  # noqa: SLF001
        return product

    def blocks(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Widen the weight. *Shape:* `(in_features, some of out_features)`."""
        width = self._width if self.packed == "cpu" else 1
        for part, scaled in self._parts(width):
            halves = (part & 15, part >> 4)
            levels = torch.cat(halves, -1) if self.packed == "cpu" else torch.stack(halves, -1)
            levels = levels.view(len(part), -1, GROUP, width)
            scale, offset = scaled[:, :, None, :, 0].contiguous(), scaled[:, :, None, :, 1].contiguous()
            wide = torch.addcmul(offset, levels.to(dtype).sub_(8), scale).view(len(part), self.in_features, width)
            yield wide.transpose(0, 1).reshape(self.in_features, -1)

    def _parts(self, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield weights, and scales of as many. *Shape:* of scales `(len(weights), groups, width, 2)`."""
        if self.native is not None:
            count = _rows(self.in_features)
            for first in range(0, self.out_features, count):
                blocks, left = slice(first // native.BLOCK, (first + count) // native.BLOCK), self.out_features - first
                scales = native.unpack_scales(self.scales, blocks)[:, :left, None]
                yield native.unpack4(self.weight[first : first + count])[:left], scales.transpose(0, 1)
            return
        count = max(self._block // (self.in_features * width), 1)
        scales = self.scales.view(-1, self.out_features // width, width, 2).transpose(0, 1)
        if self.packed == "cpu":
            halves = self.weight.view(self.out_features // width, self.in_features, -1)
        else:
            halves = self.saved()[0]
        for first in range(0, len(halves), count):
            yield halves[first : first + count], scales[first : first + count]

    def saved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the scales as they are saved."""
        return (self._unpacked(), self.scales.data.contiguous()) if self.packed else super().saved()

    def to_native(self, isa: str) -> bool:
        """Bring weight and scales into the order of lmkit's own kernels, where they have one; return whether."""
        if there := super().to_native(isa):
            self.packed = ""
        return there

    @property
    def reordered(self) -> bool:
        """Whether the weight lies in a kernel's order."""
        return bool(self.packed) or self.native is not None

    def to_saved(self) -> Callable[[], object]:
        """Bring weight and scales into the order in which they are saved; return what undoes it."""
        if not self.packed:
            return super().to_saved()
        hold(self, *self.saved())
        self.packed = ""
        return self.pack

    def _unpacked(self) -> torch.Tensor:
        if self.packed == "cuda":
            levels = cuda.unpack4(self.weight)
            return levels[:, ::2] | levels[:, 1::2] << 4
        part = self.weight.view(self.out_features // self._width, self.in_features, -1)
        levels = torch.cat((part & 15, part >> 4), -1).transpose(1, 2).reshape(self.out_features, self.in_features)
        return levels[:, ::2] | levels[:, 1::2] << 4


def runs_torch_kernels(model: torch.nn.Module) -> bool:
    """Say whether torch's quantized kernels multiply in a model: many rows are no faster compiled."""
    return any(module.native is None for module in model.modules() if isinstance(module, QuantizedLinear))


def _rows(numbers: int) -> int:
    """Return how many rows of so many numbers are widened at once, as whole blocks of lmkit's own kernels."""
    return -(-max(BLOCK // numbers, 1) // native.BLOCK) * native.BLOCK


def _levels(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round groups of weights to 16 levels between their least and their greatest.

    Returns:
        The levels, *shape* `(rows, in_features)`; scales and offsets, *shape* `(rows, groups, 2)`. A weight is
        `(level - 8) * scale + offset`, as torch's kernel has it.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    scale = ((greatest - least) / 15).clamp_(min=TINY).to(dtype)
    offset = (least + 8 * scale.float()).to(dtype)
    levels = (groups - offset.float()).div_(scale.float()).round_().add_(8).clamp_(0, 15)
    return levels.to(torch.uint8).view(weight.shape), torch.cat((scale, offset), -1)


def _packed(levels: torch.Tensor) -> torch.Tensor:
    """Bring levels into the kernel's order. *Shape:* `(out_features, in_features)` to the same, two in a byte."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)  # noqa: SLF001
    return packed


@functools.cache
def _int8_kernel(dtype: torch.dtype) -> bool:
    """Try torch's kernel on a small layer: is it there, and is it right?"""
    numbers = torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
    rows, scales = torch.ones(1, 32, dtype=dtype), torch.full((4,), 0.5, dtype=dtype)
    try:
        found = torch.ops.aten._weight_int8pack_mm(rows, numbers, scales)  # noqa: SLF001
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(found.float(), numbers.float().sum(1) * 0.5, rtol=0.01)


@functools.cache
def _int4_kernel() -> int:
    """Try torch's kernel on a small layer: how many outputs lie side by side in its order? 0 where it is of no use."""
    levels = (torch.arange(64 * GROUP) * 7 % 13).view(64, GROUP).to(torch.uint8)
    rows, scales = torch.arange(1.0, GROUP + 1)[None], torch.tensor([1.0, 0.5]).expand(1, 64, 2).contiguous()
    try:
        packed = _packed(levels)
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)  # noqa: SLF001
    except (AttributeError, NotImplementedError, RuntimeError):
        return 0
    if not torch.allclose(found, rows @ (levels.float() - 7.5).T, rtol=0.01):
        return 0
    for width in (64, 32):
        part = packed.view(64 // width, GROUP, -1)
        if torch.equal(torch.cat((part & 15, part >> 4), -1).transpose(1, 2).reshape(64, GROUP), levels):
            return width
    return 0
