"""Two things that asyncio does not have: a semaphore with an order of priority, and calls that are sent in batches."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class PrioritySemaphore:
    """A number of slots; a free one goes to the lowest order that waits."""

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ties = itertools.count()  # who came first, among equals

    @asynccontextmanager
    async def slot(self, order: int) -> AsyncIterator[None]:
        """Hold a slot in the block."""
        await self._acquire(order)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, order: int) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._ties), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got the slot and was then cancelled
                self._release()
            raise

    def _release(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1


class Batcher(Generic[Item, Result]):
    """Calls `send` with all items that came while its last call ran; it gives results for some of the first of them.

    With `idle_s`, also with none when nothing came for so many seconds. Once `send` raises, every item gets that error.
    """

    def __init__(
        self, send: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], idle_s: float | None = None
    ) -> None:
        self._send, self._idle_s = send, idle_s
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """The result for `item`, once a batch with it was sent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._fail_waiting)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._arrived.set()
        if self._task.done():
            self._fail_waiting(self._task)
        return await future

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(self._idle_s):  # wait_for can swallow a cancellation
                        await self._arrived.wait()
                except TimeoutError:
                    await self._send([])
                    continue
            results = await self._send([item for item, _ in self._waiting])
            # Items that came in the meantime, and those without a result yet, go with the next batch.
            answered, self._waiting = self._waiting[: len(results)], self._waiting[len(results) :]
            for (_, future), result in zip(answered, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _fail_waiting(self, task: "asyncio.Task[None]") -> None:
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if future.done():
                continue
            if task.cancelled():
                future.cancel()
            else:
                error = task.exception()
                assert error is not None, "_run ends by an error only"
                future.set_exception(error)
