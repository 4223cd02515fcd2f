import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import texts, wrapper

OF_EACH_TASK = ["llama", "t5", "bert"]
INPUTS = {"llama": "She", "t5": "Birds fly.", "bert": "Birds [MASK]."}
BOUND = 256  # inputs that map may have read beyond the results it gave; any constant will do


def short(name: str) -> dict[str, Any]:
    """Return options that keep a call short."""
    return {} if name == "bert" else {"max_new_tokens": 3}


def shown(result: Any) -> str:
    """Return what a result says, for comparison."""
    return str(result)


# map


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_map_reads_a_bounded_number_ahead(name: str) -> None:
    """`map` works on an endless iterable: nothing is read before it is asked, and never far ahead."""
    asked = 0

    def endless() -> Iterator[str]:
        nonlocal asked
        for number in itertools.count():
            asked += 1
            yield texts(name)[number % 5]

    results = wrapper(name).map(endless(), **short(name))
    assert asked == 0
    expected = [shown(r) for r in wrapper(name)(texts(name), **short(name))]
    for number, result in enumerate(itertools.islice(results, 70)):
        assert shown(result) == expected[number % 5]
        assert asked <= number + 1 + BOUND
    assert asked >= 70


@pytest.mark.parametrize("name", OF_EACH_TASK)
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64])
def test_map_gives_one_result_per_input(name: str, count: int) -> None:
    """Any number of inputs gives as many results, those around a batch's size and none at all too."""
    given = [texts(name)[n % 5] for n in range(count)]
    assert len(list(wrapper(name).map(iter(given), **short(name)))) == count


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_map_raises_a_rows_error_in_its_place(name: str) -> None:
    """By default the rows before a wrong one come first, then its error."""
    bad: Any = 3 if name != "bert" else "no mask"
    results = wrapper(name).map([INPUTS[name], INPUTS[name], bad, INPUTS[name]], **short(name))
    assert [shown(next(results)) for _ in range(2)] == [shown(wrapper(name)(INPUTS[name], **short(name)))] * 2
    with pytest.raises(lmkit.LmkitError):
        next(results)


@pytest.mark.parametrize("bad", [3, None, b"bytes"])
@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_map_returns_a_rows_error_in_its_place(name: str, bad: Any) -> None:
    """With `on_error="return"` an input that is no text is an error in its place, like any other."""
    results = list(wrapper(name).map([INPUTS[name], bad, INPUTS[name]], on_error="return", **short(name)))
    assert isinstance(results[1], lmkit.OptionError)
    assert shown(results[0]) == shown(results[2])


def test_map_returns_inputs_that_are_too_long() -> None:
    """A prompt that does not fit is an InputTooLongError in its place."""
    given = ["She", "the old sailor " * 60, "He"]
    results = list(wrapper("llama").map(given, on_error="return", max_new_tokens=2))
    assert [type(r).__name__ for r in results] == ["Generation", "InputTooLongError", "Generation"]


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_source_that_breaks_gives_what_came_before(on_error: Any) -> None:
    """An iterable that raises midway yields the results of what it gave, then its own error."""

    def breaking() -> Iterator[str]:
        yield from texts("llama")[:3]
        msg = "the disk is gone"
        raise OSError(msg)

    results = wrapper("llama").map(breaking(), on_error=on_error, max_new_tokens=2)
    assert [shown(next(results)) for _ in range(3)] == [
        shown(r) for r in wrapper("llama")(texts("llama")[:3], max_new_tokens=2)
    ]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_map_checks_its_options_at_once(name: str) -> None:
    """A misspelt option, a list per row or an unknown `on_error` raises where `map` is called."""
    with pytest.raises(lmkit.UnknownOptionError):
        wrapper(name).map([], nonsense=1)
    with pytest.raises(lmkit.OptionError, match="on_error='skip'"):
        wrapper(name).map([], on_error="skip")


def test_map_takes_one_value_per_option() -> None:
    """A list with one value per row has no meaning for rows that come one by one: it raises at once."""
    with pytest.raises(lmkit.OptionError):
        wrapper("llama").map(texts("llama"), temperature=[0.5])
    with pytest.raises(lmkit.OptionError):
        wrapper("llama").map(texts("llama"), temperature=[0.5, 0.6])


def test_map_takes_options_that_are_lists() -> None:
    """One list of stop strings is one value, for all rows."""
    plain = wrapper("gpt2")("She", max_new_tokens=10).text
    results = list(wrapper("gpt2").map(["She"] * 34, stop=[plain[4:6], "zzz"], max_new_tokens=10))
    assert {r.text for r in results} == {plain.partition(plain[4:6])[0]}


# asyncio


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_acall_gives_what_a_call_gives(name: str) -> None:
    """`acall` has the same shapes and results as a call, several at a time too."""

    async def main() -> tuple[Any, Any, Any]:
        one, many, none = await asyncio.gather(
            wrapper(name).acall(INPUTS[name], **short(name)),
            wrapper(name).acall(texts(name), **short(name)),
            wrapper(name).acall([], **short(name)),
        )
        return one, many, none

    one, many, none = asyncio.run(main())
    assert shown(one) == shown(wrapper(name)(INPUTS[name], **short(name)))
    assert [shown(r) for r in many] == [shown(r) for r in wrapper(name)(texts(name), **short(name))]
    assert none == []


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_astream_gives_what_a_stream_gives(name: str) -> None:
    """`astream` yields the chunks of `stream`; the event loop runs on in between."""

    async def main() -> tuple[list[str], int]:
        turns = 0

        async def beat() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beating = asyncio.create_task(beat())
        found = [shown(chunk) async for chunk in wrapper(name).astream(texts(name), **short(name))]
        beating.cancel()
        return found, turns

    found, turns = asyncio.run(main())
    assert found == [shown(chunk) for chunk in wrapper(name).stream(texts(name), **short(name))]
    assert turns > 2


def test_errors_come_out_of_async_calls() -> None:
    """What is wrong with a call is raised from `acall` when awaited and from `astream` when made."""
    with pytest.raises(lmkit.OptionError, match="temperature=-1"):
        asyncio.run(wrapper("llama").acall("She", temperature=-1))
    with pytest.raises(lmkit.OptionError, match="temperature=-1"):
        wrapper("llama").astream("She", temperature=-1)


def test_cancelling_an_acall_ends_its_rows() -> None:
    """A cancelled task raises CancelledError, and the model makes at most a step or two more."""
    started = threading.Event()

    def note(step: int, _logits: torch.Tensor) -> None:
        if step == 1:
            started.set()

    async def main() -> int:
        with checkpoints.on_logits(wrapper("bloom").model, note), checkpoints.forwards(wrapper("bloom").model) as seen:
            call = wrapper("bloom").acall(texts("bloom") * 20, max_new_tokens=5000)
            task = asyncio.create_task(call)
            await asyncio.to_thread(started.wait, 60)
            before = len(seen)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return len(seen) - before

    # A step may be under way when the task is cancelled, and the thread needs its turn to see it.
    assert asyncio.run(main()) < 30
    assert wrapper("bloom")("She", max_new_tokens=2).generated_tokens == 2


def test_cancelling_an_acall_ends_a_beam_search_between_batches() -> None:
    """A cancelled task does not go on with the batches of beams that had not begun."""
    started = threading.Event()

    def note(_step: int, _logits: torch.Tensor) -> None:
        started.set()

    async def main() -> int:
        with checkpoints.on_logits(wrapper("t5").model, note), checkpoints.forwards(wrapper("t5").model) as seen:
            options = {"num_beams": 8, "max_new_tokens": 20, "min_new_tokens": 20}
            task = asyncio.create_task(wrapper("t5").acall(texts("t5") * 8, **options))
            await asyncio.to_thread(started.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return len(seen)

    # Forty rows of 8 beams are ten batches of 20 steps each.
    assert asyncio.run(main()) <= 45


async def steps_until_cancelled(work: Coroutine[Any, Any, None]) -> int:
    """Cancel what steps "bloom" at its first step; return how many steps it took in all."""
    with checkpoints.forwards(wrapper("bloom").model) as seen:
        task = asyncio.create_task(work)
        while not seen:  # noqa: ASYNC110 - the model's hook knows no event of the loop
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(seen)


def test_leaving_an_astream_ends_its_rows() -> None:
    """Closing an async stream, or cancelling its task, stops the model and leaves it usable."""

    async def leave() -> int:
        with checkpoints.forwards(wrapper("bloom").model) as seen:
            stream: AsyncIterator[Any] = wrapper("bloom").astream("She", max_new_tokens=5000)
            async with aclosing(stream) as chunks:  # type: ignore[type-var]
                async for _chunk in chunks:
                    break
            return len(seen)

    async def cancel() -> None:
        async for _chunk in wrapper("bloom").astream("She", max_new_tokens=5000):
            pass

    assert asyncio.run(leave()) < 10
    assert asyncio.run(steps_until_cancelled(cancel())) < 200
    assert wrapper("bloom")("She", max_new_tokens=2).generated_tokens == 2


def test_a_cancelled_astream_does_not_wait_for_its_next_chunk() -> None:
    """A row whose text is held back, for it may become a stop string, ends at the next step all the same."""
    held = wrapper("bloom")("She", max_new_tokens=300, min_new_tokens=300).text + "!"

    async def first() -> None:
        await anext(wrapper("bloom").astream("She", max_new_tokens=5000, stop=held))

    assert asyncio.run(steps_until_cancelled(first())) < 100
    assert wrapper("bloom")("She", max_new_tokens=2).generated_tokens == 2


def test_who_cancels_in_each_turn_of_the_loop_leaves_the_model_its_time() -> None:
    """Anyio cancels again until a task ends: the event loop rests in between, or the step would wait for Python."""
    reading, cancels = threading.Event(), 0

    def slow(*_given: Any) -> None:
        reading.set()
        time.sleep(0.3)

    async def main() -> None:
        nonlocal cancels
        task = asyncio.create_task(wrapper("bloom").acall("She", max_new_tokens=5))
        await asyncio.to_thread(reading.wait, 60)
        while not task.done():
            task.cancel()
            cancels += 1
            await asyncio.sleep(0)
        assert task.cancelled()

    hook = wrapper("bloom").model.register_forward_pre_hook(slow)
    try:
        asyncio.run(main())
    finally:
        hook.remove()
    assert cancels < 300  # of two milliseconds each; tens of thousands without


# Closing


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_a_closed_wrapper_refuses_every_verb(name: str) -> None:
    """After `close()` each verb is an EngineError that says how to go on; closing twice is fine."""
    closed = checkpoints.fresh(name)
    closed.close()
    closed.close()
    asynchronous = [lambda: asyncio.run(closed.acall(INPUTS[name])), lambda: closed.astream(INPUTS[name])]
    verbs: list[Any] = [
        lambda: closed(INPUTS[name]),
        lambda: closed([]),
        lambda: closed.map([INPUTS[name]]),
        lambda: closed.stream(INPUTS[name]),
        lambda: closed.model,
        lambda: closed.tokenizer,
        lambda: closed.device,
        lambda: closed.memory_bytes,
        *asynchronous,
    ]
    for verb in verbs:
        with pytest.raises(lmkit.EngineError, match=r"was closed.*lmkit\.load"):
            verb()
    assert repr(closed) == f"<lmkit.{type(closed).__name__} {closed.name!r}, closed>"
    assert closed.plan.name == closed.name


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_a_block_closes_and_gives_the_memory_back(name: str) -> None:
    """Leaving a `with` block, by an error too, closes the wrapper and lets go of the model."""
    import gc
    import weakref

    opened = checkpoints.fresh(name)
    model = weakref.ref(opened.model)
    opened(INPUTS[name], **short(name))

    def fail() -> None:
        with opened as inside:
            assert inside is opened
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    gc.collect()
    assert model() is None
    with pytest.raises(lmkit.EngineError):
        opened(INPUTS[name])


def test_closing_ends_work_in_flight() -> None:
    """A stream whose model is closed raises an EngineError at its next step, text before it kept."""
    opened = checkpoints.fresh("gpt2")
    stream = opened.stream(texts("gpt2"), max_new_tokens=40)
    first = next(stream)
    opened.close()
    with pytest.raises(lmkit.EngineError, match="closed"):
        list(stream)
    assert first.text


def test_closing_ends_a_call_of_another_thread() -> None:
    """A call that runs in another thread when the model is closed ends with an EngineError."""
    opened = checkpoints.fresh("bloom")
    started = threading.Event()
    raised: list[BaseException] = []

    def note(step: int, _logits: torch.Tensor) -> None:
        if step == 1:
            started.set()

    def call() -> None:
        try:
            opened(texts("bloom"), max_new_tokens=5000)
        except lmkit.EngineError as error:
            raised.append(error)

    with checkpoints.on_logits(opened.model, note):
        thread = threading.Thread(target=call)
        thread.start()
        assert started.wait(60)
        opened.close()
        thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_closing_ends_map_at_its_next_batch() -> None:
    """A map over a model that is closed raises an EngineError when it needs the model again."""
    opened = checkpoints.fresh("bert")
    results = opened.map(itertools.repeat("Birds [MASK]."))
    next(results)
    opened.close()
    with pytest.raises(lmkit.EngineError, match="closed"):
        list(itertools.islice(results, 200))


# Attributes


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_attributes_say_what_was_loaded(name: str) -> None:
    """Name, precision, device and size are those of the transformers model inside."""
    found = wrapper(name)
    assert found.name == str(checkpoints.folder(name))
    assert (found.precision, found.device) == ("float32", torch.device("cpu"))
    tensors = {t.data_ptr(): t for t in (*found.model.parameters(), *found.model.buffers())}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.memory_bytes == pytest.approx(held, rel=0.05)
    assert repr(found) == f"<lmkit.{type(found).__name__} {found.name!r}, float32 on cpu>"
    assert found.plan.task == checkpoints.FAMILIES[name].task
    assert not found.model.training


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_a_pickled_wrapper_loads_again(name: str) -> None:
    """A wrapper's pickle holds how it was loaded, not its weights, and gives the same results."""
    data = pickle.dumps(wrapper(name))
    assert len(data) < 2000
    again = pickle.loads(data)  # noqa: S301 - written in the line above
    assert type(again) is type(wrapper(name))
    assert again.model is not wrapper(name).model
    assert (again.precision, again.device) == (wrapper(name).precision, wrapper(name).device)
    assert shown(again(INPUTS[name], **short(name))) == shown(wrapper(name)(INPUTS[name], **short(name)))


@pytest.mark.parametrize("name", OF_EACH_TASK)
def test_the_callers_options_are_not_changed(name: str) -> None:
    """Lists and dicts passed as options come back as they were."""
    options: dict[str, Any] = {"targets": ["was", "the"]} if name == "bert" else {"stop": ["x", "y"]}
    options |= short(name)
    before = {key: list(v) if isinstance(v, list) else v for key, v in options.items()}
    wrapper(name)(INPUTS[name], **options)
    assert options == before
