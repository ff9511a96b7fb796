"""Replicas that come and go under load: by the load itself, by a new configuration, by kill -9, and with their node.

The model only sleeps, so that two cores have room for several replicas; the service, Serve and the client are the real
ones.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.serve_load import (
    Client,
    Reply,
    closed_loop,
    http_client,
    open_loop,
    process_named,
    served,
    statuses,
)
from jobs.benches.slow_engine import SlowModel
from medmm_ray.config import Config
from medmm_ray.retries import DEFAULT_RETRIES, Retries
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.deployment import application, running
from medmm_ray.service.replica import ReplicaScorer, ServedModel
from medmm_ray.service.rerank import ModelTraits
from medmm_ray.session import fresh_token, session

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TOKENS_PER_S = 2000.0
NODE_CPUS = 1
WORDS = 200  # of a request: a tenth of a second


OLD, NEW = "org/slow", "org/slow-new"
BIAS = {OLD: 0.0, NEW: 1.0}
"""What each of the models adds to all log-odds."""

Event = Literal["scale", "replace", "replace_further", "kill", "kill_node"]


class ReplicasConfig(Config):
    """How replicas come and go."""

    events: tuple[Event, ...] = get_args(Event)
    """What happens to them."""
    most: int = Field(4, ge=2)
    """Replicas that the load step asks for."""
    high_s: float = 40.0
    """Seconds of the high load."""
    low_s: float = 40.0
    """Seconds of the low load after it."""
    steady_s: float = 30.0
    """Seconds of the load during which a replica is killed, or all are replaced."""


def load_slow(config: ModelConfig) -> ServedModel:
    """A model that sleeps, as a replica loads one."""
    scorer = ReplicaScorer(SlowModel(TOKENS_PER_S, BIAS[str(config.model)]), config, default_budget=256)
    scorer.batcher.meter.add(int(TOKENS_PER_S), 1.0)
    return ServedModel(scorer, ModelTraits(has_image_tower=False), tiny_log_odds=(5.0, 5.0), fingerprint="slow")


def measure_replicas(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """The rows."""
    happen = {
        "scale": scale,
        "replace": replace,
        "replace_further": replace_further,
        "kill": kill,
        "kill_node": kill_node,
    }
    for event in config.events:
        yield from happen[event](config, console)


@contextmanager
def serving_slow(**fields: object) -> Iterator[tuple[str, ServeConfig]]:
    """The address of a service whose model sleeps, and its configuration."""
    config = ServeConfig.model_validate({"model": OLD, "port": 0, "access": "loopback", "num_cpus": 0.1, **fields})
    with session(), running(config, load_slow) as url:
        yield url, config


def body(number: int, model: str | None = None) -> bytes:
    """A request of `WORDS` words, to a model by its name or to the first."""
    words = " ".join(f"w{number}" for _ in range(WORDS // 2))
    case = {"question": f"w{number}", "solutions": [[words, words]], "answer_type": "open", "model": model}
    return json.dumps(case).encode()


def num_replicas() -> int:
    """Replicas that serve."""
    from ray import serve

    (application_status,) = serve.status().applications.values()
    (deployment,) = application_status.deployments.values()
    # Ray has the state's name here, or its enumeration, which is text too.
    return sum(number for state, number in deployment.replica_states.items() if state == "RUNNING")


async def watch(counts: list[tuple[float, int]]) -> None:
    """Note the number of replicas each half second."""
    while True:
        counts.append((time.monotonic(), await asyncio.to_thread(num_replicas)))
        await asyncio.sleep(0.5)


def scale(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """One replica, a load that three and a half of them need, then a tenth of that."""
    counts: list[tuple[float, int]] = []
    capacity = TOKENS_PER_S / WORDS

    async def step(url: str) -> list[Reply]:
        watching = asyncio.create_task(watch(counts))
        async with http_client(url) as http:
            send = Client(http, retries=DEFAULT_RETRIES).send
            high = await open_loop(send, body, (config.most - 0.5) * capacity, config.high_s)
            low = await open_loop(send, body, 0.3 * capacity, config.low_s)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching  # what it died of, if it did
        return [*high, *low]

    fields = {"min_replicas": 1, "max_replicas": config.most, "upscale_delay_s": 2, "downscale_delay_s": 8}
    with serving_slow(**fields, target_ongoing_requests=2, max_wait_s=4) as (url, _):
        replies = asyncio.run(step(url))
        first, most, last = counts[0][1], max(count for _, count in counts), counts[-1][1]
    console.print(f"replicas {first} -> {most} -> {last}, statuses {statuses(replies)}")
    failed = len(replies) - len(served(replies))
    yield Measured(
        "load step: replicas",
        first,
        most,
        most / config.most,
        "≥ 1",
        "replicas",
    )
    yield Measured(
        "load step: replicas after it",
        first,
        last,
        last,
        "≤ 1",
        "replicas",
    )
    yield Measured(
        "load step: failed after retries",
        len(replies),
        failed,
        failed,
        "≤ 0",
        "requests",
    )


def under_load(
    url: str, seconds: float, retries: Retries | None, act: Callable[[], None], model: str | None = None
) -> list[Reply]:
    """Half of what two replicas of a model can, while `act` runs a third into it."""

    async def ask() -> list[Reply]:
        async def act_later() -> None:
            await asyncio.sleep(seconds / 3)
            await asyncio.to_thread(act)

        acting = asyncio.create_task(act_later())
        async with http_client(url) as http:
            send = Client(http, retries=retries).send
            replies = await open_loop(send, lambda number: body(number, model), TOKENS_PER_S / WORDS, seconds)
        await acting
        return replies

    return asyncio.run(ask())


def replace(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """All replicas are replaced by ones with another configuration; no request is sent twice."""
    from ray import serve

    with serving_slow(num_replicas=2, max_wait_s=10) as (url, serve_config):
        changed = serve_config.model_copy(update={"max_solutions": 17, "port": int(url.rpartition(":")[2])})

        def update() -> None:
            serve.run(application(changed, load_slow), name="medmm", route_prefix="/")

        replies = under_load(url, config.steady_s, None, update)
    console.print(f"rolling update: statuses {statuses(replies)}")
    yield failed_row("rolling update: failed, without retries", replies)


def replace_further(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """A further model gets new weights while clients ask for it by its name; no request is sent twice."""
    from ray import serve

    further = ModelConfig(model=OLD, num_cpus=0.1, num_replicas=2, max_wait_s=10)
    with serving_slow(num_replicas=2, max_wait_s=10, models={"next": further}) as (url, serve_config):
        models = {"next": further.model_copy(update={"model": NEW})}
        changed = serve_config.model_copy(update={"models": models, "port": int(url.rpartition(":")[2])})

        def update() -> None:
            serve.run(application(changed, load_slow), name="medmm", route_prefix="/")

        replies = under_load(url, config.steady_s, None, update, "next")
        after = asyncio.run(ask_after(url, "next"))
    biases = [bias_of(reply) for reply in replies if reply.status == 200]
    num_new = sum(reply.status == 200 and bias_of(reply) == BIAS[NEW] for reply in after)
    first = biases[0]
    console.print(
        f"new weights of a further model: statuses {statuses(replies)}, the first request has log-odds of {first:+g}, "
        f"{num_new} of {len(after)} sent after the update of {BIAS[NEW]:+g}"
    )
    yield failed_row("new weights of a further model: failed, without retries", replies)
    yield Measured(
        "new weights of a further model: answers of the new ones after the update",
        len(after),
        num_new,
        num_new / len(after),
        "≥ 1",
        "requests",
    )


async def ask_after(url: str, model: str) -> list[Reply]:
    """The answers to twenty requests, one after another, to a model by its name."""
    async with http_client(url) as http:
        replies, _ = await closed_loop(Client(http).send, [body(number, model) for number in range(20)], 1)
    return replies


def bias_of(reply: Reply) -> float:
    """What the model that answered adds to the log-odds of a step of ``WORDS / 2`` words."""
    steps = json.loads(reply.body)["solutions"][0]["steps"]
    return float(steps[0]["text_log_odds"]) - WORDS // 2


WITHOUT_RETRIES = "without retries: neither scores nor 503"
AFTER_RETRIES = "failed after retries"


def kill(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """One of two replicas is killed; what it had is sent again."""
    for retries, name in ((None, WITHOUT_RETRIES), (DEFAULT_RETRIES, AFTER_RETRIES)):
        with serving_slow(num_replicas=2, max_wait_s=10) as (url, _):
            replies = under_load(url, config.steady_s, retries, lambda: process_named("Reranker").kill())
        yield _failed(f"kill -9 of a replica, {name}", replies, retries, console)


def kill_node(config: ReplicasConfig, console: Console) -> Iterator[Measured]:
    """A node with one of two replicas is killed with all its processes; another node has room for its replica."""
    for retries, name in ((None, WITHOUT_RETRIES), (DEFAULT_RETRIES, AFTER_RETRIES)):
        with (
            three_nodes() as (cluster, nodes, port),
            serving_slow(num_replicas=2, max_wait_s=10, num_cpus=NODE_CPUS, port=port) as (url, _),
        ):
            raylet = process_named("Reranker").ppid()
            (victim,) = (node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet)

            def kill_victim(cluster: "Cluster" = cluster, victim: Any = victim) -> None:
                cluster.remove_node(victim, allow_graceful=False)

            replies = under_load(url, config.steady_s, retries, kill_victim)
        yield _failed(f"kill -9 of a node, {name}", replies, retries, console)


@contextmanager
def three_nodes() -> Iterator[tuple["Cluster", Sequence[Any], int]]:
    """A Ray cluster on this machine, its nodes but the head, and the port of its proxy: a head without CPUs, where the
    proxy is, and three nodes with as many as a replica takes."""
    from ray import serve
    from ray.cluster_utils import Cluster

    # A proxy reads it from its node's environment.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "medmm_ray.service.proxy:middlewares")
    with fresh_token():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(3)]
            os.environ["RAY_ADDRESS"] = cluster.address
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = int(probe.getsockname()[1])
            with session():
                # Nodes of one machine have no port each to themselves, as each node's own proxy would need.
                serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
                yield cluster, nodes, port
        finally:
            os.environ.pop("RAY_ADDRESS", None)
            cluster.shutdown()  # type: ignore[no-untyped-call]


def _failed(name: str, replies: Sequence[Reply], retries: Retries | None, console: Console) -> Measured:
    """The row of requests that failed; without retries a 503 that says when to come again is none."""
    console.print(f"{name}: statuses {statuses(replies)}")
    num_told = 0
    if retries is None:
        num_told = sum(reply.status == 503 and reply.retry_after is not None for reply in replies)
    return failed_row(name, replies, num_told)


def failed_row(name: str, replies: Sequence[Reply], num_told: int = 0) -> Measured:
    """The row of requests without scores, less those that were told when to come again."""
    num_failed = len(replies) - len(served(replies)) - num_told
    return Measured(name, len(replies), num_failed, num_failed, "≤ 0", "requests")
