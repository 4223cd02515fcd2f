"""Prompts of several rows, read as one row of tokens without the padding between them."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts
from lmkit.engine import batches
from lmkit.engine.cache import GrowingLayer
from lmkit.engine.decoders.unpadding import unpads
from lmkit.kernels import unpadded

READS = ["llama", "qwen3", "gpt2", "opt", "gpt_neox"]
"""Families that read prompts without padding."""

LEFT = ["bloom", "mistral", "gemma2"]
"""Families that do not: one whose masks are slopes, and two with windows."""

THERE = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try it at the first chance, whatever it saves."""
    monkeypatch.setattr(batches, "TRIAL", 1)


def laid_out() -> unpadded.Layout:
    """Lay seven tokens out in three rows."""
    return unpadded.Layout(THERE, lambda numbers: numbers)


def passes(seen: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Return the shapes of the passes that read prompts."""
    return [tuple(kwargs["input_ids"].shape) for kwargs in seen if kwargs["input_ids"].shape[1] > 1]


def prompts(name: str, parts: int = 3) -> list[str]:
    """Return texts of very different lengths."""
    some = texts(name)
    return [some[0][:9], " ".join(some * parts)[:150], some[1], some[0], " ".join(some)[:70]]


# Tokens in rows


def test_what_is_spread_is_gathered_again() -> None:
    """Each token lies in its row and column, and comes back from there; the last of each row is known."""
    layout = laid_out()
    states = torch.randn(1, 2, 7, 5)
    spread = layout.spread(states)
    assert spread.shape == (3, 2, 4, 5)
    for token, (row, column) in enumerate(THERE.nonzero().tolist()):
        assert torch.equal(spread[row, :, column], states[0, :, token])
    assert torch.equal(layout.gathered(spread.transpose(1, 2)), states.transpose(1, 2))
    assert layout.last.tolist() == [1, 5, 6]


def test_what_lies_beside_tokens_is_left_alone() -> None:
    """A cache takes tokens where they belong, keeps what it knows of rows further on, and has zeros elsewhere."""
    layer = GrowingLayer()
    known = torch.zeros(3, 2, 6, 5)
    known[0, :, 2:4], known[2, :, 4:5] = 7, 8  # columns that rows know; row 1 knows nothing
    layer.update(known, known)
    layer.crop(-4)
    states = torch.randn(1, 2, 7, 5)
    layer.layout = laid_out()
    keys, values = layer.update(states, -states)
    assert keys.shape == (3, 2, 6, 5)
    expected = known.clone()
    for token, (row, column) in enumerate(THERE.nonzero().tolist()):
        expected[row, :, 2 + column] = states[0, :, token]
    assert torch.equal(keys, expected)
    assert torch.equal(values[1, :, 2:], -expected[1, :, 2:])


# Models


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", READS)
def test_rows_get_the_tokens_of_generate_alone(name: str) -> None:
    """The model reads the tokens of all rows and no padding, and each row's answer is that of its single run."""
    given = prompts(name)
    with checkpoints.fresh(name) as generator:
        read = [generator.tokenizer(text)["input_ids"] for text in given]
        assert len({len(row) for row in read}) > 3
        with checkpoints.forwards(generator.model) as seen:
            found = [list(result.token_ids) for result in generator(given, max_new_tokens=12)]
    tried = 5  # with padding, in two parts without, and a step behind each
    assert passes(seen[tried:]) == [(1, sum(map(len, read)))]
    for row, prompt in zip(found, given, strict=True):
        assert (
            checkpoints.until_end(row, checkpoints.ends(checkpoints.reference(name)[0]))
            == (checkpoints.generated(name, [prompt], max_new_tokens=12)[0])
        )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", LEFT)
def test_a_model_that_cannot_reads_padding(name: str) -> None:
    """Where masks say more than what is seen, or windows are kept, rows are padded, and get the same tokens."""
    given = prompts(name)
    with checkpoints.fresh(name) as generator:
        assert not unpads(generator.model, 0)
        with checkpoints.forwards(generator.model) as seen:
            found = [list(result.token_ids) for result in generator(given, max_new_tokens=8)]
        assert {rows for rows, _ in passes(seen[-8:])} == {len(given)}
    for row, prompt in zip(found, given, strict=True):
        ends = checkpoints.ends(checkpoints.reference(name)[0])
        assert checkpoints.until_end(row, ends) == checkpoints.generated(name, [prompt], max_new_tokens=8)[0]


@pytest.mark.usefixtures("eager")
def test_rows_that_know_their_beginning_read_only_what_is_new() -> None:
    """What rows share is read once and taken over whole by each, however long the rest is; answers stay the same."""
    beginning = " ".join(texts("qwen3") * 2)[:180]
    given = [f"{beginning} {end}" for end in ("a", " ".join(texts("qwen3"))[:90], "the old sailor", "birds sing")]
    with checkpoints.fresh("qwen3") as generator:
        read = [tuple(generator.tokenizer(text)["input_ids"]) for text in given]
        common = next(n for n in range(len(read[0])) if len({row[n] for row in read}) > 1)
        generator(prompts("qwen3"), max_new_tokens=1)  # it is tried there
        checkpoints.forget(generator)
        before = generator.stats
        with checkpoints.forwards(generator.model) as seen:
            found = [list(result.token_ids) for result in generator(given, max_new_tokens=8)]
        assert passes(seen) == [(1, len(read[0])), (1, sum(len(row) - common for row in read[1:]))]
        assert generator.stats.reused_tokens - before.reused_tokens == 3 * common
    for row, prompt in zip(found, given, strict=True):
        ends = checkpoints.ends(checkpoints.reference("qwen3")[0])
        assert checkpoints.until_end(row, ends) == checkpoints.generated("qwen3", [prompt], max_new_tokens=8)[0]


@pytest.mark.usefixtures("eager")
def test_long_prompts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes so many tokens and no more, and rows that begin in a later part wait for it."""
    for name in ("PROMPT_TOKENS", "PROMPT_TOKENS_BESIDE"):
        monkeypatch.setattr(f"lmkit.engine.scheduler.{name}", 60)
    given = [*prompts("llama"), " ".join(texts("llama") * 4)[:290]]
    with checkpoints.fresh("llama") as generator:
        read = [len(generator.tokenizer(text)["input_ids"]) for text in given]
        assert sum(read) > 200
        with checkpoints.forwards(generator.model) as seen:
            found = [list(result.token_ids) for result in generator(given, max_new_tokens=8)]
        widths = [columns for rows, columns in passes(seen[5:]) if rows == 1]
        assert len(widths) > 3
        assert max(widths) <= 60
    for row, prompt in zip(found, given, strict=True):
        ends = checkpoints.ends(checkpoints.reference("llama")[0])
        assert checkpoints.until_end(row, ends) == checkpoints.generated("llama", [prompt], max_new_tokens=8)[0]


def test_a_batch_has_places_for_the_rows_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows of a call begin in groups, those that wait have places from the first join on."""
    for name in ("PROMPT_TOKENS", "PROMPT_TOKENS_BESIDE"):
        monkeypatch.setattr(f"lmkit.engine.scheduler.{name}", 60)
    places: list[int] = []
    plain = GrowingLayer.absorb

    def noting(self: GrowingLayer, other: GrowingLayer, coming: int = 0) -> None:
        plain(self, other, coming)
        places.append(len(self._buffers[0]))

    monkeypatch.setattr(GrowingLayer, "absorb", noting)
    given = prompts("llama") * 4
    with checkpoints.fresh("llama") as generator:
        generator(given, max_new_tokens=20)
        assert len(places) > len(generator.model.model.layers)
    assert set(places) == {len(given)}


@pytest.mark.parametrize("how", ["differs", "fails"])
def test_a_model_that_looks_beside_is_left_alone(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer that mixes neighbours outside of attention, or that wants as many rows, is found out, and it is said."""
    with checkpoints.fresh("llama") as generator:
        assert unpads(generator.model, 0)
        layer = generator.model.model.layers[0].mlp
        plain = layer.forward

        def mixing(states: torch.Tensor) -> torch.Tensor:
            if how == "fails" and len(states) == 1:
                raise ValueError("one row alone")
            return plain(states + states.roll(1, 1))

        monkeypatch.setattr(layer, "forward", mixing)
        with caplog.at_level(logging.INFO, "lmkit"):
            assert not unpads(generator.model, 0)
    assert "prompts are read with padding, since" in caplog.text
    assert ("one row alone" if how == "fails" else "scores are others") in caplog.text


def test_it_is_tried_only_where_it_is_worth_it() -> None:
    """Few tokens of padding are read as they are, without a trial."""
    with checkpoints.fresh("llama") as generator:
        with checkpoints.forwards(generator.model) as seen:
            generator(["She", "The old sailor"], max_new_tokens=2)
        assert [kwargs["input_ids"].shape[0] for kwargs in seen] == [2, 2]


@pytest.mark.parametrize("precision, compile", [("bfloat16", False), ("bfloat16", "kernels"), ("int8", "kernels")])
def test_scores_are_those_with_padding(precision: Any, compile: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: A002
    """In half precision and with lmkit's kernels too, whatever attends: what rows find likely is the same."""
    found = {}
    for trial in (1, 10**9):
        monkeypatch.setattr(batches, "TRIAL", trial)
        with lmkit.load("causal", str(checkpoints.folder("llama")), precision, "cpu", compile=compile) as generator:
            options: Any = {"max_new_tokens": 2, "logprobs": 5}
            with checkpoints.forwards(generator.model) as seen:
                results = generator(prompts("llama"), **options)
            assert (passes(seen)[-1][0] == 1) is (trial == 1)
            likely = [[one.logprob for one in result.logprobs[0].top] for result in results]
            found[trial] = [result.token_ids[0] for result in results], torch.tensor(likely)
    (tokens, scores), (others, padded) = found.values()
    assert tokens == others
    assert padded.std() > 0.2  # rows taken for one another would show
    assert torch.allclose(scores, padded, atol=0.05)


def test_a_row_without_numbers_spoils_no_other() -> None:
    """Values that are no numbers stay with their row: beside it lie zeros, and other rows do not see it."""
    layout = laid_out()
    states = torch.randn(1, 1, 7, 4)
    states[:, :, 2:6] = torch.nan  # the whole second row
    layer = GrowingLayer()
    layer.layout = layout
    keys, values = layer.update(states, states)
    seen = THERE[:, None, None, :] & torch.ones(4, 4, dtype=torch.bool).tril()
    attend = unpadded.spreading(
        lambda _module, query, key, value, mask: (
            torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2),
            None,
        )
    )
    found, _ = attend(SimpleNamespace(), states, keys, values, seen)
    assert found.shape == (1, 7, 1, 4)
    assert found[0, :, 0].isfinite().all(1).tolist() == [True, True, False, False, False, False, True]


@pytest.mark.usefixtures("eager")
def test_a_hook_may_call_other_models_in_the_middle() -> None:
    """What a hook runs in the middle of such a pass, a model of lmkit's or a plain one, reads rows of its own."""
    given, others = prompts("llama"), prompts("qwen3")[1:]
    with checkpoints.fresh("llama") as generator, checkpoints.fresh("qwen3") as inner:
        expected = [result.token_ids for result in generator(given, max_new_tokens=4)]
        right = [result.token_ids for result in inner(others, max_new_tokens=4)]
        checkpoints.forget(inner)
        plain = checkpoints.reference("llama")[0]
        ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
        scores = plain(ids).logits
        found: list[Any] = []

        def calls(_module: Any, inputs: Any) -> None:
            if inputs[0].shape[0] == 1 and not found:
                found.append(None)
                found.append([result.token_ids for result in inner(others, max_new_tokens=4)])
                found.append(plain(ids).logits)

        checkpoints.forget(generator)
        handle = generator.model.model.layers[0].mlp.register_forward_pre_hook(calls)
        try:
            assert [result.token_ids for result in generator(given, max_new_tokens=4)] == expected
        finally:
            handle.remove()
        assert found[1] == right
        assert torch.allclose(found[2], scores, atol=1e-5)


@pytest.mark.usefixtures("eager")
def test_a_model_that_is_changed_later_still_answers(caplog: pytest.LogCaptureFixture) -> None:
    """With another attention, set by hand behind a trial, prompts are read with padding, and nothing fails."""
    given = prompts("llama")
    with checkpoints.fresh("llama") as generator:
        expected = [result.token_ids for result in generator(given, max_new_tokens=4)]
        checkpoints.forget(generator)
        generator.model.set_attn_implementation("eager")
        with checkpoints.forwards(generator.model) as seen, caplog.at_level(logging.INFO, "lmkit"):
            assert [result.token_ids for result in generator(given, max_new_tokens=4)] == expected
    assert {rows for rows, _ in passes(seen)} == {len(given)}
    assert "failed" not in caplog.text


def test_a_trial_without_memory_is_made_another_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where memory is short in the trial, prompts are read with padding, and it is tried again later."""
    monkeypatch.setattr(batches, "TRIAL", 1)
    given = prompts("llama")
    with checkpoints.fresh("llama") as generator:
        tries: list[int] = []

        def short(model: Any, pad: int) -> bool:
            tries.append(1)
            if len(tries) == 1:
                raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
            return unpads(model, pad)

        monkeypatch.setattr(batches, "unpads", short)
        with caplog.at_level(logging.INFO, "lmkit"):
            first = [result.token_ids for result in generator(given, max_new_tokens=4)]
        assert "with padding for now" in caplog.text
        checkpoints.forget(generator)
        with checkpoints.forwards(generator.model) as seen:
            assert [result.token_ids for result in generator(given, max_new_tokens=4)] == first
    assert len(tries) == 2
    assert passes(seen)[-1][0] == 1
