"""Ctrl-C between any two instructions of a call: nothing that other threads share stays held, changed or half done."""

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

import lmkit
from checkpoints import folder, wrapper
from lmkit._quiet import LIBRARIES

# An interrupt in a generator that ends because nobody needs it any more is seen by nobody.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WAIT = 20
"""Seconds after which a thread is taken to hang."""

OWN = f"{Path(lmkit.__file__).parent}{os.sep}"
"""Not by its name: a checkout that is called lmkit may hold the environment too."""

TRACED = (OWN, "/logging/", "threading.py", "contextlib.py", "warnings.py", "/concurrent/")

CALLS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "call": ("llama", lambda w: w(["She", "The old sailor"], max_new_tokens=3)),
    "sampled": ("llama", lambda w: w(["She", "The"], max_new_tokens=3, temperature=1.5, seed=[1, 2], stop="zz")),
    "structured": ("llama", lambda w: w(["She", "The"], output=lmkit.OneOf("yes", "no"), max_new_tokens=6)),
    "map": ("llama", lambda w: list(w.map(["She", "The"], max_new_tokens=2))),
    "stream": ("llama", lambda w: list(w.stream("She", max_new_tokens=3))),
    "score": ("llama", lambda w: w.score(["She is old", "The"])),
    "beams": ("llama", lambda w: w("She", num_beams=2, max_new_tokens=2)),
    "fallback": ("mamba", lambda w: w("She", max_new_tokens=2)),
    "translate": ("t5", lambda w: w("She", max_new_tokens=2)),
    "search": ("t5", lambda w: w("She", num_beams=2, max_new_tokens=3)),
    "document": ("t5", lambda w: w("She is. He was.", split="sentence", max_new_tokens=2)),
    "unmask": ("bert", lambda w: w("She [MASK].")),
    "pseudo": ("bert", lambda w: w.score("She is.")),
}


class Interrupts:
    """Raises a KeyboardInterrupt before instruction number `at` of this thread, in frames of the modules `TRACED`."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        """Trace what is of the modules, and count."""
        file, caller = frame.f_code.co_filename, frame.f_back.f_code.co_filename if frame.f_back else ""
        # torch's own settings of the thread are held by contextlib's generators, which end when they are collected.
        if not any(part in file for part in TRACED) or ("contextlib" in file and OWN not in caller):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event in ("opcode", "call"):
            self.left -= 1
            if self.left == 0:
                self.where = "".join(traceback.format_stack(frame)[-6:]) + f"at {frame.f_lasti}"
                raise KeyboardInterrupt
        return self


def traced(work: Callable[[], object], at: int) -> tuple[Interrupts, BaseException | None]:
    """Run `work` with an interrupt; return where it came, and what the caller saw: kept, as sys.last_value keeps it."""
    interrupts = Interrupts(at)
    before = sys.gettrace()
    try:
        sys.settrace(interrupts)
        work()
    except BaseException as error:  # noqa: BLE001 - all that a caller could see
        return interrupts, error
    finally:
        sys.settrace(before)
    return interrupts, None


def instructions(work: Callable[[], object]) -> int:
    """Count the instructions at which `work` can be interrupted."""
    work()
    return -traced(work, 0)[0].left


def state() -> dict[str, Any]:
    """Return what threads share and a call may not leave changed."""
    return {
        "levels": {name: logging.getLogger(name).level for name in LIBRARIES},
        "log filters": {name: list(logging.getLogger(name).filters) for name in LIBRARIES},
        "warnings": list(warnings.filters),
        "bars": (transformers_logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()),
        "stdout": sys.stdout,
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "environment": dict(os.environ),
    }


def in_thread(work: Callable[[], object]) -> object:
    """Run something in another thread; return what it gives, or that it hangs."""
    found: list[object] = ["hangs"]

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - told
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT)
    return found[-1]


def locks_are_free() -> bool:
    """Say whether this thread, which is another, gets every lock of logging's."""
    handlers = [handler.lock for handler in logging.getLogger("transformers").handlers if handler.lock is not None]
    return all(lock.acquire(timeout=1) and lock.release() is None for lock in [logging._lock, *handlers])  # type: ignore[attr-defined]


def places(count: int, number: int, shift: int) -> Iterator[int]:
    """Spread `number` places over so many instructions."""
    return iter(sorted({1 + (shift + place * count // number) % count for place in range(number)}))


def check(name: str, call: Callable[[Any], object], number: int, shift: int = 0) -> int:
    """Interrupt a call at so many places, and look at all that others share after each; return how many came."""
    model = wrapper(name)
    expected = repr(call(model))
    before, held = state(), []
    came = 0
    for at in places(instructions(lambda: call(model)), number, shift):
        interrupts, error = traced(lambda: call(model), at)
        held.append(error)  # with its frames
        came += isinstance(error, KeyboardInterrupt)
        assert error is None or isinstance(error, KeyboardInterrupt), (interrupts.where, error)
        assert state() == before, interrupts.where
        assert in_thread(locks_are_free) is True, interrupts.where
        assert untimed(str(in_thread(lambda: repr(call(model))))) == untimed(expected), interrupts.where
        if hasattr(model.stats, "waiting"):
            assert (model.stats.running, model.stats.waiting) == (0, 0), interrupts.where
        assert untimed(repr(call(model))) == untimed(expected), interrupts.where
        del held[:-3]
    return came


def untimed(text: str) -> str:
    """Leave out of a result's text what it took."""
    import re

    return re.sub(r"Timing\([^)]*\)", "", text)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_anywhere_leaves_nothing_behind(name: str) -> None:
    """At forty instructions of a call, or as many as `LMKIT_INTERRUPTS` says."""
    model, call = CALLS[name]
    number = int(os.environ.get("LMKIT_INTERRUPTS", "40"))
    assert check(model, call, number, shift=len(name) * 7) > number * 3 // 4


def loaded(name: str) -> tuple[int, ...]:
    """Load a model and let it write; return the tokens."""
    with lmkit.load("causal", folder(name)) as model:
        return model("She", max_new_tokens=3).token_ids


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_interrupt_of_a_load_leaves_nothing_behind(precision: Any) -> None:
    """The next load, in another thread, gives the whole model; at `LMKIT_INTERRUPTS` instructions, or 25."""
    work = lambda: lmkit.load("causal", folder("llama"), precision).close()  # noqa: E731
    expected = loaded("llama")
    before, held = state(), []
    for at in places(instructions(work), int(os.environ.get("LMKIT_INTERRUPTS", "25")), 11):
        interrupts, error = traced(work, at)
        held.append(error)
        came = not interrupts.where or isinstance(error, KeyboardInterrupt)  # a load may have fewer instructions
        assert came, (interrupts.where, error)
        assert state() == before, interrupts.where
        assert in_thread(locks_are_free) is True, interrupts.where
        assert in_thread(lambda: loaded("llama")) == expected, interrupts.where


def test_a_load_onto_a_cpu_starts_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt inside of a pool's own locks would leave workers that Python waits for at its end."""
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread)))
    lmkit.load("causal", folder("llama")).close()
    assert started == []


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_interrupt_of_who_leads_takes_nothing_from_others(name: str) -> None:
    """Calls and streams of other threads, whose rows are in the interrupted batch, lose no text and no token."""
    model = wrapper(name)
    texts = [f"{first} {second}" for first in ("She", "The", "An") for second in ("old", "sailor")]
    options: dict[str, Any] = {"max_new_tokens": 12}
    expected = [model(text, **options).text for text in texts]
    held: list[object] = []

    def others(over: threading.Event, wrong: list[object]) -> None:
        while not over.is_set():
            for text, right in zip(texts, expected, strict=True):
                if (told := "".join(chunk.text for chunk in model.stream(text, **options))) != right:
                    wrong.append((told, right))

    over, wrong = threading.Event(), list[object]()
    threads = [threading.Thread(target=others, args=(over, wrong), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for at in range(200, 12_000, 400):
            interrupts, error = traced(lambda: model(texts, **options), at)
            held.append((interrupts.where, error))
    finally:
        over.set()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), held[-3:]
    assert wrong == []
    assert sum(isinstance(error, KeyboardInterrupt) for _, error in held) > 10  # type: ignore[misc]


def test_the_level_that_another_thread_sees_does_not_change() -> None:
    """While a call runs, the libraries' loggers have their levels, and what another thread logs there is heard."""
    model, library = wrapper("llama"), logging.getLogger("transformers")
    level, found = library.level, []

    def look(*_: object) -> None:
        found.append(in_thread(lambda: (library.level, library.filter(_record()))))

    handle = model.model.register_forward_pre_hook(look)
    try:
        model("She", max_new_tokens=2)
    finally:
        handle.remove()
    assert found
    assert {one[0] for one in found} == {level}  # type: ignore[index]
    assert all(one[1] for one in found)  # type: ignore[index]


def _record() -> logging.LogRecord:
    return logging.LogRecord("transformers", logging.WARNING, "", 0, "heard", (), None)
