"""Linear layers that read the same input, as one product: the same numbers, and nothing else that can be seen."""

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from lmkit.engine.compiled import CompiledStep
from lmkit.kernels.packed import PackedLinear, pack, packs
from lmkit.kernels.quantized import Int4Linear, Int8Linear
from lmkit.kernels.together import KEPT, Joinable, join, siblings, wholes

BF16, INPUTS = torch.bfloat16, 64
needs_packs = pytest.mark.skipif(not packs(), reason="this processor or this torch has no bfloat16 kernel to pack for")
KINDS = [pytest.param("packed", marks=needs_packs), "int8", "int4"]
kinds = pytest.mark.parametrize("kind", KINDS)
FAMILIES = [name for name in checkpoints.FAMILIES if name not in ("nllb", "mbart50", "marian_group", "deberta")]
"""Without doubles of others; of deberta's, which joins no layers, transformers' own code fails in bfloat16."""


class Attention(torch.nn.Module):
    """Three layers that read the same input, and one that does not."""

    def __init__(self, kind: str, outputs: tuple[int, ...] = (128, 64, 64), *, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, count in zip(("q", "k", "v", "o"), (*outputs, INPUTS), strict=True):
            plain = torch.nn.Linear(INPUTS if name != "o" else sum(outputs), count, bias=bias).to(BF16)
            for parameter in plain.parameters():
                parameter.requires_grad_(requires_grad=False).copy_(
                    torch.randn(parameter.shape, generator=generator) / 8
                )
            setattr(self, name, plain if kind == "packed" else quantized(plain, kind))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by all."""
        return self.o(torch.cat((self.q(rows), self.k(rows), self.v(rows)), -1))


def quantized(plain: torch.nn.Linear, word: str) -> Joinable:
    """Quantize a layer."""
    kind = Int8Linear if word == "int8" else Int4Linear
    made = kind(plain.in_features, plain.out_features, BF16, bias=plain.bias is not None)
    made.weight.data, made.scales.data = kind.quantize(plain.weight, BF16)
    if plain.bias is not None:
        made.bias = plain.bias
    made.pack()
    return made


def pair(kind: str, **shape: Any) -> tuple[Any, Any]:
    """Return layers that multiply one by one, and the same ones joined."""
    single, joined = Attention(kind, **shape), Attention(kind, **shape)
    group = [("q", "k", "v")]
    if kind == "packed":
        assert pack(single) == pack(joined, group) == 4
    else:
        assert join(joined, group) == 3
    assert len(wholes(joined)) == 1
    assert not wholes(single)
    return single, joined


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    """Draw an input."""
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(seed)).to(BF16)


def loaded(name: str, word: str, *, joins: bool = True, **options: Any) -> Any:
    """Load a family; with `joins=False` each of its layers multiplies by itself."""
    with pytest.MonkeyPatch.context() as patch:
        if not joins:
            patch.setattr("lmkit.planning.trial.Trial.together", property(lambda _: ()))
        return lmkit.load(checkpoints.FAMILIES[name].task, str(checkpoints.folder(name)), word, "cpu", **options)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch no kernel for 4 bits: with AVX2 it takes some layers of a tiny model and not their siblings."""
    monkeypatch.setattr("lmkit.kernels.quantized._int4_kernel", lambda: 0)


def members(model: Any) -> dict[str, Joinable]:
    """Return the layers of a model that others multiply with."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Joinable) and m.joint is not None}


@kinds
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(128, 64, 64), (64, 64, 64), (48, 40, 40)], ids=str)
@torch.no_grad()
def test_the_numbers_are_those_of_the_single_layers(kind: str, outputs: tuple[int, ...], *, bias: bool) -> None:
    """Each part of the product is bit for bit what its layer gives alone, for any number of rows."""
    single, joined = pair(kind, outputs=outputs, bias=bias)
    for shape in ((1,), (2, 1), (5,), (3, 7), (64,), (0,)):
        given = rows(*shape)
        for name in "qkv":
            assert torch.equal(getattr(joined, name)(given), getattr(single, name)(given))
        assert torch.equal(joined(given), single(given))


@kinds
@torch.no_grad()
def test_one_product_is_computed_and_nothing_stays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer multiplies for all, in any order; behind the last one the input is as it was."""
    _, joined = pair(kind)
    (whole,) = wholes(joined)
    calls = []
    product = whole.product
    monkeypatch.setattr(whole, "product", lambda given: calls.append(len(given)) or product(given))
    for order in ("qkv", "vqk"):
        given = rows(3)
        for name in order:
            assert not vars(given) if name == order[0] else KEPT in vars(given)
            getattr(joined, name)(given)
        assert not vars(given)
    assert calls == [3, 3]


@kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_stale_part_is_taken(kind: str, mode: Any) -> None:
    """An input that was written to, another one, a second call and a call after an error each get their own product."""
    single, joined = pair(kind)
    with mode():
        given, other = rows(3).clone(), rows(3, seed=2).clone()
        joined.q(given)
        given.mul_(2)
        assert torch.equal(joined.k(given), single.k(given))
        assert torch.equal(joined.k(given), single.k(given))
        assert torch.equal(joined.v(other), single.v(other))
        assert torch.equal(joined.v(given), single.v(given))
        joined.q(given)
        with pytest.raises(RuntimeError):
            joined.k(given[:, 1:])
        given[1].zero_()
        assert torch.equal(joined(given), single(given))
        copied = copy.copy(given)
        assert torch.equal(joined(copied), single(copied))


@kinds
@torch.no_grad()
def test_what_nobody_takes_goes_with_the_input(kind: str) -> None:
    """A layer that is called alone leaves the others' parts only as long as its input lives."""
    _, joined = pair(kind)
    given = rows(3)
    joined.q(given)
    kept = weakref.ref(next(iter(vars(given)[KEPT][2].values())))
    assert kept() is not None
    del given
    gc.collect()
    assert kept() is None


@kinds
def test_threads_may_share_an_input(kind: str) -> None:
    """Threads that run the same layers, on inputs of their own or on the same one, each get the right numbers."""
    single, joined = pair(kind)
    shared = rows(4)
    wrong: list[str] = []
    start = threading.Barrier(4)

    @torch.no_grad()
    def work(seed: int) -> None:
        start.wait()
        for number in range(60):
            given = shared if number % 2 else rows(3, seed=seed)
            for name in "qkv":
                taken = getattr(joined, name)(given)
                right = torch.equal(taken, getattr(single, name)(given))
                wrong.extend([] if right else [name])
                taken.zero_()  # a part is given to one only

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@kinds
def test_gradients_flow_through_each_layer_or_fail_as_before(kind: str) -> None:
    """Where an input is trained each layer multiplies alone: quantized ones have gradients, as they had."""
    single, joined = pair(kind)
    found = []
    for layers in (single, joined):
        given = rows(3).requires_grad_()
        layers.q(given)
        assert not vars(given)
        if kind != "packed":
            layers(given).sum().backward()
            assert given.grad is not None
            found.append(given.grad)
    assert all(torch.equal(one, found[0]) for one in found)


@kinds
@torch.no_grad()
def test_a_hook_sees_one_layer_and_may_write_to_its_output(kind: str) -> None:
    """What a hook does to the output of one layer, in place too, does not reach the others."""
    single, joined = pair(kind)
    given = rows(3)
    expected = single.q(given), single.k(given) * 2, single.v(given)
    seen = []

    def double(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output.mul_(2)

    joined.k.register_forward_hook(double)
    found = joined.q(given), joined.k(given), joined.v(given)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert seen == [(3, 64)]


@kinds
@torch.no_grad()
def test_weights_and_states_are_as_they_were(kind: str) -> None:
    """The names, the shapes and the values of the weights, of each layer and of all, are those of single layers."""
    single, joined = pair(kind)
    assert {n: p.shape for n, p in joined.named_parameters()} == {n: p.shape for n, p in single.named_parameters()}
    mine, theirs = joined.state_dict(), single.state_dict()
    assert [*mine] == [*theirs]
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].stride() == theirs[name].stride() for name in mine)
    for name in "qkv":
        assert torch.equal(getattr(joined, name).weight, getattr(single, name).weight)
    held = [sum(b.numel() for b in layers.buffers()) for layers in (single, joined)]
    assert held[0] == held[1]


@pytest.mark.parametrize("word", ["int8", "int4"])
@torch.no_grad()
def test_a_weight_that_is_replaced_or_read_into_counts(word: str) -> None:
    """New values reach the product, whether they are written, assigned, or loaded from a state."""
    single, joined = pair(word)
    other = Attention(word)
    other.q.scales.mul_(2)
    other.k.bias.add_(1)
    given = rows(3)
    for layers in (single, joined):
        layers.q.scales.mul_(3)
    assert torch.equal(joined(given), single(given))
    for layers in (single, joined):
        layers.load_state_dict(other.state_dict())
    assert torch.equal(joined(given), single(given))
    assert torch.equal(joined(given), other(given))
    for layers in (single, joined):
        layers.k.bias = torch.nn.Parameter(torch.ones(64, dtype=BF16), requires_grad=False)
        layers.v.scales.data = layers.v.scales.data * 2
    assert torch.equal(joined(given), single(given))
    assert not torch.equal(joined(given), other(given))


@needs_packs
@torch.no_grad()
def test_a_bias_of_a_packed_layer_may_be_replaced() -> None:
    """It is added to its own layer's part alone, rounded once as before."""
    single, joined = pair("packed")
    for layers in (single, joined):
        layers.k.bias = torch.nn.Parameter(torch.ones(64, dtype=BF16), requires_grad=False)
    given = rows(3)
    assert torch.equal(joined(given), single(given))


@kinds
@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
@torch.no_grad()
def test_copies_multiply_by_themselves(kind: str, way: Any) -> None:
    """A copy of joined layers gives their numbers with weights of its own, and none that is held for it besides."""
    single, joined = pair(kind)
    again = way(joined)
    given = rows(3)
    assert torch.equal(again(given), single(given))
    assert not wholes(again)
    again.q.bias.zero_()
    assert torch.equal(joined(given), single(given))


class Flat(Attention):
    """Something that relies on the memory of what a layer gives."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply, and take rows for one."""
        self.k(rows)
        return self.q(rows).view(-1)


class Writing(Attention):
    """Something that writes to an input between two layers."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by all."""
        return (self.q(rows), rows.add_(1), self.k(rows), self.v(rows))[0]


class Twice(Attention):
    """Something whose layers meet for one input, and not for another."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by all."""
        return (super().forward(rows), self.q(rows + 1), self.v(rows))[0]


@pytest.mark.parametrize("kind, expected", [(Attention, ("q", "k", "v")), (Writing, ("k", "v")), (Twice, None)])
@torch.no_grad()
def test_siblings_are_given_the_same_inputs_in_each_call(kind: Any, expected: Any) -> None:
    """Layers of one parent go together if each call gives them the very same tensor, unchanged."""
    with torch.device("meta"):
        model = torch.nn.Sequential(kind("packed"))
    _, found = siblings(model, lambda: model(torch.zeros(2, INPUTS, dtype=BF16, device="meta")))
    assert found == (() if expected is None else (tuple(f"0.{name}" for name in expected),))
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_code_that_needs_outputs_of_its_own_fails_in_the_trial() -> None:
    """A part is a view of a wider product: who cannot bear that is found out without values, and left alone."""
    with torch.device("meta"):
        model = Flat("packed")
    given = torch.zeros(2, INPUTS, dtype=BF16, device="meta")
    model(given)
    with pytest.raises(RuntimeError, match="view"):
        siblings(model, lambda: model(given))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("word", [pytest.param("bfloat16", marks=needs_packs), "int4"])
def test_a_plan_counts_what_is_joined(name: str, word: str) -> None:
    """As many layers are joined as the plan says, into as many products; the scores are those of single layers."""
    with loaded(name, word) as wrapper, loaded(name, word, joins=False) as single:
        found = members(wrapper.model)
        told = f"{len(found)} linear layers that read the same input are {len(wholes(wrapper.model))} products"
        unknown = "none: which linear layers read the same input only shows when this model runs"
        none = unknown if name in ("xlm", "deberta_v2") else None
        assert wrapper.plan.reasons.get("together") == (told if found else none)
        assert not members(single.model)
        assert wrapper.memory_bytes == single.memory_bytes
        ids, _ = checkpoints.inputs(name, checkpoints.texts(name)[:2])
        more = {"decoder_input_ids": ids[:, :3]} if wrapper.model.config.is_encoder_decoder else {}
        with torch.no_grad():
            mine, theirs = (one.model(input_ids=ids, **more).logits for one in (wrapper, single))
    assert torch.equal(mine, theirs)


def test_the_usual_families_are_joined() -> None:
    """What reads the same input is found in decoders, encoders, cross attention and gated layers."""
    expected = {
        "llama": {"q_proj k_proj v_proj", "gate_proj up_proj"},
        "marian": {"q_proj k_proj v_proj", "k_proj v_proj"},
        "mt5": {"q k v", "k v", "wi_0 wi_1"},
        "bert": {"query key value"},
    }
    for name, groups in expected.items():
        plan: Any = lmkit.plan(checkpoints.FAMILIES[name].task, str(checkpoints.folder(name)), "int8", "cpu")
        assert {" ".join(one.rpartition(".")[2] for one in group) for group in plan._together} == groups


def test_float32_stays_as_it_is() -> None:
    """Its layers are transformers' own."""
    wrapper = checkpoints.wrapper("llama")
    assert "together" not in wrapper.plan.reasons
    assert type(wrapper.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("word", [pytest.param("bfloat16", marks=needs_packs), "int8", "int4"])
def test_adapters_are_put_around_joined_layers(word: str, tmp_path: Path) -> None:
    """LoRA on some of them changes the scores as it does around single layers, put on before or afterwards."""
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(checkpoints.plain("causal", checkpoints.folder("llama"))[0], config).save_pretrained(
            tmp_path
        )
    ids, _ = checkpoints.inputs("llama", [checkpoints.texts("llama")[1]])
    with (
        loaded("llama", word, joins=False, adapter=tmp_path) as single,
        loaded("llama", word, adapter=tmp_path) as joined,
        loaded("llama", word) as later,
        torch.no_grad(),
    ):
        plain = later.model(ids).logits
        later.model.load_adapter(tmp_path)
        expected = single.model(ids).logits
        assert len(members(joined.model)) == 10
        assert torch.equal(joined.model(ids).logits, expected)
        assert torch.allclose(later.model(ids).logits, expected, rtol=2**-5, atol=2**-5)
        assert not torch.equal(plain, expected)


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("word", [pytest.param("bfloat16", marks=needs_packs), "int8", "int4"])
def test_a_compiled_step_holds_the_joint_products(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a step multiplies once for layers that read the same input."""
    monkeypatch.setattr(CompiledStep, "_artifact", lambda *_: None)
    monkeypatch.setattr(CompiledStep, "_tried", lambda *_: (None, None))
    monkeypatch.setattr(CompiledStep, "_verify", lambda *_: None)
    counts = []
    for joins in (False, True):
        with loaded("llama", word, joins=joins) as wrapper, torch.no_grad():
            graph, _ = CompiledStep(wrapper.model)._trace()
            nodes = [str(node.target) for node in graph.graph.nodes]
            counts.append(sum("_linear_pointwise" in name or "pack_mm" in name or "aten.mm" in name for name in nodes))
    layers = 2
    assert counts[0] - counts[1] == layers * (2 + 1)


@needs_packs
@pytest.mark.filterwarnings("ignore:Dynamo detected")
def test_a_user_may_compile_the_model() -> None:
    """`torch.compile` takes a model with joined layers, and its scores are the model's."""
    with loaded("llama", "bfloat16") as wrapper, torch.no_grad():
        ids, _ = checkpoints.inputs("llama", [checkpoints.texts("llama")[1]])
        compiled: Any = torch.compile(wrapper.model, backend="eager")
        assert torch.equal(compiled(ids).logits, wrapper.model(ids).logits)


def test_a_packed_member_is_packed_layers_own_kind() -> None:
    """Who looks for linear layers finds each of them, with its own size."""
    with loaded("llama", "bfloat16" if packs() else "int8") as wrapper:
        attention = wrapper.model.model.layers[0].self_attn
        assert isinstance(attention.k_proj, (PackedLinear, Int8Linear))
        assert (
            attention.k_proj.out_features
            == checkpoints.reference("llama")[0].model.layers[0].self_attn.k_proj.out_features
        )
