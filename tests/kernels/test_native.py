"""lmkit's own kernels against float64, on weights widened by the documented format and rows rounded as it says."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.errors import OptionError
from lmkit.kernels.native import build, linear
from lmkit.kernels.native.build import INSTRUCTIONS, NoKernelsError
from lmkit.kernels.native.operators import refusal
from lmkit.kernels.ordered import put_on
from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.tied import Int8Embedding, TiedHead
from lmkit.loading import reading
from native_kernels import CACHE, HERE, NEEDED, kernels
from quantized_layers import filled, numbers, widened

pytestmark = [NEEDED, pytest.mark.usefixtures("one_thread")]
DTYPES = (torch.float32, torch.bfloat16)
KINDS: tuple[Any, ...] = (Int8Linear, Int4Linear)
EVERY_ISA = pytest.mark.parametrize("isa", HERE)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.NAME)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def native(layer: Any, isa: str = HERE[0] if HERE else "") -> Any:
    """Bring a layer into the kernels' order."""
    kernels(isa)
    assert layer.to_native(isa)
    return layer


def rounded(rows: torch.Tensor, bits: int, isa: str) -> torch.Tensor:
    """Round rows as the documentation says.

    To 127 steps up to the largest magnitude of each 32 numbers, or 16 before weights in 4 bits; to 127 * 256 steps up
    to the largest of all where AMX multiplies by 8 bits.
    """
    share, steps = (16 if bits == 4 else 32), 127
    if isa == "amx" and bits == 8:
        share, steps = max(rows.shape[-1], 1), 127 * 256
    found = torch.zeros(rows.shape, dtype=torch.float64)
    for first in range(0, rows.shape[-1], share):
        part = rows[..., first : first + share].float()
        most = part.abs().amax(-1, keepdim=True)
        whole = (part * torch.tensor(float(steps)).div(most.clamp(min=1e-34))).round()
        found[..., first : first + share] = whole.double() * (most / steps).double()
    return found


def check(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Compare a layer's product with that of its widened weight and rounded rows in float64; return it."""
    weight, size = widened(layer.state_dict())
    near = rounded(rows, layer.BITS, layer.native)
    if layer.BITS == 4 and linear.widens(rows, layer.native):
        near, weight = rows.double(), weight.to(torch.bfloat16).double()
    found = layer(rows)
    exact, most = near @ weight.T, near.abs() @ size.T
    if layer.bias is not None:
        exact, most = exact + layer.bias.double(), most + layer.bias.double().abs()
    assert found.dtype is rows.dtype
    assert found.shape == (*rows.shape[:-1], layer.out_features)
    # The result is rounded to the dtype, and sums to float32, one addition or two a group.
    slack = torch.finfo(torch.float32).eps * (4 + layer.in_features / 16)
    result = torch.finfo(rows.dtype).eps * exact.abs() if rows.dtype is torch.bfloat16 else 0
    assert ((found.double() - exact).abs() <= slack * most + result + 1e-30).all()
    return found


# Products ---------------------------------------------------------------------------------------


@EVERY_ISA
@EVERY_KIND
@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 200),
    shape=st.lists(st.integers(0, 8), max_size=2),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@PROPERTY
def test_any_shape(
    kind: Any, isa: str, outputs: int, inputs: int, shape: list[int], *, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    """Whatever the rows, inputs and outputs, the product is that of the widened weight with rounded rows."""
    inputs = inputs if kind is Int8Linear else -(-inputs // 32) * 32
    layer = native(filled(kind, numbers(outputs, inputs, seed=seed), dtype, bias=bias), isa)
    check(layer, numbers(*shape, inputs, seed=seed + 1).to(dtype))


@EVERY_ISA
@EVERY_KIND
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@PROPERTY
def test_any_numbers(kind: Any, isa: str, data: st.DataObject, dtype: torch.dtype) -> None:
    """Whatever finite numbers a row has, the product is in range and right; below 1e-36 a group counts as zeros."""
    layer = native(filled(kind, numbers(33, 64), dtype), isa)
    number = st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1, 1, width=32), st.just(-0.0))
    row = torch.tensor([data.draw(st.lists(number, min_size=64, max_size=64))])
    check(layer, torch.where(row.abs() < 1e-30, 0, row).to(dtype))
    assert torch.equal(layer(row.sign().to(dtype) * 1e-37), torch.zeros(1, 33, dtype=dtype))


@EVERY_ISA
@pytest.mark.parametrize("extreme", [-128, 127])
def test_no_sum_is_saturated(isa: str, extreme: int) -> None:
    """Weights and rows of the largest magnitudes, all of one sign or of both, give exact products."""
    ops, rows = kernels(isa), torch.ones(2, 256)
    rows[1, ::2] = -1
    weights = torch.full((40, 256), extreme, dtype=torch.int8)
    weights[1::2, ::2] = -127
    found = ops.linear(rows, linear.pack8(weights), torch.ones(40), None, 8, 40)
    assert torch.equal(found.round(), (rows @ weights.float().T).round())
    levels = torch.full((40, 128), 0xFF if extreme > 0 else 0xF0, dtype=torch.uint8)
    pairs = torch.tensor([1.0, 8.0]).expand(8, 40, 2)
    found = ops.linear(rows, linear.pack4(levels), linear.pack_scales(pairs), None, 4, 40)
    wide = torch.stack((levels & 15, levels >> 4), -1).flatten(1).float()
    torch.testing.assert_close(found, rows @ wide.T, rtol=1e-5, atol=1e-3)


@EVERY_ISA
@EVERY_DTYPE
@EVERY_KIND
def test_rows_need_not_lie_together(kind: Any, dtype: torch.dtype, isa: str) -> None:
    """Views of larger tensors, also such as begin at odd places, are multiplied like their copies."""
    layer = native(filled(kind, numbers(70, 64), dtype, bias=True), isa)
    whole = numbers(5, 7, 192, seed=1).to(dtype)
    for view in (
        whole[:, -1, 1:65],
        whole[:, :, 64:128],
        whole[:1, 0, :64].expand(9, 64),
        whole[..., ::3],
        whole.flatten()[3:67],
    ):
        check(layer, view)


@EVERY_ISA
@EVERY_KIND
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@given(row=st.integers(0, 12), place=st.integers(0, 95))
@settings(PROPERTY, max_examples=20)
def test_what_is_not_finite_stays_in_its_row(kind: Any, isa: str, bad: float, row: int, place: int) -> None:
    """A row with NaN or infinity gives NaN, or infinity; the others give what they would without it."""
    for dtype in DTYPES:
        layer = native(filled(kind, numbers(33, 96), dtype), isa)
        rows = numbers(13, 96, seed=1).to(dtype)
        expected = layer(rows)
        rows[row, place] = bad
        found = layer(rows)
        assert not found[row].isfinite().any()
        others = torch.arange(13) != row
        assert torch.equal(found[others], expected[others])


@EVERY_ISA
@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 13, 300])
def test_a_row_is_computed_as_if_it_were_alone(kind: Any, dtype: torch.dtype, isa: str, count: int) -> None:
    """Bit for bit: whatever rows are beside it, and with two threads as with one.

    With AMX, weights in 4 bits are widened for eight rows in bfloat16 and more: these are alike among themselves.
    """
    layer = native(filled(kind, numbers(200, 1408), dtype, bias=True), isa)
    rows = numbers(count, 1408, seed=1).to(dtype)
    together = layer(rows)
    least = linear.MANY if kind is Int4Linear and linear.widens(rows, isa) else 1
    for place in {0, count // 2, count - 1}:
        assert torch.equal(layer(rows[place].expand(least, -1))[0], together[place])
    torch.set_num_threads(2)
    assert torch.equal(layer(rows), together)


@EVERY_ISA
@EVERY_KIND
def test_gradients_go_through_to_the_input(kind: Any, isa: str) -> None:
    """An adapter below a layer can be trained: such rows are not rounded."""
    layer = native(filled(kind, numbers(50, 64), torch.float32), isa)
    rows, grown = numbers(7, 64, seed=1).requires_grad_(), numbers(7, 50, seed=2)
    weight = widened(layer.state_dict())[0]
    product = layer(rows)
    torch.testing.assert_close(product.double(), rows.double() @ weight.T, rtol=1e-4, atol=1e-3)
    product.backward(grown)
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.double(), grown.double() @ weight, rtol=1e-4, atol=1e-3)


@EVERY_ISA
@EVERY_KIND
def test_operators_can_be_traced(kind: Any, isa: str) -> None:
    """The check of operators that torch has finds shapes, dtypes and aliasing as they are described."""
    layer = native(filled(kind, numbers(50, 64), torch.float32, bias=True), isa)
    for rows in (numbers(3, 64), numbers(2, 5, 64)):
        arguments = (rows, layer.weight, layer.scales, layer.bias, kind.BITS, 50)
        torch.library.opcheck(kernels(isa).linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_tensors_are_refused() -> None:
    """A weight, scales, a bias or rows that do not belong together are errors, and nothing is read beyond their end."""
    ops, rows, weight, scales = (
        kernels(),
        numbers(2, 64),
        linear.pack8(torch.ones(40, 64, dtype=torch.int8)),
        torch.ones(40),
    )
    for arguments in (
        (torch.tensor(1.0), weight, scales, None, 8, 40),
        (torch.ones(2, 0), weight[:0], scales, None, 8, 40),
        (rows[:, :32], weight, scales, None, 8, 40),
        (rows, weight, scales[:39], None, 8, 40),
        (rows, weight, scales, torch.ones(39), 8, 40),
        (rows, weight, scales, None, 4, 40),
        (rows, weight, scales, None, 3, 40),
        (rows[:, :40], weight[:, :32].contiguous(), torch.ones(2, 64, 2), None, 4, 40),
        (rows.half(), weight, scales.half(), None, 8, 40),
        (rows.bfloat16(), weight, scales, None, 8, 40),
    ):
        with pytest.raises(RuntimeError):
            ops.linear(*arguments)


@EVERY_KIND
def test_rows_of_another_length_are_refused(kind: Any) -> None:
    """Also where they would fill the same groups."""
    layer = native(filled(kind, numbers(50, 64), torch.float32))
    for length in (40, 63, 96, 1):
        with pytest.raises(RuntimeError):
            layer(numbers(3, length))


# Layers -----------------------------------------------------------------------------------------


@EVERY_DTYPE
@EVERY_KIND
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("outputs", [64, 50])
def test_what_is_saved_is_what_was_loaded(kind: Any, dtype: torch.dtype, outputs: int, *, packed: bool) -> None:
    """A layer in the kernels' order saves the documented one, reads it again, and can be copied and pickled."""
    plain = filled(kind, numbers(outputs, 96), dtype, bias=True, packed=packed)
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    layer = native(plain)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - its own
        found = one.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        check(one, numbers(3, 96, seed=1).to(dtype))
    other = filled(kind, numbers(outputs, 96, seed=5), dtype, bias=True, packed=False).state_dict()
    layer.load_state_dict(other)
    assert layer.native is not None
    assert all(torch.equal(tensor, other[name]) for name, tensor in layer.state_dict().items())
    check(layer, numbers(3, 96, seed=1).to(dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [64, 77])
def test_an_embedding_is_looked_up_and_is_the_head(tokens: int, dtype: torch.dtype) -> None:
    """Tokens are found as before, those beyond the table are refused, and the head multiplies with the same weight."""
    embedding = Int8Embedding(tokens, 40, dtype, embed_scale=2.0)
    numbers_, scales = Int8Linear.quantize(numbers(tokens, 40), dtype)
    embedding.load_state_dict({"weight": numbers_, "scales": scales})
    head = TiedHead(embedding, dtype, bias=False)
    ids = torch.tensor([[0, 31, 32], [tokens - 1, 5, 5]])
    expected = embedding(ids)
    assert put_on(torch.nn.ModuleList([head, embedding]), HERE[0]) == 2
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding.state_dict()["weight"], numbers_)
    assert not head.state_dict()
    with pytest.raises(IndexError):
        embedding(torch.tensor([tokens]))
    exact = rounded(numbers(3, 40, seed=1).to(dtype), 8, HERE[0]) @ (numbers_.double() * scales.double()[:, None]).T
    torch.testing.assert_close(head(numbers(3, 40, seed=1).to(dtype)).double(), exact, rtol=2e-2, atol=2e-2)


@EVERY_KIND
def test_float16_stays_with_torch(kind: Any) -> None:
    """A layer in float16 is left as it is, and one that is cast to it afterwards still multiplies."""
    assert not filled(kind, numbers(64, 64), torch.float16).to_native(HERE[0])
    rows = numbers(3, 64, seed=1)
    layer = native(filled(kind, numbers(64, 64), torch.float32))
    expected = rows.double() @ widened(layer.state_dict())[0].T
    torch.testing.assert_close(layer.half()(rows.half()).double(), expected, rtol=0.02, atol=0.2)


# Models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_model_is_put_on_kernels_and_saved_without(name: str, word: Any, tmp_path: Path) -> None:
    """With compile="kernels" the plan says so, scores are close to those without, and what is saved opens anywhere."""
    kernels()
    task, folder = checkpoints.FAMILIES[name].task, str(checkpoints.folder(name))
    load: Any = lmkit.load
    with load(task, folder, word, "cpu") as plain, load(task, folder, word, "cpu", compile="kernels") as fast:
        assert (plain.plan.kernels, fast.plan.kernels) == ("torch", "native")
        assert linear.rounding(HERE[0]) in fast.plan.reasons["kernels"]
        assert any(getattr(module, "native", None) for module in fast.model.modules())
        expected, found = plain.model.state_dict(), fast.model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        fast.model.save_pretrained(tmp_path)
        fast.tokenizer.save_pretrained(tmp_path)
        if task == "masked":
            return
        prompts = texts(name)[:3]
        close, exact = ([one.score(prompt, " and").logprob for prompt in prompts] for one in (fast, plain))
        assert close == pytest.approx(exact, rel=0.05)
    with load(task, str(tmp_path), devices="cpu", compile="kernels") as again:
        assert again.plan.kernels == "native"
        found = again.model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_plan_counts_nothing_beside_kernels() -> None:
    """Integers are brought into another order; and what is not quantized by lmkit is planned as without the option."""
    folder = str(checkpoints.folder("llama"))
    found = lmkit.plan("causal", folder, "int8", "cpu", compile="kernels")
    assert (found.kernels, found.compiled) == ("native", False)
    assert found.beside_bytes == lmkit.plan("causal", folder, "int8", "cpu").beside_bytes
    assert lmkit.plan("causal", folder, "float32", "cpu", compile="kernels").kernels == "torch"
    assert lmkit.plan("causal", folder, "int8", "cpu").kernels == "torch"


def test_another_word_is_refused() -> None:
    """compile= takes True, False or "kernels"."""
    with pytest.raises(OptionError, match="pass True, False or 'kernels'"):
        lmkit.load("causal", str(checkpoints.folder("llama")), compile="fast")  # type: ignore[call-overload]


@pytest.mark.parametrize("hide", ["compiler", "processor"])
def test_a_plan_says_why_there_are_no_kernels(hide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, or on another processor, torch's kernels compute, and the plan has the reason."""
    if hide == "compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_vnni": True})
    folder = str(checkpoints.folder("llama"))
    with lmkit.load("causal", folder, "int8", "cpu", compile="kernels") as generator:
        assert generator.plan.kernels == "torch"
        expected = {
            "compiler": "no C++ compiler is here (c++, g++, clang++)",
            "processor": "neither AVX2 nor AVX512-VNNI",
        }
        assert expected[hide] in generator.plan.reasons["kernels"]
        assert generator("She", max_new_tokens=3).token_ids


def test_a_build_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What only the build shows is logged as a warning and stands in the wrapper's plan; torch's kernels compute."""

    def fails(_isa: str) -> None:
        raise NoKernelsError("what was compiled multiplies wrongly")

    monkeypatch.setattr(reading, "operators", fails)
    with lmkit.load("causal", str(checkpoints.folder("llama")), "int4", "cpu", compile="kernels") as generator:
        assert generator.plan.kernels == "torch"
        assert "multiplies wrongly" in generator.plan.reasons["kernels"]
        assert "multiplies wrongly" in caplog.text
        assert generator("She", max_new_tokens=3).token_ids


# Building ---------------------------------------------------------------------------------------

BUILD = "from lmkit.kernels.native.operators import operators; operators()"


def building(cache: Path, compiler: str | None = None) -> dict[str, Any]:
    """Return how to build in another process, with a compiler of one's own."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache)} | ({"CXX": compiler} if compiler else {})
    return {"args": [sys.executable, "-c", BUILD], "env": env}


def built(cache: Path, compiler: str | None = None) -> str:
    """Build in another process; return its errors."""
    done = subprocess.run(**building(cache, compiler), capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(done.stderr)
    return done.stderr


def test_every_set_of_instructions_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what this processor cannot run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    for isa in set(INSTRUCTIONS) - set(HERE):
        build.library(isa, f"lmkit_{isa}", lambda _path: None)
        assert list(CACHE.rglob(build.LIBRARY))


@pytest.mark.parametrize(
    "compiler, told",
    [("false", "does not compile them"), ("no-such-compiler", "no C++ compiler is here (no-such-compiler)")],
)
def test_a_compiler_that_fails_is_named(compiler: str, told: str, tmp_path: Path) -> None:
    """The error names the compiler, and nothing is left in the cache."""
    assert told in built(tmp_path, compiler)
    assert not list(tmp_path.rglob("*.so"))
    assert all(not list(folder.iterdir()) for folder in tmp_path.glob("lmkit/kernels"))


def test_without_a_home_there_is_no_place_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs with the number of a user whom it does not know: torch's kernels compute."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(NoKernelsError, match=r"there is no home folder .*: set XDG_CACHE_HOME"):
        build.library("avx2", "lmkit_nowhere", lambda _path: None)


def test_a_wrong_kernel_is_not_used() -> None:
    """Kernels that are off by 1%, that swap outputs or that give NaN do not pass their trial."""
    ops = kernels()
    linear.check(ops, HERE[0])
    for spoil in (lambda found: found * 1.01, lambda found: found.roll(1, -1), lambda found: found * torch.nan):

        class Spoilt:
            @staticmethod
            def linear(*given: Any, spoil: Any = spoil) -> torch.Tensor:
                wrong: torch.Tensor = spoil(ops.linear(*given))
                return wrong

        with pytest.raises(NoKernelsError, match="multiplies wrongly"):
            linear.check(Spoilt, HERE[0])


def test_a_build_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """After a kill half way the next process compiles anew; a damaged library is compiled again too."""
    slow = tmp_path / "slow"
    slow.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho half > "$(for last; do :; done; echo "$last")"\nsleep 60\n'
    )
    slow.chmod(0o755)
    process = subprocess.Popen(**building(tmp_path, str(slow)), start_new_session=True)
    while not list(tmp_path.rglob(build.LIBRARY)) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.rglob(build.LIBRARY)
    assert left.read_text() == "half\n"
    assert built(tmp_path) == ""
    (made,) = [path for path in tmp_path.rglob(build.LIBRARY) if path != left]
    assert made.parent.stat().st_mode & 0o777 == 0o700
    before = made.stat().st_mtime_ns
    assert built(tmp_path) == ""
    assert made.stat().st_mtime_ns == before
    made.write_bytes(b"damaged")
    assert built(tmp_path) == ""
    assert made.stat().st_size > 1000


def test_nothing_speaks_against_kernels_here() -> None:
    """What a plan asks before it promises kernels agrees with what was built."""
    assert refusal() is None
