"""Linear layers whose weights lie in the order that a CPU's bfloat16 kernel reads: torch's, or lmkit's own.

`torch.nn.functional.linear` brings a weight into that order anew at every call. Done once, a row costs half as much
on a processor with AVX512-BF16 (`docs/performance.md` has the figures); the results are those of the same kernel.
lmkit's own, which needs AMX and is asked for, takes half of that again.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from lmkit.kernels.native import linear as native
from lmkit.kernels.native.build import instructions
from lmkit.kernels.native.operators import operators, refusal
from lmkit.kernels.together import Joinable, Joint, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


class PackedLinear(Joinable):
    """A linear layer that holds its weight packed, and unpacks it for who asks for it.

    Attributes:
        packed: The weight in the kernel's own layout, which only the kernel and `Order.unpack` can read; of all layers
            of a `Joint`, if it is one of these.
    """

    OUTPUTS: ClassVar[Mapping[str, int]] = {"bias": 0}

    packed: torch.Tensor

    def __init__(
        self, linear: torch.nn.Linear, *, tied: bool, packed: torch.Tensor | None = None, kernel: Order | None = None
    ) -> None:
        """Take the place of `linear`; a `tied` weight is another module's too, which keeps it."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        self.bias = linear.bias
        self.kernel = kernel or Order()
        # In a tuple, so that it is not registered a second time.
        self._dense: tuple[Any, ...] = (linear.weight,) if tied else ()
        packed = self.kernel.pack(linear.weight) if packed is None else packed
        self.register_buffer("packed", packed, persistent=False)  # a `Buffer` would be another object for each of them

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by this layer alone. *Shape:* `(…, in_features)` to `(…, out_features)`."""
        trained = torch.is_grad_enabled() and rows.requires_grad and not torch.compiler.is_compiling()
        if trained:
            found: torch.Tensor = _Trained.apply(rows, self.bias, self)  # type: ignore[no-untyped-call]
            return found
        return self.multiply(rows)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply without a derivative, which the kernels do not have. *Shape:* as `product`."""
        if self.joint is None:
            return self.kernel.multiply(rows, self.packed, self.bias, self.out_features)
        span, every = self.joint.span(self), self.joint.whole.out_features
        bias = None if self.bias is None else torch.nn.functional.pad(self.bias, (span.start, every - span.stop))
        return self.kernel.multiply(rows, self.packed, bias, every)[..., span]

    @property
    def weight(self) -> torch.nn.Parameter:  # type: ignore[override]
        """The weight as it was loaded; kept from then on, since who asks once asks at every step (T5 does)."""
        if not self._dense:
            self._dense = (torch.nn.Parameter(self.unpacked(), requires_grad=False),)
        dense: torch.nn.Parameter = self._dense[0]
        return dense

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._dense[0].detach() if self._dense else self.unpacked()

    def unpacked(self) -> torch.Tensor:
        """Return what was packed. *Shape:* `(out_features, in_features)`."""
        every = self.out_features if self.joint is None else self.joint.whole.out_features
        dense = self.kernel.unpack(self.packed, every, self.in_features)
        return dense if self.joint is None else dense[self.joint.span(self)].clone()  # which holds no others

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the weight as a plain tensor: the packed one knows neither."""
        return super().__getstate__() | {"_buffers": {"packed": self.unpacked()}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Pack the weight again, in an order that this processor's kernels read."""
        kernel = state.get("kernel") or Order()  # which earlier versions did not write
        kernel = kernel if kernel.isa is None or (refusal() is None and kernel.isa == instructions()) else Order()
        made = {"kernel": kernel, "_buffers": {"packed": kernel.pack(state["_buffers"]["packed"])}}
        super().__setstate__({**state, **made})  # type: ignore[no-untyped-call]


class _Trained(torch.autograd.Function):
    """A product by a packed layer whose input or bias is trained."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, _bias: torch.Tensor | None, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.multiply(rows)

    @staticmethod
    def backward(ctx: Any, *grown: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (given,) = grown
        rows = given @ ctx.layer.unpacked() if ctx.needs_input_grad[0] else None
        bias = given.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return rows, bias, None


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a packed weight, and the kernel that reads it.

    Attributes:
        isa: The set of instructions of lmkit's own kernel; None is torch's.
    """

    isa: str | None = None

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Bring a weight into the kernel's order. *Shape:* `(out_features, in_features)`."""
        if self.isa is not None:
            return native.pack16(weight.detach())
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # noqa: SLF001
        return packed

    def unpack(self, packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
        """Return what was packed. *Shape:* `(outputs, inputs)`."""
        return packed.to_dense() if self.isa is None else native.unpack16(packed)[:outputs, :inputs].contiguous()

    def multiply(
        self, rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        """Multiply by a packed weight. *Shape:* `(…, inputs)` to `(…, outputs)`."""
        if self.isa is not None:
            return _own(self.isa)(rows, packed, bias, outputs)
        ops = torch.ops.mkldnn  # torch has no public one
        product: torch.Tensor = ops._linear_pointwise(rows, packed, bias, "none", [], "")  # noqa: SLF001
        return product


@functools.cache
def _own(isa: str) -> Callable[..., torch.Tensor]:
    kernel: Callable[..., torch.Tensor] = operators(isa).packed_linear.default
    return kernel


@functools.cache
def packs() -> bool:
    """Say whether this torch and this processor have the kernel."""
    ops, backend = torch.ops.mkldnn, cast("Any", torch.backends.mkldnn)
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    has = backend.is_available() and all(hasattr(ops, name) for name in names)
    return bool(has and ops._is_mkldnn_bf16_supported())  # noqa: SLF001


def multiplies(isa: str) -> bool:
    """Say whether lmkit's own kernels for a set of instructions multiply by bfloat16: where oneDNN is slower."""
    return isa == "amx"


def pack(model: torch.nn.Module, together: Iterable[Sequence[str]] = (), isa: str | None = None) -> int:
    """Pack the bfloat16 linear layers of a model that are on a CPU, one after the other; return how many.

    For torch's kernel, or for lmkit's own with a set of instructions that has one (`multiplies`).

    Only plain `torch.nn.Linear` modules are replaced, each in its own place; a hook of accelerate's, which moves
    weights about, keeps a module as it is. Layers whose names are in `together` are packed as one.
    """
    shared, kernel = _shared(model), Order(isa)
    places = [[place(model, name) for name in names] for names in together]
    joints = [joint for some in places if (joint := _packed_as_one(some, shared, kernel))]
    count = sum(len(members) for _, members in joints)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and _packs(parent, child):
                packed = PackedLinear(child, tied=id(child.weight) in shared, kernel=kernel)
                parent._modules[name] = packed  # noqa: SLF001 - setattr would do the same
                count += 1
    if count:
        for module in model.modules():
            let_go_of_file(module)
    for whole, members in joints:
        Joint(whole, members)
    return count


def _packed_as_one(
    places: Sequence[tuple[torch.nn.Module, str]], shared: set[int], kernel: Order
) -> tuple[PackedLinear, list[PackedLinear]] | None:
    """Pack layers as one, and put layers with this weight in their places; None where one of them cannot be packed."""
    linears: list[Any] = [parent._modules[name] for parent, name in places]  # noqa: SLF001
    if not all(_packs(parent, one) for (parent, _), one in zip(places, linears, strict=True)):
        return None
    if shared & {id(linear.weight) for linear in linears}:
        return None
    joined = torch.nn.Linear(
        linears[0].in_features, sum(one.out_features for one in linears), bias=False, device="meta"
    )
    joined.weight = torch.nn.Parameter(torch.cat([one.weight.detach() for one in linears]), requires_grad=False)
    whole = PackedLinear(joined, tied=False, kernel=kernel)
    members = [PackedLinear(linear, tied=False, packed=whole.packed, kernel=kernel) for linear in linears]
    for (parent, name), member in zip(places, members, strict=True):
        parent._modules[name] = member  # noqa: SLF001
    return whole, members


def let_go_of_file(module: torch.nn.Module, *, integers: bool = True) -> None:
    """Copy what of a module's own still lies in the mapped file, so that its pages do not stay in memory beside copies.

    Not the `integers` that were made while the file was read, nor what is packed: these are copies already.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.device.type == "cpu" and (integers or parameter.is_floating_point()):
            parameter.data = parameter.data.clone()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.device.type == "cpu" and not isinstance(module, PackedLinear):
            setattr(module, name, buffer.clone())  # not its data: a buffer may be a view, which holds what it views


def _packs(parent: torch.nn.Module, linear: torch.nn.Module | None) -> bool:
    if type(linear) is not torch.nn.Linear or len(getattr(parent, "lora_magnitude_vector", ())):
        return False  # DoRA measures the weight of its base layer in each step
    weight = linear.weight
    hooked = hasattr(linear, "_hf_hook") or linear._forward_hooks or linear._forward_pre_hooks  # noqa: SLF001
    return weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and not hooked


def _shared(model: torch.nn.Module) -> set[int]:
    """Find the weights that several modules hold."""
    counts = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {weight for weight, count in counts.items() if count > 1}
