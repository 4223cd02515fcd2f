"""Errors that somebody keeps: they say where they came from, and hold no tensors and no closed model."""

import asyncio
import contextlib
import gc
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

import checkpoints
import lmkit
from checkpoints import texts, wrapper
from lmkit import wrappers
from lmkit._tracebacks import HEADER, frameless, without_frames
from lmkit.engine.compiled import CompiledStep
from lmkit.loading import entry, reading

SHORTAGE = torch.OutOfMemoryError("out of memory")


def kept(call: Callable[[], Any]) -> BaseException:
    """Return what a call raises, or the error among its results."""
    try:
        results = call()
    except BaseException as error:  # noqa: BLE001 - an interrupt too
        return error
    return next(one for one in results if isinstance(one, lmkit.LmkitError))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Leave the garbage uncollected: what is let go of has to be free at once, for the next try needs the memory."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def text_of(error: BaseException) -> str:
    """Return what Python prints of an error that nobody catches."""
    return "".join(traceback.format_exception(error))


def in_a_task(call: Callable[[], Any]) -> Any:
    """Await a call of the asynchronous interface."""

    async def main() -> Any:
        return await call()

    return asyncio.run(main())


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "call": ("llama", lambda model: model(texts("llama"), max_new_tokens=4)),
    "stream": ("llama", lambda model: list(model.stream(texts("llama"), max_new_tokens=4))),
    "map": ("llama", lambda model: list(model.map(texts("llama"), max_new_tokens=4, on_error="return"))),
    "beams": ("llama", lambda model: model(texts("llama"), num_beams=2, max_new_tokens=4)),
    "own beams": ("t5", lambda model: model(texts("t5"), num_beams=2, max_new_tokens=4)),
    "translate": ("m2m100", lambda model: model(texts("m2m100"), source="en", target="fr", max_new_tokens=4)),
    "a family of its own": ("mamba", lambda model: model(texts("mamba"), max_new_tokens=4)),
    "first score": ("llama", lambda model: model.score(texts("llama"))),
    "rank": ("t5", lambda model: model.rank(texts("t5")[0], texts("t5"))),
    "masks": ("bert", lambda model: model("She [MASK] the river.")),
    "score of masks": ("bert", lambda model: model.score(["She crossed the river."] * 2, on_error="return")),
    "task": ("llama", lambda model: in_a_task(lambda: model.acall(texts("llama"), max_new_tokens=4))),
}


def fails(model: Any, error: BaseException, held: list[Any]) -> Any:
    """Have the model raise an error in its head, and keep weak references to what it was given."""

    def hook(_module: Any, inputs: Any) -> None:
        hidden = inputs[0]
        held.append(weakref.ref(hidden))
        raise error

    return (model.get_output_embeddings() or model.cls).register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [RuntimeError("broken"), SHORTAGE, KeyboardInterrupt()], ids=["step", "memory", "^C"])
@pytest.mark.parametrize("name", CALLS)
def test_an_error_holds_no_tensors_and_no_closed_model(name: str, error: BaseException) -> None:
    """Whoever keeps an error keeps nothing of a forward pass, nor a closed model; its text is all there."""
    family, call = CALLS[name]
    model = checkpoints.fresh(family)
    whole, states = weakref.ref(model.model), []  # type: ignore[var-annotated]
    hook = fails(model.model, error, states)
    with without_collection():
        found = kept(lambda: call(model))
        hook.remove()
        assert states
        assert not any(state() is not None for state in states)
    assert isinstance(found, lmkit.EngineError if isinstance(error, Exception) else KeyboardInterrupt)
    assert "in hook\n" in text_of(found)
    assert "in forward\n" in text_of(found)
    model.close()
    gc.collect()
    assert whole() is None


OTHERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "option": ("llama", lambda model: model("She", temperature=-1)),
    "option in a map": ("llama", lambda model: list(model.map(["She"], on_error="return", stop=[""]))),
    "row": ("llama", lambda model: list(model.map(["She", 5], on_error="return"))),
    "too long": ("llama", lambda model: model("water " * 9000)),
    "chat": ("llama", lambda model: model.chat([{"role": "user"}])),
    "language": ("m2m100", lambda model: model("She", source="en", target="tlh")),
    "no mask": ("bert", lambda model: model("She")),
    "not scored": ("bert", lambda model: model.score("")),
    "source": ("llama", lambda model: list(model.map(int(word) for word in ["She"]))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_error_of_the_callers_keeps_no_closed_model(name: str) -> None:
    """An error that no forward pass made lets go of the model too, once the wrapper is closed."""
    family, call = OTHERS[name]
    model = checkpoints.fresh(family)
    whole = weakref.ref(model.model)
    found = kept(lambda: call(model))
    assert isinstance(found, (lmkit.LmkitError, ValueError))
    model.close()
    again = kept(lambda: call(model))
    gc.collect()
    assert whole() is None
    assert isinstance(again, (lmkit.LmkitError, ValueError))


ERRORS = [RuntimeError("broken"), KeyboardInterrupt()]
ALL = [*((name, error) for name in CALLS for error in ERRORS), *((name, None) for name in OTHERS)]


@pytest.mark.parametrize("name, error", ALL, ids=str)
def test_an_error_keeps_no_wrapper(name: str, error: BaseException | None) -> None:
    """A wrapper that nobody has any more goes, with its model, though an error of it is kept; nobody has closed it."""
    family, call = (CALLS | OTHERS)[name]
    held = [checkpoints.fresh(family)]
    wrapped, whole = weakref.ref(held[0]), weakref.ref(held[0].model)
    hook = None if error is None else fails(held[0].model, error, [])
    found = kept(lambda: call(Passing(held)))
    assert isinstance(found, (lmkit.LmkitError, KeyboardInterrupt, ValueError))
    del hook
    held.clear()
    gc.collect()
    assert wrapped() is whole() is None


class Passing:
    """Passes calls on to a wrapper in a list: no frame of the caller's holds it, who may be rid of it."""

    def __init__(self, held: list[Any]) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapper has."""
        return getattr(self._held[0], name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        """Call the wrapper."""
        return self._held[0](*given, **options)


def test_what_the_callers_code_raised_keeps_its_frames() -> None:
    """An error of the source of a map shows where in the caller's code it came from, and comes as it was raised."""

    def source() -> Iterator[str]:
        mark = "the caller's"
        yield str(int(mark))

    error = kept(lambda: list(wrapper("llama").map(source())))
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(error.__traceback__)}
    assert frames["source"].f_locals == {"mark": "the caller's"}


BROKEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no scores": ("llama", lambda model: model("She", max_new_tokens=4)),
    "no scores in a beam": ("t5", lambda model: model("She", num_beams=2, max_new_tokens=4)),
    "no scores in generate": ("llama", lambda model: model("She", num_beams=2, max_new_tokens=4)),
    "nothing to score by": ("llama", lambda model: model.score("She wrote")),
    "no mask to be told": ("bert", lambda model: model("She [MASK].")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_scores_that_are_no_numbers_keep_nothing(name: str) -> None:
    """A model that gives no numbers is not kept by the error which says so."""
    family, call = BROKEN[name]
    model = checkpoints.fresh(family)
    whole = weakref.ref(model.model)
    with checkpoints.on_logits(model.model, lambda _, logits: logits.fill_(torch.nan)):
        found = kept(lambda: call(model))
    assert isinstance(found, lmkit.EngineError)
    model.close()
    gc.collect()
    assert whole() is None


def test_an_error_in_the_middle_holds_no_keys_and_values() -> None:
    """What a row had read before its step failed is given back, though the error and what was logged of it are kept."""
    model = wrapper("llama")
    caches: list[Any] = []
    name = checkpoints.cache_name(model.model)

    def fail(step: int, kwargs: dict[str, Any]) -> None:
        caches.extend(weakref.ref(layer.keys) for layer in kwargs[name].layers if step)
        if step >= 3:
            raise RuntimeError

    with checkpoints.before_forwards(model.model, fail):
        found = kept(lambda: model(texts("llama"), max_new_tokens=9, min_new_tokens=9))
    checkpoints.forget(model)
    gc.collect()
    assert isinstance(found, lmkit.EngineError)
    assert caches
    assert not any(keys() is not None for keys in caches)


STAGES = {"check_report": reading, "put_on": entry, "carry_out": entry, "Generator": wrappers.generator.Generator}
"""Where a load can fail, by the name there; of the last its `__init__`."""


@pytest.mark.parametrize("error", [RuntimeError("broken"), lmkit.WeightsError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("stage", STAGES)
def test_a_load_that_fails_keeps_no_model(stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a load once weights were read, an interrupt too, its error holds none of them."""
    made: list[Any] = []
    build = transformers.LlamaForCausalLM.__init__
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "__init__",
        lambda self, *given: (made.append(weakref.ref(self)), build(self, *given))[1],
    )

    def fail(*_given: Any) -> None:
        raise error

    monkeypatch.setattr(STAGES[stage], "__init__" if stage == "Generator" else stage, fail)
    found = kept(lambda: checkpoints.fresh("llama"))
    gc.collect()
    assert found is error
    assert "in fail\n" in text_of(found)
    assert made
    assert made[-1]() is None


def test_weights_that_cannot_be_read_keep_no_half_made_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading the weights fails, the error does not hold the model that waits for them."""
    made: list[Any] = []

    class Half:
        @staticmethod
        def from_pretrained(*_given: Any, config: Any, **_options: Any) -> None:
            model = transformers.LlamaForCausalLM(config)
            made.append(weakref.ref(model))
            raise ValueError("broken")

    monkeypatch.setattr(reading, "auto_class", lambda *_: Half)
    found = kept(lambda: checkpoints.fresh("llama"))
    gc.collect()
    assert isinstance(found, lmkit.WeightsError)
    assert isinstance(found.__cause__, ValueError)
    assert "in from_pretrained\n" in text_of(found)
    assert made[-1]() is None


def test_a_step_that_cannot_be_compiled_keeps_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a compilation that failed holds neither the model nor its weights."""
    made: list[Any] = []

    def fail(step: Any, *_given: Any) -> None:
        made.append(weakref.ref(step._model))
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CompiledStep, "_artifact", fail)
    found = kept(lambda: lmkit.load("causal", str(checkpoints.folder("llama")), devices="cpu", compile=True))
    gc.collect()
    assert isinstance(found, lmkit.EngineError)
    assert "in fail\n" in text_of(found)
    assert made[-1]() is None


def test_what_a_caller_is_handling_stays_the_callers() -> None:
    """A call made while another error is handled leaves that one's traceback as it is."""
    model = wrapper("llama")

    def calls() -> tuple[BaseException, Any, BaseException]:
        try:
            {}["the caller's"]
        except LookupError as own:
            before = own.__traceback__
            with checkpoints.before_forwards(model.model, lambda *_: 1 / 0):
                return own, before, kept(lambda: model("She", max_new_tokens=2))
        raise AssertionError

    own, before, found = calls()
    assert found.__cause__ is not None
    assert found.__cause__.__context__ is own
    assert own.__traceback__ is before is not None
    assert not hasattr(own, "__notes__")


def test_the_text_of_all_errors_in_a_chain_is_kept() -> None:
    """Causes, contexts and groups lose their frames, and each says where it came from, once."""

    def outer() -> None:
        try:
            {}["inner"]
        except KeyError:
            raise ExceptionGroup("several", [kept(lambda: int("x"))]) from kept(lambda: 1 / 0)  # type: ignore[list-item]

    with pytest.raises(ExceptionGroup) as caught, frameless:
        outer()
    without_frames(group := caught.value)
    assert group.__context__ is not None
    assert group.__cause__ is not None
    for one in (group, group.__context__, group.__cause__, *group.exceptions):
        assert one.__traceback__ is None
        assert [note.partition("\n")[0] for note in one.__notes__] == [HEADER]
    assert '{}["inner"]' in text_of(group)
