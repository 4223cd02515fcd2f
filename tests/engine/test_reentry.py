"""Calls from inside a call: each works, or says at once that it would wait for itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import checkpoints
import lmkit
from checkpoints import fresh, wrapper

INSIDE = "this call comes from inside a forward pass of the same model"


def from_hook(module: Any, use: Callable[[], object], call: Callable[[], object]) -> object:
    """Run `use`, and `call` once from inside its first forward pass; return what that gave or raised."""
    found: list[object] = []

    def hook(*_: object) -> None:
        if not found:
            found.append(None)
            try:
                found[0] = call()
            except lmkit.LmkitError as error:
                found[0] = error

    handle = module.register_forward_hook(hook)
    try:
        use()
    finally:
        handle.remove()
    return found[0]


def text_of(stream: Iterator[Any]) -> str:
    """Read a stream to its end."""
    return "".join(chunk.text for chunk in stream)


@pytest.mark.parametrize(
    "name, use, call",
    [
        ("llama", lambda w: w("She", max_new_tokens=3), lambda w: w("The", max_new_tokens=2)),
        ("llama", lambda w: w("She", max_new_tokens=3), lambda w: list(w.stream("The", max_new_tokens=2))),
        ("llama", lambda w: text_of(w.stream("She", max_new_tokens=3)), lambda w: list(w.map(["The"]))),
        ("t5", lambda w: w("She", max_new_tokens=3), lambda w: w("The", num_beams=2, max_new_tokens=2)),
        ("llama", lambda w: w("She", num_beams=2, max_new_tokens=3), lambda w: w("The", max_new_tokens=2)),
        ("llama", lambda w: w.score("She is"), lambda w: w.rank("She", ["is", "was"])),
        ("bert", lambda w: w("She [MASK]."), lambda w: w("The [MASK].")),
        ("bert", lambda w: w.score("She is."), lambda w: w("The [MASK].")),
    ],
)
def test_a_call_from_a_hook_of_the_same_kind_is_refused(
    name: str, use: Callable[[Any], Any], call: Callable[[Any], Any]
) -> None:
    """It would wait for the pass that it interrupts. The call around it is not disturbed."""
    model = wrapper(name)
    expected = use(model)
    if name != "bert":
        checkpoints.forget(model)
    found: list[Any] = []
    told = from_hook(model.model, lambda: found.append(use(model)), lambda: call(model))
    assert isinstance(told, lmkit.EngineError)
    assert str(told).startswith(INSIDE)
    assert str(found[0]) == str(expected)


def test_a_call_from_a_hook_of_another_model_works() -> None:
    """Only the same model would wait for itself; scores inside a generation have a turn of their own."""
    generator, unmasker = wrapper("llama"), wrapper("bert")
    expected = unmasker("She [MASK].").text
    checkpoints.forget(generator)
    told = from_hook(generator.model, lambda: generator("She", max_new_tokens=2), lambda: unmasker("She [MASK].").text)
    assert told == expected
    score = generator.score("She is").logprob
    assert from_hook(
        generator.model, lambda: generator("She", max_new_tokens=2), lambda: generator.score("She is").logprob
    ) == pytest.approx(score)


def test_an_error_in_a_hook_is_the_rows() -> None:
    """A hook that lets the refusal through fails the step of its rows, with the reason, and nobody else's."""
    model = wrapper("llama")
    checkpoints.forget(model)
    handle = model.model.register_forward_hook(lambda *_: model("The", max_new_tokens=2))
    try:
        with pytest.raises(lmkit.EngineError, match=INSIDE):
            model("She", max_new_tokens=3)
    finally:
        handle.remove()
    assert model("She", max_new_tokens=3).generated_tokens == 3


def test_a_call_inside_the_source_of_a_map_works() -> None:
    """A map reads its source between steps, when nobody leads."""
    model = wrapper("llama")

    def source() -> Iterator[str]:
        for text in ("She", "The old sailor"):
            yield text + model(text, max_new_tokens=2).text

    prompts = [text + model(text, max_new_tokens=2).text for text in ("She", "The old sailor")]
    found = [result.token_ids for result in model.map(source(), max_new_tokens=3)]
    assert found == [model(prompt, max_new_tokens=3).token_ids for prompt in prompts]


def test_closing_inside_its_own_stream_ends_it() -> None:
    """The next chunk is an error that says so; closing twice is fine."""
    model = fresh("llama")
    stream = model.stream("She", max_new_tokens=50)
    next(stream)
    model.close()
    with pytest.raises(lmkit.EngineError, match="closed"):
        list(stream)
    model.close()


def test_closing_inside_a_hook_ends_the_call() -> None:
    """The step is finished, and then its callers are told."""
    model = fresh("llama")
    model.model.register_forward_hook(lambda *_: model.close())
    with pytest.raises(lmkit.EngineError, match="closed"):
        model("She", max_new_tokens=50)
