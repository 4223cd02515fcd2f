"""What the engine asks of a device that is not a CPU, counted on one that only says it is there.

The tokens must be those of the CPU, a step waits for its device once, and nothing is sent that was sent before.
"""

import copy
from typing import Any

import pytest
import torch

import away
import checkpoints
from lmkit.engine import Caller, Draw
from lmkit.engine.engine import Engine
from lmkit.engine.passes.masks import MaskScorer
from lmkit.engine.passes.scores import Scorer
from lmkit.kernels import attention
from lmkit.options.generation import Sample

TOKENS = 6
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "logprobs": {"logprobs": 5},
    "suppressed": {"suppress_tokens": [3, 4, 5]},
    "all": {**SAMPLED, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 3},
}


def moved(name: str) -> Any:
    """Return a family's model on the device that is not there."""
    model = copy.deepcopy(checkpoints.reference(name)[0])
    model.generation_config = checkpoints.wrapper(name).model.generation_config
    if attention.fits(model):
        attention.put_on(model)
    return away.put(model)


def requests(name: str, prompts: list[str], options: dict[str, Any]) -> list[Any]:
    """Return what a wrapper asks its engine for."""
    wrapper = checkpoints.wrapper(name)
    chosen = wrapper._options({"max_new_tokens": TOKENS} | options)
    return [wrapper._request(chosen, checkpoints.encoded(name, prompt), room=100) for prompt in prompts]


def run(name: str, model: Any, prompts: list[str], **options: Any) -> tuple[list[Any], Any, away.Counting]:
    """Run rows on a model; return what they wrote, what the engine has done, and what was counted."""
    wrapper = checkpoints.wrapper(name)
    with away.counting() as counted:
        engine = Engine(model, wrapper._codec, wrapper.plan, wrapper._start)
        told = engine.run(iter(requests(name, prompts, options)), Caller())
        found = {update.index: update for update in told if update is not None}
    outcomes = [found[number] for number in range(len(prompts))]
    assert [update.error for update in outcomes] == [None] * len(prompts)
    return [update.outcome.completions[0] for update in outcomes if update.outcome], engine.stats(), counted


@pytest.fixture(params=["llama", "t5"])
def name(request: pytest.FixtureRequest) -> str:
    """Name a causal family, and an encoder-decoder."""
    return str(request.param)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_for_its_device_once(name: str, way: str) -> None:
    """Whatever the options, rows of several lengths have the CPU's tokens, for one copy to the host a forward pass."""
    model, prompts = moved(name), checkpoints.texts(name)[:3]
    _, fewer, begun = run(name, model, prompts, **WAYS[way], max_new_tokens=2)
    found, stats, counted = run(name, model, prompts, **WAYS[way])
    expected = checkpoints.wrapper(name)(prompts, max_new_tokens=TOKENS, **WAYS[way])
    assert [one.token_ids for one in found] == [result.token_ids for result in expected]
    for one, result in zip(found, expected, strict=True):
        for mine, its in zip(one.logprobs or (), result.logprobs or (), strict=True):
            assert [top.logprob for top in (mine, *mine.top)] == pytest.approx(
                [top.logprob for top in (its, *its.top)], abs=1e-4
            )
    assert stats.forwards > fewer.forwards
    # The passes of prompts ask whether there is padding, and lists of tokens in a config are read once.
    assert len(counted.waited) - len(begun.waited) == stats.forwards - fewer.forwards, counted.waited
    assert counted.fetched - begun.fetched == stats.forwards - fewer.forwards, counted.waited


def test_rows_of_one_length_have_no_mask_and_nothing_is_sent_twice() -> None:
    """A greedy step sends the newest tokens, and gets the chosen ones."""
    model, prompt = moved("llama"), checkpoints.texts("llama")[0]
    seen: list[Any] = []
    with checkpoints.before_forwards(model, lambda _step, kwargs: seen.append(kwargs["attention_mask"])):
        _, _, counted = run("llama", model, [prompt] * 3, logprobs=0)
    assert seen == [None] * len(seen)
    few = counted.counts["sent"]
    _, _, more = run("llama", model, [f"{prompt} {prompt}", *[prompt] * 2])
    # Prompts and their mask, pads once for each change of the batch, and a tensor of tokens for each step.
    assert max(few, more.counts["sent"]) <= 6 + 3 * TOKENS


def test_the_mask_is_made_once_and_added() -> None:
    """All layers get one mask, in the dtype that attention adds, in lines that no kernel has to copy."""
    model = moved("llama")
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    run("llama", model, checkpoints.texts("llama")[:3])
    steps = [mask for mask in seen if mask is not None and mask.shape[-2] == 1]
    count = len(model.model.layers)
    assert len(steps) >= (TOKENS - 1) * count
    assert all(mask is steps[place // count * count] for place, mask in enumerate(steps))
    assert {mask.dtype for mask in steps} == {torch.float32}
    assert {stride % attention.ALIGNED for mask in steps for stride in mask.stride()[:-1]} == {0}


def test_beams_wait_once_for_all_of_them() -> None:
    """A step of searches with four beams each has one copy to the host, and the CPU's answers."""
    prompts = checkpoints.texts("t5")[:3]
    found, stats, counted = run("t5", moved("t5"), prompts, num_beams=4)
    expected = checkpoints.wrapper("t5")(prompts, max_new_tokens=TOKENS, num_beams=4)
    assert [one.token_ids for one in found] == [result.token_ids for result in expected]
    assert counted.fetched <= stats.forwards + 1, counted.waited


def test_scores_wait_once_for_a_batch() -> None:
    """The scores of texts are those of the CPU, and come in one copy."""
    wrapper, texts = checkpoints.wrapper("llama"), checkpoints.texts("llama")[:3]
    readings = [wrapper._alone(text, row)[0].reading for row, text in enumerate(texts)]
    expected = [wrapper.score(text).token_logprobs for text in texts]
    with away.counting() as counted:
        scorer = Scorer(moved("llama"), 0)
        scorer.score(readings[:1])
        counted.waited.clear()
        found: list[Any] = scorer.score(readings)
    for one, its in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(its, abs=1e-4)
    assert counted.fetched == 1, counted.waited


def test_masks_wait_once_for_a_batch() -> None:
    """What masks are filled with comes in one copy, and drawn tokens in one more."""
    from lmkit.engine import Query

    unmasker, (text, *_) = checkpoints.wrapper("bert"), checkpoints.texts("bert")
    tokens = tuple(unmasker._codec.typed(text))
    wants = [3, (5, 6), Draw(Sample(0.8, 0.9), 0.4), Draw(Sample(0.8, 0.9), 0.9)]
    queries = [Query(tokens, place, want) for place, want in enumerate(wants, 1)]
    expected: list[Any] = MaskScorer(copy.deepcopy(checkpoints.reference("bert")[0]), 0).score(queries)
    with away.counting() as counted:
        scorer = MaskScorer(away.put(copy.deepcopy(checkpoints.reference("bert")[0])), 0)
        scorer.score(queries[:1])
        counted.waited.clear()
        found: list[Any] = scorer.score(queries)
    for one, its in zip(found, expected, strict=True):
        assert [token for token, _ in one] == [token for token, _ in its]
        assert [value for _, value in one] == pytest.approx([value for _, value in its], abs=1e-4)
    assert counted.fetched == 2, counted.waited
