"""Greedy rows whose processors only forbid or force tokens: those of `generate`, for fewer calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

import checkpoints
import lmkit
from checkpoints import texts

TOKENS = 10
Own = Callable[[list[int]], dict[str, Any]]
"""Makes settings that bite, from the tokens that are written without them."""

OWN: dict[str, Own] = {
    "suppressed": lambda written: {"suppress_tokens": written[2:4]},
    "suppressed at first": lambda written: {"begin_suppress_tokens": written[:1]},
    "bad word": lambda written: {"bad_words_ids": [written[3:4]]},
    "bad words": lambda written: {"bad_words_ids": [written[2:4], written[5:6]]},
    "no end before": lambda written: {"eos_token_id": written[2], "min_new_tokens": 5},
    "shortest length": lambda written: {"eos_token_id": written[2], "min_length": 10},
    "forced end": lambda written: {"forced_eos_token_id": written[0]},
    "forced beginning": lambda written: {"forced_bos_token_id": written[0] + 1},
    "several": lambda written: {
        "suppress_tokens": written[1:2],
        "bad_words_ids": [written[4:5]],
        "forced_eos_token_id": written[0],
        "min_new_tokens": 4,
    },
    "one that does more": lambda written: {"suppress_tokens": written[1:2], "repetition_penalty": 1.5},
}


def expected(name: str, text: str, model: Any) -> list[int]:
    """Return what `generate` writes, with a budget of `TOKENS`."""
    tokens: list[int] = checkpoints.generated(name, [text], model=model, max_new_tokens=TOKENS)[0]
    return tokens


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", ["llama", "t5", "marian"])
def test_what_is_forbidden_and_forced_is_that_of_generate(name: str, own: str, tmp_path: Path) -> None:
    """Rows of a batch get the tokens of single runs of `generate`, where settings of the checkpoint's own bite."""
    written = expected(name, texts(name)[0], None)
    where = checkpoints.configured(name, tmp_path / name, **OWN[own](written))
    model, _ = checkpoints.plain(checkpoints.FAMILIES[name].task, where)
    with checkpoints.fresh(name, where) as loaded:
        results = loaded(texts(name), max_new_tokens=TOKENS)
    for text, result in zip(texts(name), results, strict=True):
        assert list(result.token_ids) == expected(name, text, model)
    if own != "forced beginning" or name != "llama":  # a prompt has begun before
        assert list(results[0].token_ids) != written


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many rows go through processors."""
    rows: list[int] = []
    plain = LogitsProcessorList.__call__

    def call(self: Any, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        rows.append(len(scores))
        return plain(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(LogitsProcessorList, "__call__", call)
    return rows


@pytest.mark.parametrize(
    "own, asked",
    [
        ({}, 0),
        ({"suppress_tokens": [3]}, 0),
        ({"bad_words_ids": [[3]], "min_new_tokens": 2}, 0),
        ({"forced_eos_token_id": 2}, 0),
        ({"forced_bos_token_id": 5, "forced_eos_token_id": 2}, 0),
        ({"repetition_penalty": 1.1}, TOKENS),
    ],
    ids=str,
)
def test_processors_are_asked_when_it_matters(
    own: dict[str, Any], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose likeliest token may stand, or that a token is forced on, is not copied and steered."""
    text = texts("t5")[0]
    unused = {"eos_token_id": 3, "pad_token_id": 0, "bad_words_ids": None, "forced_eos_token_id": None, "min_length": 0}
    where = checkpoints.configured("t5", tmp_path / "t5", **unused | own)
    with checkpoints.fresh("t5", where) as loaded:
        assert 3 not in loaded(text, max_new_tokens=TOKENS).token_ids
        rows = counted(monkeypatch)
        result = loaded(text, max_new_tokens=TOKENS)
    assert result.generated_tokens == TOKENS
    assert sum(rows) == asked


def test_rows_of_other_budgets_are_forced_to_end_at_their_own(tmp_path: Path) -> None:
    """A batch whose rows may not take the likeliest token ends each row with the forced token at its own budget."""
    text = texts("t5")[0]
    first = checkpoints.generated("t5", [text], max_new_tokens=1)[0][0]
    own: dict[str, Any] = {"forced_eos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "suppress_tokens": [first]}
    where = checkpoints.configured("t5", tmp_path / "t5", **own)
    with checkpoints.fresh("t5", where) as loaded:
        budgets = [3, 5, 4]
        results = loaded([text] * 3, max_new_tokens=budgets)
        alone = [loaded(text, max_new_tokens=budget) for budget in budgets]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
    assert [result.generated_tokens for result in results] == budgets


def test_a_forbidden_token_is_asked_about_only_where_it_is_the_likeliest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of a batch that runs into a suppressed token is steered at that step; the others are not."""
    written = checkpoints.generated("llama", texts("llama")[:1], max_new_tokens=4)[0]
    where = checkpoints.configured("llama", tmp_path / "llama", suppress_tokens=[written[0]], eos_token_id=None)
    with checkpoints.fresh("llama", where) as loaded:
        plain = [checkpoints.generated("llama", [text], max_new_tokens=1)[0] for text in texts("llama")]
        rows = counted(monkeypatch)
        loaded(texts("llama"), max_new_tokens=1)
    assert sum(rows) == sum(first == written[:1] for first in plain)


WAYS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}, {"logprobs": 2}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_scores_that_are_not_finite_are_an_error(name: str, way: dict[str, Any], value: float) -> None:
    """Where a model gives no finite score, a row has an error in place of a token, whatever the way of choosing."""

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step >= 1:
            logits.fill_(value)

    generator = checkpoints.wrapper(name)
    with (
        checkpoints.on_logits(generator.model, spoil)
        if name == "gpt2" or "num_beams" not in way
        else spoilt(generator, value),
        pytest.raises(lmkit.EngineError, match=r"row \d: the model gave no finite score at token \d"),
    ):
        generator(texts(name)[:2], max_new_tokens=4, **way)
    assert generator(texts(name)[0], max_new_tokens=2, **way).token_ids


@contextmanager
def spoilt(generator: Any, value: float) -> Iterator[None]:
    """Spoil the scores of a head that runs apart from its model."""
    handle = generator.model.lm_head.register_forward_hook(lambda _module, _args, output: output.fill_(value))
    try:
        yield
    finally:
        handle.remove()


def test_a_beam_search_without_scores_leaves_the_others() -> None:
    """Of beam searches that run together, only the one without finite scores fails."""
    generator, prompts = checkpoints.wrapper("gpt2"), texts("gpt2")[:1] * 3
    plain = generator(prompts, num_beams=2, max_new_tokens=4)

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step == 1:
            logits[2:4] = float("nan")  # the beams of the second

    with (
        checkpoints.on_logits(generator.model, spoil),
        pytest.raises(lmkit.EngineError, match="row 1: the model gave no finite score at token 2") as caught,
    ):
        generator(prompts, num_beams=2, max_new_tokens=4)
    assert [one and one.token_ids for one in caught.value.results] == [plain[0].token_ids, None, plain[2].token_ids]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_options_that_forbid_all_tokens_are_an_error(name: str, way: dict[str, Any]) -> None:
    """Where all tokens are suppressed, a row has an error in place of token 0."""
    generator = checkpoints.wrapper(name)
    every = [*range(generator.model.config.vocab_size)]
    with pytest.raises(lmkit.EngineError, match="row 0: the options leave no token to draw at token 1"):
        generator(texts(name)[0], max_new_tokens=4, suppress_tokens=every, **way)


def test_one_infinite_score_is_the_greatest() -> None:
    """A score of infinity among finite ones is the likeliest, as it is to `generate`."""

    def one(_step: int, logits: torch.Tensor) -> None:
        logits[..., 7] = float("inf")

    generator = checkpoints.wrapper("gpt2")
    with checkpoints.on_logits(generator.model, one):
        assert generator(texts("gpt2")[0], max_new_tokens=2).token_ids == (7, 7)
