"""One replica's scoring: requests of different questions share forward passes, on one thread that never waits for the
event loop.

Enters: requests, by `Batcher.score`. Leaves: their results, each as soon as its last piece was read. `FairQueue` says
what a pass holds; an `Engine` tokenizes a request (on threads of their own, few), reads passes, and makes results. A
request whose caller is cancelled, or whose deadline passes, leaves the queue between two passes. Of a pass that fails
each piece is read again alone, so that only the request whose piece it is fails. A request that would wait longer than
`max_wait_s` is refused at once: the wait is the tokens before it by the rate that was measured.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from medmm_ray.service.fair_queue import FairQueue, Work

logger = logging.getLogger("ray.serve")

MIN_PASS_TOKENS = 256  # below it a pass costs more around the model than in it
RATE_MEMORY_S = 10.0  # seconds of scoring after which a measurement weighs 1/e

T = TypeVar("T")
R = TypeVar("R")
T_contra = TypeVar("T_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class OverloadedError(RuntimeError):
    """The request was refused: it would wait longer than allowed. `retry_after_s` says when to come again."""

    def __init__(self, wait_s: float, max_wait_s: float) -> None:
        super().__init__(
            f"overloaded: the expected wait is {wait_s:.1f} s, more than {max_wait_s:g} s; send it again after that"
        )
        self.retry_after_s = max(1, math.ceil(wait_s - max_wait_s))


class DeadlineError(RuntimeError):
    """The request's time was over before it was scored."""


class TooManyTokensError(ValueError):
    """The request is larger than a replica takes."""


class CacheFigures(Protocol):
    """What an engine keeps between requests: tokens that were looked up, and known; what was dropped, and its bytes."""

    num_tokens: int
    num_hit_tokens: int
    num_evictions: int
    num_bytes: int


class Engine(Protocol[T_contra, R_co]):
    """What reads passes. `prepare` and `estimate` may run on several threads, the others on one."""

    def estimate(self, request: T_contra) -> int:
        """About how many tokens a request has, without tokenizing it."""

    def prepare(self, request: T_contra) -> Any:
        """A request as `Work`, tokenized."""

    def forward(self, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Read the pieces of a pass, each with the work that gave it; all of them, or none where it raises."""

    def is_complete(self, work: Any) -> bool:
        """Whether all of a request was read."""

    def result(self, work: Any) -> R_co:
        """What came of a complete request."""

    def cache_figures(self) -> CacheFigures:
        """What it keeps; from any thread."""


@dataclass(frozen=True)
class BatchLimits:
    """How large passes are, and how long requests wait.

    `token_budget` tokens of a pass at most, and as many as take `max_pass_s` seconds: so long may a request have to
    wait for a pass that is running. `max_wait_s`: expected wait over which a request is refused. `max_tokens` of one
    request. `stuck_s`: seconds without progress after which work that waits means that the replica hangs.
    """

    token_budget: int
    max_pass_s: float = 0.1
    max_wait_s: float = 2.0
    max_tokens: int = 1 << 20
    stuck_s: float = 120.0


@dataclass
class RequestTimes:
    """Seconds that one request spent: until it was tokenized, in the queue until its first piece, and from then on."""

    prepared_s: float = 0.0
    queued_s: float = 0.0
    scored_s: float = 0.0
    num_tokens: int = 0


@dataclass
class BatchCounts:
    """What a batcher did since it started. `num_budget_tokens`: what all passes together had room for; `num_retried`:
    passes that failed and whose requests were then read one by one."""

    num_passes: int = 0
    num_tokens: int = 0
    num_budget_tokens: int = 0
    num_retried: int = 0
    num_scored: int = 0
    num_refused: int = 0
    num_expired: int = 0
    num_cancelled: int = 0
    busy_s: float = 0.0

    @property
    def fill(self) -> float:
        """Tokens of passes by what they had room for."""
        return self.num_tokens / max(1, self.num_budget_tokens)


class RateMeter:
    """Tokens per second of scoring, the last seconds weighing most."""

    def __init__(self, memory_s: float = RATE_MEMORY_S) -> None:
        self._memory_s = memory_s
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Note a pass."""
        # By the time that was measured, not by the clock: a night without requests says nothing new.
        decay = math.exp(-seconds / self._memory_s)
        self._tokens = self._tokens * decay + num_tokens
        self._seconds = self._seconds * decay + seconds

    @property
    def rate(self) -> float:
        """Tokens per second; infinite before the first pass."""
        return self._tokens / self._seconds if self._seconds else math.inf


@dataclass(eq=False)
class _Ticket(Generic[R]):
    """A request in the batcher: who waits for it, and when things happened (seconds of the monotonic clock)."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[R]"
    arrived: float
    num_tokens: int
    work: Work[Any] | None = None
    queued: float = 0.0
    started: float | None = None
    times: RequestTimes = field(default_factory=RequestTimes)

    def settle(self, result: R | None, error: BaseException | None) -> None:
        """Wake the caller, who may be gone."""
        self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        # Cancelled, or late: nobody waits.
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Batcher(Generic[T, R]):
    """Scores requests on one thread. `close` ends it; callers that still wait get a `RuntimeError`."""

    def __init__(self, engine: Engine[T, R], limits: BatchLimits, num_prepare_threads: int = 2) -> None:
        self.limits = limits
        self.meter = RateMeter()
        self.counts = BatchCounts()
        self._engine = engine
        self._pool = ThreadPoolExecutor(num_prepare_threads, thread_name_prefix="prepare")
        self._changed = threading.Condition()
        self._queue: FairQueue[Any] = FairQueue()
        self._tickets: dict[int, _Ticket[R]] = {}  # by the work's id(); all that is not settled
        self._preparing: dict[int, int] = {}  # estimated tokens by the ticket's id()
        self._read: list[Any] = []
        """Works that have nothing left to read, for the scoring thread to answer."""
        self._in_pass = 0
        self._last_progress = time.monotonic()
        self._closed = False
        # A thread, not tasks: passes follow each other however busy the event loop is.
        self._thread = threading.Thread(target=self._run, name="score", daemon=True)
        self._thread.start()

    def warm_up(self, request: T) -> None:
        """Read a request before any other, so that the rate is known: twice, for the first pays for much besides."""
        for _ in range(2):
            self.meter = RateMeter()
            # In a queue of its own: the thread must not answer what nobody asked.
            work = self._engine.prepare(request)
            queue: FairQueue[Any] = FairQueue()
            queue.add(work)
            while len(queue):
                started = time.monotonic()
                pieces = queue.next_pass(self.limits.token_budget)
                self._engine.forward(pieces)
                num_tokens = sum(piece.num_tokens for _, piece in pieces)
                self.meter.add(num_tokens, time.monotonic() - started)

    # On the event loop

    async def score(self, request: T, timeout_s: float | None = None, times: RequestTimes | None = None) -> R:
        """What the engine makes of a request; `times` is filled in.

        Raises `OverloadedError`, `TooManyTokensError`, `DeadlineError` after `timeout_s`, and what the engine raises.
        """
        # By an estimate: to tokenize what is refused would be work for nothing.
        num_tokens = self._engine.estimate(request)
        self.check_wait(num_tokens)
        loop = asyncio.get_running_loop()
        ticket: _Ticket[R] = _Ticket(loop, loop.create_future(), time.monotonic(), num_tokens)
        if times is not None:
            ticket.times = times
        try:
            async with asyncio.timeout(timeout_s):
                await self._prepare(request, ticket)
                return await ticket.future
        except TimeoutError:
            self.counts.num_expired += 1
            raise DeadlineError(
                f"deadline: the request was not scored within {timeout_s:g} s; allow more, or send fewer solutions"
            ) from None
        except asyncio.CancelledError:
            self.counts.num_cancelled += 1
            raise
        finally:
            self._forget(ticket)

    def expected_wait(self, num_tokens: int) -> float:
        """Seconds until a new request of `num_tokens` is begun with, as far as is known now."""
        with self._changed:
            before = self._queue.tokens_before(num_tokens) + self._in_pass
            before += sum(min(tokens, num_tokens) for tokens in self._preparing.values())
        return before / self.meter.rate

    def check_wait(self, num_tokens: int = MIN_PASS_TOKENS) -> None:
        """Raise `OverloadedError` where a request of `num_tokens` would wait too long."""
        wait_s = self.expected_wait(num_tokens)
        if wait_s > self.limits.max_wait_s:
            self.counts.num_refused += 1
            raise OverloadedError(wait_s, self.limits.max_wait_s)

    async def _prepare(self, request: T, ticket: _Ticket[R]) -> None:
        """Tokenize a request on another thread, and queue it."""
        self._preparing[id(ticket)] = ticket.num_tokens
        try:
            work = await ticket.loop.run_in_executor(self._pool, self._engine.prepare, request)
        finally:
            del self._preparing[id(ticket)]
        ticket.num_tokens = ticket.times.num_tokens = work.tokens_left
        ticket.queued = time.monotonic()
        ticket.times.prepared_s = ticket.queued - ticket.arrived
        # What its cache knows of a request costs it nothing, and does not count.
        if work.tokens_left > self.limits.max_tokens:
            raise TooManyTokensError(
                f"the request has {work.tokens_left} tokens; at most {self.limits.max_tokens} are read (max_tokens): "
                "send fewer solutions, or several requests"
            )
        ticket.work = work
        with self._changed:
            if self._closed:
                raise RuntimeError("the scorer is shutting down")
            # Known before it is queued: the scoring thread may have it at once.
            self._tickets[id(work)] = ticket
            if work.is_cut:  # none of its solutions can be read
                self._read.append(work)
            else:
                self._queue.add(work)
            self._changed.notify()

    def _forget(self, ticket: _Ticket[R]) -> None:
        """Take a request out, whatever became of it."""
        # Its tokens are out of the queue with this, between two passes.
        if ticket.work is None:
            return
        with self._changed:
            self._queue.remove(ticket.work)
            self._tickets.pop(id(ticket.work), None)

    # On the scoring thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._read or len(self._queue)):
                    self._last_progress = time.monotonic()
                    self._changed.wait()
                if self._closed:
                    return
                # Under the lock, and short: what a pass computes is not.
                pieces = self._queue.next_pass(self.pass_budget)
                self._in_pass = sum(piece.num_tokens for _, piece in pieces)
            self._pass(pieces)
            with self._changed:
                self._in_pass = 0
                self._last_progress = time.monotonic()

    @property
    def pass_budget(self) -> int:
        """Tokens of a pass: the budget, or as many as take `max_pass_s`."""
        affordable = self.meter.rate * self.limits.max_pass_s
        return int(min(self.limits.token_budget, max(MIN_PASS_TOKENS, affordable)))

    def _pass(self, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Read a pass and answer the requests that are complete with it."""
        started = time.monotonic()
        budget = self.pass_budget
        works = [work for work, _ in pieces]
        self._note_start(works, started)
        is_whole = self._forward(pieces)
        # Each leaves with the pass that completes it, whatever else is in the queue.
        for work in [*self._take_read(), *works]:
            if self._engine.is_complete(work):
                self._answer(work)
        seconds = time.monotonic() - started
        # One that was read in parts says nothing of the rate.
        if pieces and is_whole:
            self.meter.add(self._in_pass, seconds)
            self.counts.num_passes += 1
            self.counts.num_tokens += self._in_pass
            self.counts.num_budget_tokens += budget
            self.counts.busy_s += seconds

    def _forward(self, pieces: Sequence[tuple[Any, Any]]) -> bool:
        """Read a pass, or, where it fails, each of its pieces alone; whether it was read in one.

        What a request's own piece raises is that request's error, and no neighbour's.
        """
        if not pieces:
            return True
        try:
            self._engine.forward(pieces)
        except Exception as error:  # noqa: BLE001  # whatever a pass raises, the thread goes on
            logger.warning("a pass of %d requests failed: %s", len(pieces), type(error).__name__)
            if len(pieces) == 1:
                self._settle([pieces[0][0]], error)
            else:
                self.counts.num_retried += 1
                for piece in pieces:
                    self._forward([piece])
            return False
        return True

    def _note_start(self, works: Sequence[Any], started: float) -> None:
        for work in works:
            ticket = self._tickets.get(id(work))
            if ticket is not None and ticket.started is None:
                ticket.started = started
                ticket.times.queued_s = started - ticket.queued

    def _take_read(self) -> list[Any]:
        with self._changed:
            works, self._read = self._read, []
        return works

    def _answer(self, work: Any) -> None:
        ticket = self._tickets.get(id(work))
        if ticket is None:  # its caller is gone
            return
        try:
            result = self._engine.result(work)
        except Exception as error:  # noqa: BLE001  # this request's error, no other's
            self._settle([work], error)
            return
        ticket.times.scored_s = time.monotonic() - (ticket.started or ticket.queued)
        self.counts.num_scored += 1
        ticket.settle(result, None)

    def _settle(self, works: Sequence[Any], error: BaseException) -> None:
        """Answer requests with an error; nothing more of them is read."""
        with self._changed:
            for work in works:
                self._queue.remove(work)
                ticket = self._tickets.get(id(work))
                if ticket is not None:
                    ticket.settle(None, error)

    # From any thread

    @property
    def num_waiting(self) -> int:
        """Requests that were let in and not answered."""
        return len(self._tickets) + len(self._preparing)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all requests that were let in and that no pass has had yet."""
        with self._changed:
            return self._queue.num_tokens + sum(self._preparing.values())

    @property
    def cache(self) -> CacheFigures:
        """What the engine keeps between requests."""
        return self._engine.cache_figures()

    @property
    def is_stuck(self) -> bool:
        """Whether work waits and nothing was read for `stuck_s`."""
        return bool(self._tickets) and time.monotonic() - self._last_progress > self.limits.stuck_s

    def close(self) -> None:
        """End the thread after the pass that is running, and the requests that wait."""
        with self._changed:
            self._closed = True
            # With an error, so that callers do not wait for what will not come.
            waiting = [ticket.work for ticket in self._tickets.values()]
            self._changed.notify()
        self._settle(waiting, RuntimeError("the scorer is shutting down"))
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
