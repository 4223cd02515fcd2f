"""Layers in 8 and 4 bits against the same products in float64, on weights widened here as the format is documented."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkit.kernels import quantized
from lmkit.kernels.quantized import BLOCK, GROUP, TINY, Int4Linear, Int8Linear
from lmkit.kernels.tied import Int8Embedding, TiedHead
from quantized_layers import filled, numbers, widened

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
torch.set_num_threads(1)  # small layers: a second thread costs more than it brings
KINDS: tuple[Any, ...] = (Int8Linear, Int4Linear)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)
PROPERTY = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(layer: Any, rows: torch.Tensor, state: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Compare a layer's product with that of its widened weight in float64; return it."""
    state = layer.state_dict() if state is None else state
    weight, size = widened(state)
    found = layer(rows)
    exact, most = rows.double() @ weight.T, rows.double().abs() @ size.T
    if layer.bias is not None:
        exact, most = exact + layer.bias.double(), most + layer.bias.double().abs()
    assert found.dtype is rows.dtype
    assert found.shape == (*rows.shape[:-1], layer.out_features)
    # The widened weights, scales and the result are rounded to the dtype, and all sums to float32 as they grow.
    slack = 2 * torch.finfo(rows.dtype).eps + layer.in_features * torch.finfo(torch.float32).eps / 2
    assert ((found.double() - exact).abs() <= slack * most + 1e-30).all()
    return found


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch lack the kernels, as on another processor."""

    def absent(*_args: Any, **_options: Any) -> None:
        raise NotImplementedError

    def forget() -> None:
        for value in vars(quantized).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    for name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"):
        monkeypatch.setattr(torch.ops.aten, name, absent)
    forget()
    yield
    monkeypatch.undo()
    forget()


# Products ---------------------------------------------------------------------------------------

SHAPES = [(64, 64), (128, 96), (50, 32), (96, 64), (1, 32), (17, 64), (640, 64), (64, 544)]
"""Outputs and inputs: what the kernels take, and outputs that they do not."""
ODD = [(64, 40), (50, 33), (7, 1), (96, 48), (3, 65), (64, 8)]
"""Inputs that do not divide into groups."""


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("outputs, inputs", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_widened_weight(
    kind: Any, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool
) -> None:
    """For few rows and for many, the product is that of the documented weight, but for rounding."""
    layer = filled(kind, numbers(outputs, inputs), dtype, bias=bias)
    for count in (1, 2, 4, 5, kind.FEW, kind.FEW + 1, 100):
        check(layer, numbers(count, inputs, seed=1).to(dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("outputs, inputs", ODD)
def test_8_bits_take_every_width(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Widths that the kernel does not take give the same products."""
    layer = filled(Int8Linear, numbers(outputs, inputs), dtype, bias=True)
    for count in (1, 3, Int8Linear.FEW + 1):
        check(layer, numbers(count, inputs, seed=1).to(dtype))


def test_4_bits_fit_whole_groups_only() -> None:
    """A layer in 4 bits has to have inputs in whole groups."""
    assert [inputs for inputs in range(1, 130) if Int4Linear.fits(inputs)] == [32, 64, 96, 128]
    assert GROUP == 32


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("outputs", [640, 600])
def test_a_weight_of_several_blocks_is_whole(kind: Any, outputs: int, dtype: torch.dtype) -> None:
    """A weight that is widened in several blocks, the last one smaller, gives all outputs, in order."""
    inputs = 2048
    assert outputs * inputs > BLOCK
    layer = filled(kind, numbers(outputs, inputs), dtype, bias=True)
    check(layer, numbers(2, inputs, seed=1).to(dtype))
    check(layer, numbers(kind.FEW + 1, inputs, seed=1).to(dtype))


@EVERY_KIND
def test_a_row_longer_than_a_block_is_one(kind: Any) -> None:
    """Where a single row has more weights than a block, it is widened row by row."""
    inputs = BLOCK + GROUP
    layer = filled(kind, numbers(3, inputs), torch.float32)
    check(layer, numbers(kind.FEW + 1, inputs, seed=1) / 100)


@EVERY_KIND
@given(
    outputs=st.integers(1, 200),
    groups=st.integers(1, 6),
    count=st.integers(0, 100),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@PROPERTY
def test_any_shape(
    kind: Any, outputs: int, groups: int, count: int, *, dtype: torch.dtype, seed: int, bias: bool
) -> None:
    """Whatever the numbers of rows, inputs and outputs, the product is that of the widened weight."""
    inputs = groups * GROUP
    layer = filled(kind, numbers(outputs, inputs, seed=seed), dtype, bias=bias)
    check(layer, numbers(count, inputs, seed=seed + 1).to(dtype))


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (), (1, 1), (2, 3), (3, 1, 2), (5, 20), (2, 2, 13)], ids=str)
def test_rows_may_have_any_shape(kind: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All dimensions but the last are kept, also where there are no rows, or no dimension beside it."""
    layer = filled(kind, numbers(128, 64), dtype, bias=True)
    check(layer, numbers(*shape, 64, seed=1).to(dtype))


VIEWS: dict[str, Any] = {
    "last of each": lambda count, dtype: numbers(count, 7, 64, seed=1).to(dtype)[:, -1],
    "last of each, kept": lambda count, dtype: numbers(count, 7, 64, seed=1).to(dtype)[:, -1:],
    "some columns": lambda count, dtype: numbers(count, 192, seed=1).to(dtype)[:, 64:128],
    "one row for all": lambda count, dtype: numbers(1, 64, seed=1).to(dtype).expand(count, 64),
    "every second column": lambda count, dtype: numbers(count, 128, seed=1).to(dtype)[:, ::2],
    "transposed": lambda count, dtype: numbers(64, count, seed=1).to(dtype).T,
}


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_rows_need_not_lie_together(kind: Any, view: str, dtype: torch.dtype, *, few: bool) -> None:
    """A view of a larger tensor, such as the last state of each row, is multiplied like its copy."""
    layer = filled(kind, numbers(128, 64), dtype)
    check(layer, VIEWS[view](3 if few else kind.FEW + 1, dtype))


@EVERY_KIND
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_torch_computes(kind: Any, mode: Any, *, few: bool) -> None:
    """The product is the same with gradients recorded or not."""
    layer = filled(kind, numbers(128, 64), torch.float32)
    with mode():
        check(layer, numbers(3 if few else kind.FEW + 1, 64, seed=1))


@EVERY_KIND
@pytest.mark.parametrize("few", [True, False])
def test_gradients_go_through_to_the_input(kind: Any, *, few: bool) -> None:
    """An adapter below a layer can be trained: the input's gradient is that of the widened weight."""
    layer = filled(kind, numbers(128, 64), torch.float32)
    rows = numbers(3 if few else kind.FEW + 1, 64, seed=1).requires_grad_()
    grown = numbers(len(rows), 128, seed=2)
    layer(rows).backward(grown)
    exact = grown.double() @ widened(layer.state_dict())[0]
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.double(), exact, rtol=1e-4, atol=1e-3)


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("few", [True, False])
def test_sums_stay_in_range(kind: Any, dtype: torch.dtype, *, few: bool) -> None:
    """A product that is in range comes out in range: small weights times large rows, all of one sign."""
    weight = 0.02 * numbers(64, 1024).abs()
    layer = filled(kind, weight, dtype)
    rows = (30 * numbers(3 if few else kind.FEW + 1, 1024, seed=1).abs()).to(dtype)
    assert check(layer, rows).max() < 1000


@EVERY_KIND
@pytest.mark.parametrize("few", [True, False])
def test_another_dtype_is_refused_as_a_plain_layer_does(kind: Any, *, few: bool) -> None:
    """Rows in another dtype than the layer computes in are an error, however many they are."""
    layer = filled(kind, numbers(128, 64), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        layer(numbers(3 if few else kind.FEW + 1, 64, seed=1))


MISALIGNED = """
import sys, torch
from lmkit.kernels.quantized import Int8Linear, Int4Linear

def moved(tensor):
    place = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)[1 : tensor.numel() + 1].view(tensor.shape)
    return place.copy_(tensor)

torch.set_num_threads(1)
for kind in (Int8Linear, Int4Linear):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for outputs in (64, 50, 7):
            layer = kind(64, outputs, dtype, bias=False)
            integers, scales = kind.quantize(torch.ones(outputs, 64), dtype)
            layer.load_state_dict({"weight": integers, "scales": scales})
            if sys.argv[1] == "weight":
                layer.weight = torch.nn.Parameter(moved(layer.weight.data), requires_grad=False)
                layer.scales = torch.nn.Parameter(moved(layer.scales.data), requires_grad=False)
            layer.pack()
            for count in (1, 3, 4, 5):
                rows = torch.ones(count, 64, dtype=dtype)
                found = layer(moved(rows) if sys.argv[1] == "rows" else rows)
                assert (found - 64).abs().max() < 1
"""


@pytest.mark.parametrize("what", ["weight", "rows"])
def test_numbers_may_lie_anywhere_in_memory(what: str) -> None:
    """A weight as it lies in a mapped file, and rows that begin anywhere do not end the process."""
    done = subprocess.run([sys.executable, "-c", MISALIGNED, what], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Quantizing -------------------------------------------------------------------------------------


def errors(kind: Any, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far each weight is from what it became, and the farthest that its scale allows."""
    integers, scales = kind.quantize(weight, dtype)
    state = {"weight": integers, "scales": scales}
    wide = widened(state)[0]
    unit = torch.finfo(dtype).eps / 2
    if kind is Int8Linear:
        allowed = scales.double()[:, None].expand(weight.shape) / 2
    else:
        step, offset = scales.double().transpose(0, 1).repeat_interleave(GROUP, 1).unbind(-1)
        # A scale and an offset are themselves rounded to `dtype`; only the ends of a group feel it.
        allowed = torch.maximum(step / 2, unit * (offset.abs() + 16 * step) * 1.01)
    return (weight.double() - wide).abs(), allowed * 1.0001


CASES: dict[str, torch.Tensor] = {
    "random": numbers(64, 96),
    "zero": torch.zeros(64, 96),
    "negative zero": torch.full((64, 96), -0.0),
    "a zero row": numbers(64, 96) * torch.tensor([0.0, 1.0] * 32)[:, None],
    "a zero group": numbers(64, 96) * torch.cat((torch.zeros(32), torch.ones(64))),
    "an outlier": torch.where(torch.arange(64 * 96).view(64, 96) == 1000, 500.0, numbers(64, 96)),
    "constant": torch.full((64, 96), 0.3),
    "constant, negative": torch.full((64, 96), -7.1),
    "positive": numbers(64, 96).abs() + 3,
    "two values": torch.where(numbers(64, 96) > 0, 0.25, -0.125),
    "one value, else zero": torch.eye(64, 96),
}


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_off_by_half_a_step_at_most(kind: Any, case: str, dtype: torch.dtype) -> None:
    """Each weight becomes the nearest one that there is, whatever its neighbours are."""
    weight = CASES[case]
    off, allowed = errors(kind, weight, dtype)
    assert (off <= allowed + 1e-12).all()
    layer = filled(kind, weight, dtype)
    for count in (2, kind.FEW + 1):
        assert check(layer, numbers(count, 96, seed=1).to(dtype)).isfinite().all()


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e30, 1e37])
def test_extreme_weights_are_off_by_half_a_step_at_most(kind: Any, size: float, dtype: torch.dtype) -> None:
    """Weights may be as small and as large as the dtype has them."""
    weight = size * numbers(64, 96)
    off, allowed = errors(kind, weight, dtype)
    assert (off <= allowed).all()
    assert off.max() <= max(size, TINY)


@EVERY_KIND
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3, 1.0, 1e3, 1e4])
def test_small_and_large_weights_survive_float16(kind: Any, size: float) -> None:
    """In float16, weights are off by half a step, and by what a scale is rounded: its least number is 6e-8."""
    weight = (size * numbers(64, 96)).half()
    off, _ = errors(kind, weight, torch.float16)
    greatest = weight.double().abs().amax(1, keepdim=True)
    least = 2.0**-24  # what scales are rounded to: up to half of it off, times up to 127
    assert (off <= (0.5 / 127 if kind is Int8Linear else 1.1 / 15) * greatest + 127 / 2 * least).all()


@EVERY_KIND
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@PROPERTY
def test_any_weight_is_off_by_half_a_step_at_most(kind: Any, data: st.DataObject, dtype: torch.dtype) -> None:
    """Whatever numbers a row has, each becomes the nearest one that there is."""
    finite = st.floats(-(2.0**100), 2.0**100, width=32)
    row = data.draw(st.lists(st.one_of(finite, st.floats(-1, 1, width=32), st.just(-0.0)), min_size=64, max_size=64))
    off, allowed = errors(kind, torch.tensor([row]), dtype)
    assert (off <= allowed).all()


@EVERY_KIND
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_may_be_given_in_any_dtype(kind: Any, given: torch.dtype) -> None:
    """The checkpoint's dtype and the one that is computed in are two things."""
    weight = numbers(64, 96).to(given)
    integers, scales = kind.quantize(weight, torch.float32)
    again, as_wide = kind.quantize(weight.float(), torch.float32)
    assert torch.equal(integers, again)
    assert torch.equal(scales, as_wide)
    assert scales.dtype is torch.float32


@EVERY_KIND
def test_the_empty_layer_has_the_shapes_of_the_quantized_one(kind: Any) -> None:
    """What is allocated on the meta device, and counted in a plan, is what quantizing gives."""
    for dtype in DTYPES:
        for outputs, inputs in ((1, 32), (50, 64), (64, 96)):
            found, wanted = kind.quantize(numbers(outputs, inputs), dtype), kind.empty(inputs, outputs, dtype)
            assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in wanted]


def test_8_bits_are_symmetric() -> None:
    """The integers are -127 to 127, so that a weight and its negative become each other's negatives."""
    weight = numbers(64, 96)
    (one, scales), (other, others) = (
        Int8Linear.quantize(weight, torch.float32),
        Int8Linear.quantize(-weight, torch.float32),
    )
    assert torch.equal(one, -other)
    assert torch.equal(scales, others)
    assert one.abs().amax(1).eq(127).all()
    assert one.min() >= -127


def test_4_bits_use_both_ends() -> None:
    """The least weight of each group is level 0 and the greatest is level 15."""
    weight, _ = Int4Linear.quantize(numbers(64, 96), torch.float32)
    levels = torch.stack((weight & 15, weight >> 4), -1).view(64, 3, GROUP)
    assert levels.amin(-1).eq(0).all()
    assert levels.amax(-1).eq(15).all()


@EVERY_KIND
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_no_number_stays_in_its_row(kind: Any, strange: float) -> None:
    """A NaN or infinite weight shows in its own output, which is no number then, and in no other."""
    weight = numbers(64, 96)
    weight[5, 40] = strange
    layer = filled(kind, weight, torch.float32)
    clean = filled(kind, torch.cat((weight[:5], weight[6:7], weight[6:])), torch.float32)
    for count in (2, kind.FEW + 1):
        rows = numbers(count, 96, seed=1)
        found, expected = layer(rows), clean(rows)
        assert not found[:, 5].isfinite().any()
        others = [n for n in range(64) if n != 5]
        torch.testing.assert_close(found[:, others], expected[:, others])


# Packing, saving, copying -----------------------------------------------------------------------


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("outputs", [64, 50, 640])
def test_packing_changes_neither_products_nor_what_is_saved(kind: Any, outputs: int, dtype: torch.dtype) -> None:
    """Before and after, a layer saves the same and multiplies the same, but for rounding."""
    layer = filled(kind, numbers(outputs, 96), dtype, bias=True, packed=False)
    rows = {count: numbers(count, 96, seed=1).to(dtype) for count in (1, 3, kind.FEW + 1)}
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for given_rows in rows.values():
        check(layer, given_rows)
    held = sum(tensor.nbytes for tensor in layer.parameters())
    layer.pack()
    after = layer.state_dict()
    assert list(before) == list(after) == ["weight", "scales", "bias"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype is after[name].dtype for name in before)
    assert sum(tensor.nbytes for tensor in layer.parameters()) == held
    for given_rows in rows.values():
        check(layer, given_rows, before)


@EVERY_KIND
def test_packing_twice_is_packing_once(kind: Any) -> None:
    """A layer that is packed stays as it is."""
    layer = filled(kind, numbers(64, 96), torch.float32)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    check(layer, numbers(3, 96, seed=1), before)


@EVERY_KIND
def test_a_saved_state_is_read_into_a_packed_layer(kind: Any) -> None:
    """What one layer saves, another one of its shape computes with when it has read it, packed or not."""
    layer, other = (filled(kind, numbers(64, 96, seed=seed), torch.float32, bias=True) for seed in (1, 2))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
    for count in (3, kind.FEW + 1):
        check(other, numbers(count, 96, seed=1), state)


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("outputs", [64, 50])
def test_without_kernels_the_products_are_the_same(kind: Any, outputs: int, dtype: torch.dtype) -> None:
    """Where torch has no kernel, a layer widens and multiplies, with the same results but for rounding."""
    layer = filled(kind, numbers(outputs, 96), dtype, bias=True)
    for count in (1, 3, kind.FEW, kind.FEW + 1):
        check(layer, numbers(count, 96, seed=1).to(dtype))


@EVERY_KIND
def test_a_kernel_that_computes_something_else_is_not_used(kind: Any) -> None:
    """A kernel of another torch that gives other results is as good as none."""
    with pytest.MonkeyPatch.context() as patch:
        wrong = lambda rows, weight, *_: torch.zeros(len(rows), len(weight))  # noqa: E731
        for name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"):
            patch.setattr(torch.ops.aten, name, wrong)
        for value in vars(quantized).values():
            if hasattr(value, "cache_clear"):
                patch.setattr(quantized, value.__name__, value.__wrapped__)
        layer = filled(kind, numbers(64, 96), torch.float32)
        check(layer, numbers(3, 96, seed=1))


def unpickled(module: Any) -> Any:
    """Return what a module's pickle gives."""
    return pickle.loads(pickle.dumps(module))  # noqa: S301 - written in the line itself


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("way", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("outputs", [64, 50])
def test_copies_give_the_same(kind: Any, outputs: int, way: Any, dtype: torch.dtype) -> None:
    """A deep copy and an unpickled one compute and save the same, and share nothing."""
    layer = filled(kind, numbers(outputs, 96), dtype, bias=True)
    again = way(layer)
    for count in (3, kind.FEW + 1):
        rows = numbers(count, 96, seed=1).to(dtype)
        assert torch.equal(again(rows), layer(rows))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in layer.state_dict().items())
    assert not {tensor.data_ptr() for tensor in layer.parameters()} & {
        tensor.data_ptr() for tensor in again.parameters()
    }


@EVERY_KIND
def test_a_layer_is_a_linear_layer(kind: Any) -> None:
    """Adapters and other tools see a linear layer with its widths, and nothing in it asks for gradients."""
    layer = filled(kind, numbers(64, 96), torch.bfloat16, bias=True)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (96, 64)
    assert "in_features=96, out_features=64, bias=True" in repr(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "scales", "bias"]


@EVERY_KIND
def test_a_weight_takes_the_bytes_of_its_bits(kind: Any) -> None:
    """8 bits for each weight and a scale for each row, or 4 bits and a scale and an offset for each 32 weights."""
    layer = filled(kind, numbers(640, 320), torch.bfloat16)
    extra = 640 * 2 if kind is Int8Linear else 640 * 10 * 2 * 2
    assert (
        sum(tensor.nbytes for tensor in layer.parameters()) == 640 * 320 * (8 if kind is Int8Linear else 4) // 8 + extra
    )


# Embeddings and heads ---------------------------------------------------------------------------


def embedding(dtype: torch.dtype, scale: float = 1.0, size: tuple[int, int] = (50, 48)) -> Int8Embedding:
    """Make an embedding of random numbers."""
    made = Int8Embedding(*size, dtype, scale)
    integers, scales = Int8Linear.quantize(numbers(*size), dtype)
    made.load_state_dict({"weight": integers, "scales": scales})
    return made


@EVERY_DTYPE
@pytest.mark.parametrize("scale", [1.0, 48**0.5, 0.1])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 0)], ids=str)
def test_an_embedding_looks_up_rows(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    """What is looked up is the documented row, rounded, times the family's scale."""
    made = embedding(dtype, scale)
    ids = (
        torch.arange(shape.numel() if isinstance(shape, torch.Size) else int(torch.tensor(shape).prod())).view(shape)
        * 3
    )
    found = made(ids)
    exact = widened(made.state_dict())[0][ids] * scale
    assert found.dtype is dtype
    assert found.shape == (*shape, 48)
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * (1 if scale != 1 else 0.5)).all()


def test_an_embedding_refuses_ids_that_it_does_not_have() -> None:
    """An id beyond the vocabulary is an error, as in a plain embedding."""
    made = embedding(torch.float32)
    with pytest.raises(IndexError):
        made(torch.tensor([50]))


@EVERY_DTYPE
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(50, 48), (64, 33), (1000, 64)], ids=str)
def test_a_tied_head_multiplies_with_the_embedding(size: tuple[int, int], dtype: torch.dtype, *, bias: bool) -> None:
    """A head's product is that of the embedding's weight, without the scale of what is looked up."""
    made = embedding(dtype, 7.0, size)
    head = TiedHead(made, dtype, bias=bias)
    if bias:
        head.load_state_dict({"bias": numbers(size[0], seed=9).to(dtype)})
    head.pack()
    for count in (0, 1, 3, TiedHead.FEW + 1, 100):
        check(head, numbers(count, size[1], seed=1).to(dtype), made.state_dict())
    check(head, numbers(2, 3, size[1], seed=1).to(dtype), made.state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, unpickled])
def test_a_tied_head_stays_tied(way: Any) -> None:
    """The weight is there once: in memory, in what is saved, and in copies, which are tied among themselves."""
    made = embedding(torch.float32)
    both = torch.nn.ModuleDict({"embed": made, "head": TiedHead(made, torch.float32, bias=False)})
    for model in (both, way(both)):
        assert set(model.state_dict()) == {"embed.weight", "embed.scales"}
        assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == ["embed.weight", "embed.scales"]
        assert model["head"].weight is model["embed"].weight
        assert model["head"].scales is model["embed"].scales
    again = way(both)
    assert again["embed"].weight is not made.weight
    rows = numbers(3, 48, seed=1)
    assert torch.equal(again["head"](rows), both["head"](rows))
    with torch.no_grad():
        again["embed"].weight.zero_()
    assert again["head"](rows).eq(0).all()
    assert both["head"](rows).ne(0).any()


def test_a_head_is_saved_with_its_bias() -> None:
    """A bias of the head's own is saved under its own name."""
    made = embedding(torch.float32)
    both = torch.nn.ModuleDict({"embed": made, "head": TiedHead(made, torch.float32, bias=True)})
    assert set(both.state_dict()) == {"embed.weight", "embed.scales", "head.bias"}
