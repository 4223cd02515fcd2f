"""Wide copies of quantized layers: compared with products on weights widened by the documented format alone."""

import copy
import threading
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from lmkit.errors import OptionError, PlacementError
from lmkit.kernels.packed import packs
from lmkit.kernels.quantized import KERNEL_ROWS, Int4Linear, Int8Linear, QuantizedLinear
from lmkit.kernels.wide_copies import Copies, copies_bytes, copy_bytes, keep_copies
from lmkit.planning.machine import computes_bfloat16
from quantized_layers import filled, numbers, widened
from quantized_models import checkpoint, layers

pytestmark = pytest.mark.skipif(
    not (packs() and computes_bfloat16()), reason="this processor or torch has no bfloat16 kernel"
)  # oneDNN emulates one on AVX512, for which nothing is widened

KINDS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
WORDS = pytest.mark.parametrize("word", ["int8", "int4"])
ROOM = 2**30
MANY = KERNEL_ROWS + 1
FLOAT: Any = torch.bfloat16


def layer(kind: Any, outputs: int = 192, inputs: int = 96, most: int = ROOM, **how: Any) -> tuple[Any, Copies]:
    """Make a layer that may keep a copy."""
    made = filled(kind, numbers(outputs, inputs), FLOAT, **how)
    return made, keep_copies(made, most)


def opened(name: str, word: str, most: int = ROOM) -> Any:
    """Load a family's checkpoint in bfloat16, quantized, with a budget for copies."""
    task: Any = checkpoints.FAMILIES[name].task
    return lmkit.load(task, checkpoint(name), word, "cpu", wide_copy_bytes=most)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow for other orders of sums and for bfloat16's rounding."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-6, atol=0.02 * float(expected.float().std()))


def packed_bytes(copies: Copies) -> int:
    """Ask the library what its packed tensors take."""
    return sum(torch.ops.mkldnn._nbytes(made) for _, made in copies._made.values())


# Layers


@KINDS
@pytest.mark.parametrize("rows", [MANY, 32, 100])
@pytest.mark.parametrize("outputs", [64, 192, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_copy_multiplies_as_widened_weights_do(kind: Any, rows: int, outputs: int, *, bias: bool) -> None:
    """Many rows get what a product in float32 on the widened weights gives, rounded as bfloat16 is."""
    made, copies = layer(kind, outputs, bias=bias)
    given = numbers(rows, 96, seed=1).to(FLOAT)
    exact = given.float() @ widened(made.state_dict())[0].float().T
    if bias:
        exact += made.bias.float()
    found = made(given)
    assert copies.held_bytes > 0
    near(found, exact)


@KINDS
def test_a_copy_gives_what_the_layer_gives_without_one(kind: Any) -> None:
    """The weights that are multiplied are the same numbers, so that only the order of sums may differ."""
    plain, (kept, _) = filled(kind, numbers(192, 96), FLOAT), layer(kind)
    given = numbers(2 * kind.FEW, 96, seed=1).to(FLOAT)  # more than its kernel takes
    near(kept(given), plain(given))
    assert float((kept(given) == plain(given)).float().mean()) > 0.98


@KINDS
def test_few_rows_go_through_the_kernel(kind: Any) -> None:
    """Up to four rows make no copy, and give bit for bit what they give without a budget, also when there is one."""
    plain, (kept, copies) = filled(kind, numbers(192, 96), FLOAT), layer(kind)
    for rows in range(1, KERNEL_ROWS + 1):
        assert torch.equal(kept(numbers(rows, 96).to(FLOAT)), plain(numbers(rows, 96).to(FLOAT)))
    assert copies.held_bytes == 0
    kept(numbers(MANY, 96).to(FLOAT))
    assert copies.held_bytes > 0
    assert torch.equal(kept(numbers(1, 96).to(FLOAT)), plain(numbers(1, 96).to(FLOAT)))


@pytest.mark.parametrize("shape", [(64, 32), (192, 96), (100, 64), (1000, 160)])
def test_bytes_are_those_of_the_library(shape: tuple[int, int]) -> None:
    """What a copy counts for is what the library's tensor takes, padding included."""
    made, copies = layer(Int8Linear, *shape)
    made(numbers(MANY, shape[1]).to(FLOAT))
    assert copies.held_bytes == copy_bytes(made) == packed_bytes(copies)


def test_no_more_is_held_than_allowed() -> None:
    """Layers that come when the budget is used up go on without a copy, with the same results."""
    parts = torch.nn.Sequential(*[filled(Int4Linear, numbers(64, 64, seed=seed), FLOAT) for seed in range(3)])
    one: Any = parts[0]
    given = numbers(32, 64).to(FLOAT)
    expected = parts(given)
    copies = keep_copies(parts, 2 * copy_bytes(one) + 1)
    near(parts(given), expected)
    assert copies.held_bytes == packed_bytes(copies) == 2 * copy_bytes(one)
    assert copies_bytes(parts) == 3 * copy_bytes(one)


@KINDS
def test_a_weight_that_is_read_again_has_a_new_copy(kind: Any) -> None:
    """A state that is loaded into a layer counts from the next call on, and its old copy is gone."""
    made, copies = layer(kind)
    given = numbers(32, 96).to(FLOAT)
    made(given)
    other = filled(kind, numbers(192, 96, seed=5), FLOAT)
    made.load_state_dict(other.state_dict())
    near(made(given), given.float() @ widened(other.state_dict())[0].float().T)
    assert copies.held_bytes == packed_bytes(copies) == copy_bytes(made)


def test_released_copies_do_not_come_back() -> None:
    """After a release nothing is held or made, and layers compute without."""
    made, copies = layer(Int4Linear)
    given = numbers(32, 96).to(FLOAT)
    before = made(given)
    copies.release()
    near(made(given), before)
    assert copies.held_bytes == len(copies._made) == 0


def test_threads_make_one_copy() -> None:
    """Threads that need a copy at the same moment get right products, and its bytes are counted once."""
    made, copies = layer(Int4Linear, 512, 512)
    given = numbers(32, 512).to(FLOAT)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(made(given))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one, found[0]) for one in found)
    assert copies.held_bytes == copy_bytes(made)


def test_a_copied_layer_begins_without() -> None:
    """A deep copy of a layer shares no copy with it, and has the same budget."""
    made, _ = layer(Int4Linear)
    given = numbers(32, 96).to(FLOAT)
    first = made(given)
    other = copy.deepcopy(made)
    assert other.copies.held_bytes == 0
    assert torch.equal(other(given), first)
    assert other.copies.held_bytes == copy_bytes(made)


def test_gradients_go_through_the_layer_without() -> None:
    """What is trained beside a layer gets its gradient, which packed products have not."""
    made, copies = layer(Int4Linear)
    given = numbers(32, 96).to(FLOAT).requires_grad_()
    made(given).float().sum().backward()
    expected = widened(made.state_dict())[0].float().sum(0).expand(32, -1)
    assert given.grad is not None
    torch.testing.assert_close(given.grad.float(), expected, rtol=0.02, atol=0.1)
    assert copies.held_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_have_no_copies(dtype: torch.dtype) -> None:
    """Layers that compute in something else than bfloat16 are left alone."""
    made = filled(Int4Linear, numbers(64, 64), dtype)
    copies = keep_copies(made, ROOM)
    made(numbers(32, 64).to(dtype))
    assert (copies.held_bytes, copies_bytes(made), made.copies) == (0, 0, None)


# Models


@WORDS
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_model_holds_what_its_plan_reserved(name: str, word: str) -> None:
    """Copies are made by the first batch, counted while they are held as planned, and given back when closed."""
    with opened(name, word) as wrapper, opened(name, word, 0) as plain:
        bare = plain.memory_bytes
        assert wrapper.memory_bytes == bare
        assert "bfloat16 copies" in wrapper.plan.reasons["copies"]
        reserved = wrapper.plan.beside_bytes - plain.plan.beside_bytes
        options: Any = {} if name == "bert" else {"max_new_tokens": 6}
        many = checkpoints.texts(name) * 3
        wrapper(many, **options)
        found = [module for module in wrapper.model.modules() if isinstance(module, QuantizedLinear)]
        copies = wrapper._loaded.copies
        assert wrapper.memory_bytes - bare == copies.held_bytes == packed_bytes(copies) > 0
        assert copies.held_bytes <= reserved == sum(copy_bytes(one) for one in found)
        assert plain.memory_bytes == bare
    assert copies.held_bytes == len(copies._made) == 0


@WORDS
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_of_the_widened_weights(name: str, word: str) -> None:
    """Rows are as near to float32 on the widened weights as plain transformers is in bfloat16 on them."""
    with opened(name, word) as wrapper, torch.no_grad():
        plain, _ = checkpoints.plain("causal", checkpoint(name))
        for path, module in layers(wrapper.model).items():
            own, weight = plain.get_submodule(path), widened(module.state_dict())[0]
            own.weight.copy_(weight.T if module.__dict__.get("transposed") else weight)
        given = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))
        found, half, exact = (
            model(given).logits.float() for model in (wrapper.model, plain.bfloat16(), copy.deepcopy(plain).float())
        )
        assert wrapper.memory_bytes > sum(module.bytes for module in wrapper.modules)
    assert (found - exact).square().mean() < 2 * (half - exact).square().mean()


def test_a_budget_for_nothing_says_so() -> None:
    """Where there is nothing to copy, the plan says that the budget is of no use, and reserves nothing."""
    found = lmkit.plan("causal", checkpoint("llama"), "bfloat16", "cpu", wide_copy_bytes=10**9)
    without = lmkit.plan("causal", checkpoint("llama"), "bfloat16", "cpu")
    assert found.reasons["copies"].startswith("none")
    assert found.beside_bytes == without.beside_bytes
    assert "copies" not in without.reasons


@WORDS
def test_copies_have_to_fit(word: str) -> None:
    """A budget that does not fit beside the weights is refused, and the message says what would."""
    folder = checkpoint("llama")
    plain = lmkit.plan("causal", folder, word, "cpu")
    room = plain.weights_bytes + plain.beside_bytes
    assert lmkit.plan("causal", folder, word, {"cpu": room}).fits
    assert lmkit.plan("causal", folder, word, {"cpu": room + 5000}, wide_copy_bytes=5000).fits
    with pytest.raises(PlacementError, match="Without wide_copy_bytes it would fit"):
        lmkit.load("causal", folder, word, {"cpu": room + 4999}, wide_copy_bytes=5000)


@pytest.mark.parametrize("given", [-1, "1GiB", 0.5])
def test_other_budgets_are_refused(given: Any) -> None:
    """A budget is a whole number of bytes."""
    with pytest.raises(OptionError, match=r"wide_copy_bytes=.* is not accepted: pass a whole number of bytes"):
        lmkit.plan("causal", checkpoint("llama"), "int4", "cpu", wide_copy_bytes=given)


def test_accelerators_hold_no_copies() -> None:
    """Copies are for the CPU's kernels: a plan for a card reserves none."""
    card = lmkit.plan("causal", checkpoint("llama"), "int4", {"cuda:0": "24GiB"}, wide_copy_bytes=10**9)
    assert card.reasons["copies"].startswith("none")
    assert card.beside_bytes == lmkit.plan("causal", checkpoint("llama"), "int4", {"cuda:0": "24GiB"}).beside_bytes
