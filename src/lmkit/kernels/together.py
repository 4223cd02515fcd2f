"""Linear layers that read the same input as one product: the first that is called computes it for the others too.

A row costs a call of the kernel more than its arithmetic: q, k and v of SmolLM2 take 24 microseconds in place of 56.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

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
        OUTPUTS: Along which dimension of each parameter the outputs lie as it is saved.
        joint: What multiplies for it and its siblings; None while it does so by itself.
    """

    OUTPUTS: ClassVar[Mapping[str, int]]

    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    joint: Joint | None = None

    @property
    def outputs(self) -> Mapping[str, int | None]:
        """Along which dimension of each parameter the outputs lie as it is now; None is as they lie in memory."""
        return self.OUTPUTS

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
        for name, dim in whole.outputs.items():
            parts: list[Any] = [member._parameters.get(name) for member in members]  # noqa: SLF001
            if any(part is None for part in parts):
                continue
            joined, views = _joined([part.data for part in parts], dim)
            setattr(whole, name, torch.nn.Parameter(joined, requires_grad=False))
            for member, view in zip(members, views, strict=True):
                setattr(member, name, torch.nn.Parameter(view, requires_grad=False))
        self._held = {id(member): [_address(one) for one in member._parameters.values()] for member in members}  # noqa: SLF001
        self._sizes = [member.out_features for member in members]
        for member in members:
            member.joint = self

    def part(self, member: Joinable, rows: torch.Tensor) -> torch.Tensor | None:
        """Return a layer's part of the product; None for one that was given other parameters since."""
        parameters: Any = member._parameters.values()  # noqa: SLF001 - the public ones take longer than the rest
        for one, held in zip(parameters, self._held[id(member)], strict=False):
            if one is not None and type(one) is not FakeTensor and one.data_ptr() != held:
                return None
        made = self, id(rows), torch.is_inference_mode_enabled(), -1 if rows.is_inference() else rows._version  # noqa: SLF001
        kept: _Kept | None = vars(rows).get(KEPT)
        same = kept is not None and kept[0] == made and (kept[1] is None or torch.equal(kept[1], rows))
        part = kept[2].pop(id(member), None) if kept is not None and same else None
        if kept is None or part is None:
            # Writes in inference mode are not counted.
            copied = rows.clone() if rows.is_inference() else None
            kept = (
                made,
                copied,
                dict(zip(self._held, self.whole.product(rows).split_with_sizes(self._sizes, -1), strict=True)),
            )
            part = kept[2].pop(id(member))
            setattr(rows, KEPT, kept)
        elif not kept[2]:
            vars(rows).pop(KEPT, None)
        return part

    def span(self, member: Joinable) -> slice:
        """Return where a layer's outputs lie in the whole."""
        place = [*self._held].index(id(member))
        first = sum(self._sizes[:place])
        return slice(first, first + self._sizes[place])


_Kept: TypeAlias = "tuple[tuple[object, ...], torch.Tensor | None, dict[int, torch.Tensor]]"
"""For which input a product was computed, a copy of it where it may change unseen, and the parts that are left."""


def _joined(parts: Sequence[torch.Tensor], dim: int | None) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Put tensors one behind the other along a dimension, or as they lie in memory; return the parts of it as well."""
    if dim is not None:
        whole = torch.cat([*parts], dim)
        return whole, torch.split(whole, [part.shape[dim] for part in parts], dim)
    flat = torch.cat([part.flatten() for part in parts])
    views = torch.split(flat, [part.numel() for part in parts])
    both = zip(views, parts, strict=True)
    return flat.view(len(parts[0]), -1, *parts[0].shape[2:]), [view.view_as(part) for view, part in both]


def _address(parameter: torch.nn.Parameter | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()


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
    """A model, and beside it the layers that multiply for its own: so all tensors that it computes with have names."""

    def __init__(self, model: torch.nn.Module, beside: Iterable[torch.nn.Module] = ()) -> None:
        """Hold a model, its `wholes`, and other layers `beside` them."""
        super().__init__()
        self.model = model
        self.wholes = torch.nn.ModuleList([*wholes(model), *beside])

    def forward(self, run: Callable[..., ResultT], *inputs: Any) -> ResultT:
        """Call what runs the model."""
        return run(*inputs)


def wholes(model: torch.nn.Module) -> list[Joinable]:
    """Return the layers that multiply for several of a model's own, which are no modules of it."""
    joints = (module.joint for module in model.modules() if isinstance(module, Joinable))
    return list(dict.fromkeys(joint.whole for joint in joints if joint is not None))
