"""Processes forked from one that uses models: each call in them works, or says at once why it cannot."""

import contextlib
import faulthandler
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import checkpoints
import lmkit
from checkpoints import folder, wrapper

WAIT = 30
"""Seconds after which a process takes something to hang."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

CALLS: dict[str, Callable[[], object]] = {
    "call": lambda: wrapper("llama")("She", max_new_tokens=2),
    "map": lambda: list(wrapper("llama").map(["She"], max_new_tokens=2)),
    "stream": lambda: list(wrapper("llama").stream("She", max_new_tokens=2)),
    "score": lambda: wrapper("llama").score("She is old"),
    "rank": lambda: wrapper("llama").rank("She is", ["old", "young"]),
    "beams": lambda: wrapper("llama")("She", num_beams=2, max_new_tokens=2),
    "translate": lambda: wrapper("t5")("She", max_new_tokens=2),
    "unmask": lambda: wrapper("bert")("She [MASK]."),
    "pseudo-likelihood": lambda: wrapper("bert").score("She is."),
    "load": lambda: lmkit.load("causal", folder("llama")).close(),
    "plan": lambda: lmkit.plan("causal", folder("llama")),
}


def in_child(work: Callable[[], object]) -> str:
    """Run something in a process that is forked now; return what it gives or raises, or that it hangs."""
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on, Python warns of forks beside threads: that is what is tried
        child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(WAIT, exit=True, file=writes)  # says where it hangs, and ends it
        try:
            told = repr(work())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            told = f"{type(error).__name__}: {error}"
        os.write(writes, told.encode()[:4000])
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, encoding="utf-8") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return told if status == 0 else f"ended with status {status}: {told}"


@contextlib.contextmanager
def at_work(module: Any, use: Callable[[], object]) -> Iterator[None]:
    """Have another thread stand in the middle of a forward pass of `module` while the block runs."""
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        leave.wait(WAIT)

    hook = module.register_forward_pre_hook(wait)
    thread = threading.Thread(target=use)
    try:
        thread.start()
        assert inside.wait(WAIT)
        yield
    finally:
        hook.remove()
        leave.set()
        thread.join(WAIT)


@pytest.mark.parametrize("call", CALLS)
def test_a_process_forked_while_no_call_runs_works(call: str) -> None:
    """A server that loads first and forks then is right: the child gives what the parent gives."""
    CALLS[call]()
    told = in_child(lambda: CALLS[call]() is not None or "nothing")
    assert told in {"True", "'nothing'"}


def test_a_forked_process_gives_the_same_tokens() -> None:
    """The copy of the model in a child is whole, after calls in the parent and in another thread of it."""
    expected = checkpoints.generated("llama", ["She"], max_new_tokens=6)[0]
    thread = threading.Thread(target=lambda: wrapper("llama")("The old sailor", max_new_tokens=6))
    thread.start()
    thread.join(WAIT)
    assert in_child(lambda: list(wrapper("llama")("She", max_new_tokens=6).token_ids)) == repr(expected)


@pytest.mark.parametrize("busy", ["call", "score", "unmask"])
def test_a_process_forked_while_another_thread_computes_says_so(busy: str) -> None:
    """The thread is not in the child: waiting for it would take for ever, so every call there is refused at once."""
    name = "bert" if busy == "unmask" else "llama"
    for work in CALLS.values():
        work()
    with at_work(wrapper(name).model, CALLS[busy]):
        told = {call: in_child(work) for call, work in CALLS.items()}
    for call, text in told.items():
        assert text.startswith("EngineError: "), (call, text)
        assert "this process was forked while another thread" in text
        assert "'spawn'" in text
    assert wrapper(name).plan is not None
    CALLS[busy]()  # the parent goes on


def test_a_process_forked_while_another_thread_loads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load holds what loads share; torch's default dtype may be the model's at that moment."""
    from lmkit.loading import entry

    inside, leave = threading.Event(), threading.Event()
    make_plan = entry.make_plan

    def wait(*arguments: Any, **options: Any) -> Any:
        inside.set()
        leave.wait(WAIT)
        return make_plan(*arguments, **options)

    monkeypatch.setattr(entry, "make_plan", wait)
    thread = threading.Thread(target=CALLS["plan"])
    thread.start()
    try:
        assert inside.wait(WAIT)
        assert in_child(CALLS["load"]).startswith("EngineError: this process was forked while")
    finally:
        leave.set()
        thread.join(WAIT)


def test_threads_that_torch_keeps_do_not_make_a_child_wait() -> None:
    """What the caller computes leaves threads of torch; in a child there are none, and it does not wait for them."""

    def compute() -> str:
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 16, 16, 256, 32))
        return str(wrapper("llama")("She", max_new_tokens=6).text)

    torch.set_num_threads(2)
    try:
        expected = compute()
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 16, 16, 256, 32))
        assert in_child(compute) == repr(expected)
    finally:
        torch.set_num_threads(1)  # as all tests have it


def test_a_paused_stream_does_not_count_as_work() -> None:
    """Between two chunks nothing is computed, so a child may use the model, and the parent's stream goes on."""
    expected = wrapper("llama")("She", max_new_tokens=6).text
    stream = wrapper("llama").stream("She", max_new_tokens=6)
    first = next(stream).text
    assert in_child(lambda: wrapper("llama")("She", max_new_tokens=6).text) == repr(expected)
    assert first + "".join(chunk.text for chunk in stream) == expected
