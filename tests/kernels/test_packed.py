"""Linear layers in the order of a CPU's bfloat16 kernel."""

import copy
import gc
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

import checkpoints
import lmkit
from lmkit.kernels.packed import Order, PackedLinear, pack, packs
from native_kernels import HERE, kernels

pytestmark = pytest.mark.skipif(not packs(), reason="this processor or this torch has no bfloat16 kernel to pack for")
BF16 = torch.bfloat16
OWN = pytest.param(Order("amx"), marks=pytest.mark.skipif("amx" not in HERE, reason="this processor has no AMX"))
EVERY_KERNEL = pytest.mark.parametrize("kernel", [Order(), OWN], ids=lambda kernel: kernel.isa or "torch")


@pytest.fixture(autouse=True)
def own() -> None:
    """Have lmkit's own kernels built, where one is tried."""
    if "amx" in HERE:
        kernels("amx")


def layer(inputs: int = 48, outputs: int = 80, *, bias: bool = True, seed: int = 0) -> torch.nn.Linear:
    """Make a linear layer in bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(inputs, outputs, bias=bias).to(BF16).requires_grad_(requires_grad=False)


def loaded(name: str, precision: str = "bfloat16", where: Path | None = None) -> Any:
    """Load a family in bfloat16, packed."""
    task = checkpoints.FAMILIES[name].task
    return lmkit.load(task, str(where or checkpoints.folder(name)), precision, "cpu")


def packed_in(model: Any) -> list[PackedLinear]:
    """Return the packed layers of a model."""
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@EVERY_KERNEL
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 5, 48), (2, 1, 1, 48)], ids=str)
@pytest.mark.parametrize("outputs", [1, 17, 80, 1000])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_packed_layer_multiplies_like_the_plain_one(
    shape: tuple[int, ...], outputs: int, kernel: Order, *, bias: bool
) -> None:
    """The product is the layer's own in float32, but for bfloat16's rounding, whatever the shape."""
    plain = layer(outputs=outputs, bias=bias)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    found = PackedLinear(plain, tied=False, kernel=kernel)(given)
    exact = linear(given.float(), plain.weight.float(), plain.bias.float() if bias else None)
    assert found.dtype is BF16
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found, plain(given), rtol=2**-6, atol=2**-6)


@EVERY_KERNEL
def test_the_weight_comes_back_bit_by_bit(kernel: Order) -> None:
    """What asks for the weight, or saves it, gets the one that was packed."""
    plain = layer()
    packed = PackedLinear(plain, tied=False, kernel=kernel)
    assert torch.equal(packed.state_dict()["weight"], plain.weight)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.weight is packed.weight
    assert set(packed.state_dict()) == {"weight", "bias"}
    assert torch.equal(packed.state_dict()["bias"], plain.bias)


def unpickled(module: Any) -> Any:
    """Return what a module's pickle gives."""
    return pickle.loads(pickle.dumps(module))  # noqa: S301 - written in the line itself


@EVERY_KERNEL
@pytest.mark.parametrize("way", [copy.deepcopy, unpickled])
@torch.no_grad()
def test_copies_are_packed_too(way: Any, kernel: Order) -> None:
    """A deep copy and an unpickled one are packed layers of their own with the same weight and products."""
    packed = PackedLinear(layer(), tied=False, kernel=kernel)
    again = way(packed)
    given = torch.randn(3, 48).to(BF16)
    assert type(again) is PackedLinear
    assert torch.equal(again(given), packed(given))
    assert torch.equal(again.state_dict()["weight"], packed.state_dict()["weight"])
    assert (again.in_features, again.out_features) == (48, 80)


@EVERY_KERNEL
def test_gradients_go_through_to_the_input(kernel: Order) -> None:
    """An adapter below a layer can be trained, and so can its bias."""
    plain = layer()
    packed = PackedLinear(copy.deepcopy(plain), tied=False, kernel=kernel)
    mine, theirs = (torch.ones(3, 48, dtype=BF16, requires_grad=True) for _ in range(2))
    for one, rows in ((packed, mine), (plain, theirs)):
        assert one.bias is not None
        one.bias.requires_grad_()
        one(rows).sum().backward()
    assert packed.bias is not None
    assert packed.bias.grad is not None
    assert torch.equal(packed.bias.grad, plain.bias.grad)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.equal(mine.grad, theirs.grad)


def test_only_plain_bfloat16_layers_are_packed() -> None:
    """Other dtypes, subclasses, and layers with hooks stay as they are."""

    class Own(torch.nn.Linear):
        """Somebody's own layer, a quantized one or an adapter's."""

    hooked, moved = layer(), layer()
    hooked.register_forward_pre_hook(lambda *_: None)
    moved._hf_hook = object()  # type: ignore[assignment]
    model = torch.nn.ModuleDict(
        {
            "plain": layer(),
            "inside": torch.nn.Sequential(layer(), torch.nn.ReLU()),
            "wide": layer().float(),
            "narrow": layer().half(),
            "own": Own(48, 80).to(BF16),
            "hooked": hooked,
            "moved": moved,
            "meta": layer().to("meta"),
        }
    )
    assert pack(model) == 2
    found = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert found == {"plain", "inside.0"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "bert", "m2m100"])
def test_a_packed_model_writes_and_saves_what_the_plain_one_does(name: str, tmp_path: Path) -> None:
    """In bfloat16 a model is packed; saved again its weights equal the checkpoint's own, rounded once."""
    with loaded(name) as wrapper:
        assert wrapper.plan.kernels == "packed"
        assert packed_in(wrapper.model)
        wrapper(
            checkpoints.texts(name)[0],
            **({} if name == "bert" else {"max_new_tokens": 4} | checkpoints.languages(name)),
        )
        wrapper.model.save_pretrained(tmp_path)
    model = getattr(checkpoints.hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])
    plain = model.from_pretrained(checkpoints.folder(name), dtype=BF16)
    plain.save_pretrained(tmp_path / "plain")
    mine, theirs = (load_file(where / "model.safetensors") for where in (tmp_path, tmp_path / "plain"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_the_scores_are_those_of_the_plain_model(name: str) -> None:
    """A packed model's scores are those of plain bfloat16, as near as its rounding goes."""
    auto = getattr(checkpoints.hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])
    plain = auto.from_pretrained(checkpoints.folder(name), dtype=BF16).eval()
    ids, _ = checkpoints.inputs(name, [checkpoints.texts(name)[1]])
    more = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
    with loaded(name) as wrapper, torch.no_grad():
        mine = wrapper.model(input_ids=ids, **more).logits.float()
        theirs = plain(input_ids=ids, **more).logits.float()
        exact = checkpoints.reference(name)[0](input_ids=ids, **more).logits
    # No farther from float32 than plain bfloat16 is, but for a small factor.
    assert (mine - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_a_tied_head_keeps_its_tie(tmp_path: Path) -> None:
    """A packed head's weight is the embedding's own parameter, in memory, in copies and when saved."""
    with loaded("gpt2") as wrapper:
        model = wrapper.model
        head = model.get_output_embeddings()
        assert isinstance(head, PackedLinear)
        assert head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        again = copy.deepcopy(model)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def in_the_file(where: Path) -> list[str]:
    """Return this process's mappings of a checkpoint's weights."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if line.endswith(str(where.resolve() / "model.safetensors"))]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bart", "marian"])
def test_a_packed_model_lets_go_of_its_file(name: str, tmp_path: Path) -> None:
    """No part of the file stays mapped beside the packed copies, as it does beside the model that was not packed."""
    where = checkpoints.changed(name, tmp_path / name, lambda model, _tokenizer: model.to(BF16))
    auto = getattr(checkpoints.hf, checkpoints._AUTO[checkpoints.FAMILIES[name].task])
    plain = auto.from_pretrained(where, dtype=BF16)
    assert in_the_file(where)
    del plain
    gc.collect()
    assert not in_the_file(where)
    with loaded(name, where=where) as wrapper:
        assert packed_in(wrapper.model)
        assert not in_the_file(where)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
@pytest.mark.parametrize("word", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bart", "m2m100"])
def test_a_quantized_model_lets_go_of_its_file(name: str, word: str, tmp_path: Path) -> None:
    """Nor does it beside integers, though biases and what is left wide come from the file as they are."""
    where = checkpoints.changed(name, tmp_path / name, lambda model, _tokenizer: model.to(BF16))
    with loaded(name, word, where=where):
        assert not in_the_file(where)


def test_t5_may_ask_for_its_weights() -> None:
    """T5's layers read the dtype of their weight at every step, which costs one unpacking, not one per step."""
    with loaded("t5") as wrapper:
        wrapper(checkpoints.texts("t5")[0], max_new_tokens=6)
        asked = [module for module in packed_in(wrapper.model) if module._dense]
        held = [id(module._dense[0]) for module in asked]
        wrapper(checkpoints.texts("t5")[0], max_new_tokens=6)
        assert [id(module._dense[0]) for module in asked] == held


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_other_precisions_are_not_packed(precision: str) -> None:
    """Only bfloat16 has such a kernel."""
    with loaded("llama", precision) as wrapper:
        assert wrapper.plan.kernels == "torch"
        assert not packed_in(wrapper.model)


def test_memory_is_counted_once_for_each_copy() -> None:
    """Packing keeps the bytes of a model, but for a tied head, which is there twice."""
    with loaded("llama") as wrapper:
        assert wrapper.memory_bytes == pytest.approx(checkpoints.wrapper("llama").memory_bytes / 2, rel=0.05)
    with loaded("gpt2") as wrapper:
        head = wrapper.model.get_output_embeddings()
        twice = head.in_features * head.out_features * 2
        assert wrapper.memory_bytes == pytest.approx(checkpoints.wrapper("gpt2").memory_bytes / 2 + twice, rel=0.05)


@pytest.mark.parametrize("gone", ["_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"])
def test_a_torch_without_the_kernel_does_not_pack(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lacks any of the operators, its own layers compute."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    there = {name: lambda: True for name in names}
    for left, expected in ((there, torch.backends.mkldnn.is_available()), (there.keys() - {gone}, False)):
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{name: there[name] for name in left}))
        assert packs.__wrapped__() is expected
