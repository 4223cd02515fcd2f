"""Calls in threads of their own, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lmkit._interrupts import Flag
from lmkit.wrappers.letting_go import letting_go

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

Given = ParamSpec("Given")
ResultT = TypeVar("ResultT")

RESTING_SECONDS = 0.002
"""How long the event loop rests between cancellations of one task that waits for the end of a step."""


@contextlib.contextmanager
def a_thread() -> Iterator[Callable[..., asyncio.Future[Any]]]:
    """Give an asynchronous call a thread of its own.

    asyncio.to_thread has a handful for everybody, and a call that waits for one joins no batch.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="lmkit")

    def run(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(pool.submit(contextvars.copy_context().run, function, *arguments))

    try:
        yield run
    finally:
        pool.shutdown()  # what ran in it has ended


_CANCELLED: ContextVar[Flag | None] = ContextVar("lmkit's call is cancelled", default=None)


def cancelled() -> Flag:
    """Return what is set once the asynchronous call that this thread works for is cancelled."""
    return _CANCELLED.get() or Flag()


def asynchronous(verb: Callable[Given, ResultT]) -> Callable[Given, Coroutine[Any, Any, ResultT]]:
    """Return a verb for asyncio: it runs in a thread, and what is left of it is not read once its task is cancelled."""
    light = letting_go(verb)

    @functools.wraps(verb)
    async def call(*given: Given.args, **options: Given.kwargs) -> ResultT:
        gone = Flag()

        def work(ask: Callable[[], ResultT]) -> ResultT:
            _CANCELLED.set(gone)  # in a context of its own
            try:
                return ask()
            finally:
                del ask

        try:
            with a_thread() as run:
                result: ResultT = await finished(run(work, functools.partial(light, *given, **options)), gone.set)
        finally:
            del given, options  # for an error that is kept: the frames of both are in its traceback
        return result

    return call


async def alternately(items: Iterator[ResultT]) -> AsyncIterator[ResultT]:
    """Take items one by one in a thread; leaving the loop or cancelling the task ends their rows at the next step."""
    gone = Flag()

    def take(items: Iterator[ResultT]) -> ResultT | None:
        _CANCELLED.set(gone)  # in a context of its own
        return next(items, None)

    with a_thread() as run:
        try:
            while (item := await finished(run(take, items), gone.set)) is not None:
                yield item
        finally:
            items.close()  # type: ignore[attr-defined]  # a generator
            del items, run, take  # for an error that is kept


async def finished(work: Any, cancel: Callable[[], None]) -> Any:
    """Await work in a thread; if the task is cancelled, call `cancel` and still wait for the thread.

    A thread cannot be killed, and leaving it behind would let it go on with a model that its caller
    believes to be free.
    """
    task = asyncio.ensure_future(work)
    interrupted = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if interrupted:  # again in each turn of the loop, as anyio does: the thread needs Python's lock
                time.sleep(RESTING_SECONDS)  # noqa: ASYNC251
            interrupted = True
            cancel()
    if interrupted:
        task.exception()  # looked at, so that asyncio does not complain about it
        raise asyncio.CancelledError
    return task.result()
