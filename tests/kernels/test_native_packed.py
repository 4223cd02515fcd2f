"""lmkit's own product in bfloat16, which needs AMX, against float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
import gguf_tiny
import lmkit
from checkpoints import texts
from lmkit.kernels import packed as packing
from lmkit.kernels.native import build, linear
from lmkit.kernels.native.build import NoKernelsError
from lmkit.kernels.packed import Order, PackedLinear, multiplies
from lmkit.loading import reading
from native_kernels import HERE, kernels
from quantized_layers import numbers

pytestmark = [
    pytest.mark.skipif("amx" not in HERE, reason="this processor has no AMX"),
    pytest.mark.usefixtures("one_thread"),
]
BF16 = torch.bfloat16


def multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with the kernel."""
    found: torch.Tensor = kernels("amx").packed_linear(rows, linear.pack16(weight), bias, len(weight))
    return found


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 200),
    shape=st.lists(st.integers(0, 9), max_size=2),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(outputs: int, inputs: int, shape: list[int], *, bias: bool, seed: int) -> None:
    """Whatever the rows, inputs and outputs, the product is that of float64, rounded."""
    weight, rows = numbers(outputs, inputs, seed=seed).to(BF16), numbers(*shape, inputs, seed=seed + 1).to(BF16)
    added = numbers(outputs, seed=seed + 2).to(BF16) if bias else None
    found = multiply(rows, weight, added)
    exact, most = rows.double() @ weight.double().T, rows.double().abs() @ weight.double().abs().T
    exact, most = (exact, most) if added is None else (exact + added.double(), most + added.double().abs())
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * most + 1e-30).all()
    assert torch.equal(linear.unpack16(linear.pack16(weight))[:outputs, :inputs], weight)


@pytest.mark.parametrize("count", [1, 4, 16, 17, 33, 300, 1000])
def test_a_row_is_computed_as_if_it_were_alone(count: int) -> None:
    """Bit for bit: whatever rows are beside it, and with two threads as with one."""
    weight, rows = numbers(200, 1408).to(BF16), numbers(count, 1408, seed=1).to(BF16)
    together = multiply(rows, weight)
    for place in {0, count // 2, count - 1}:
        assert torch.equal(multiply(rows[place], weight), together[place])
    torch.set_num_threads(2)
    assert torch.equal(multiply(rows, weight), together)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 15, 16, 39])
def test_what_is_not_finite_stays_in_its_row(bad: float, row: int) -> None:
    """A row with NaN or infinity gives that; the others give what they would without it."""
    weight, rows = numbers(33, 90).to(BF16), numbers(40, 90, seed=1).to(BF16)
    expected = multiply(rows, weight)
    rows[row, 77] = bad
    found = multiply(rows, weight)
    assert not found[row].isfinite().any()
    others = torch.arange(40) != row
    assert torch.equal(found[others], expected[others])


def test_rows_need_not_lie_together() -> None:
    """Views of larger tensors are multiplied like their copies."""
    weight, whole = numbers(70, 64).to(BF16), numbers(5, 7, 192, seed=1).to(BF16)
    for view in (whole[:, -1, 1:65], whole[:1, 0, :64].expand(9, 64), whole[..., ::3], whole.flatten()[3:67]):
        assert torch.equal(multiply(view, weight), multiply(view.contiguous(), weight))


def test_wrong_tensors_are_refused() -> None:
    """What does not belong together is an error, and nothing is read beyond its end."""
    ops, rows, weight = kernels("amx"), numbers(2, 64).to(BF16), linear.pack16(numbers(40, 64).to(BF16))
    for arguments in (
        (torch.tensor(1.0, dtype=BF16), weight, None, 40),
        (rows[:, :0], weight[:0], None, 40),
        (rows[:, :32], weight, None, 40),
        (rows, weight, None, 70),
        (rows, weight, torch.ones(39, dtype=BF16), 40),
        (rows, weight, torch.ones(40), 40),
        (rows.float(), weight, None, 40),
        (rows, weight.float(), None, 40),
    ):
        with pytest.raises(RuntimeError):
            ops.packed_linear(*arguments)


def test_the_operator_can_be_traced() -> None:
    """The check of operators that torch has finds shapes, dtypes and aliasing as they are described."""
    weight, bias = linear.pack16(numbers(50, 64).to(BF16)), numbers(50).to(BF16)
    for rows in (numbers(3, 64).to(BF16), numbers(2, 5, 64).to(BF16)):
        arguments = (rows, weight, bias, 50)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(kernels("amx").packed_linear.default, arguments, test_utils=checks)


def test_a_wrong_kernel_is_not_used() -> None:
    """One that is off by 2% does not pass its trial."""
    ops = kernels("amx")

    class Spoilt:
        linear = ops.linear

        @staticmethod
        def packed_linear(*given: Any) -> torch.Tensor:
            wrong: torch.Tensor = ops.packed_linear(*given) * 1.02
            return wrong

    with pytest.raises(NoKernelsError, match="multiplies wrongly: 16 bits"):
        linear.check(Spoilt, "amx")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_model_in_bfloat16_is_put_on_the_kernel(name: str) -> None:
    """With compile="kernels" the plan says so, its weights come back, and scores are those without but for rounding."""
    assert multiplies("amx")
    task, folder = checkpoints.FAMILIES[name].task, str(checkpoints.folder(name))
    load: Any = lmkit.load
    with (
        load(task, folder, "bfloat16", "cpu") as plain,
        load(task, folder, "bfloat16", "cpu", compile="kernels") as own,
    ):
        assert (plain.plan.kernels, own.plan.kernels) == ("packed", "native")
        assert "this processor's amx" in own.plan.reasons["kernels"]
        layers = [module for module in own.model.modules() if isinstance(module, PackedLinear)]
        assert {layer.kernel.isa for layer in layers} == {"amx"}
        expected, found = plain.model.state_dict(), own.model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        ids, _ = checkpoints.inputs(name, [texts(name)[1]])
        more = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
        with torch.no_grad():
            close, exact = (one.model(input_ids=ids, **more).logits.float() for one in (own, plain))
        assert (close - exact).abs().mean() <= 0.05 * exact.std()


def test_where_the_kernel_fails_torchs_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the build shows stands in the wrapper's plan, and layers are packed as without the option."""

    def fails(_isa: str) -> None:
        raise NoKernelsError("what was compiled multiplies wrongly")

    monkeypatch.setattr(reading, "operators", fails)
    with lmkit.load("causal", str(checkpoints.folder("llama")), "bfloat16", "cpu", compile="kernels") as generator:
        assert generator.plan.kernels == "packed"
        assert "multiplies wrongly" in generator.plan.reasons["kernels"]
        assert generator("She", max_new_tokens=3).token_ids


def test_joined_layers_share_one_weight() -> None:
    """What multiplies for q, k and v is there once, and the model takes what its plan says."""
    with lmkit.load("causal", str(checkpoints.folder("llama")), "bfloat16", "cpu", compile="kernels") as generator:
        attention = generator.model.model.layers[0].self_attn
        whole = attention.q_proj.joint.whole
        places = {layer.packed.data_ptr() for layer in (attention.q_proj, attention.k_proj, attention.v_proj)}
        assert places == {whole.packed.data_ptr()}


def test_a_gguf_file_in_bfloat16_is_put_on_the_kernel(tmp_path: Path) -> None:
    """Its model has a quantizer of transformers', although nothing is quantized."""
    gguf_tiny.save(tmp_path / "tiny.gguf")
    with lmkit.load("causal", tmp_path / "tiny.gguf", "bfloat16", "cpu", compile="kernels") as generator:
        assert generator.plan.kernels == "native"
        layers = [module for module in generator.model.modules() if isinstance(module, PackedLinear)]
        assert {layer.kernel.isa for layer in layers} == {"amx"}
        assert generator("She", max_new_tokens=3).token_ids


def test_a_pickle_is_opened_in_the_order_of_its_new_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a processor with AMX, and one of an earlier version, which wrote no order."""
    plain = torch.nn.Linear(64, 40).to(BF16)
    kernels("amx")
    packed = PackedLinear(plain, tied=False, kernel=Order("amx"))
    state = packed.__getstate__()
    monkeypatch.setattr(packing, "instructions", lambda: "avx2")
    for written in (state, {name: value for name, value in state.items() if name != "kernel"}):
        again = object.__new__(PackedLinear)
        again.__setstate__(written)
        assert again.kernel == Order()
        assert torch.equal(again.weight, plain.weight)


@pytest.mark.parametrize("refusing", ["system", "compiler"])
def test_without_tiles_vectors_compute(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses tiles, or the compiler is older than they are, the next best instructions are taken."""
    assert build.instructions() == "amx"
    if refusing == "system":
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    else:
        monkeypatch.setattr(build, "_version", lambda _path: "g++ (Debian 10.2.1-6) 10.2.1 20210110")
    assert build.instructions() == "avx512bf16"
    plan = lmkit.plan("causal", str(checkpoints.folder("llama")), "bfloat16", "cpu", compile="kernels")
    assert plan.kernels == "packed"
