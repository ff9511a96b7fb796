"""The scoring thread: shares, deadlines, callers that leave, refusals by the expected wait, and its counts."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from jobs.benches.slow_engine import SlowEngine, SlowRequest
from medmm_ray.service.batching import (
    Batcher,
    BatchLimits,
    DeadlineError,
    OverloadedError,
    RateMeter,
    RequestTimes,
    TooManyTokensError,
)

LIMITS = BatchLimits(token_budget=400, max_pass_s=10.0, max_wait_s=100.0, max_tokens=100_000)


@contextmanager
def batching(engine: SlowEngine, **changes: Any) -> Iterator[Batcher[SlowRequest, list[float]]]:
    limits = BatchLimits(**{**vars(LIMITS), **changes})
    batcher: Batcher[SlowRequest, list[float]] = Batcher(engine, limits)
    try:
        yield batcher
    finally:
        engine.gate.set()
        batcher.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


async def until_queued(batcher: Batcher[Any, Any], num_tokens: int) -> None:
    """Wait until so many tokens are in the queue: those of a request that is still tokenized wait elsewhere."""
    await until(lambda: batcher.waiting_tokens == num_tokens and not batcher._preparing)


def test_requests_that_come_together_share_passes_and_each_gets_its_own_result() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine) as batcher:

        async def ask() -> list[list[float]]:
            first = asyncio.create_task(batcher.score(SlowRequest("a", [100])))
            await until(lambda: len(engine.passes) == 1)  # it is being read, and the others come meanwhile
            others = [asyncio.create_task(batcher.score(SlowRequest(name, [100, 90]))) for name in "bc"]
            await until_queued(batcher, 380)
            engine.gate.set()
            return await asyncio.gather(first, *others)

        results = run(ask())
        assert results == [[100.0], [100.0, 90.0], [100.0, 90.0]]
        assert engine.passes == [{"a": 100}, {"b": 190, "c": 190}]
        assert (batcher.counts.num_passes, batcher.counts.num_tokens, batcher.counts.num_scored) == (2, 480, 3)
        assert batcher.counts.fill == pytest.approx(480 / 800)
        assert (batcher.num_waiting, batcher.waiting_tokens) == (0, 0)


def test_a_short_request_is_answered_while_a_long_one_is_read() -> None:
    engine = SlowEngine(tokens_per_s=40_000)
    with batching(engine) as batcher:

        async def ask() -> tuple[float, float]:
            long = asyncio.create_task(batcher.score(SlowRequest("long", [390] * 60)))
            await until(lambda: bool(engine.passes))
            await batcher.score(SlowRequest("short", [100]))
            assert not long.done()
            position = next(i for i, one in enumerate(engine.passes) if "short" in one)
            await long
            return position, len(engine.passes)

        position, num_passes = run(ask())
        assert num_passes >= 60
        assert position < num_passes / 2


def test_a_caller_that_leaves_costs_no_further_pass() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine) as batcher:

        async def ask() -> None:
            big = asyncio.create_task(batcher.score(SlowRequest("big", [390] * 50)))
            await until(lambda: len(engine.passes) == 1)
            waiting = asyncio.create_task(batcher.score(SlowRequest("waiting", [390])))
            await until(lambda: batcher.num_waiting == 2 and not batcher._preparing)
            big.cancel()
            await asyncio.gather(big, return_exceptions=True)
            engine.gate.set()
            await waiting

        run(ask())
        assert engine.passes == [{"big": 390}, {"waiting": 390}]
        assert (batcher.counts.num_cancelled, batcher.num_waiting, batcher.waiting_tokens) == (1, 0, 0)


def test_a_request_whose_deadline_passes_is_never_read() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine) as batcher:

        async def ask() -> None:
            first = asyncio.create_task(batcher.score(SlowRequest("first", [390])))
            await until(lambda: len(engine.passes) == 1)
            with pytest.raises(DeadlineError, match=r"not scored within 0\.05 s"):
                await batcher.score(SlowRequest("late", [390]), timeout_s=0.05)
            engine.gate.set()
            await first
            await batcher.score(SlowRequest("next", [390]))

        run(ask())
        assert engine.passes == [{"first": 390}, {"next": 390}]
        assert batcher.counts.num_expired == 1


def test_what_would_wait_too_long_is_refused_by_the_measured_rate() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine, max_wait_s=2.0) as batcher:
        batcher.meter.add(1000, 1.0)  # 1,000 tokens a second

        async def ask() -> None:
            tasks = [asyncio.create_task(batcher.score(SlowRequest("0", [400])))]
            await until(lambda: len(engine.passes) == 1)
            for number in range(1, 5):  # 400 in the pass; 400 to 1,600 before those that come
                tasks.append(asyncio.create_task(batcher.score(SlowRequest(str(number), [400]))))
                await until_queued(batcher, 400 * number)
            assert batcher.expected_wait(400) == pytest.approx(2.0)
            tasks.append(asyncio.create_task(batcher.score(SlowRequest("5", [400]))))
            await until_queued(batcher, 2000)
            with pytest.raises(OverloadedError, match=r"the expected wait is 2\.4 s, more than 2 s") as refused:
                await batcher.score(SlowRequest("6", [400]))
            assert refused.value.retry_after_s == 1
            # A request of 20 tokens waits for 20 of each, not for 2,400.
            batcher.check_wait(20)
            engine.gate.set()
            await asyncio.gather(*tasks)

        run(ask())
        assert batcher.counts.num_refused == 1
        assert "6" not in {name for one in engine.passes for name in one}


def test_a_request_that_is_too_large_or_cannot_be_read_is_its_own_fault() -> None:
    engine = SlowEngine()
    with batching(engine, max_tokens=500) as batcher:

        async def ask() -> Any:
            return await asyncio.gather(
                batcher.score(SlowRequest("large", [300, 300])),
                batcher.score(SlowRequest("broken", [50])),
                batcher.score(SlowRequest("empty", [])),
                return_exceptions=True,
            )

        large, broken, empty = run(ask())
        assert isinstance(large, TooManyTokensError)
        assert "has 600 tokens; at most 500" in str(large)
        assert isinstance(broken, ArithmeticError)
        assert empty == []
        assert run(batcher.score(SlowRequest("again", [20]))) == [20.0]  # the thread goes on


def test_a_request_that_breaks_a_pass_breaks_no_neighbours() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine) as batcher:

        async def ask() -> Any:
            first = asyncio.create_task(batcher.score(SlowRequest("first", [100])))
            await until(lambda: len(engine.passes) == 1)
            together = [asyncio.create_task(batcher.score(SlowRequest(name, [60]))) for name in ("a", "broken", "b")]
            await until_queued(batcher, 180)
            engine.gate.set()
            await first
            return await asyncio.gather(*together, return_exceptions=True)

        a, broken, b = run(ask())
        assert (a, b) == ([60.0], [60.0])
        assert isinstance(broken, ArithmeticError)
        # The pass of three, then each of them alone.
        assert engine.passes[1] == {"a": 60, "broken": 60, "b": 60}
        assert sorted(engine.passes[2:], key=str) == [{"a": 60}, {"b": 60}, {"broken": 60}]
        assert (batcher.counts.num_retried, batcher.counts.num_scored) == (1, 3)
        assert run(batcher.score(SlowRequest("again", [20]))) == [20.0]


def test_the_times_of_a_request_add_up() -> None:
    engine = SlowEngine(tokens_per_s=2000)
    with batching(engine) as batcher:
        times = RequestTimes()
        started = time.monotonic()
        run(batcher.score(SlowRequest("a", [200]), times=times))
        total = time.monotonic() - started
        assert times.num_tokens == 200
        assert times.scored_s >= 0.1
        assert 0 < times.prepared_s + times.queued_s + times.scored_s <= total


def test_a_pass_is_as_long_as_a_short_request_may_wait() -> None:
    engine = SlowEngine()
    with batching(engine, token_budget=8192, max_pass_s=0.1) as batcher:
        assert batcher.pass_budget == 8192  # nothing is known yet
        batcher.meter.add(5000, 1.0)
        assert batcher.pass_budget == 500
        batcher.meter.add(1000, 100.0)
        assert batcher.pass_budget == 256


def test_it_is_stuck_where_nothing_is_read_while_requests_wait() -> None:
    engine = SlowEngine(gate=threading.Event())
    with batching(engine, stuck_s=0.05) as batcher:

        async def ask() -> None:
            assert not batcher.is_stuck
            task = asyncio.create_task(batcher.score(SlowRequest("a", [100])))
            await until(lambda: batcher.is_stuck)
            engine.gate.set()
            await task
            assert not batcher.is_stuck

        run(ask())


def test_those_that_wait_are_told_when_it_closes() -> None:
    engine = SlowEngine(gate=threading.Event())
    batcher: Batcher[SlowRequest, list[float]] = Batcher(engine, LIMITS)

    async def ask() -> None:
        tasks = [asyncio.create_task(batcher.score(SlowRequest(name, [390]))) for name in "ab"]
        await until(lambda: len(engine.passes) == 1 and batcher.num_waiting == 2)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(result) for result in results] == ["the scorer is shutting down"] * 2
        engine.gate.set()
        await closing

    run(ask())


@pytest.mark.parametrize(
    ("passes", "rate"), [([], float("inf")), ([(100, 1.0)], 100.0), ([(100, 50.0), (300, 1.0)], 104.8)]
)
def test_the_rate_forgets(passes: Sequence[tuple[int, float]], rate: float) -> None:
    meter = RateMeter()
    for num_tokens, seconds in passes:
        meter.add(num_tokens, seconds)
    if len(passes) == 2:  # 100 tokens in 50 s weigh exp(-1/10) of themselves beside 300 in 1 s
        assert meter.rate == pytest.approx((100 * 0.904837 + 300) / (50 * 0.904837 + 1), rel=1e-3)
    else:
        assert meter.rate == rate
