"""Coroutines run to their end from plain functions: in a shell, and in a notebook, whose cells run in an event loop."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine in an event loop of its own: in a thread, where the caller's has one that runs.

    That one stands still meanwhile. Ctrl-C cancels the coroutine, and is raised once it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # none: a loop may run in this thread
        return asyncio.run(coroutine)
    cancelling: Future[Callable[[], object]] = Future()

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(coroutine)
        cancelling.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await task

    with ThreadPoolExecutor(1, thread_name_prefix="event-loop") as pool:
        try:
            return pool.submit(asyncio.run, cancellable()).result()
        except KeyboardInterrupt:
            cancel = cancelling.result()
            cancel()
            raise
