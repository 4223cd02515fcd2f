"""Where forward passes run, and with which of CUDA's kernels, told without a card."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lmkit.engine.computing import Lane, one_token

ELSEWHERE = torch.device("meta")
CUDA = torch.device("cuda", 0)


def test_on_a_cpu_who_asks_computes() -> None:
    """A pass on a CPU runs in the thread that asks for it."""
    assert Lane(torch.device("cpu"))(threading.get_ident) == threading.get_ident()


def test_elsewhere_one_thread_computes() -> None:
    """Whoever asks, passes run in one thread, without gradients, and what they raise is told."""
    lane = Lane(ELSEWHERE)
    with ThreadPoolExecutor(4) as callers:
        found = {callers.submit(lane, threading.get_ident).result() for _ in range(8)}
    assert len(found) == 1
    assert threading.get_ident() not in found
    assert not lane(torch.is_grad_enabled)
    with pytest.raises(ZeroDivisionError):
        lane(lambda: 1 // 0)


def test_an_interrupt_waits_for_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked and is interrupted goes on when the pass has ended, which is told to make no other."""
    lane, begun, seen = Lane(ELSEWHERE), threading.Event(), []

    def interrupted(_future: Any) -> None:
        begun.wait(10)
        raise KeyboardInterrupt

    def work() -> None:
        begun.set()
        while not lane.halted:
            pass
        seen.append("ended")

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lane(work)
    assert seen == ["ended"]
    monkeypatch.undo()
    assert not lane.halted
    assert lane(lambda: 3) == 3


@pytest.mark.parametrize("before", [True, False])
def test_steps_leave_cudnns_attention_out(monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    """On CUDA it is off while a step runs, and then as it was, whatever the step raises; elsewhere nobody asks."""
    state = [before]
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: state[0])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: state.__setitem__(0, on))
    assert one_token(CUDA, lambda: state[0]) is False
    assert state == [before]
    with pytest.raises(ZeroDivisionError):
        one_token(CUDA, lambda: 1 // 0)
    assert state == [before]
    assert one_token(torch.device("cpu"), lambda: state[0]) is before
