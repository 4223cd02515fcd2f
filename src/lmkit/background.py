"""Calls in threads of their own, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["a_thread", "finished"]


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
            interrupted = True
            cancel()
    if interrupted:
        task.exception()  # looked at, so that asyncio does not complain about it
        raise asyncio.CancelledError
    return task.result()
