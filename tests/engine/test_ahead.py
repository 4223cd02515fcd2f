"""Steps that are asked for before the host has the tokens of the one before: on a CPU, where all of it can be seen."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts, wrapper
from lmkit.engine import batches
from lmkit.engine.choice import Chooser
from lmkit.engine.decoders.causal import CausalDecoder


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let rows on a CPU run ahead, and write down in which order things happen."""
    found: list[str] = []
    monkeypatch.setattr(batches, "AHEAD_ON", ("cuda", "cpu"))
    step, likeliest = CausalDecoder.step, Chooser.likeliest

    def stepped(self: CausalDecoder, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        found.append("step" if token_ids is None else "ahead")
        return step(self, token_ids)

    def chosen(self: Chooser, logits: torch.Tensor) -> tuple[torch.Tensor, Callable[[Any], int]]:
        tokens, give = likeliest(self, logits)
        return tokens, lambda rows: (found.append("given"), give(rows))[1]

    monkeypatch.setattr(CausalDecoder, "step", stepped)
    monkeypatch.setattr(Chooser, "likeliest", chosen)
    return found


@contextmanager
def loaded(name: str = "llama") -> Iterator[Any]:
    """Load a wrapper whose engine no other test has used."""
    with lmkit.load("causal", str(checkpoints.folder(name)), "float32", "cpu") as generator:
        yield generator


def test_a_step_is_asked_for_before_the_tokens_before_it_are_there(events: list[str]) -> None:
    """Of 20 tokens the first is the prompt's; then each step comes before the tokens of the last one are there."""
    prompt = texts("llama")[0]
    with loaded() as generator:
        result = generator(prompt, max_new_tokens=20)
        forwards = generator.stats.forwards
    assert list(result.token_ids) == checkpoints.generated("llama", [prompt], max_new_tokens=20)[0]
    assert len(result.token_ids) == forwards == 20
    burst = ["step", *["ahead", "given"] * (batches.MOST_AHEAD - 1), "given"]
    assert events == [*burst, *burst, "step", "ahead", "given", "ahead", "given", "given"]


def test_a_stream_waits_for_each_token(events: list[str]) -> None:
    """Somebody reads a stream token by token: no steps are made in one go, with other rows beside it either."""
    prompt = texts("llama")[0]
    with loaded() as generator:
        list(generator.stream([prompt, prompt], max_new_tokens=20))
    assert "ahead" not in events


@pytest.mark.usefixtures("events")
def test_a_row_that_fails_on_the_way_takes_no_other_down() -> None:
    """Scores that are none in the middle of steps ahead are an error of their row, and the others go on."""
    prompts = texts("llama")[:3]
    expected = [list(result.token_ids) for result in wrapper("llama")(prompts, max_new_tokens=20)]

    def spoil(step: int, logits: torch.Tensor) -> None:
        if step == 4:
            logits[1].fill_(float("nan"))

    with loaded() as generator:
        with checkpoints.on_logits(generator.model, spoil):
            found = [*generator.map(prompts, max_new_tokens=20, on_error="return")]
        (failed,) = (place for place, one in enumerate(found) if isinstance(one, lmkit.EngineError))
        assert "no finite score at token 5" in str(found.pop(failed))
        expected.pop(failed)
        assert [list(one.token_ids) for one in found] == expected


@pytest.mark.usefixtures("events")
def test_a_step_that_fails_is_tried_again_with_the_tokens_that_were_given() -> None:
    """A pass that fails in the middle of steps ahead loses nothing: its rows are read again, in halves."""
    prompts = texts("llama")[:3]
    failed = []

    def fail(step: int, _kwargs: dict[str, Any]) -> None:
        if step == 5:
            failed.append(step)
            raise torch.OutOfMemoryError("no memory")

    with loaded() as generator, checkpoints.before_forwards(generator.model, fail):
        found = generator(prompts, max_new_tokens=20)
    assert failed == [5]
    assert [one.token_ids for one in found] == [one.token_ids for one in wrapper("llama")(prompts, max_new_tokens=20)]


@pytest.mark.usefixtures("events")
def test_a_row_that_has_ended_is_not_failed_by_the_pass_on_its_way() -> None:
    """A row ends by a stop string while the next pass, which it does not need, fails: it has its result."""
    prompt = texts("llama")[0]
    plain = wrapper("llama")(prompt, max_new_tokens=20)
    expected = wrapper("llama")(prompt, max_new_tokens=20, stop=[plain.text[5:7]])
    assert expected.finish_reason == "stop"
    failed = []

    def fail(step: int, _kwargs: dict[str, Any]) -> None:
        if step == expected.generated_tokens:
            failed.append(step)
            raise RuntimeError("no such pass is needed")

    with loaded() as generator, checkpoints.before_forwards(generator.model, fail):
        found = generator(prompt, max_new_tokens=20, stop=[plain.text[5:7]])
        assert generator.stats.generated_tokens == expected.generated_tokens
    assert failed
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)


@pytest.mark.usefixtures("events")
def test_a_model_that_is_closed_ends_the_steps() -> None:
    """`close()` from another thread ends a row within the steps that are on their way."""
    prompt, seen = texts("llama")[0], []
    with loaded() as generator:
        closer = threading.Thread(target=generator.close)

        def close(step: int, _kwargs: dict[str, Any]) -> None:
            seen.append(step)
            if step == 3:
                closer.start()
                while not generator._engine._batches.closed:
                    time.sleep(0.001)

        with checkpoints.before_forwards(generator.model, close), pytest.raises(lmkit.EngineError, match="closed"):
            generator(prompt, max_new_tokens=200)
        closer.join()
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "way",
    [
        {"temperature": 1.0, "seed": 1},
        {"repetition_penalty": 1.2},
        {"logprobs": 1},
        {"num_beams": 2},
        {"output": lmkit.OneOf("yes", "no")},
        {"min_new_tokens": 9},
        {"lookup": True},
    ],
    ids=lambda way: next(iter(way)),
)
def test_rows_that_need_the_host_do_not_run_ahead(way: dict[str, Any], events: list[str]) -> None:
    """What is drawn, steered, scored or guessed waits for its tokens, as ever."""
    with loaded() as generator:
        generator(texts("llama")[0], max_new_tokens=10, **way)
    assert "ahead" not in events


@pytest.mark.parametrize("name", checkpoints.CAUSAL)
def test_rows_that_run_ahead_have_the_tokens_of_others(name: str, events: list[str]) -> None:
    """Rows with ends, stop strings and budgets of their own, alone and together, and prompts that come again."""
    prompts = texts(name)
    budgets = [3, 9, 24, 12, 30][: len(prompts)]
    plain = wrapper(name)(prompts, max_new_tokens=30)
    stop = plain[0].text[4:6] or "x"
    expected = []
    for ahead in ((), ("cpu",)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches, "AHEAD_ON", ahead)
            with lmkit.load("causal", str(checkpoints.folder(name)), "float32", "cpu") as generator:
                every = generator(prompts, max_new_tokens=budgets[: len(prompts)])
                again = [generator(one.prompt + one.text, max_new_tokens=9) for one in every]
                found = [*every, *again, *generator(prompts, max_new_tokens=30, stop=[stop])]
        expected.append([(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in found])
    assert expected[0] == expected[1]
    assert ("ahead" in events) == (wrapper(name).plan.engine == "lmkit")  # what generate() runs is generate()'s
