"""Processors beside transformers' own, against `generate` with the same, and forward passes by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import checkpoints
import lmkit
from checkpoints import reference, texts, wrapper

TOKENS = 8
NAMES = ["llama", "gpt2", "mamba", "t5", "marian"]
WAYS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}]


class Wave(LogitsProcessor):
    """Adds waves whose length all tokens before decide, so that one of padding would tell."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Add them."""
        turns = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(-1, keepdim=True)
        return scores + 3 * torch.sin(torch.arange(scores.shape[-1]) * turns)


def falling(_token_ids: Any, scores: Any) -> Any:
    """Lower the scores of late tokens, in place."""
    return scores.sub_(torch.arange(scores.shape[-1]) * 0.01)


def penalized(start: int, frequency: float, presence: float) -> Callable[[Any, Any], Any]:
    """Return penalties counted one token at a time."""

    def lower(token_ids: Any, scores: Any) -> Any:
        for row, written in enumerate(token_ids[:, start:].tolist()):
            for token_id in set(written):
                scores[row, token_id] -= frequency * written.count(token_id) + presence
        return scores

    return lower


def start_of(name: str, text: str) -> int:
    """Return at which place of the tokens that processors see an answer begins."""
    return len(checkpoints.encoded(name, text)) if checkpoints.FAMILIES[name].task == "causal" else 1


def scores_behind(name: str, text: str, written: list[int]) -> torch.Tensor:
    """Return the scores that a plain forward pass gives behind some of an answer."""
    model, ids = reference(name)[0], torch.tensor([checkpoints.encoded(name, text)])
    if checkpoints.FAMILIES[name].task == "causal":
        inputs = {"input_ids": torch.cat([ids, torch.tensor([written], dtype=torch.long)], 1)}
    else:
        start = model.generation_config.decoder_start_token_id
        inputs = {"input_ids": ids, "decoder_input_ids": torch.tensor([[start, *written]])}
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[0, -1]
    return found


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_tokens_of_generate_with_the_same_processors(name: str, beams: int) -> None:
    """Each row of a batch of several lengths gets what its single run of `generate` gets with its processors."""
    lists: list[list[Any]] = [[Wave()], [falling, Wave()], []]
    rows = texts(name)[:3]
    expected = [
        checkpoints.generated(name, [text], max_new_tokens=TOKENS, num_beams=beams, logits_processor=each)[0]
        for text, each in zip(rows, lists, strict=True)
    ]
    results = wrapper(name)(rows, max_new_tokens=TOKENS, num_beams=beams, processors=lists)
    assert [list(result.token_ids) for result in results] == expected
    plain = checkpoints.generated(name, rows[:1], max_new_tokens=TOKENS, num_beams=beams)[0]
    assert plain != expected[0]
    assert list(wrapper(name)(rows[0], max_new_tokens=TOKENS, num_beams=beams).token_ids) == plain


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_equal_rows_have_their_own_processors(name: str, beams: int) -> None:
    """Rows that differ in nothing else are not given one another's."""
    text, lists = texts(name)[0], [[Wave()], [falling], None]
    asked = {"max_new_tokens": TOKENS, "num_beams": beams}
    results = wrapper(name)([text] * 3, processors=lists, **asked)
    for result, own in zip(results, lists, strict=True):
        expected = checkpoints.generated(name, [text], logits_processor=own or [], **asked)[0]
        assert list(result.token_ids) == expected


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_processor_sees_one_row_unpadded_and_all_that_others_did_to_its_scores(name: str) -> None:
    """It is given the row's tokens, on the CPU, and the model's scores behind penalties, temperature and top-k."""
    rows, seen = texts(name)[:2], list[tuple[Any, Any]]()

    def note(token_ids: Any, scores: Any) -> Any:
        seen.append((token_ids, scores))
        return scores

    options = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "temperature": 0.7, "top_k": 20, "seed": 5}
    results = wrapper(name)(rows, max_new_tokens=TOKENS, processors=[[note], None], **options)
    alone = wrapper(name)(rows[0], max_new_tokens=TOKENS, **options)
    assert results[0].token_ids == alone.token_ids
    written = list(alone.token_ids)
    start = start_of(name, rows[0])
    for step, (token_ids, scores) in enumerate(seen):
        assert token_ids.shape == (1, start + step)
        assert token_ids[0, start:].tolist() == written[:step]
        if start > 1:
            assert token_ids[0, :start].tolist() == checkpoints.encoded(name, rows[0])
        logits = scores_behind(name, rows[0], written[:step])[None]
        shaped = penalized(start, 1.5, -0.5)(token_ids, logits) / 0.7
        shaped[shaped < shaped.topk(20).values[0, -1]] = -torch.inf
        assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(scores, shaped, rtol=1e-4, atol=1e-4)
    assert len(seen) == alone.generated_tokens


@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_what_a_processor_leaves_is_what_is_chosen(way: dict[str, Any]) -> None:
    """Nothing comes behind it: a token that it alone leaves is taken, even one that top-k had cut off."""

    def only(token_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).index_fill_(1, token_ids.new_tensor([30 + token_ids.shape[1]]), 1.0)

    more = {"top_k": 1} if way else {}
    result = wrapper("gpt2")(texts("gpt2")[0], max_new_tokens=4, processors=[only], **way, **more)
    first = 30 + start_of("gpt2", texts("gpt2")[0])
    assert list(result.token_ids) == list(range(first, first + 4))


@pytest.mark.parametrize("frequency, presence", [(1.5, 0.0), (0.0, 2.0), (-2.0, 0.5)])
@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5", "bart"])
def test_penalties_are_those_counted_by_hand(name: str, frequency: float, presence: float) -> None:
    """Greedy rows of a batch take the likeliest token less what the answer's own tokens cost, step by step."""
    rows = texts(name)[:3]
    asked = {"frequency_penalty": frequency, "presence_penalty": presence}
    results = wrapper(name)(rows, max_new_tokens=16, **asked)
    for text, result in zip(rows, results, strict=True):
        start = start_of(name, text)
        by_hand = [penalized(start, frequency, presence)]
        assert (
            list(result.token_ids)
            == checkpoints.generated(name, [text], max_new_tokens=16, logits_processor=by_hand)[0]
        )
    assert wrapper(name)(rows[0], max_new_tokens=16, **asked).token_ids == results[0].token_ids


def test_penalties_change_something() -> None:
    """The comparison above says something: each of its settings gives other tokens than none, for some model."""
    for asked in ({"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": -2.0}):
        changed = [
            wrapper(name)(texts(name)[:3], max_new_tokens=16, **asked)[row].token_ids
            != wrapper(name)(texts(name)[row], max_new_tokens=16).token_ids
            for name in ("gpt2", "t5")
            for row in range(3)
        ]
        assert any(changed)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_beams_are_penalized_too(name: str) -> None:
    """A beam search has the tokens of `generate` with penalties counted by hand."""
    rows = texts(name)[:3]
    results = wrapper(name)(rows, max_new_tokens=16, num_beams=3, frequency_penalty=1.5, presence_penalty=0.5)
    for text, result in zip(rows, results, strict=True):
        by_hand = [penalized(start_of(name, text), 1.5, 0.5)]
        expected = checkpoints.generated(name, [text], max_new_tokens=16, num_beams=3, logits_processor=by_hand)[0]
        assert list(result.token_ids) == expected


def broken(_token_ids: Any, _scores: Any) -> Any:
    """Raise an error."""
    raise ValueError("no such token")


FAILING: list[tuple[Callable[[Any, Any], Any], str]] = [
    (broken, "failed: ValueError: no such token"),
    (lambda _token_ids, _scores: None, "gave an object of type NoneType, where scores of shape"),
    (lambda _token_ids, scores: scores[0], r"gave a tensor of shape \(\d+,\) and type torch.float32, where scores"),
    (lambda _token_ids, scores: scores.argsort(), r"gave a tensor of shape \(\d, \d+\) and type torch.int64, where"),
    (lambda _token_ids, scores: scores.fill_(torch.nan), "gave NaN, where scores of shape"),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("failing, told", FAILING, ids=[told[:22] for _, told in FAILING])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_processor_that_fails_fails_its_row_alone(
    name: str, failing: Callable[[Any, Any], Any], told: str, way: dict[str, Any]
) -> None:
    """The row's error names it and the step, without frames; it is not called again, nor one behind it."""
    rows, lengths, behind = texts(name)[:3], list[int](), list[int]()
    start = start_of(name, rows[1])

    def third(token_ids: Any, scores: Any) -> Any:
        lengths.append(token_ids.shape[1] - start)
        return failing(token_ids, scores) if lengths[-1] == 2 else scores

    def fourth(token_ids: Any, scores: Any) -> Any:
        behind.append(token_ids.shape[1] - start)
        return scores

    asked = {"max_new_tokens": TOKENS, "min_new_tokens": 4, **way}
    with pytest.raises(lmkit.EngineError, match=f"row 1: the processor third at token 3 {told}") as caught:
        wrapper(name)(rows, processors=[None, [third, fourth], None], **asked)
    assert (lengths, behind) == ([0, 1, 2], [0, 1])
    cause = caught.value.__cause__
    assert (type(cause), getattr(cause, "__traceback__", None)) == (
        (ValueError, None) if failing is broken else (type(None), None)
    )
    results: Any = caught.value.results
    assert results[1] is None
    for place in (0, 2):
        assert results[place].token_ids == wrapper(name)(rows[place], **asked).token_ids


def test_a_processor_that_leaves_nothing_is_told_as_options_that_do() -> None:
    """Scores that are all minus infinity leave no token to choose."""
    with pytest.raises(lmkit.EngineError, match="the options leave no token to draw at token 1"):
        wrapper("llama")("She", processors=[lambda _token_ids, scores: scores.fill_(-torch.inf)])


def test_guesses_are_verified_behind_processors() -> None:
    """With `lookup=True` tokens are the same, and a processor sees each length of the row once, in order."""
    text, lengths = f"{texts('llama')[1]} {texts('llama')[1]}", list[int]()

    def again(token_ids: Any, scores: Any) -> Any:
        lengths.append(token_ids.shape[1])
        scores[0, token_ids[0, -3]] += 8  # so that the text repeats, and is guessed
        return scores

    plain = wrapper("llama")(text, max_new_tokens=20, processors=[again])
    expected, lengths[:] = list(lengths), []
    with checkpoints.forwards(wrapper("llama").model) as passes:
        result = wrapper("llama")(text, max_new_tokens=20, processors=[again], lookup=True)
    assert result.token_ids == plain.token_ids
    assert lengths == expected
    assert len(passes) < len(expected)


def test_a_step_that_fails_is_not_asked_about_twice() -> None:
    """Rows that begin again, since a forward pass failed, go on with their tokens: a processor sees no length twice."""
    rows = texts("llama")[:2]
    lengths: list[list[int]] = [[], []]
    notes = [[lambda token_ids, scores, seen=seen: (seen.append(token_ids.shape[1]), scores)[1]] for seen in lengths]

    def fail(step: int, _inputs: Any) -> None:
        if step == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    loaded = checkpoints.fresh("llama")
    with loaded, checkpoints.before_forwards(loaded.model, fail):
        results = loaded(rows, max_new_tokens=TOKENS, processors=notes)
    for text, result, seen in zip(rows, results, lengths, strict=True):
        assert list(result.token_ids) == checkpoints.generated("llama", [text], max_new_tokens=TOKENS)[0]
        assert seen == list(range(seen[0], seen[0] + result.generated_tokens))


def test_an_interrupt_in_a_processor_ends_the_call() -> None:
    """Ctrl-C while a processor runs is raised as it is, and the model answers the next call."""

    def interrupt(_token_ids: Any, _scores: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapper("llama")(texts("llama")[:2], max_new_tokens=4, processors=[[interrupt], None])
    expected = checkpoints.generated("llama", texts("llama")[:1], max_new_tokens=4)[0]
    assert list(wrapper("llama")(texts("llama")[0], max_new_tokens=4).token_ids) == expected


def test_a_processor_that_calls_its_own_model_is_refused() -> None:
    """The call would wait for itself; the error of that is the row's."""
    with pytest.raises(lmkit.EngineError, match="would wait for itself"):
        wrapper("llama")("She", processors=[lambda _token_ids, _scores: wrapper("llama")("He")])


def test_logprobs_are_the_models_own() -> None:
    """Log-probabilities are of the raw scores, whatever processors, biases and penalties do to them."""
    text = texts("gpt2")[0]
    asked: dict[str, Any] = {"processors": [Wave()], "logit_bias": {40: 3.0}, "frequency_penalty": 2.0}
    result = wrapper("gpt2")(text, max_new_tokens=TOKENS, logprobs=1, bad_words=[[41]], **asked)
    for step, place in enumerate(result.logprobs):
        raw = scores_behind("gpt2", text, list(result.token_ids[:step])).log_softmax(-1)
        assert place.logprob == pytest.approx(float(raw[place.token_id]), abs=1e-4)
        assert place.top[0].token_id == int(raw.argmax())
    assert any(place.token_id != place.top[0].token_id for place in result.logprobs)


@pytest.mark.parametrize("given", [falling, ["falling"], [3], {"falling": falling}])
def test_processors_are_a_list_of_callables(given: Any) -> None:
    """Anything else is an error that says so."""
    with pytest.raises(lmkit.OptionError, match="processors takes a list of callables"):
        wrapper("llama")("She", processors=given)
