"""The order of CUDA's kernels, by one made up here, and what is asked of a card by torch's records of its kernels."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lmkit.kernels import cuda, quantized
from lmkit.kernels.quantized import GROUP, Int4Linear, Int8Linear
from quantized_layers import filled, numbers

SHUFFLED = torch.randperm(1024, generator=torch.Generator().manual_seed(0))


def packed(weight: torch.Tensor, _tiles: int) -> torch.Tensor:
    """Pack as CUDA does, but for the order inside of a tile: the first of two neighbours is the upper half."""
    levels = torch.stack((weight >> 4, weight & 15), -1).flatten(1)
    tiles = levels.unflatten(1, (-1, 128)).unflatten(0, (-1, 8)).transpose(1, 2).flatten(2)[..., SHUFFLED]
    halves = tiles.unflatten(-1, (32, 4, 8)).long() << torch.arange(0, 32, 4)
    return halves.sum(-1).to(torch.int32)


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have CUDA's packing here, and its product."""

    def multiply(rows: torch.Tensor, weight: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        levels = cuda.unpack4(weight).float().unflatten(1, (-1, group)) - 8
        pairs = scales.float().transpose(0, 1)[..., None, :]
        return (rows.float() @ (levels * pairs[..., 0] + pairs[..., 1]).flatten(1).T).to(rows.dtype)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", packed, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply, raising=False)
    cuda._order.cache_clear()
    yield
    cuda._order.cache_clear()


@pytest.mark.usefixtures("_kernel")
def test_what_is_packed_comes_back() -> None:
    """Levels in the kernel's order are unpacked, whatever that order is."""
    weight = torch.randint(0, 256, (24, 128), dtype=torch.uint8)
    levels = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
    assert torch.equal(cuda.unpack4(cuda.pack4(weight)), levels)


@pytest.mark.usefixtures("_kernel")
def test_a_packed_layer_multiplies_and_is_saved_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel's order a layer has the products of its plain weight, for few rows and many, and saves that."""
    plain = filled(Int4Linear, numbers(24, 256), torch.bfloat16, packed=False)
    layer = filled(Int4Linear, numbers(24, 256), torch.bfloat16, packed=False)
    monkeypatch.setattr(quantized, "_int4_kernel", lambda: 0)
    monkeypatch.setattr(cuda, "takes4", lambda *_layer: True)
    layer.pack()
    assert layer.packed == "cuda"
    assert layer.weight.shape == (3, 2, 32, 4)
    assert {name: value.tolist() for name, value in layer.state_dict().items()} == {
        name: value.tolist() for name, value in plain.state_dict().items()
    }
    rows = numbers(5, 256, seed=1).to(torch.bfloat16)
    expected = rows.double() @ torch.cat(list(plain.blocks(torch.float32)), -1).double()
    monkeypatch.setattr(Int4Linear, "_has_kernel", lambda self, _dtype: self.packed == "cuda")
    for many in (False, True):
        monkeypatch.setattr(Int4Linear, "FEW", 0 if many else 128)
        assert layer(rows).double() == pytest.approx(expected, rel=0.05, abs=0.2)


@pytest.fixture(autouse=True)
def _guard() -> None:
    """Let tensors stand in for ones on CUDA in a build without it, and torch's kernel for a CPU be tried before."""
    torch._C._ensureCUDADeviceGuardSet()
    quantized._int4_kernel()


class Kernels(TorchDispatchMode):
    """Counts what is asked of a device."""

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation that is no view."""
        if func.namespace == "aten" and not func.is_view:
            self.names[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows, kind", [(1, Int4Linear), (64, Int4Linear), (1, Int8Linear), (16, Int8Linear)])
def test_few_rows_are_one_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch, rows: int, kind: Any) -> None:
    """By the shapes that torch has recorded of its kernels, a product of few rows is one of them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            layer = kind(4096, 1024, torch.bfloat16, bias=False)
            given = torch.empty(rows, 4096, dtype=torch.bfloat16)
        layer.pack()
        with Kernels() as counted:
            found = layer(given)
    assert (found.shape, found.dtype) == ((rows, 1024), torch.bfloat16)
    name = "_weight_int4pack_mm" if kind is Int4Linear else "_weight_int8pack_mm"
    assert counted.names[name] == 1
    assert counted.names.total() <= 2, counted.names


@pytest.mark.parametrize("kind", [Int4Linear, Int8Linear])
def test_many_rows_widen_the_weight_once(kind: Any) -> None:
    """A product of many rows is a few kernels, not thousands of blocks."""
    with torch.device("meta"), torch.no_grad():
        layer = kind(4096, 14336, torch.bfloat16, bias=False)
        given = torch.empty(512, 4096, dtype=torch.bfloat16)
        with Kernels() as counted:
            layer(given)
    assert counted.names.total() <= 14, counted.names


def test_what_the_kernel_does_not_take_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other widths, dtypes and older cards leave the weight as it is saved."""
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    with FakeTensorMode():
        scales = torch.empty(4, 8, 2, dtype=torch.bfloat16, device="cuda")
        assert cuda.takes4(8, 4 * GROUP, scales)
        assert not cuda.takes4(12, 4 * GROUP, scales)
        assert not cuda.takes4(8, 3 * GROUP, scales)
        assert not cuda.takes4(8, 4 * GROUP, scales.float())
        assert not cuda.takes4(8, 4 * GROUP, torch.empty(4, 8, 2, dtype=torch.bfloat16))
        capability = (7, 5)
        assert not cuda.takes4(8, 4 * GROUP, scales)
