"""The service under load: what HTTP, Serve and shared passes cost and save, against the model in process.

One replica of a random model on one core answers a client on this machine through Serve's proxy. The baseline is
`RewardModel.score_many` in process on the same requests, with as many threads. A request is 64 solutions unless a row
says otherwise.
"""

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.models import SERVED, BenchQuestion, Shape, bench_question, reward_model
from jobs.benches.serve_load import (
    Client,
    Reply,
    closed_loop,
    http_client,
    open_loop,
    process_named,
    quantile,
    served,
    statuses,
)
from jobs.benches.serve_replicas import ReplicasConfig, measure_replicas
from medmm_ray.config import Config
from medmm_ray.retries import DEFAULT_RETRIES
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.deployment import running
from medmm_ray.session import session

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel, ScoreRequest

NUM_BLOCKS = 8  # of requests alone, and as many beside a long one
Part = Literal["latency", "saturation", "clients", "fairness", "prefix", "overload", "replicas"]


class BenchConfig(Config):
    """What is measured, and on what."""

    parts: tuple[Part, ...] = get_args(Part)
    """Parts of the benchmark."""
    shape: Shape = SERVED
    """The scorer."""
    solutions: int = 64
    """Solutions of a request."""
    solution: int = 60
    """Tokens of a solution."""
    documents: int = 512
    """Tokens of a request's documents."""
    repeats: int = Field(12, ge=3)
    """Requests of each side, in turn, for the latency."""
    requests: int = Field(32, ge=4)
    """Requests of each number of clients."""
    clients: tuple[int, ...] = (1, 4, 8, 32)
    """Numbers of clients."""
    client_rounds: int = Field(3, ge=1)
    """Turns of each number of clients."""
    overload_s: float = 60.0
    """Seconds of three times the capacity."""
    replicas: ReplicasConfig = ReplicasConfig()
    """How replicas come and go."""
    seed: int = 0
    """Start of all random numbers."""


@dataclass(frozen=True)
class Bench:
    """The model in process, and its checkpoint for services."""

    config: BenchConfig
    model: "RewardModel"
    folder: str
    console: Console

    def question(self, number: int, solutions: int, tokens: int, documents: int) -> BenchQuestion:
        """A case of its own for each number."""
        vocabulary = self.config.shape.vocab_size
        return bench_question(vocabulary, 60, documents, solutions, tokens, self.config.seed + number)

    def case(self, number: int) -> BenchQuestion:
        """A case of the benchmark's size."""
        config = self.config
        return self.question(number, config.solutions, config.solution, config.documents)

    def in_process(self, cases: Sequence[BenchQuestion]) -> float:
        """Seconds of the cases in process."""
        started = time.perf_counter()
        for _ in self.model.score_many(map(request_of, cases)):
            pass
        return time.perf_counter() - started

    @contextmanager
    def serving(self, max_wait_s: float = 600.0, prefix_cache_mb: int = 512) -> Iterator[str]:
        """The address of a service of one replica, warm; no cache and no rate of another's."""
        config = ServeConfig(
            model=self.folder,
            port=0,
            access="loopback",
            max_wait_s=max_wait_s,
            prefix_cache_mb=prefix_cache_mb,
        )
        cases = [self.case(-number) for number in range(1, 4)]

        async def warm_up(url: str) -> None:
            async with http_client(url) as http:
                await closed_loop(Client(http).send, [body_of(case) for case in cases], 1)

        with session(), running(config) as url:
            asyncio.run(warm_up(url))
            self.in_process(cases)
            yield url


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The rows of the parts."""
    torch.set_num_threads(1)  # the replica has one core
    of_one_replica: dict[str, Callable[[Bench], Iterator[Measured]]] = {
        "latency": latency,
        "saturation": saturation,
        "clients": clients,
        "fairness": fairness,
        "prefix": prefix,
        "overload": overload,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = reward_model(config.shape, "float32", "cpu", context=4096)
        model.save_pretrained(folder)
        bench = Bench(config, model, folder, console)
        for part in config.parts:
            if part == "replicas":
                yield from measure_replicas(config.replicas, console)
            else:
                yield from of_one_replica[part](bench)


def request_of(case: BenchQuestion) -> "ScoreRequest":
    """A case as the model takes it."""
    from medmm_ray.reward_model import ScoreRequest

    return ScoreRequest(case.question, case.solutions, case.documents)


def body_of(case: BenchQuestion) -> bytes:
    """A case as the service takes it."""
    body = {"question": case.question, "documents": case.documents, "solutions": case.solutions}
    return json.dumps({**body, "answer_type": "open"}).encode()


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


# The parts


def latency(bench: Bench) -> Iterator[Measured]:
    """What one request alone takes more than in process."""
    config = bench.config
    through_http: list[float] = []
    in_process: list[float] = []

    async def take_turns(url: str) -> None:
        async with http_client(url) as http:
            client = Client(http)
            for number in range(config.repeats):
                case = bench.case(number)
                reply = await client.send(body_of(case))
                assert reply.status == 200, reply
                through_http.append(reply.seconds)
                in_process.append(bench.in_process([case]))

    with bench.serving() as url:
        asyncio.run(take_turns(url))
    for share, target in ((0.5, "≤ 20"), (0.99, "≤ 40")):
        theirs, ours = 1000 * quantile(in_process, share), 1000 * quantile(through_http, share)
        label = f"added latency, {config.solutions} solutions, p{100 * share:g}"
        yield Measured(
            label,
            theirs,
            ours,
            ours - theirs,
            target,
            "ms",
        )


def saturation(bench: Bench) -> Iterator[Measured]:
    """Throughput with more requests than are read at once, and what it costs the cores."""
    cases = [bench.case(number) for number in range(bench.config.requests)]
    number = len(cases)

    async def saturate(url: str) -> tuple[list[Reply], float]:
        async with http_client(url) as http:
            return await closed_loop(Client(http, retries=DEFAULT_RETRIES).send, [body_of(case) for case in cases], 8)

    with bench.serving() as url:
        processes = [psutil.Process(), process_named("Reranker"), process_named("ProxyActor")]
        starts = list(map(cpu_s, processes))
        seconds_in_process = bench.in_process(cases)
        cpu_in_process = cpu_s(processes[0]) - starts[0]
        starts = list(map(cpu_s, processes))
        replies, seconds = asyncio.run(saturate(url))
        used = [cpu_s(process) - start for process, start in zip(processes, starts, strict=True)]
        counts = figures(url)
    assert len(served(replies)) == number, statuses(replies)
    bench.console.print("CPU seconds: client {:.1f}, replica {:.1f}, proxy {:.1f}".format(*used))
    theirs, ours = number / seconds_in_process, number / seconds
    yield Measured(
        "throughput at saturation, 8 clients",
        theirs,
        ours,
        ours / theirs,
        "≥ 0.9",
        "requests/s",
    )
    theirs, ours = cpu_in_process / number, used[1] / number
    yield Measured(
        "CPU in process by the replica's",
        theirs,
        ours,
        theirs / ours,
        "≥ 0.9",
        "s/request",
    )
    fill = counts["medmm_pass_tokens_total"] / counts["medmm_pass_budget_tokens_total"]
    yield Measured(
        "token fill of passes at saturation",
        1.0,
        fill,
        fill,
        "≥ 0.8",
        "share",
    )


def figures(url: str) -> dict[str, float]:
    """The service's counters by name, those with labels left out."""
    import httpx

    values = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#") and "{" not in name:
            values[name] = float(value)
    return values


def clients(bench: Bench) -> Iterator[Measured]:
    """Throughput by the number of clients."""
    config = bench.config
    seconds_of = dict.fromkeys(config.clients, 0.0)

    async def ask(url: str, num_clients: int, turn: int) -> float:
        first = 1000 * (100 * turn + num_clients)
        cases = [bench.case(first + number) for number in range(config.requests)]
        async with http_client(url) as http:
            client = Client(http, retries=DEFAULT_RETRIES)
            replies, seconds = await closed_loop(client.send, [body_of(case) for case in cases], num_clients)
        assert len(served(replies)) == len(cases), statuses(replies)
        return seconds

    with bench.serving() as url:
        # In turn, for whatever else the machine does.
        for turn in range(config.client_rounds):
            for num_clients in config.clients:
                seconds_of[num_clients] += asyncio.run(ask(url, num_clients, turn))
    rates = {number: config.client_rounds * config.requests / seconds for number, seconds in seconds_of.items()}
    best = max(rates.values())
    for num_clients, rate in rates.items():
        label = f"throughput of {num_clients} clients, by the best"
        yield Measured(
            label,
            best,
            rate,
            rate / best,
            "≥ 0.95",
            "requests/s",
        )


def fairness(bench: Bench) -> Iterator[Measured]:
    """Short requests alone, and beside a client that always has one of 64 solutions with 30 steps."""
    long_bodies = [_long_body(number) for number in range(8)]

    alone: list[Reply] = []
    together: list[Reply] = []

    async def ask(url: str, block: int, is_beside: bool) -> None:
        async with http_client(url) as http:
            client = Client(http)
            beside = asyncio.create_task(_always(client, long_bodies)) if is_beside else None
            await asyncio.sleep(0.5)
            for number in range(bench.config.repeats):
                short = bench.question(5000 + 2 * (100 * block + number) + is_beside, 1, 120, 400)
                (together if is_beside else alone).append(await client.send(body_of(short)))
            if beside is not None:
                beside.cancel()

    with bench.serving() as url:
        # In turn, for whatever else the machine does.
        for block in range(NUM_BLOCKS):
            asyncio.run(ask(url, block, False))
            asyncio.run(ask(url, block, True))
    theirs, ours = 1000 * quantile(served(alone), 0.99), 1000 * quantile(served(together), 0.99)
    yield Measured(
        "a short request beside 64 x 30 steps, p99",
        theirs,
        ours,
        ours / theirs,
        "≤ 3",
        "ms",
    )


def _long_body(seed: int) -> bytes:
    """64 solutions of 30 steps of 8 words, no two alike: what is equal would be read once."""
    rng = Random(seed)
    solutions: list[list[str]] = []
    for _ in range(64):
        numbers = rng.choices(range(1000), k=240)
        words = [f"w{number}" for number in numbers]
        solutions.append([" ".join(words[start : start + 8]) for start in range(0, 240, 8)])
    return json.dumps({"question": f"w{seed} w2", "solutions": solutions}).encode()


async def _always(client: Client, bodies: Sequence[bytes]) -> None:
    for body in itertools.cycle(bodies):
        await client.send(body)


def prefix(bench: Bench) -> Iterator[Measured]:
    """A second request about a case, with other solutions."""
    firsts: list[float] = []
    seconds: list[float] = []

    async def ask(url: str) -> None:
        async with http_client(url) as http:
            client = Client(http)
            for number in range(bench.config.repeats):
                first = bench.question(7000 + number, 8, 60, 3000)
                new_solutions = bench.question(8000 + number, 8, 60, 0).solutions
                second = BenchQuestion(first.question, first.documents, new_solutions)
                firsts.append((await client.send(body_of(first))).seconds)
                seconds.append((await client.send(body_of(second))).seconds)

    with bench.serving() as url:
        asyncio.run(ask(url))
    theirs, ours = 1000 * quantile(firsts, 0.5), 1000 * quantile(seconds, 0.5)
    yield Measured(
        "a known prefix, 3k tokens, 8 new solutions",
        theirs,
        ours,
        theirs / ours,
        "≥ 4",
        "ms",
    )


def overload(bench: Bench) -> Iterator[Measured]:
    """Three times what the replica can, where requests may wait one and a half times as long as one takes."""
    config = bench.config
    alone_s = bench.in_process([bench.case(number) for number in range(4)]) / 4

    async def ask(url: str, per_s: float, seconds: float, first: int) -> list[Reply]:
        async with http_client(url) as http:
            return await open_loop(
                Client(http).send, lambda number: body_of(bench.case(first + number)), per_s, seconds
            )

    # A cache that is full before the load: what it keeps on purpose is no memory that grows.
    with bench.serving(max_wait_s=1.5 * alone_s, prefix_cache_mb=16) as url:
        quiet = asyncio.run(ask(url, 0.2 / alone_s, config.repeats * 5 * alone_s, 20_000))
        replica = process_named("Reranker")
        before = replica.memory_info().rss
        loaded = asyncio.run(ask(url, 3 / alone_s, config.overload_s, 30_000))
        after = replica.memory_info().rss
    bench.console.print(f"three times the capacity: statuses {statuses(loaded)}")
    unexpected = len(loaded) - len(served(loaded)) - statuses(loaded).get(429, 0)
    yield Measured(
        "3 x capacity: neither scores nor 429",
        len(loaded),
        unexpected,
        unexpected,
        "≤ 0",
        "requests",
    )
    theirs, ours = 1000 * quantile(served(quiet), 0.99), 1000 * quantile(served(loaded), 0.99)
    yield Measured(
        "3 x capacity: p99 of those let in",
        theirs,
        ours,
        ours / theirs,
        "≤ 3",
        "ms",
    )
    capacity, rate = 1 / alone_s, len(served(loaded)) / config.overload_s
    yield Measured(
        "3 x capacity: throughput by that in process", capacity, rate, rate / capacity, "≥ 0.9", "requests/s"
    )
    yield Measured(
        "3 x capacity: memory of the replica",
        before,
        after,
        after / before,
        "≤ 1.1",
        "bytes",
    )
