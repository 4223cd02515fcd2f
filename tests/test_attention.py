"""Attention of rows that read one token each on a CPU: against float32, torch's own kernel and whole models."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import checkpoints
import lmkit
from lmkit import attention
from lmkit.attention import attend
from lmkit.packing import packs

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
    task: Any = checkpoints.FAMILIES[name].task
    texts = checkpoints.texts(name) * 8
    options: dict[str, Any] = {**checkpoints.languages(name), "max_new_tokens": 4, "logprobs": 0}
    with lmkit.load(task, str(checkpoints.folder(name)), "bfloat16", "cpu") as loaded:
        found = loaded(texts, **options)
        used = len(calls)
        monkeypatch.setattr(attention, "WORTH", 10**9)
        expected = loaded(texts, **options)
    assert len(calls) > 2 * used > 0  # what went by products is in the second run alone
    compared = [pair for one, other in zip(found, expected, strict=True) for pair in alike(one, other)]
    assert len(compared) > 2 * len(texts)
    assert sum(abs(mine - torchs) for mine, torchs in compared) / len(compared) < 0.05


def alike(one: Any, other: Any) -> Iterator[tuple[float, float]]:
    """Pair the log-probabilities of two results up to the first token that differs."""
    for mine, others in zip(one.logprobs, other.logprobs, strict=False):
        if mine.token_id != others.token_id:
            break
        yield mine.logprob, others.logprob
