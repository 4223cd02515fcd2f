"""torch's pools of threads: lmkit leaves none behind, for they slow down every other thread that computes."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import checkpoints
from lmkit import _openmp
from lmkit._openmp import release_pool

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
    yield
    release_pool()
    torch.set_num_threads(before)


def pooled() -> int:
    """Count this process's threads that are not Python's."""
    return len(list(TASKS.iterdir())) - threading.active_count()


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


def test_another_openmp_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where torch brings no libgomp, nothing is called."""
    _openmp._pause.cache_clear()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    try:
        compute()
        before = pooled()
        release_pool()
        assert pooled() == before
    finally:
        _openmp._pause.cache_clear()
