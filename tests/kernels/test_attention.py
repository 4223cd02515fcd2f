"""Attention in bfloat16 on a CPU: against float32, torch's own kernel and whole models."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import checkpoints
import every_family
import lmkit
from lmkit.engine import batches
from lmkit.kernels import attention
from lmkit.kernels.attention import attend
from lmkit.kernels.packed import packs
from native_kernels import NEEDED, kernels

native = pytest.mark.skipif(not packs(), reason="this processor has no bfloat16 products to attend with")


def case(
    rows: int, heads: int, groups: int, columns: int, *, tokens: int = 1, size: int = 16, dtype: Any = torch.bfloat16
) -> list[torch.Tensor]:
    """Make queries, keys and values; keys and values are parts of larger buffers, as in a cache that grows."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, tokens, size, generator=random)
    buffers = (torch.randn(rows + 2, groups, columns + 9, size, generator=random) for _ in range(2))
    parts = [query, *(buffer[:rows, :, 3 : columns + 3] for buffer in buffers)]
    return [part.to(dtype) for part in parts]


def seeing(rows: int, columns: int) -> torch.Tensor:
    """Hide some columns on the left of each row."""
    hidden = torch.arange(rows)[:, None] % columns
    return (torch.arange(columns) >= hidden)[:, None, None]


def layer(heads: int, groups: int) -> Any:
    """Make what transformers reads of an attention layer."""
    return SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)


def exactly(parts: list[torch.Tensor], mask: torch.Tensor | None, bias: torch.Tensor | None, scale: float) -> Any:
    """Attend in float32, with torch's kernel."""
    query, key, value = (part.float() for part in parts)
    added = torch.zeros(1) if mask is None else torch.where(mask, 0.0, -torch.inf)
    added = added if bias is None else added + bias
    added = added.expand(len(query), query.shape[1], 1, key.shape[2])
    attended = scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale, enable_gqa=True)
    return attended.transpose(1, 2)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the calls of transformers' function."""
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(attention, "_sdpa", lambda: called)
    return calls


@native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("heads, groups", [(9, 3), (8, 8), (8, 1)])
@torch.no_grad()
def test_many_rows_attend_as_in_float32(
    heads: int, groups: int, mask: str, *, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are those of float32 within bfloat16's rounding, for shared keys and own ones, and any mask."""
    calls = counted(monkeypatch)
    rows, columns = 40, 23
    parts = case(rows, heads, groups, columns)
    seen = None if mask == "none" else seeing(rows, columns)
    given = seen
    if mask == "added":
        given = torch.where(seeing(rows, columns), 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    added = torch.randn(1, heads, 1, columns, generator=torch.Generator().manual_seed(1)) if bias else None
    found, weights = attend(layer(heads, groups), *parts, given, scaling=0.3, position_bias=added)
    assert (found.shape, found.dtype, weights, calls) == ((rows, 1, heads, 16), torch.bfloat16, None, [])
    torch.testing.assert_close(found.float(), exactly(parts, seen, added, 0.3), rtol=0.02, atol=0.02)


@native
@torch.no_grad()
def test_the_scale_is_one_over_the_root_of_the_size_by_default() -> None:
    """Without a scale of the layer's own, torch's is used."""
    parts = case(40, 4, 2, 9)
    found, _ = attend(layer(4, 2), *parts, None)
    torch.testing.assert_close(found.float(), exactly(parts, None, None, 0.25), rtol=0.02, atol=0.02)


def padded_left(rows: int, tokens: int, columns: int) -> torch.Tensor:
    """Hide `row % 3` columns on the left, and what is behind a token; the first tokens of some rows see nothing."""
    hidden = (torch.arange(rows) % 3)[:, None, None, None]
    places = torch.arange(columns)
    return (places >= hidden) & (places <= torch.arange(columns - tokens, columns)[:, None])


def densely(parts: list[torch.Tensor], seen: torch.Tensor | None, bias: torch.Tensor | None, scale: float) -> Any:
    """Attend in float64 by the formula, with keys repeated for the heads that share them."""
    query, key, value = (part.double() for part in parts)
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).float()


@native
@pytest.mark.parametrize("scores", [2**20, 3000, 500], ids=["at once", "some rows", "some tokens"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("heads, groups", [(9, 3), (8, 8), (8, 1)])
@torch.no_grad()
def test_prompts_attend_as_in_float64(
    heads: int, groups: int, mask: str, scores: int, *, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several tokens, in blocks of rows or of tokens, are right within bfloat16's rounding."""
    calls = counted(monkeypatch)
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "WORTH_SCORES", 1)
    monkeypatch.setattr(attention.Room, "_free", [])
    rows, tokens = 5, 13
    columns = tokens if mask == "causal" else 17
    parts = case(rows, heads, groups, columns, tokens=tokens)
    seen = padded_left(rows, tokens, columns) if mask in ("bool", "added") else None
    given = seen
    if mask == "added":
        given = torch.where(padded_left(rows, tokens, columns), 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    added = torch.randn(1, heads, tokens, columns, generator=torch.Generator().manual_seed(1)) if bias else None
    options = {"position_bias": added, "is_causal": mask == "causal", "scaling": 0.3}
    found, weights = attend(layer(heads, groups), *parts, given, **options)
    assert (found.shape, found.dtype, weights, calls) == ((rows, tokens, heads, 16), torch.bfloat16, None, [])
    if mask == "causal":
        seen = torch.ones(tokens, columns, dtype=torch.bool).tril()
    torch.testing.assert_close(found.float(), densely(parts, seen, added, 0.3), rtol=0.02, atol=0.02)


@native
@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_the_layer_says_whether_tokens_see_what_follows(tokens: int) -> None:
    """Without a mask and a word of the caller's, it is the layer's own attribute that counts, as in transformers."""
    parts = case(12, 8, 8, 40, tokens=tokens)
    for causal in (True, False):
        module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=causal)
        found, _ = attend(module, *parts, None)
        expected, _ = sdpa_attention_forward(module, *parts, None)
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)


@native
@pytest.mark.parametrize("added", [None, -torch.inf, torch.finfo(torch.float32).min])
@torch.no_grad()
def test_padding_that_sees_nothing_is_a_number(added: float | None) -> None:
    """NaN there would reach all tokens in the next layer, whose products read hidden values too."""
    seen = torch.ones(6, 1, 60, 60, dtype=torch.bool).tril()
    seen[:, :, :9] = False
    mask = seen if added is None else torch.where(seen, 0.0, added)
    found, _ = attend(layer(8, 8), *case(6, 8, 8, 60, tokens=60), mask, position_bias=None if added is None else mask)
    assert found.isfinite().all()


@native
@pytest.mark.parametrize("shape", [(5, 1, 1, 60), (1, 1, 1, 60), (1, 8, 1, 60), (60, 60), (8, 60, 60), (1, 60)])
@pytest.mark.parametrize("scores", [2**20, 1000])
@torch.no_grad()
def test_a_mask_may_have_any_shape_that_broadcasts(
    shape: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of one row for all tokens, as LayoutLM's, and one without some dimensions; a bias in the same way."""
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "WORTH_SCORES", 1)
    monkeypatch.setattr(attention.Room, "_free", [])
    parts, random = case(5, 8, 4, 60, tokens=60), torch.Generator().manual_seed(0)
    seen, bias = torch.rand(shape, generator=random) > 0.3, torch.randn(shape, generator=random)
    found, _ = attend(layer(8, 4), *parts, seen, position_bias=bias)
    torch.testing.assert_close(found.float(), densely(parts, seen, bias, 0.25), rtol=0.02, atol=0.02)


@native
@torch.no_grad()
def test_what_all_keys_share_costs_no_digits() -> None:
    """A bias of the keys moves all scores of a token alike: they are as right as without it."""
    query, key, value = case(6, 8, 8, 60, tokens=60)
    parts = [
        query,
        (key.float() + 40 * torch.randn(1, 8, 1, 16, generator=torch.Generator().manual_seed(2))).bfloat16(),
    ]
    found, _ = attend(layer(8, 8), *parts, value, torch.ones(60, 60, dtype=torch.bool))
    torch.testing.assert_close(found.float(), densely([*parts, value], None, None, 0.25), rtol=0.02, atol=0.02)


@native
@torch.no_grad()
def test_memory_for_scores_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One room serves calls one after the other, in inference mode too; one of unusual size is let go."""
    rooms: list[Any] = []
    monkeypatch.setattr(attention.Room, "_free", rooms)
    parts = case(6, 8, 8, 60, tokens=60)
    with torch.inference_mode():
        attend(layer(8, 8), *parts, None)
    first = rooms[0]
    attend(layer(8, 8), *parts, None)
    assert rooms == [first]
    monkeypatch.setattr(attention, "SCORES", 8 * 60 - 1)
    found, _ = attend(layer(8, 8), *parts, None)
    assert rooms == [first]
    causal = torch.ones(60, 60, dtype=torch.bool).tril()
    torch.testing.assert_close(found.float(), densely(parts, causal, None, 0.25), rtol=0.02, atol=0.02)


@native
def test_threads_do_not_share_memory_for_scores() -> None:
    """Calls at the same time get the results of single ones."""
    cases = [[part + number for part in case(6, 8, 8, 90, tokens=90)] for number in range(4)]

    def run(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [attend(layer(8, 8), *parts, None)[0] for _ in range(20)]

    alone = [run(parts)[0] for parts in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, cases))
    assert all(torch.equal(found, one) for one, several in zip(alone, together, strict=True) for found in several)
    assert 0 < len(attention.Room._free) <= attention.ROOMS


@native
@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_that_is_trained_goes_to_torchs_kernel(*, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 may have nothing else to train; without gradients the products serve."""
    calls = counted(monkeypatch)
    added = torch.zeros(1, 8, 60, 60, requires_grad=True)
    with torch.set_grad_enabled(bias):
        attend(layer(8, 8), *case(6, 8, 8, 60, tokens=60), None, position_bias=added)
    assert len(calls) == bias


@native
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # of functions that are cached
@torch.no_grad()
def test_what_is_traced_goes_to_torchs_kernel() -> None:
    """A compiled model gets its results, and no memory of lmkit's is in the graph or takes a stand-in's place."""
    parts = case(6, 8, 8, 60, tokens=60)
    module = layer(8, 8)
    compiled = torch.compile(lambda *states: attend(module, *states, None)[0], backend="aot_eager")
    expected, _ = sdpa_attention_forward(module, *parts, None)
    assert torch.equal(compiled(*parts), expected)
    before = list(attention.Room._free)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attend(module, *map(mode.from_tensor, parts), None)[0].shape == expected.shape
    assert attention.Room._free == before


@native
@torch.no_grad()
def test_one_query_for_several_rows_of_keys_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned queries have one row, whatever the keys have."""
    calls = counted(monkeypatch)
    query, key, value = case(6, 8, 8, 60, tokens=60)
    found, _ = attend(layer(8, 8), query[:1], key, value, torch.ones(60, 60, dtype=torch.bool))
    assert (found.shape, len(calls)) == ((6, 60, 8, 16), 1)


@native
def test_what_is_trained_goes_to_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products write into memory of their own, which has no derivative."""
    calls = counted(monkeypatch)
    parts = [part.requires_grad_() for part in case(6, 8, 8, 60, tokens=60)]
    found, _ = attend(layer(8, 8), *parts, None)
    found.sum().backward()
    assert len(calls) == 1
    assert all(part.grad is not None for part in parts)


@pytest.mark.parametrize(
    "shape, options", [({"tokens": 3}, {}), ({}, {"dropout": 0.5})], ids=["several tokens", "dropout"]
)
@torch.no_grad()
def test_everything_else_is_transformers(
    shape: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and what only that function knows get its results, bit by bit."""
    calls = counted(monkeypatch)
    parts, mask = case(**{"rows": 40, "heads": 4, "groups": 2, "columns": 11, **shape}), seeing(40, 11)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found, _ = attend(layer(4, 2), *parts, mask, **options)
        torch.manual_seed(0)
        expected, _ = sdpa_attention_forward(layer(4, 2), *parts, mask, **options)
    assert len(calls) == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads, groups", [(9, 3), (8, 8), (8, 1)])
@pytest.mark.parametrize(
    "rows, dtype, off", [(40, torch.float32, 1e-6), (3, torch.float32, 1e-6), (3, torch.bfloat16, 0.02)]
)
@torch.no_grad()
def test_float32_and_few_rows_attend_by_torchs_kernel(
    rows: int, dtype: torch.dtype, off: float, heads: int, groups: int, *, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a row, the heads that share a key side by side: torch's kernel, asked once, with its results."""
    asked: list[Any] = []

    def spy(query: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(query.shape)
        return scaled_dot_product_attention(query, *args, **kwargs)

    parts, mask = case(rows, heads, groups, 23, dtype=dtype), seeing(rows, 23) if masked else None
    expected = exactly(parts, mask, None, 0.3)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found, _ = attend(layer(heads, groups), *parts, mask, scaling=0.3)
    assert asked == [(rows, groups, heads // groups, 16)]
    assert found.shape == (rows, 1, heads, 16)
    torch.testing.assert_close(found.float(), expected, rtol=off, atol=off)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "marian", "bert", "mamba"])
def test_which_models_use_it(name: str) -> None:
    """A model on a CPU whose parts all use transformers' interface with torch's kernel; no other."""
    model = checkpoints.wrapper(name).model
    plain, _ = checkpoints.reference(name)
    own = plain.config._attn_implementation == "sdpa" and plain._can_set_attn_implementation()
    assert (model.config._attn_implementation == "lmkit") == own
    assert own == (name not in ("gemma2", "mamba"))


def test_a_family_that_asks_for_the_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose code compares the name of the implementation keeps torch's."""
    monkeypatch.setattr(attention.inspect, "getsource", lambda _module: 'if name == "sdpa": ...')
    with checkpoints.fresh("llama") as generator:
        assert generator.model.config._attn_implementation == "sdpa"


@native
@pytest.mark.parametrize("name", ["llama", "t5", "marian"])
def test_a_model_saved_and_copied_knows_nothing_of_it(name: str, tmp_path: Any) -> None:
    """What is saved is a plain checkpoint."""
    checkpoints.wrapper(name).model.save_pretrained(tmp_path)
    assert "lmkit" not in (tmp_path / "config.json").read_text()


@native
@pytest.mark.parametrize("name", ["llama", "marian", "t5", "qwen3"])
def test_a_large_batch_in_bfloat16_scores_as_torchs_kernel_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a batch that attends by products have the log-probabilities that torch's kernel gives them."""
    calls: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(batches, "TRIAL", 10**9)  # whose passes would be counted
    task: Any = checkpoints.FAMILIES[name].task
    texts = checkpoints.texts(name) * 8
    options: dict[str, Any] = {**checkpoints.languages(name), "max_new_tokens": 4, "logprobs": 0}
    with lmkit.load(task, str(checkpoints.folder(name)), "bfloat16", "cpu") as loaded:
        found = loaded(texts, **options)
        used = len(calls)
        monkeypatch.setattr(attention, "WORTH", 10**9)
        expected = loaded(texts, **options)
    assert len(calls) > 2 * used  # what went by products is in the second run alone
    compared = [pair for one, other in zip(found, expected, strict=True) for pair in alike(one, other)]
    assert len(compared) > 2 * len(texts)
    assert sum(abs(mine - torchs) for mine, torchs in compared) / len(compared) < 0.05


def alike(one: Any, other: Any) -> Iterator[tuple[float, float]]:
    """Pair the log-probabilities of two results up to the first token that differs."""
    for mine, others in zip(one.logprobs, other.logprobs, strict=False):
        if mine.token_id != others.token_id:
            break
        yield mine.logprob, others.logprob


@native
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "marian"])
def test_prompts_in_bfloat16_are_as_right_as_with_torchs_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of padded batches, causal or encoded, are about as far from those of float32."""
    blocks: list[int] = []
    own = attention._in_blocks

    def spy(*args: Any, **kwargs: Any) -> Any:
        blocks.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(attention, "_in_blocks", spy)
    task: Any = checkpoints.FAMILIES[name].task
    texts = checkpoints.texts(name)
    pairs = [texts, [texts[0]] * len(texts)] if task == "seq2seq" else [[f"{text} {text}" for text in texts]]
    scored, used = [], []
    for precision, worth in (("float32", 1), ("bfloat16", 1), ("bfloat16", 10**9)):
        monkeypatch.setattr(attention, "WORTH_SCORES", worth)
        with lmkit.load(task, str(checkpoints.folder(name)), precision, "cpu") as loaded:
            scores = loaded.score(*pairs, **checkpoints.languages(name))
        scored.append(torch.tensor([value for score in scores for value in score.token_logprobs]))
        used.append(len(blocks))
    assert 0 == used[0] < used[1] == used[2]
    exact, ours, torchs = scored
    assert len(exact) > 10
    assert (ours - exact).abs().mean() < 1.5 * (torchs - exact).abs().mean() < 0.5


@pytest.mark.parametrize("native", [pytest.param(True, marks=NEEDED), False], ids=["native", "torch"])
@pytest.mark.parametrize("model_type", ["gemma2", "vaultgemma", "granite_swa", "gpt_oss"])
def test_soft_caps_and_sinks_are_those_of_the_family(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, native: bool
) -> None:
    """With kernels asked for lmkit attends there too, and prompts and answers are those of plain transformers."""
    if native:
        kernels()
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    every_family.save(every_family.built("causal", model_type), tmp_path)
    texts = [every_family.written(prompt) for prompt in every_family.prompts()]
    with lmkit.load("causal", tmp_path, "float32", "cpu", compile="kernels") as generator:
        assert generator.plan.attention == "lmkit"
        found = generator(texts, max_new_tokens=every_family.NEW)
    for result, (expected, _) in zip(found, every_family.expected("causal", tmp_path), strict=True):
        assert list(result.token_ids) == expected
    assert lmkit.plan("causal", tmp_path, "float32", "cpu").attention == "eager"  # as before
