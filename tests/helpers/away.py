"""A device that is not there: tensors that say they are on it and compute on the CPU, while all copies are counted.

Python's dispatch sees each operation once, so what an engine asks of an accelerator can be counted without one: copies
to the host, for which the host waits, copies from it, and kernels. Figures of speed are not to be had.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lmkit.engine import computing, scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = torch.device("meta")
"""What they say: of all kinds of devices but the CPU, the one that every build of torch has code for."""

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "equal"}
"""Operations whose result, or its shape, the host waits for."""


class Away(torch.Tensor):
    """A tensor that says it is on `DEVICE`."""

    inner: torch.Tensor

    def __new__(cls, inner: torch.Tensor) -> Self:
        """Wrap a tensor."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """Return the values, which is a copy to the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to compute where nothing counts; parameters are made anywhere."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner.detach())
        raise AssertionError(f"{func} on {DEVICE} where no one counts")


class Counting(TorchDispatchMode):
    """Computes what tensors on `DEVICE` need, and counts.

    Attributes:
        counts: How many `"waits"` of the host there were, copies `"sent"`, and `"kernels"`.
        waited: What for, and where.
    """

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waited: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        kwargs = dict(kwargs or {})
        away = any(isinstance(one, Away) for one in tree_leaves((args, kwargs)))
        stays, name = away, func._schema.name.partition("::")[2]
        if (device := kwargs.get("device")) is not None:
            stays = torch.device(device).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        into_cpu = name == "copy_" and not isinstance(args[0], Away)
        if away and (name in WAITS or into_cpu or not stays):
            self._count("waits", name)
        elif (stays and not away) or (name == "copy_" and away and not isinstance(args[1], Away)):
            self._count("sent" if name in ("_to_copy", "copy_") else "kernels", name)
        elif away and not func.is_view:
            self._count("kernels", name)
        stays = stays and not into_cpu
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        found = func(*inner_args, **inner_kwargs)
        if name == "_to_copy" and away != stays:  # a copy, though both are in the same memory
            found = found.clone() if found is inner_args[0] else found
        if name.endswith("_") and not name.endswith("__") and stays:
            return args[0]
        return tree_map(lambda one: Away(one) if isinstance(one, torch.Tensor) else one, found) if stays else found

    def _count(self, what: str, name: str) -> None:
        self.counts[what] += 1
        if what == "waits":
            frames = [one for one in traceback.extract_stack() if "/torch/" not in one.filename]
            self.waited.append((name, f"{frames[-3].filename}:{frames[-3].lineno}"))

    @property
    def fetched(self) -> int:
        """How many copies to the host there were."""
        return sum(name == "_to_copy" for name, _ in self.waited)


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, Away) else one


def put(model: Any) -> Any:
    """Move a model to `DEVICE`, in place."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(Away(value.data), requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = Away(value)
    model.hf_device_map = {"": str(DEVICE)}  # else what is on it counts as not loaded
    return model


class _Sending(TorchFunctionMode):
    """Has numbers that become a tensor on `DEVICE` be copied there, by an operation that can be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == str(DEVICE):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Away):
            args = (args[0], _placed(args[1]), *args[2:])
        return func(*args, **kwargs)


def _placed(index: Any) -> Any:
    """Have the lists of an index be copied to `DEVICE`, as torch does where nobody sees it."""
    if isinstance(index, tuple):
        return tuple(map(_placed, index))
    return torch.tensor(index).to(DEVICE) if isinstance(index, list) else index


@contextmanager
def counting() -> Iterator[Counting]:
    """Compute on `DEVICE`, and count, while the block runs; also what engines do in threads of theirs."""
    computed, free, owner = computing.computed, scheduler._free, threading.get_ident()
    try:
        with torch.no_grad(), _Sending(), Counting() as counted:

            def here(do: Any) -> Any:
                if threading.get_ident() == owner:
                    return do()
                with _Sending(), counted:
                    return do()

            computing.computed = lambda do: computed(lambda: here(do))
            scheduler._free = lambda _device: 2**30
            yield counted
    finally:
        computing.computed, scheduler._free = computed, free
