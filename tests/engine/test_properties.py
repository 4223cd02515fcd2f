"""Random sets of rows, callers and arrivals: each row is its own single run."""

import asyncio
import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
import lmkit
from checkpoints import reference, wrapper

NAMES = ["llama", "gpt2", "gemma2", "t5"]
LONGEST = 12
"""The most new tokens of a row."""


GREEDY = lmkit.Greedy()


@dataclass(frozen=True)
class Asked:
    """A row as its caller asks for it."""

    prompt: str
    budget: int
    mode: lmkit.Greedy | lmkit.Sample = GREEDY
    penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    copies: int = 1
    logprobs: int | None = None
    lookup: bool = False


@dataclass(frozen=True)
class Caller:
    """Somebody who asks for rows in one way, after so many forward passes of the model."""

    verb: str
    rows: tuple[Asked, ...]
    arrives: int


@dataclass(frozen=True)
class Limits:
    """What runs together, and what is kept; small numbers make rows wait, join and be read in pieces."""

    batch: int = 16_384
    prompt: int = 2048
    beside: int = 512
    ahead: int = 256
    prefix: int = 32


@cache
def prompts(name: str) -> tuple[str, ...]:
    """Return prompts from a word to sixty, of which some begin alike; Gemma 2's window is eight tokens."""
    draws = random.Random(name)  # noqa: S311 - the same every time
    words = " ".join(checkpoints.texts(name)).split()
    alike = " ".join(draws.choices(words, k=10))
    return tuple(
        f"{alike if n % 3 == 0 else ''} {' '.join(draws.choices(words, k=length))}".strip()
        for n, length in enumerate([1, 2, 3, 4, 5, 6, 8, 9, 12, 15, 20, 24])
    )


STOPS = ("e", "a", "th", " s", "er", "on the", "\n")

modes = st.one_of(
    st.just(lmkit.Greedy()),
    st.builds(
        lmkit.Sample,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_p=st.sampled_from([1.0, 0.8]),
        top_k=st.sampled_from([None, 3, 20]),
    ),
)


@st.composite
def rows(draw: Any, name: str) -> Asked:
    """Draw a row."""
    mode = draw(modes)
    sampled = isinstance(mode, lmkit.Sample)
    return Asked(
        prompt=draw(st.sampled_from(prompts(name))),
        budget=draw(st.integers(1, LONGEST)),
        mode=mode,
        penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        stop=draw(st.sampled_from([(), (), *((stop,) for stop in STOPS), STOPS[:3]])),
        seed=draw(st.integers(0, 3)) if sampled else 0,
        copies=draw(st.sampled_from([1, 1, 3])) if sampled else 1,
        logprobs=draw(st.sampled_from([None, None, 0, 2])),
        lookup=draw(st.booleans()),
    )


@st.composite
def callers(draw: Any, name: str) -> Caller:
    """Draw a caller; a stream has one completion per row, and a map the same options for all rows."""
    verb = draw(st.sampled_from(["call", "stream", "map", "acall"]))
    found = draw(st.lists(rows(name), min_size=1, max_size=5))
    if verb == "stream":
        found = [replace(row, copies=1) for row in found]
    if verb == "map":
        found = [replace(found[0], prompt=row.prompt) for row in found]
    return Caller(verb, tuple(found), draw(st.sampled_from([0, 0, 1, 3, 6])))


limits = st.builds(
    Limits,
    batch=st.sampled_from([16_384, 150, 60]),
    prompt=st.sampled_from([2048, 24]),
    beside=st.sampled_from([512, 6]),
    ahead=st.sampled_from([256, 2]),
    prefix=st.sampled_from([32, 4]),
)


# The reference


@cache
def greedy(name: str, prompt: str, penalty: float) -> tuple[int, ...]:
    """Return what plain transformers continues a prompt with, its end token included."""
    model, _ = reference(name)
    ids, mask = checkpoints.inputs(name, [prompt])
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, repetition_penalty=penalty, max_new_tokens=LONGEST
    )
    new = found[0, ids.shape[1] if checkpoints.FAMILIES[name].task == "causal" else 1 :].tolist()
    kept = checkpoints.until_end(new, checkpoints.ends(model))
    return tuple(new[: len(kept) + 1])


def ended(name: str, row: Asked) -> tuple[tuple[int, ...], str, str, str | None]:
    """Cut a greedy continuation where the row's budget, an end token or a stop string ends it, token by token."""
    model, tokenizer = reference(name)
    tokens = greedy(name, row.prompt, row.penalty)[: row.budget]
    before = checkpoints.encoded(name, row.prompt) if checkpoints.FAMILIES[name].task == "causal" else []
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    ids: list[int] = []
    text = ""
    for token_id in tokens:
        if token_id in checkpoints.ends(model):
            return tuple(ids), text, "eos", None
        ids.append(token_id)
        text = tokenizer.decode([*before, *ids], skip_special_tokens=True)[start:]
        begins = sorted((text.index(stop), -len(stop), stop) for stop in row.stop if stop in text)
        if begins:
            return tuple(ids), text[: begins[0][0]], "stop", begins[0][2]
    return tuple(ids), text, "length", None


@cache
def alone(name: str, row: Asked) -> Any:
    """Return the result of the row's own call, with nothing else running."""
    return wrapper(name)([row.prompt], **options(name, [row]))[0]


# What lmkit does


def options(name: str, found: list[Asked]) -> dict[str, Any]:
    """Write rows as the options of a call, one value per row; only a generator takes `lookup`."""
    guesses = {"lookup": [row.lookup for row in found]} if checkpoints.FAMILIES[name].task == "causal" else {}
    return guesses | {
        "max_new_tokens": [row.budget for row in found],
        "mode": [row.mode for row in found],
        "repetition_penalty": [row.penalty for row in found],
        "stop": [list(row.stop) for row in found],
        "seed": [row.seed for row in found],
        "num_return_sequences": [row.copies for row in found],
        "logprobs": [row.logprobs for row in found],
    }


def run(name: str, caller: Caller) -> list[Any]:
    """Do what a caller does; return the results of its rows in order."""
    model, found = wrapper(name), list(caller.rows)
    texts = [row.prompt for row in found]
    if caller.verb == "map":
        same = {key: values[0] for key, values in options(name, found).items()}
        return list(model.map(iter(texts), **same))
    if caller.verb == "acall":
        results: list[Any] = asyncio.run(model.acall(texts, **options(name, found)))
        return results
    if caller.verb == "stream":
        del (given := options(name, found))["num_return_sequences"]
        shown, results = [""] * len(found), [None] * len(found)
        for chunk in model.stream(texts, **given):
            shown[chunk.index] += chunk.text
            results[chunk.index] = chunk.result or results[chunk.index]
        assert shown == [result.text for result in results if result is not None]
        return results
    return list(model(texts, **options(name, found)))


def arrive(gate: threading.Event, others: list[threading.Thread]) -> None:
    """Wait until a gate opens, or until all others are done: then no forward pass will open it."""
    while any(thread.is_alive() for thread in others) and not gate.wait(0.002):
        pass
    gate.set()


def together(name: str, found: list[Caller]) -> list[list[Any]]:
    """Let callers arrive in their own threads, each after so many forward passes; return the results of each."""
    results: list[list[Any]] = [[] for _ in found]
    failed: list[BaseException] = []
    gates = [threading.Event() for _ in found]

    def work(number: int) -> None:
        gates[number].wait(60)
        try:
            results[number] = run(name, found[number])
        except Exception as error:  # noqa: BLE001 - raised below, in the test's own thread
            failed.append(error)

    def open_gates(step: int, _kwargs: dict[str, Any]) -> None:
        for caller, gate in zip(found, gates, strict=True):
            if caller.arrives <= step:
                gate.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(found))]
    with checkpoints.before_forwards(wrapper(name).model, open_gates):
        for thread in threads:
            thread.start()
        for number in sorted(range(len(found)), key=lambda number: found[number].arrives):
            others = [thread for thread, gate in zip(threads, gates, strict=True) if gate.is_set()]
            arrive(gates[number], others)
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for error in failed:
        raise error
    return results


@contextmanager
def limited(name: str, limit: Limits) -> Iterator[None]:
    """Let only so much run together, and start with no prefixes kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmkit.engine.scheduler.BATCH_TOKENS", {"cpu": limit.batch})
        patch.setattr("lmkit.engine.scheduler.PROMPT_TOKENS", limit.prompt)
        patch.setattr("lmkit.engine.scheduler.PROMPT_TOKENS_BESIDE", limit.beside)
        patch.setattr("lmkit.wrappers.ordered_map.READ_AHEAD", limit.ahead)
        for module in ("prefixes", "batches"):
            patch.setattr(f"lmkit.engine.{module}.SHORTEST", limit.prefix)
        checkpoints.forget(wrapper(name))
        yield


def check(name: str, row: Asked, result: Any) -> None:
    """Compare a row's result with plain transformers if it is greedy, and with its own single run."""
    single = alone(name, row)
    if isinstance(row.mode, lmkit.Greedy):
        found = (result.token_ids, result.text, result.finish_reason, result.stop_reason)
        assert found == ended(name, row)
    assert len(result.completions) == row.copies
    for mine, expected in zip(result.completions, single.completions, strict=True):
        assert (mine.token_ids, mine.text) == (expected.token_ids, expected.text)
        assert (mine.finish_reason, mine.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert (mine.logprobs is None) == (row.logprobs is None)
        for entry, other in zip(mine.logprobs or (), expected.logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert len(entry.top) == row.logprobs


@pytest.mark.parametrize("name", NAMES)
@settings(
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_rows_equal_their_single_runs_whatever_runs_beside_them(name: str, data: Any) -> None:
    """Rows of calls, maps and streams from several threads, arriving at any time, are those of their own runs."""
    found = data.draw(st.lists(callers(name), min_size=1, max_size=4))
    threads = checkpoints.threads()
    with limited(name, data.draw(limits)):
        results = together(name, found)
    for caller, given_back in zip(found, results, strict=True):
        assert len(given_back) == len(caller.rows)
        for row, result in zip(caller.rows, given_back, strict=True):
            check(name, row, result)
    assert checkpoints.idle(wrapper(name))
    assert checkpoints.threads() <= threads


@pytest.mark.parametrize("name", NAMES)
def test_the_limits_of_these_tests_make_rows_wait_and_join(name: str) -> None:
    """With such limits a batch is filled again as rows end and prompts are read in pieces, to the same results."""
    causal = checkpoints.FAMILIES[name].task == "causal"
    found = [Asked(prompt, 3 + 3 * (n % 4)) for n, prompt in enumerate(prompts(name) * 2)]
    model = wrapper(name).model
    sizes: list[tuple[int, int]] = []

    def note(_step: int, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids") if causal else kwargs["decoder_input_ids"]
        assert ids is not None
        sizes.append(tuple(ids.shape))

    with limited(name, Limits(batch=200, prompt=24, beside=12)), checkpoints.before_forwards(model, note):
        results = run(name, Caller("call", tuple(found), 0))
    for row, result in zip(found, results, strict=True):
        check(name, row, result)
    assert 1 < max(count for count, _ in sizes) < len(found)
    pieces = [place for place, (_, columns) in enumerate(sizes) if columns > 1]
    batches = [count for count, _ in sizes]
    grown = [place for place in range(1, len(batches)) if batches[place] > batches[place - 1]]
    assert grown, "no batch grew after rows had left it"
    if causal:
        assert len(pieces) > 4
        assert max(count * columns for count, columns in sizes) < 60
        # Pieces of prompts are read between the steps of rows that run.
        assert any(b - a > 1 for a, b in itertools.pairwise(pieces))
    assert len(sizes) < sum(len(result.token_ids) + 1 for result in results)


def test_gemma_2_has_rows_longer_than_its_window() -> None:
    """The prompts of these tests cross the sliding window, and some do not reach it."""
    lengths = [len(checkpoints.encoded("gemma2", prompt)) for prompt in prompts("gemma2")]
    assert wrapper("gemma2").model.config.sliding_window == 8
    assert min(lengths) < 8
    assert max(lengths) > 24
