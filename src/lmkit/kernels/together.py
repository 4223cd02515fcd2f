"""Linear layers that read the same input as one product: the first that is called computes it for the others too.

A row costs a call of the kernel more than its arithmetic: q, k and v of SmolLM2 take 24 microseconds in place of 56.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch._subclasses import FakeTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

ResultT = TypeVar("ResultT")

KEPT = "_lmkit_parts"
"""The attribute of an input that holds the parts of its product that nobody has taken yet."""


class Joinable(torch.nn.Linear):
    """A linear layer that may be one of a `Joint`.

    Attributes:
        OUTPUTS: Along which dimension of each parameter the outputs lie.
        joint: What multiplies for it and its siblings; None while it does so by itself.
    """

    OUTPUTS: ClassVar[Mapping[str, int]]

    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    joint: Joint | None = None

    @property
    def order(self) -> object:
        """What the order of the weight depends on: layers must have it in common, to be joined."""
        return None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name for it
        """Multiply. *Shape:* `(…, in_features)` to `(…, out_features)`."""
        # torch.compile knows no tensor with attributes of its own; gradients would hold a tensor that holds itself.
        alone = torch.compiler.is_compiling() or (input.requires_grad and torch.is_grad_enabled())
        part = None if self.joint is None or alone else self.joint.part(self, input)
        return self.product(input) if part is None else part

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by this layer alone. *Shape:* as `forward`."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle a layer that multiplies by itself."""
        return {name: value for name, value in self.__dict__.items() if name != "joint"}


class Joint:
    """The product of several layers with one input.

    What the first of them leaves for the others hangs on the input itself, so that it goes with it, each thread has
    its own, and no other tensor can be taken for it.

    Attributes:
        whole: A layer with the outputs of all, one after the other; the parameters of each are views of its own.
    """

    def __init__(self, whole: Joinable, members: Sequence[Joinable]) -> None:
        """Have `members` multiply by `whole`, which takes their parameters over."""
        self.whole = whole
        for name, dim in whole.OUTPUTS.items():
            parts: list[Any] = [member._parameters.get(name) for member in members]  # noqa: SLF001
            if any(part is None for part in parts):
                continue
            joined: Any = torch.nn.Parameter(torch.cat([part.data for part in parts], dim), requires_grad=False)
            setattr(whole, name, joined)
            for member, view in zip(members, joined.split([part.shape[dim] for part in parts], dim), strict=True):
                setattr(member, name, torch.nn.Parameter(view, requires_grad=False))
        self._spans: dict[int, tuple[int, int]] = {}
        self._held: dict[int, list[int]] = {}
        first = 0
        for member in members:
            self._spans[id(member)] = first, member.out_features
            self._held[id(member)] = [one.data_ptr() for one in _parameters(member)]
            first += member.out_features
            member.joint = self

    def part(self, member: Joinable, rows: torch.Tensor) -> torch.Tensor | None:
        """Return a layer's part of the product; None for one that was given other parameters since."""
        held = _parameters(member)
        traced = any(isinstance(one, FakeTensor) for one in held)
        if not traced and [one.data_ptr() for one in held] != self._held[id(member)]:
            return None
        kept: _Kept | None = getattr(rows, KEPT, None)
        part = kept.taken(self, member, rows) if kept is not None else None
        if part is None:
            product = self.whole.product(rows)
            parts = {name: product.narrow(-1, *span) for name, span in self._spans.items()}
            part = parts.pop(id(member))
            setattr(rows, KEPT, _Kept(self, rows, parts))
        return part

    def span(self, member: Joinable) -> slice:
        """Return where a layer's outputs lie in the whole."""
        first, count = self._spans[id(member)]
        return slice(first, first + count)


class _Kept:
    """What is left of a product with one input."""

    def __init__(self, joint: Joint, rows: torch.Tensor, parts: dict[int, torch.Tensor]) -> None:
        self._made = joint, id(rows), _version(rows)
        self._copy = rows.clone() if rows.is_inference() else None
        self._parts = parts

    def taken(self, joint: Joint, member: Joinable, rows: torch.Tensor) -> torch.Tensor | None:
        """Give a part away, once; None if there is none, or the input was written to since."""
        same = self._made == (joint, id(rows), _version(rows))
        if not same or (self._copy is not None and not torch.equal(self._copy, rows)):
            return None
        part = self._parts.pop(id(member), None)
        if not self._parts:
            vars(rows).pop(KEPT, None)
        return part


def _version(rows: torch.Tensor) -> tuple[bool, int]:
    """Tell writes to a tensor apart; those made in inference mode are not counted."""
    return torch.is_inference_mode_enabled(), 0 if rows.is_inference() else rows._version  # noqa: SLF001


def _parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [one for one in module._parameters.values() if one is not None]  # noqa: SLF001 - faster than parameters()


def siblings(model: torch.nn.Module, run: Callable[[], ResultT]) -> tuple[ResultT, tuple[tuple[str, ...], ...]]:
    """Run a model, and find the linear layers of one parent that are given the very same inputs, call by call.

    Their outputs are views of wider tensors meanwhile, as those of a `Joint` are: code that cannot bear it fails.

    Returns:
        What `run` does, and the names of such layers.
    """
    inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
    calls: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def looking(name: str) -> Callable[..., torch.Tensor]:
        def look(_module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            inputs[name] += given  # held, so that no other tensor gets its id
            calls[name] += [(id(one), one._version) for one in given]  # noqa: SLF001
            return torch.nn.functional.pad(output, (0, 1))[..., :-1]

        return look

    linear = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    handles = [module.register_forward_hook(looking(name)) for name, module in linear.items()]
    try:
        outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = defaultdict(list)
    for name, called in calls.items():  # in the order of the calls
        alike = name.rpartition(".")[0], linear[name].weight.dtype, linear[name].bias is None
        groups[(*alike, *called)].append(name)
    return outputs, tuple(tuple(names) for names in groups.values() if len(names) > 1)


def place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the parent of a module and its name there, also where an adapter was put around it."""
    module = model.get_submodule(name)
    if hasattr(module, "base_layer"):
        return module, "base_layer"
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def joinable(members: Sequence[torch.nn.Module]) -> bool:
    """Say whether layers differ in nothing but their numbers and how many outputs they have."""
    first, *others = [_settings(member) for member in members]
    own = all(isinstance(one, Joinable) and set(one.OUTPUTS) - {"bias"} <= {*one._parameters} for one in members)  # noqa: SLF001
    return own and all(other == first for other in others)


def _settings(module: torch.nn.Module) -> Mapping[str, object]:
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    hooked = hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001
    unlike = {"out_features": None, "kind": type(module), "order": getattr(module, "order", None)}
    return plain | unlike | {"hooked": hooked and id(module)}


def join(model: torch.nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Have layers whose parameters can be put one behind the other multiply together; return how many do."""
    count = 0
    for names in groups:
        members: list[Any] = [getattr(*place(model, name)) for name in names]
        if joinable(members):
            whole = copy.copy(members[0])
            whole._parameters = dict.fromkeys(whole._parameters)  # noqa: SLF001 - else it would share the dict
            whole.out_features = sum(member.out_features for member in members)
            Joint(whole, members)
            count += len(members)
    return count


class WithWholes(torch.nn.Module):
    """A model, and beside it the layers that multiply for several of its own: so all its tensors have names."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Hold a model."""
        super().__init__()
        self.model = model
        self.wholes = torch.nn.ModuleList(wholes(model))

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.model(**inputs)


def wholes(model: torch.nn.Module) -> list[Joinable]:
    """Return the layers that multiply for several of a model's own, which are no modules of it."""
    joints = (module.joint for module in model.modules() if isinstance(module, Joinable))
    return list(dict.fromkeys(joint.whole for joint in joints if joint is not None))
