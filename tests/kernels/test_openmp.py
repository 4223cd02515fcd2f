"""torch's pools of threads: lmkit leaves none behind, for they slow down every other thread that computes."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
from lmkit.kernels import openmp
from lmkit.kernels.openmp import release_pool

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not list((Path(torch.__file__).parent / "lib").glob("libgomp*")),
    reason="this torch brings no libgomp",
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Have torch compute with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    settle()
    yield
    release_pool()
    torch.set_num_threads(before)


def pooled() -> int:
    """Count this process's threads that are not Python's."""
    return len(list(TASKS.iterdir())) - threading.active_count()


def settle() -> None:
    """Wait until threads of earlier tests, and their pools, are gone: some are still there after they were joined."""
    since, count = time.monotonic(), pooled()
    while time.monotonic() < since + 0.3:
        time.sleep(0.01)
        if pooled() != count:
            since, count = time.monotonic(), pooled()


def compute() -> None:
    """Do something large enough for a pool."""
    (torch.ones(2**20) * 2).sum()


def in_a_thread(work: Callable[[], int]) -> int:
    """Return what a function finds in a thread that has no pool yet."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_a_pool_is_given_back() -> None:
    """What a thread's pool holds is gone after `release_pool`, which may be called without one, and comes back."""

    def work() -> int:
        release_pool()
        before = pooled()
        compute()
        assert pooled() > before
        release_pool()
        assert pooled() == before
        compute()
        return pooled() - before

    assert in_a_thread(work) > 0


@pytest.mark.parametrize("name", ["llama", "marian", "bert"])
def test_a_call_leaves_no_pool(name: str) -> None:
    """After a call of any task, its thread holds no pool of threads."""
    wrapper = checkpoints.wrapper(name)

    def work() -> int:
        before = pooled()
        compute()
        assert pooled() > before
        wrapper(checkpoints.texts(name), **checkpoints.languages(name))
        return pooled() - before

    assert in_a_thread(work) == 0


def test_a_load_leaves_no_pool() -> None:
    """Whoever loads in one thread and calls from others is not slowed down by the first."""

    def work() -> int:
        before = pooled()
        compute()
        checkpoints.fresh("llama").close()
        return pooled() - before

    assert in_a_thread(work) == 0


def test_who_hands_on_leading_keeps_no_pool() -> None:
    """A stream after whose step another call's thread computes holds no pool meanwhile, though it is still open."""
    generator = checkpoints.wrapper("llama")
    ended, counted = threading.Event(), threading.Event()

    def call() -> None:
        generator("She", max_new_tokens=4)
        ended.set()
        counted.wait(60)  # a thread that ends is not gone at once

    def work() -> int:
        caller = threading.Thread(target=call, daemon=True)
        before = pooled()

        def join(step: int, _kwargs: dict[str, Any]) -> None:
            if step == 0:
                caller.start()
                while not generator._engine._waiters:
                    time.sleep(0.001)

        with contextlib.closing(generator.stream("She", max_new_tokens=60, min_new_tokens=60)) as stream:
            next(stream)
            compute()
            assert pooled() > before
            with checkpoints.before_forwards(generator.model, join):
                next(stream)
                assert ended.wait(60)
            held = pooled() - before
            counted.set()
            caller.join()
        return held

    assert in_a_thread(work) == 0


def test_another_openmp_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where torch brings no libgomp, nothing is called."""
    openmp._pause.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
            compute()
            before = pooled()
            release_pool()
            assert pooled() == before
    finally:
        openmp._pause.cache_clear()  # once torch has its own file again: what is found is kept
