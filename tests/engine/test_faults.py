"""What goes wrong, and that it goes wrong for nobody else: nothing hangs, nothing leaks, other rows are right."""

import asyncio
import contextlib
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
import lmkit
from checkpoints import texts, wrapper

NAMES = ["llama", "gemma2", "t5", "mamba"]
BUDGET = 8
WAIT = 60
"""Seconds after which a test takes something to hang."""

SEARCH: dict[str, Any] = {"max_new_tokens": 90, "min_new_tokens": 90}
"""Budgets of a search that would go on for long."""

often = settings(
    deadline=None,
    max_examples=12,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
    """Check that a block leaves nothing behind: no rows, no bytes, no threads, and a model that answers at once."""
    before = checkpoints.threads()
    yield
    assert checkpoints.idle(model)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(model, "She", max_new_tokens=2).result(WAIT).generated_tokens <= 2
    assert checkpoints.idle(model)
    assert checkpoints.threads() <= before


def expected(name: str, prompts: list[str], budget: int = BUDGET) -> list[list[int]]:
    """Return what plain transformers gives each prompt alone."""
    return [checkpoints.generated(name, [prompt], max_new_tokens=budget)[0] for prompt in prompts]


def tokens(results: list[Any]) -> list[list[int] | None]:
    """Return the tokens of results as lists, None for a row that failed."""
    return [list(result.token_ids) if isinstance(result, lmkit.Generation) else None for result in results]


def in_threads(*works: Callable[[], Any], seconds: float = WAIT) -> list[Any]:
    """Run each in a thread of its own; return what each returned or raised."""
    found: list[Any] = [None] * len(works)

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except BaseException as error:  # noqa: BLE001 - returned, also a KeyboardInterrupt
            found[number] = error

    threads = [
        threading.Thread(target=run, args=(number,), name=f"caller {number}", daemon=True)
        for number in range(len(works))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads)
    return found


def rows_in(kwargs: dict[str, Any]) -> int:
    """Count the rows of a forward pass."""
    ids = kwargs["decoder_input_ids"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    return len(ids)


def raising(error: Exception, when: Callable[[int, dict[str, Any]], bool]) -> Callable[[int, dict[str, Any]], None]:
    """Raise an error before the forward passes that `when` chooses."""

    def do(step: int, kwargs: dict[str, Any]) -> None:
        if when(step, kwargs):
            raise error

    return do


# A forward pass that raises


@pytest.mark.parametrize("name", NAMES)
@often
@given(step=st.integers(0, 6), more=st.integers(0, 2))
def test_a_step_that_fails_is_tried_again(name: str, step: int, more: int) -> None:
    """A forward pass that fails once, or a few times, while several rows run changes no result."""
    model = wrapper(name)
    prompts = texts(name)[:4]
    options: dict[str, Any] = {"min_new_tokens": BUDGET, "max_new_tokens": BUDGET}  # so that no row is ever alone
    fail = raising(RuntimeError("a hiccup"), lambda now, _: step <= now <= step + more and now % 2 == step % 2)
    with whole(model), checkpoints.before_forwards(model.model, fail):
        results = model(prompts, **options)
    single = [checkpoints.generated(name, [prompt], **options)[0] for prompt in prompts]
    assert tokens(results) == single


def test_searches_in_generate_that_fail_are_tried_again_in_halves() -> None:
    """Beam searches that generate() runs together and that fail are run with fewer rows, and change no result."""
    model, options = wrapper("llama"), {"num_beams": 3, "max_new_tokens": BUDGET}
    fail = raising(RuntimeError("too many"), lambda _, kwargs: rows_in(kwargs) > 3)
    with whole(model), checkpoints.before_forwards(model.model, fail):
        results = model(texts("llama"), **options)
    assert tokens(results) == tokens([model(text, **options) for text in texts("llama")])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_always_fails_fails_each_row(name: str) -> None:
    """If no forward pass works, every row is its own error, in a call, a map and a stream."""
    model = wrapper(name)
    fail = raising(RuntimeError("broken"), lambda *_: True)
    with whole(model), checkpoints.before_forwards(model.model, fail):
        with pytest.raises(
            lmkit.EngineError, match=r"row \d: a step of the model failed: RuntimeError: broken"
        ) as caught:
            model(texts(name), max_new_tokens=BUDGET)
        assert caught.value.results == [None] * len(texts(name))
        results = list(model.map(texts(name), max_new_tokens=BUDGET, on_error="return"))
        assert [str(result) for result in results] == [
            f"row {row}: a step of the model failed: RuntimeError: broken" for row in range(len(results))
        ]
        with pytest.raises(lmkit.EngineError, match="broken"):
            list(model.stream(texts(name), max_new_tokens=BUDGET))


def cache_in(kwargs: dict[str, Any]) -> Any:
    """Return the cache that a forward pass is given."""
    return kwargs[checkpoints.cache_name(checkpoints.wrapper("llama").model)]


def running(model: Any, kwargs: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the inputs of the rows of a forward pass, known by its cache."""
    for decoder in model._engine._batches._decoders():
        if decoder._cache.cache is cache_in(kwargs):
            return [row.request.input_ids for row in decoder.rows]
    return []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_row_that_makes_every_step_fail_fails_alone(name: str, after: int) -> None:
    """Whenever one row is what breaks a forward pass, it alone gets the error, in whichever thread the others are."""
    model = wrapper(name)
    prompts = texts(name)
    bad = tuple(checkpoints.encoded(name, prompts[2]))
    steps = itertools.count()

    def when(_step: int, kwargs: dict[str, Any]) -> bool:
        return bad in running(model, kwargs) and next(steps) >= after

    with whole(model), checkpoints.before_forwards(model.model, raising(ValueError("this row"), when)):
        mine, theirs = in_threads(
            lambda: list(model.map(prompts, max_new_tokens=BUDGET, on_error="return")),
            lambda: model([prompts[0], prompts[4]], max_new_tokens=BUDGET),
        )
    right: list[Any] = expected(name, prompts)
    assert tokens(theirs) == [right[0], right[4]]
    assert isinstance(mine[2], lmkit.EngineError)
    assert "row 2: a step of the model failed: ValueError: this row" in str(mine[2])
    right[2] = None
    assert tokens(mine) == right


def test_a_row_that_failed_alone_lets_the_others_run_together_again() -> None:
    """Once the row that broke the steps is gone, the rest do not go on in halves."""
    model = wrapper("llama")
    bad = tuple(checkpoints.encoded("llama", texts("llama")[2]))
    sizes: list[int] = []
    alone = left = 0

    def when(_step: int, kwargs: dict[str, Any]) -> bool:
        nonlocal alone
        sizes.append(rows_in(kwargs))
        if broken := bad in running(model, kwargs):
            alone = len(sizes)  # it fails once more by itself
        return broken

    prompts = [*texts("llama"), *texts("llama")[3:], *texts("llama")[3:]] * 2
    prompts = [prompt for prompt in prompts if prompt != texts("llama")[2]] + [texts("llama")[2]]
    with whole(model), checkpoints.before_forwards(model.model, raising(ValueError("this row"), when)):
        while left <= len(prompts) // 4:  # which rows are there when it ends is up to how fast map reads them
            sizes.clear()
            list(model.map(prompts, max_new_tokens=20, min_new_tokens=20, on_error="return"))
            left = -(-sum(sizes[alone:]) // 20)
            assert max(sizes[alone:], default=0) == left
        failed = len(sizes)
        list(model.map(prompts[:-1], max_new_tokens=4, min_new_tokens=4, on_error="return"))
    assert sizes[failed] == len(prompts) - 1


# Memory

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["accelerator", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_for_few_rows_gives_the_same_results(name: str, shortage: Exception) -> None:
    """Where more than three rows at a time run out of memory, all rows get their results three at a time."""
    model = wrapper(name)
    prompts = texts(name) * 2
    sizes: list[int] = []

    def when(_step: int, kwargs: dict[str, Any]) -> bool:
        sizes.append(rows_in(kwargs))
        return sizes[-1] > 3

    with whole(model), checkpoints.before_forwards(model.model, raising(shortage, when)):
        results = model(prompts, max_new_tokens=BUDGET)
    assert tokens(results) == expected(name, prompts)
    assert max(sizes) > 6
    assert max(size for size in sizes if size <= 3) >= 2
    assert sum(size > 3 for size in sizes) < 8, "the engine forgot that memory is short"


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["accelerator", "cpu"])
def test_memory_that_runs_out_in_the_middle_loses_no_token(shortage: Exception) -> None:
    """Rows that had to begin anew go on from what they have, each with the draws of its own stream."""
    model = wrapper("llama")
    options: dict[str, Any] = {"temperature": 1.2, "seed": [1, 2, 3, 4, 5], "max_new_tokens": 10, "logprobs": 1}
    alone = [
        model(prompt, **options | {"seed": seed}) for prompt, seed in zip(texts("llama"), options["seed"], strict=True)
    ]
    fail = raising(shortage, lambda step, kwargs: step >= 4 and rows_in(kwargs) > 2)
    with whole(model), checkpoints.before_forwards(model.model, fail):
        results = model(texts("llama"), **options)
    assert tokens(results) == tokens(alone)
    for result, single in zip(results, alone, strict=True):
        assert [e.logprob for e in result.logprobs] == pytest.approx([e.logprob for e in single.logprobs], abs=1e-3)


def test_a_row_that_does_not_fit_alone_says_what_it_needs() -> None:
    """A row too long for the memory there is fails alone, naming its tokens and their MiB; the others are right."""
    model = wrapper("llama")
    long = " ".join(["water"] * 40)
    count = len(checkpoints.encoded("llama", long))
    prompts = [*texts("llama")[:2], long, *texts("llama")[2:]]

    def when(_step: int, kwargs: dict[str, Any]) -> bool:
        return bool(cache_in(kwargs).get_seq_length() + kwargs["input_ids"].shape[1] >= count)

    with (
        whole(model),
        checkpoints.before_forwards(model.model, raising(SHORTAGES[0], when)),
        pytest.raises(lmkit.EngineError, match="out of memory, with this row alone") as caught,
    ):
        model(prompts, max_new_tokens=BUDGET)
    message = str(caught.value)
    assert message.startswith("row 2: ")
    assert f"its {count + BUDGET} tokens" in message
    assert "MiB of keys and values" in message
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    right: list[Any] = expected("llama", prompts)
    right[2] = None
    assert tokens(caught.value.results) == right


# Callers that leave


@pytest.mark.parametrize("name", NAMES)
@often
@given(chunks=st.integers(0, 9), rows=st.integers(1, 4))
def test_a_stream_left_at_any_chunk_ends_its_rows_only(name: str, chunks: int, rows: int) -> None:
    """Whenever a stream is left, its rows are gone, and those of others get their results."""
    model = wrapper(name)
    started = threading.Event()

    def leave() -> int:
        with contextlib.closing(model.stream(texts(name)[:rows], max_new_tokens=40)) as stream:
            started.set()
            return sum(1 for _ in itertools.islice(stream, chunks))

    def stay() -> list[Any]:
        started.wait(WAIT)
        return list(model(texts(name), max_new_tokens=BUDGET))

    with whole(model):
        seen, results = in_threads(leave, stay)
        assert isinstance(seen, int)
        assert tokens(results) == expected(name, texts(name))


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_leaving_a_stream_after_two_chunks_costs_at_most_two_more_forwards(name: str) -> None:
    """A stream that is closed, or let go of, makes no more than two forward passes after that."""
    model = wrapper(name)
    for leave in (lambda stream: stream.close(), lambda _stream: None):
        stream = model.stream(texts(name)[0], max_new_tokens=60, min_new_tokens=60)
        next(stream), next(stream)
        before = model.stats.forwards
        leave(stream)
        del stream
        gc.collect()
        assert checkpoints.idle(model)
        assert model.stats.forwards <= before + 2


@often
@given(steps=st.integers(1, 20))
def test_cancelling_a_task_at_any_step_leaves_the_others(steps: int) -> None:
    """A cancelled `acall` ends its rows soon, while a call beside it goes on to its results."""
    model = wrapper("bloom")
    right = expected("bloom", texts("bloom"))

    async def main() -> list[Any]:
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()

        def note(step: int, _kwargs: dict[str, Any]) -> None:
            if step == steps:
                loop.call_soon_threadsafe(reached.set)

        with checkpoints.before_forwards(model.model, note):
            leaving = asyncio.create_task(model.acall(texts("bloom") * 3, max_new_tokens=5000))
            staying = asyncio.create_task(model.acall(texts("bloom"), max_new_tokens=BUDGET))
            await asyncio.wait_for(reached.wait(), WAIT)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(leaving, WAIT)
            found: list[Any] = await asyncio.wait_for(staying, WAIT)
            return found

    with whole(model):
        assert tokens(asyncio.run(main())) == right


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_cancelling_a_task_ends_its_beam_search_in_generate(name: str) -> None:
    """A causal model's beams run in generate(): once their task is cancelled they end at the next step."""
    model = wrapper(name)
    seen: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def cancel(step: int, _kwargs: dict[str, Any]) -> None:
            seen.append(step)
            if step == 3:
                told = threading.Event()
                loop.call_soon_threadsafe(searching.cancel)
                loop.call_soon_threadsafe(loop.call_later, 0.05, told.set)  # later than the task's own turns
                assert told.wait(WAIT)

        with checkpoints.before_forwards(model.model, cancel):
            searching = asyncio.create_task(model.acall(texts(name)[0], num_beams=3, **SEARCH))
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(searching, WAIT)

    with whole(model):
        asyncio.run(main())
    assert 4 <= len(seen) <= 5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_map_reads_an_endless_iterator_a_bounded_number_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map over inputs without an end gives results in order as they are asked for, and can be left."""
    monkeypatch.setattr("lmkit.wrappers.ordered_map.READ_AHEAD", 20)
    model = wrapper(name)
    read: list[int] = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield texts(name)[number % 5]

    right = expected(name, texts(name))
    with whole(model):
        results = model.map(endless(), max_new_tokens=BUDGET)
        for taken in range(48):
            assert tokens([next(results)]) == [right[taken % 5]]
            assert len(read) <= taken + 1 + 20
        results.close()


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_a_reader_that_stalls_stops_nobody(name: str) -> None:
    """While a stream is not read, calls of its own thread and of others finish; read later, it is right."""
    model = wrapper(name)
    prompts = texts(name)[:2]
    right = expected(name, texts(name))
    with whole(model):
        stalled = model.stream(prompts, max_new_tokens=BUDGET)
        chunks = [next(stalled), next(stalled)]
        assert tokens(model(texts(name), max_new_tokens=BUDGET)) == right
        found = in_threads(*[lambda: model(texts(name), max_new_tokens=BUDGET)] * 3)
        assert [tokens(results) for results in found] == [right] * 3
        chunks += stalled
        for row in range(2):
            result = next(chunk.result for chunk in chunks if chunk.index == row and chunk.result)
            assert list(result.token_ids) == right[row]
            assert "".join(chunk.text for chunk in chunks if chunk.index == row) == result.text


def test_a_stalled_stream_that_is_never_read_again_leaves_with_its_iterator() -> None:
    """Whoever forgets a stream in the middle gives its rows back when the iterator is collected, in any thread."""
    model = wrapper("gpt2")
    with whole(model):
        streams = [model.stream(text, max_new_tokens=30, min_new_tokens=30) for text in texts("gpt2")]
        for stream in streams:
            next(stream)
        assert model.stats.running == len(streams)
        del stream
        in_threads(streams.clear)
        gc.collect()


# Streams


@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_the_third_step_reaches_who_reads_the_stream(name: str) -> None:
    """What was written before a step failed comes out of the stream, and then the error."""
    model = wrapper(name)
    right = model(texts(name)[0], max_new_tokens=BUDGET, min_new_tokens=BUDGET)
    chunks: list[Any] = []
    fail = raising(RuntimeError("at step 3"), lambda step, _: step >= 3)
    with whole(model), checkpoints.before_forwards(model.model, fail):
        stream = model.stream(texts(name)[0], max_new_tokens=BUDGET, min_new_tokens=BUDGET)
        with pytest.raises(lmkit.EngineError, match="RuntimeError: at step 3"):
            chunks.extend(stream)
        assert next(stream, None) is None
    shown = "".join(chunk.text for chunk in chunks)
    assert right.text.startswith(shown)
    assert shown or name == "t5"  # T5 may hold back so few tokens


# Interruptions


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_an_interruption_ends_the_call_it_falls_into_only(name: str, step: int) -> None:
    """Ctrl-C in a forward pass reaches the caller whose thread made it; other threads' rows are right."""
    model = wrapper(name)
    right = expected(name, texts(name))
    started = threading.Event()

    def interrupt(now: int, _kwargs: dict[str, Any]) -> None:
        if now == 1 or step == 0:
            started.set()
        if now >= step and threading.current_thread().name == "caller 0":
            raise KeyboardInterrupt

    def later() -> list[Any]:
        started.wait(WAIT)
        return list(model(texts(name), max_new_tokens=BUDGET))

    with whole(model), checkpoints.before_forwards(model.model, interrupt):
        first, *others = in_threads(
            lambda: model(texts(name), max_new_tokens=60, min_new_tokens=60), later, later, later
        )
        assert isinstance(first, KeyboardInterrupt)
        assert [tokens(results) for results in others] == [right] * 3


def test_an_interruption_of_a_search_in_generate_ends_one_caller() -> None:
    """Ctrl-C while a caller runs the beam search of another in generate() ends his own rows: the search runs again."""
    model, options = wrapper("llama"), {"num_beams": 3, "max_new_tokens": BUDGET}
    text, started = texts("llama")[0], threading.Event()
    right = model(text, **options).token_ids

    def interrupt(step: int, kwargs: dict[str, Any]) -> None:
        if step == 0:
            started.set()
            deadline = time.perf_counter() + WAIT
            while not model.stats.waiting and time.perf_counter() < deadline:
                time.sleep(0.001)
        if rows_in(kwargs) == 3 and threading.current_thread().name == "caller 0":
            raise KeyboardInterrupt

    def later() -> Any:
        started.wait(WAIT)
        return model(text, **options)

    with whole(model), checkpoints.before_forwards(model.model, interrupt):
        first, second = in_threads(lambda: model(text, max_new_tokens=90, min_new_tokens=90), later)
    assert isinstance(first, KeyboardInterrupt)
    assert second.token_ids == right


def test_an_interruption_between_steps_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C anywhere in what the leader does, not only in the model, ends one call and breaks nothing."""
    model = wrapper("llama")
    right = expected("llama", texts("llama"))
    batches = model._engine._batches
    for method in ("sweep", "_admit", "_tell", "_choose", "_look", "_compact", "_begin_again"):
        calls = itertools.count()
        real = getattr(batches, method)

        def interrupted(*given: Any, _calls: Any = calls, _real: Any = real) -> Any:
            if next(_calls) == 1:
                raise KeyboardInterrupt
            return _real(*given)

        with whole(model), monkeypatch.context() as patch:
            patch.setattr(batches, method, interrupted)
            budgets = [2, 8, 3, 8, 8]
            with contextlib.suppress(KeyboardInterrupt):
                model(texts("llama"), max_new_tokens=budgets)
            assert tokens(model(texts("llama"), max_new_tokens=BUDGET)) == right


class Interrupting(list[Any]):
    """A list that Ctrl-C falls upon in one thread, right after something was appended."""

    def append(self, item: Any) -> None:
        """Append, and be interrupted."""
        super().append(item)
        if threading.current_thread().name == "caller 1":
            raise KeyboardInterrupt


def test_an_interruption_while_waiting_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a caller that begins to wait for its turn does not leave it in the way of those behind it."""
    model = checkpoints.fresh("llama")
    monkeypatch.setattr(model._engine, "_waiters", Interrupting())
    steps = [threading.Event() for _ in range(3)]
    gone = threading.Event()

    def note(step: int, _kwargs: dict[str, Any]) -> None:
        if step < len(steps):
            steps[step].set()
        if step == 2:
            gone.wait(WAIT)  # whoever leads goes on when the interrupted one is gone

    def interrupted() -> None:
        steps[0].wait(WAIT)
        try:
            model("She", max_new_tokens=40)
        finally:
            gone.set()

    def later() -> list[Any]:
        gone.wait(WAIT)
        return list(model(texts("llama"), max_new_tokens=40, min_new_tokens=40))

    with checkpoints.before_forwards(model.model, note):
        first, second, third = in_threads(
            lambda: model(texts("llama"), max_new_tokens=20, min_new_tokens=20), interrupted, later, seconds=20
        )
    assert isinstance(second, KeyboardInterrupt)
    assert tokens(first) == [row[:20] for row in tokens(third) if row is not None]
    assert checkpoints.idle(model)


# Closing


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_closing_with_work_in_flight_ends_all_of_it(name: str) -> None:
    """Calls and maps of several threads, and a stream nobody reads, end with a clear error; the model is let go of."""
    model = checkpoints.fresh(name)
    held = weakref.ref(model.model)
    before = checkpoints.threads()
    suspended = model.stream(texts(name), max_new_tokens=90)
    next(suspended)
    started = threading.Event()

    def note(step: int, _kwargs: dict[str, Any]) -> None:
        if step == 6:
            started.set()

    options: dict[str, Any] = {"max_new_tokens": 90, "min_new_tokens": 90}
    works: list[Callable[[], Any]] = [
        lambda: model(texts(name) * 4, **options),
        lambda: list(model.map(itertools.cycle(texts(name)), **options)),
        lambda: list(model.stream(texts(name), **options)),
    ]

    def close() -> None:
        assert started.wait(WAIT)
        model.close()

    with checkpoints.before_forwards(model.model, note):
        *found, closed = in_threads(*works, *works, close)
    assert closed is None
    for error in found:
        assert isinstance(error, lmkit.EngineError)
        assert "was closed" in str(error)
    with pytest.raises(lmkit.EngineError, match="was closed"):
        list(suspended)
    assert checkpoints.threads() <= before
    gc.collect()
    assert held() is None, "errors and streams that are kept hold the model"


def test_closing_ends_a_beam_search_in_generate() -> None:
    """A causal model's beams run in generate(): once it is closed by another thread they end at the next step."""
    model = checkpoints.fresh("llama")
    seen: list[int] = []

    def close(step: int, _kwargs: dict[str, Any]) -> None:
        seen.append(step)
        if step == 3:
            assert in_threads(model.close) == [None]

    with checkpoints.before_forwards(model.model, close), pytest.raises(lmkit.EngineError, match="was closed"):
        model(texts("llama")[0], num_beams=3, **SEARCH)
    assert 4 <= len(seen) <= 5


def test_closing_holds_no_model_though_a_stream_is_never_read_again() -> None:
    """A stream that lies suspended does not keep the weights of a closed model."""
    model = checkpoints.fresh("llama")
    held = weakref.ref(model.model)
    suspended = model.stream(texts("llama"), max_new_tokens=90)
    next(suspended)
    model.close()
    gc.collect()
    assert held() is None
    with pytest.raises(lmkit.EngineError, match="was closed"):
        list(suspended)  # after what was written before the model was closed


# Many callers


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_concurrent_tasks_join_the_same_batch(name: str) -> None:
    """Sixty-four `acall`s at a time run together, and each gets its own result."""
    model = wrapper(name)
    prompts = (texts(name) * 13)[:64]
    right = expected(name, texts(name))
    sizes: list[int] = []

    async def main() -> list[Any]:
        calls = [model.acall(prompt, max_new_tokens=BUDGET) for prompt in prompts]
        found: list[Any] = await asyncio.wait_for(asyncio.gather(*calls), WAIT)
        return found

    def note(_step: int, kwargs: dict[str, Any]) -> None:
        sizes.append(rows_in(kwargs))

    with whole(model), checkpoints.before_forwards(model.model, note):
        results = asyncio.run(main())
    assert tokens(results) == (right * 13)[:64]
    assert max(sizes) > 6
    assert len(sizes) < 64 * BUDGET / 3
