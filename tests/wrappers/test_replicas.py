"""Replicas: the answers of one model from several processes, whatever becomes of these."""

import asyncio
import gc
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import checkpoints
import lmkit
from lmkit.planning.machine import this_machine
from lmkit.replies.asking import Budget
from lmkit.replies.formats import known
from lmkit.replies.scanner import Scanner
from lmkit.wrappers.replica_worker import answer, asked, read

TEXTS = [f"The train number {number} was late again. " * (1 + number % 4) for number in range(40)]
TOP = 2
"""Draws are from two tokens: from 400, one in 77,000 was another one beside other rows, by the last bit of a sum."""

MASKED = ["Birds [MASK].", "The [MASK] was late, so we walked [MASK].", "[MASK] morning the baker opens the shop."] * 5


def replicated(name: str, replicas: Any = 2, **options: Any) -> Any:
    """Load a tiny checkpoint in processes of one thread each."""
    task: Any = checkpoints.FAMILIES[name].task
    return lmkit.load(task, checkpoints.folder(name), "float32", replicas=replicas, **options)


@pytest.fixture(scope="module")
def generator() -> Iterator[Any]:
    """Two processes of a causal model."""
    with replicated("llama") as found:
        yield found


def processes(model: Any) -> list[psutil.Process]:
    """Return the processes of replicas."""
    return [psutil.Process(replica.process.pid) for replica in model._loaded.pool._replicas]


def ended(found: list[psutil.Process]) -> bool:
    """Wait until processes have ended; say whether all have."""
    return not psutil.wait_procs(found, timeout=20)[1]


def plain(results: Any) -> list[Any]:
    """Return results as plain data, without what the clock says."""
    return [{**result.to_dict(), "timing": None} for result in results]


def likelihoods(scores: Any) -> list[Any]:
    """Return what texts score, rounded."""
    return [[round(one, 3) for one in score.token_logprobs] for score in scores]


def long_call(model: Any) -> Any:
    """Ask for more than is done in a moment."""
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "num_return_sequences": 8}
    return model(TEXTS, **options, sample=True, top_k=TOP, seed=list(range(40)))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 8},
        {"max_new_tokens": 8, "sample": True, "top_k": TOP, "seed": 7, "num_return_sequences": 2},
        {"max_new_tokens": [1 + number % 9 for number in range(40)], "logprobs": 2},
        {"max_new_tokens": 6, "num_beams": 2},
    ],
)
def test_calls_are_those_of_one_engine(generator: Any, options: dict[str, Any]) -> None:
    """What replicas answer to a list is, but for rounding, what one engine does: texts, tokens, seeds, likelihoods."""
    pairs = zip(generator(TEXTS, **options), checkpoints.wrapper("llama")(TEXTS, **options), strict=True)
    for found, expected in pairs:
        assert (found.prompt, found.seed, found.prompt_tokens) == (
            expected.prompt,
            expected.seed,
            expected.prompt_tokens,
        )
        for mine, theirs in zip(found.completions, expected.completions, strict=True):
            assert (mine.text, mine.token_ids, mine.finish_reason) == (
                theirs.text,
                theirs.token_ids,
                theirs.finish_reason,
            )
            assert [one.logprob for one in mine.logprobs or ()] == pytest.approx(
                [one.logprob for one in theirs.logprobs or ()], abs=1e-4
            )


def test_other_verbs_are_those_of_one_engine(generator: Any, tmp_path: Path) -> None:
    """Chats, `map`, streams, `score`, `rank`, answers as data and jobs give what they give with one engine."""
    one = checkpoints.wrapper("llama")
    expected = [result.text for result in one(TEXTS, max_new_tokens=5)]
    assert isinstance(generator, lmkit.Generator)
    assert [result.text for result in generator.map(iter(TEXTS), max_new_tokens=5)] == expected
    streamed = dict.fromkeys(range(6), "")
    for chunk in generator.stream(TEXTS[:6], max_new_tokens=5):
        streamed[chunk.index] += chunk.text
    assert list(streamed.values()) == expected[:6]
    assert likelihoods(generator.score(TEXTS)) == likelihoods(one.score(TEXTS))
    assert str(generator.rank(TEXTS[0], ["It rained.", "xyz", "The"])) == str(
        one.rank(TEXTS[0], ["It rained.", "xyz", "The"])
    )
    asked: Any = {"output": lmkit.Regex("[ab]{3}"), "max_new_tokens": 20}
    assert [result.value for result in generator(TEXTS[:3], **asked)] == [r.value for r in one(TEXTS[:3], **asked)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert generator.run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=5).failed == 0
    assert [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected


def test_threads_and_tasks_share_replicas(generator: Any) -> None:
    """Two threads and an asyncio task that call at the same time get their own answers, and both processes work."""
    expected = [result.text for result in checkpoints.wrapper("llama")(TEXTS, max_new_tokens=6)]
    before, found = generator.stats.generated_tokens, {}

    def call(name: int) -> None:
        found[name] = [result.text for result in generator(TEXTS, max_new_tokens=6)]

    threads = [threading.Thread(target=call, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    found[2] = [result.text for result in asyncio.run(generator.acall(TEXTS, max_new_tokens=6))]
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 3
    assert generator.stats.generated_tokens - before == 3 * sum(
        result.generated_tokens for result in checkpoints.wrapper("llama")(TEXTS, max_new_tokens=6)
    )
    assert all(one.forwards for one in generator._loaded.pool.stats())


def test_what_is_left_is_not_computed(generator: Any) -> None:
    """Leaving a stream, cancelling a task and Ctrl-C end the rows in the processes, which go on with other calls."""

    def idle() -> bool:
        deadline = time.monotonic() + 20
        while (stats := generator.stats).running + stats.waiting and time.monotonic() < deadline:
            time.sleep(0.05)
        return not stats.running + stats.waiting

    stream = generator.stream(TEXTS, max_new_tokens=80, min_new_tokens=80)
    next(stream)
    stream.close()
    assert idle()

    async def cancel() -> None:
        task = asyncio.create_task(generator.acall(TEXTS, max_new_tokens=80, min_new_tokens=80, sample=True))
        await asyncio.sleep(0.3)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert idle()
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        long_call(generator)
    assert idle()
    assert generator("She", max_new_tokens=2).text == checkpoints.wrapper("llama")("She", max_new_tokens=2).text


def test_options_are_checked_in_the_parent(generator: Any) -> None:
    """An option that is wrong, or cannot be sent, is an error at once; one that pickles is sent."""
    with pytest.raises(lmkit.UnknownOptionError, match="max_new_tokens"):
        generator(TEXTS, max_new_token=3)
    with pytest.raises(lmkit.OptionError, match=r"cannot be sent to the process of a replica.*lambda"):
        generator.map(TEXTS, processors=[lambda _ids, scores: scores])
    expected = checkpoints.wrapper("llama")("She", max_new_tokens=4)
    suppressed: Any = checkpoints.hf.SuppressTokensLogitsProcessor([expected.token_ids[0]])
    options = {"processors": [suppressed], "max_new_tokens": 4}
    assert generator("She", **options).token_ids == checkpoints.wrapper("llama")("She", **options).token_ids
    assert generator("She", **options).token_ids != expected.token_ids


def test_what_belongs_to_one_model_says_where_it_is(generator: Any) -> None:
    """The plan counts all replicas, and there is no model to look at."""
    one = checkpoints.wrapper("llama")
    assert generator.plan.weights_bytes == 2 * one.plan.weights_bytes
    assert generator.memory_bytes == 2 * one.memory_bytes
    assert "2 on cpu with 1 threads each" in generator.plan.reasons["replicas"]
    assert repr(generator).startswith("<lmkit.Generator ")
    with pytest.raises(lmkit.EngineError, match="other processes"):
        _ = generator.model


def test_closed_while_it_runs() -> None:
    """`close` ends calls with an error and leaves no process; a translator answers as one engine does before."""
    translator, one = replicated("m2m100"), checkpoints.wrapper("m2m100")
    options = {"source": "en", "target": "fr", "max_new_tokens": 6}
    assert plain(translator(TEXTS[:9], **options)) == plain(one(TEXTS[:9], **options))
    pairs = TEXTS[:9], TEXTS[9:18]
    told = {"source": "en", "target": "fr"}
    assert likelihoods(translator.score(*pairs, **told)) == likelihoods(one.score(*pairs, **told))
    assert translator.languages == one.languages
    found = processes(translator)
    threading.Timer(0.3, translator.close).start()
    with pytest.raises(lmkit.EngineError, match="closed"):
        translator(TEXTS * 100, max_new_tokens=60, min_new_tokens=60, source="en", target="fr")
    assert ended(found)


def test_masks_and_an_object_that_is_dropped() -> None:
    """Masks are filled and texts scored as by one model; processes end with the object that nobody has any more."""
    unmasker, one = replicated("bert"), checkpoints.wrapper("bert")
    for options in ({}, {"top_k": 3, "num_beams": 2}, {"sample": True, "seed": 3}, {"targets": ["the", "fly"]}):
        for found, expected in zip(unmasker(MASKED, **options), one(MASKED, **options), strict=True):
            assert [c.tokens for c in found.candidates] == [c.tokens for c in expected.candidates]
            for mine, theirs in zip(found.candidates, expected.candidates, strict=True):
                assert mine.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
    texts = [text.replace("[MASK]", "fly") for text in MASKED]
    assert likelihoods(unmasker.score(texts)) == likelihoods(one.score(texts))
    left = processes(unmasker)
    del unmasker
    gc.collect()
    assert ended(left)


def test_a_load_that_fails_late_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong once the processes have loaded, they end."""
    before = {child.pid for child in psutil.Process().children()}

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmkit.loading.entry.model_of", fails)
    with pytest.raises(KeyboardInterrupt):
        replicated("bert", 1)
    left = [child for child in psutil.Process().children() if child.pid not in before]
    assert not [child for child in left if "multiprocessing.spawn" in " ".join(child.cmdline())]


SCRIPT = """
import multiprocessing, os, sys
import lmkit
model = lmkit.load("masked", sys.argv[1], "float32", replicas=1)
print(multiprocessing.active_children()[0].pid, flush=True)
sys.stdin.read()
"""


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed takes its processes along; a script without the guard is told to have one."""
    folder = str(checkpoints.folder("bert"))
    (tmp_path / "bare.py").write_text(SCRIPT)
    lines = SCRIPT.strip().splitlines()
    (tmp_path / "guarded.py").write_text(
        "\n".join([*lines[:2], "if __name__ == '__main__':", *("    " + x for x in lines[2:])])
    )
    bare = subprocess.run([sys.executable, tmp_path / "bare.py", folder], capture_output=True, text=True, check=False)
    assert bare.returncode == 1
    assert '`if __name__ == "__main__":`' in bare.stderr.strip().splitlines()[-1]
    with subprocess.Popen(
        [sys.executable, tmp_path / "guarded.py", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert ended([worker])


def test_plans_of_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that do not fit together are refused before anything is read, as are devices that are said wrongly."""
    folder = checkpoints.folder("bert")
    needed = lmkit.plan("masked", folder, "float32", "cpu").weights_bytes
    real = this_machine()
    room = type(real)({"cpu": type(real.devices["cpu"])(needed * 9, needed * 2, bfloat16=False)})
    monkeypatch.setattr("lmkit.loading.entry.this_machine", lambda: room)
    assert lmkit.plan("masked", folder, "float32", replicas=1).fits
    assert not lmkit.plan("masked", folder, "float32", replicas=["cpu", "cpu"]).fits
    with pytest.raises(lmkit.PlacementError, match="of 2 replicas, each in its share of what is free: cpu"):
        lmkit.load("masked", folder, "float32", replicas=2)
    wrong: Any
    for wrong in (0, True, [], "cpu"):
        with pytest.raises(lmkit.OptionError, match="pass a list of devices"):
            lmkit.plan("masked", folder, replicas=wrong)
    with pytest.raises(lmkit.OptionError, match="contradict"):
        lmkit.plan("masked", folder, "float32", ["cpu"], replicas=2)
    with pytest.raises(lmkit.PlacementError, match="not on this machine"):
        lmkit.plan("masked", folder, "float32", replicas=["cuda:0"])


def test_a_budget_of_reasoning_travels_without_its_tokenizer() -> None:
    """What ends a chat's reasoning is sent with a row, and works with the tokenizer that is there."""
    one, other = checkpoints.wrapper("llama")._codec, checkpoints.wrapper("gpt2")._codec
    scanner = partial(Scanner, known("<think></think>"), "<think>", None)
    sent = asked(Budget(one, scanner, [5, 6], 1, 2), one)
    budget = read(sent, other)
    assert len(sent) < 5000
    assert budget._codec is other
    scores = budget(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 9))
    assert scores[0].argmax() == 5


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


def test_no_code_comes_back() -> None:
    """What a process sends is read as results and plain values: a name of anything else is refused."""
    with pytest.raises(pickle.UnpicklingError, match=r"posix.system, which is no result"):
        answer(pickle.dumps(Code()))


def test_processes_that_die(generator: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of a process that is killed in a call come from another; with the last, rows and later calls are errors.

    It is the last test here: it leaves no process.
    """
    caplog.set_level(logging.WARNING, "lmkit")
    first, second = processes(generator)
    expected = [[c.token_ids for c in result.completions] for result in long_call(checkpoints.wrapper("llama"))]
    threading.Timer(0.3, first.kill).start()
    assert [[c.token_ids for c in result.completions] for result in long_call(generator)] == expected
    assert re.search(rf"process {first.pid}\) has ended with exit code -9: its [1-9]\d* rows go to others", caplog.text)
    stream = generator.stream(TEXTS[:1], max_new_tokens=100, min_new_tokens=100)
    next(stream)
    second.kill()
    with pytest.raises(lmkit.EngineError, match=r"row 0: the replica on cpu \(process \d+\) has ended"):
        list(stream)
    with pytest.raises(lmkit.EngineError, match="all replicas have ended") as caught:
        generator(TEXTS, max_new_tokens=2)
    assert list(caught.value.results) == [None] * len(TEXTS)
