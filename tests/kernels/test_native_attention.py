"""The kernels of attention: against float64, by themselves and in whole models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import checkpoints
import lmkit
from lmkit.engine.compiled import CompiledStep
from lmkit.kernels import attention
from lmkit.kernels.native.build import INSTRUCTIONS, NoKernelsError
from lmkit.kernels.native.operators import operators

OFF = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""How far an attended value may be from float64's, as a share of the largest."""

PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[None, *INSTRUCTIONS], ids=str)
def kernels(request: pytest.FixtureRequest) -> Any:
    """Return the kernels of each set of instructions that this processor has."""
    return built(request.param)


@pytest.fixture(scope="module")
def best() -> Any:
    """Return the kernels that this processor would use."""
    return built(None)


def built(isa: str | None) -> Any:
    """Return kernels, where they can be had."""
    has = torch.cpu.get_capabilities()
    if isa and not all(has.get(one) for one in INSTRUCTIONS[isa]):
        pytest.skip(f"this processor has no {isa}")
    try:
        return operators(isa)
    except NoKernelsError as error:
        pytest.skip(str(error))


def with_kernels(name: str, precision: Any, kernels: Any) -> Any:
    """Load a tiny model that attends with these kernels."""
    task: Any = checkpoints.FAMILIES[name].task
    loaded = lmkit.load(task, str(checkpoints.folder(name)), precision, "cpu", compile="kernels")
    assert "a kernel in C++" in loaded.plan.reasons["attention"]
    assert loaded.model.config._attn_implementation == kernels.name
    return loaded


def case(
    draws: torch.Generator, *, sources: int = 3, beams: int = 1, groups: int = 2, share: int = 2, columns: int = 40,
    size: int = 16, value_size: int = 16, dtype: Any = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    """Make queries, keys and values, all as parts of larger buffers."""
    query = torch.randn(sources * beams, 2, groups * share, size + 3, generator=draws).to(dtype)
    buffers = [
        torch.randn(sources + 1, groups + 1, columns + 5, each, generator=draws).to(dtype)
        for each in (size, value_size + 2)
    ]
    key, value = (buffer[1:, 1:, 2 : columns + 2] for buffer in buffers)
    return [query[:, :1, :, :size].transpose(1, 2), key, value[..., :value_size]]


def attend(
    kernels: Any, parts: list[torch.Tensor], mask: Any = None, bias: Any = None, sinks: Any = None, *, cap: float = 0.0
) -> torch.Tensor:
    """Call the kernel."""
    found: torch.Tensor = kernels.attend_one(*parts, mask, bias, sinks, 0.3, cap)
    return found


def one_by_one(
    parts: list[torch.Tensor], mask: Any = None, bias: Any = None, sinks: Any = None, *, cap: float = 0.0
) -> torch.Tensor:
    """Attend in float64, a row and a head at a time, with what it sees alone."""
    query, keys, values = (part.double() for part in parts)
    rows, heads = query.shape[:2]
    found = torch.zeros(rows, 1, heads, values.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            place = row * len(keys) // rows, head * keys.shape[1] // heads
            scores = keys[place] @ query[row, head, 0] * 0.3
            scores = cap * (scores / cap).tanh() if cap else scores
            seen = torch.ones(keys.shape[2], dtype=torch.bool)
            if mask is not None:
                own = mask[row % len(mask), 0, 0]
                seen = own if own.dtype is torch.bool else own > -1e30
                scores = scores if own.dtype is torch.bool else scores + own.double()
            if bias is not None:
                scores = scores + bias[row % len(bias), head % bias.shape[1], 0].double()
            weights = scores[seen].exp() if seen.any() else torch.ones_like(scores)
            seen = seen if seen.any() else ~seen
            least = 0 if sinks is None else sinks[head].double().exp()
            found[row, 0, head] = weights @ values[place][seen] / (weights.sum() + least)
    return found


def right(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether values are those of float64, as near as their dtype allows."""
    return float((found.double() - expected).abs().max()) <= OFF[found.dtype] * float(expected.abs().max()) + 1e-12


@st.composite
def masks(draw: Any, rows: int, beams: int, columns: int, draws: torch.Generator) -> torch.Tensor | None:
    """Draw what rows see: padding on the left or right, windows, holes or nothing; as bool or added."""
    kind = draw(st.sampled_from(["none", "left", "right", "window", "holes", "nothing"]))
    if kind == "none":
        return None
    places = torch.arange(columns)
    first = torch.randint(0, columns, (rows // beams, 1), generator=draws)
    seen = {
        "left": places >= first,
        "right": places <= first,
        "window": (places >= first) & (places < first + 9),
        "holes": torch.rand(rows // beams, columns, generator=draws) > 0.5,
        "nothing": torch.zeros(rows // beams, columns, dtype=torch.bool),
    }[kind]
    seen = seen.repeat_interleave(beams, 0)[:, None, None]
    seen = seen[:1] if beams == 1 and draw(st.booleans()) else seen
    added = draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]))
    if added is None:
        return seen
    slopes = torch.randn(seen.shape, generator=draws).to(added)
    return slopes.masked_fill(~seen, draw(st.sampled_from([-torch.inf, torch.finfo(added).min])))


@PROPERTY
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_shape_attends_as_in_float64(kernels: Any, data: Any, seed: int) -> None:
    """Groups, beams over one source, odd sizes, strides, masks, biases, soft caps and sinks, in both dtypes."""
    draw, draws = data.draw, torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    shape = {
        "sources": draw(st.integers(1, 4)),
        "beams": draw(st.sampled_from([1, 1, 2, 5])),
        "groups": draw(st.integers(1, 3)),
        "share": draw(st.integers(1, 5)),
        "columns": draw(st.sampled_from([1, 2, 7, 16, 33, 127, 128, 129, 300])),
        "size": draw(st.sampled_from([1, 5, 8, 16, 24, 33, 64, 80])),
        "value_size": draw(st.sampled_from([1, 7, 8, 16, 40, 64, 96, 130])),
    }
    parts = case(draws, **shape, dtype=dtype)
    rows, heads = parts[0].shape[:2]
    mask = draw(masks(rows, shape["beams"], shape["columns"], draws))
    bias = sinks = None
    if draw(st.booleans()):
        some = draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, heads]))
        bias = torch.randn(*some, 1, shape["columns"], generator=draws).to(
            draw(st.sampled_from([dtype, torch.float32]))
        )
        seeing = mask is None or mask.dtype is torch.bool
        sinks = torch.randn(heads, generator=draws).to(dtype) if seeing and mask is None else None
    options = {"bias": bias, "sinks": sinks, "cap": draw(st.sampled_from([0.0, 2.0]))}
    assert right(attend(kernels, parts, mask, **options), one_by_one(parts, mask, **options))


def at_once(parts: list[torch.Tensor], mask: Any, bias: Any, *, causal: bool) -> torch.Tensor:
    """Attend in float64, rows of several tokens."""
    query, key, value = (part.double() for part in parts)
    share = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(share, 1).transpose(2, 3) * 0.3
    scores = scores if bias is None else scores + bias.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    if causal:
        scores += torch.full(scores.shape[2:], -torch.inf).triu(1)
    return (scores.softmax(-1) @ value.repeat_interleave(share, 1)).transpose(1, 2)


@pytest.fixture(scope="module")
def many(best: Any) -> Any:
    """Return the kernel for rows of several tokens."""
    if not hasattr(best, "attend_many"):
        pytest.skip("this processor has no AVX512-BF16")
    kernel = best.attend_many
    return lambda *parts, mask=None, bias=None, causal=False: kernel(*parts, mask, bias, causal, 0.3)


@PROPERTY
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_prompts_attend_as_in_float64(many: Any, data: Any, seed: int) -> None:
    """Causal or masked in any shape that broadcasts, with biases, odd sizes and numbers of tokens and columns."""
    draw, draws = data.draw, torch.Generator().manual_seed(seed)
    tokens, columns = (draw(st.sampled_from([1, 2, 7, 47, 48, 49, 64, 65, 150])) for _ in range(2))
    sizes = {"size": draw(st.sampled_from([1, 5, 16, 64, 80])), "value_size": draw(st.sampled_from([1, 7, 16, 64, 80]))}
    parts = case(draws, columns=columns, share=draw(st.integers(1, 3)), **sizes, dtype=torch.bfloat16)
    heads = parts[0].shape[1]
    parts[0] = torch.randn(3, tokens, heads, sizes["size"] + 1, generator=draws).bfloat16()[..., :-1].transpose(1, 2)
    shape = [draw(st.sampled_from([1, most])) for most in (3, heads, tokens)]
    mask = bias = None
    kind = draw(st.sampled_from(["causal", "none", "bool", "added"]))
    if kind in ("bool", "added"):
        mask = torch.rand(*shape, columns, generator=draws) > draw(st.sampled_from([0.02, 0.5, 0.98]))
        mask[..., draw(st.integers(0, columns - 1))] = True
        mask = torch.where(mask, torch.randn(mask.shape, generator=draws), -torch.inf) if kind == "added" else mask
    if draw(st.booleans()):
        bias = torch.randn(1, heads, tokens, columns, generator=draws).to(draw(st.sampled_from([*OFF])))
    causal = kind == "causal"
    found = many(*parts, mask=mask, bias=bias, causal=causal)
    assert right(found, at_once(parts, mask, bias, causal=causal))


def test_prompts_do_not_depend_on_threads(many: Any) -> None:
    """One thread and two give the same bits."""
    parts = case(torch.Generator().manual_seed(0), columns=300, size=64, dtype=torch.bfloat16)
    parts[0] = torch.randn(3, 4, 300, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(many(*parts, causal=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("added", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_padding_of_prompts_that_sees_nothing_is_a_number(many: Any, added: float | None) -> None:
    """Tokens beside it, which see some columns, have what they have without it."""
    parts = case(torch.Generator().manual_seed(0), columns=150, dtype=torch.bfloat16)
    parts[0] = torch.randn(3, 4, 150, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    seen = torch.ones(150, 150, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    seen[1, :, :, :70] = False
    mask = seen if added is None else torch.where(seen, 0.0, added)
    found = many(*parts, mask=mask)
    assert found.isfinite().all()
    own = [part[1:2, :, 70:] for part in parts]
    assert right(found[1:2, 70:], at_once(own, None, None, causal=True))
    assert torch.equal(found[::2], many(*parts, causal=True)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads(kernels: Any, dtype: Any) -> None:
    """One thread and two give the same bits, for one long row too, which several threads share."""
    draws = torch.Generator().manual_seed(0)
    for sources, columns in ((1, 3000), (40, 200)):
        parts = case(draws, sources=sources, columns=columns, size=64, value_size=64, dtype=dtype)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(attend(kernels, parts))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_batch_is_its_single_run(kernels: Any, dtype: Any, beams: int) -> None:
    """Bit for bit, wherever its columns lie and whatever padding the batch needs."""
    draws = torch.Generator().manual_seed(0)
    parts = case(draws, sources=20, beams=beams, share=3, columns=300, size=64, value_size=64, dtype=dtype)
    seen = (torch.arange(300) >= torch.randint(0, 290, (20, 1), generator=draws)).repeat_interleave(beams, 0)
    found = attend(kernels, parts, seen[:, None, None])
    for row in range(20 * beams):
        query, key, value = parts[0][row : row + 1], *(part[row // beams][None] for part in parts[1:])
        own = [query, *(part[:, :, seen[row]] for part in (key, value))]
        assert torch.equal(attend(kernels, own), found[row : row + 1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_no_number_stays_in_its_row(kernels: Any, bad: float, where: int) -> None:
    """Rows beside one with NaN or infinity keep their results, and what is hidden is not read."""
    parts = case(torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    seen = torch.ones(3, 1, 1, 40, dtype=torch.bool)
    seen[2, :, :, :9] = False
    expected = attend(kernels, parts, seen)
    parts[where][1, 0, 0] = bad
    if where:
        parts[where][2, :, 4] = bad
    found = attend(kernels, parts, seen)
    assert torch.equal(found[::2], expected[::2])
    assert not found[1].isfinite().all()


def test_what_all_keys_share_costs_no_digits(kernels: Any) -> None:
    """With key biases such as Qwen2's, the results are nearer to float64 than those of torch's kernel and products."""
    draws = torch.Generator().manual_seed(0)
    query, key, value = case(draws, sources=40, size=64, value_size=64, columns=150, dtype=torch.bfloat16)
    key = (key.float() + 60 * torch.randn(1, 2, 1, 64, generator=draws)).bfloat16()
    parts = [query, key, value]
    expected = one_by_one(parts)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    before = attention.WORTH
    try:
        ways = []
        for worth in (0, 10**9):
            attention.WORTH = worth
            ways.append(attention.attend(module, *parts, None, scaling=0.3)[0])
    finally:
        attention.WORTH = before
    ours, *others = (float((way - expected).abs().mean()) for way in (attend(kernels, parts), *ways))
    assert ours < 0.9 * min(others)
    assert right(attend(kernels, parts), expected)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"mask": torch.ones(2, 1, 1, 40, dtype=torch.bool)}, "another shape"),
        ({"mask": torch.ones(3, 4, 1, 40, dtype=torch.bool)}, "another shape"),
        ({"bias": torch.ones(3, 1, 1, 39)}, "another shape"),
        ({"sinks": torch.ones(3)}, "for each head"),
    ],
)
def test_what_does_not_fit_is_refused(best: Any, wrong: dict[str, Any], said: str) -> None:
    """Nothing is read that is not there."""
    with pytest.raises(RuntimeError, match=said):
        attend(best, case(torch.Generator().manual_seed(0)), **wrong)


def test_states_that_do_not_fit_are_refused(best: Any) -> None:
    """Two dtypes, several tokens, and keys of another size."""
    query, key, value = case(torch.Generator().manual_seed(0))
    for parts, said in (
        ([query, key.bfloat16(), value], "float32 or bfloat16"),
        ([query.half(), key.half(), value.half()], "float32 or bfloat16"),
        ([query.expand(-1, -1, 2, -1), key, value], "do not fit"),
        ([query, key[..., 1:], value], "do not fit"),
        ([query, key, value[:, :, 1:]], "do not fit"),
        ([query[:2], key, value], "do not fit"),
    ):
        with pytest.raises(RuntimeError, match=said):
            attend(best, parts)


def test_nothing_is_attended_to_nothing(best: Any) -> None:
    """No rows are none; rows without columns are zeros."""
    query, key, value = case(torch.Generator().manual_seed(0))
    assert attend(best, [query[:0], key, value]).shape == (0, 1, 4, 16)
    assert not attend(best, [query, key[:, :, :0], value[:, :, :0]]).any()


@torch.no_grad()
def test_it_can_be_traced_for_any_number_of_rows_and_columns(best: Any) -> None:
    """A graph holds the operator, and gives other shapes their results."""
    draws = torch.Generator().manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention.attend(module, query, key, value, mask, kernels=best)[0]

    def inputs(sources: int, columns: int) -> list[torch.Tensor]:
        seen = torch.rand(sources, 1, 1, columns, generator=draws) > 0.5
        return [*case(draws, sources=sources, columns=columns), seen]

    graph = make_fx(layer, tracing_mode="symbolic")(*inputs(5, 30))
    assert any("attend_one" in str(node.target) for node in graph.graph.nodes)
    other = inputs(7, 50)
    assert torch.equal(graph(*other), layer(*other))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "marian", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_whole_models_give_transformers_tokens(best: Any, name: str, beams: int) -> None:
    """In float32 a batch of any lengths gets the tokens of `generate`, greedily and with beams, windows and biases."""
    with with_kernels(name, "float32", best) as loaded:
        texts = checkpoints.texts(name)
        options: dict[str, Any] = {**checkpoints.languages(name), "num_beams": beams, "max_new_tokens": 12}
        found = [list(result.token_ids) for result in loaded(texts, **options)]
    assert found == checkpoints.generated(name, texts, max_new_tokens=12, num_beams=beams)


@pytest.mark.parametrize("name", ["llama", "marian"])
def test_every_row_of_one_token_goes_to_the_kernel(best: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole model, torch's kernel attends to rows of several tokens alone, and in bfloat16 to none."""
    tokens: list[int] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tokens.append(query.shape[2])
        return own(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for precision in ("float32", "bfloat16"):
        with with_kernels(name, precision, best) as loaded:
            loaded(checkpoints.texts(name), max_new_tokens=6)
        assert 1 not in tokens
        assert bool(tokens) == (precision == "float32" or not hasattr(best, "attend_many"))
        tokens.clear()


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "marian"])
def test_bfloat16_is_as_right_as_with_torchs_kernel(best: Any, name: str) -> None:
    """Log-probabilities of padded batches, causal or encoded, are about as far from those of float32."""
    task: Any = checkpoints.FAMILIES[name].task
    texts = checkpoints.texts(name)
    pairs = [texts, [texts[0]] * len(texts)] if task == "seq2seq" else [texts]
    scored = []
    for precision, compiled in (("float32", False), ("bfloat16", "kernels"), ("bfloat16", False)):
        options: Any = {"compile": compiled} if compiled else {"attn_implementation": "sdpa"}
        with lmkit.load(task, str(checkpoints.folder(name)), precision, "cpu", **options) as loaded:
            assert (loaded.model.config._attn_implementation == best.name) == bool(compiled)
            scores = loaded.score(*pairs, **checkpoints.languages(name))
        scored.append(torch.tensor([value for score in scores for value in score.token_logprobs]))
    exact, ours, torchs = scored
    assert len(exact) > 10
    assert 0 < (ours - exact).abs().mean() < 1.5 * (torchs - exact).abs().mean() < 0.5


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"position_bias": torch.zeros(1, 4, 1, 40, requires_grad=True)}])
def test_what_the_kernel_does_not_know_goes_to_torchs(best: Any, options: dict[str, Any]) -> None:
    """Dropout and gradients get the results that they have without the kernel."""
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    parts, found = case(torch.Generator().manual_seed(0)), []
    for own in (None, best):
        torch.manual_seed(0)
        found.append(attention.attend(module, *parts, None, kernels=own, **options)[0])
    assert torch.equal(*found)
    assert found[1].requires_grad == ("position_bias" in options)


@pytest.mark.usefixtures("best")
def test_a_compiled_step_holds_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with the kernel is kept beside the one without, and gives the tokens of the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = checkpoints.texts("llama")
    with lmkit.load("causal", str(checkpoints.folder("llama")), "float32", "cpu", compile=True) as loaded:
        engine: Any = loaded._engine
        called = [str(node.target) for node in engine._batches._compiled._trace()[0].graph.nodes]
        assert sum("attend_one" in one for one in called) == loaded.model.config.num_hidden_layers
        assert not any("scaled_dot_product" in one for one in called)
        found = [list(result.token_ids) for result in loaded(texts, max_new_tokens=8)]
        attention.put_on(loaded.model)
        CompiledStep(loaded.model)
    assert len(list((tmp_path / "lmkit" / "compiled").iterdir())) == 2
    assert found == checkpoints.generated("llama", texts, max_new_tokens=8)


def test_kernels_that_fail_to_build_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded all the same, with torch's kernels, and the plan says why."""

    def fail(*_args: Any) -> Any:
        raise NoKernelsError("the compiler is broken")

    monkeypatch.setattr("lmkit.loading.reading.operators", fail)
    with lmkit.load("causal", str(checkpoints.folder("llama")), "float32", "cpu", compile="kernels") as loaded:
        assert loaded.model.config._attn_implementation == attention.NAME
        assert loaded.plan.reasons["attention"].endswith("the compiler is broken")
