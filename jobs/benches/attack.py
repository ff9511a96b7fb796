"""The service under attack: hundreds of requests that no client of good will sends, and what they leave behind.

One replica of a random model with an image tower answers through Serve's proxy, with keys. Attacks are bytes on
connections of their own (`attack_cases`); requests of good will before and after them say what a replica's memory is
without them, and `/health` is asked while bodies of 5 MB are read.
"""

import asyncio
import base64
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import httpx
import numpy as np
import psutil
import yaml
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.attack_cases import BODIES, MARK, Family, Keys, attacks_of, slow
from jobs.benches.attack_files import encoded
from jobs.benches.attack_wire import Attack, Outcome, json_request, request_bytes, send_all
from jobs.benches.models import SERVED, reward_model
from jobs.benches.process_memory import anonymous_bytes, in_new_process
from jobs.benches.serve_load import process_named, quantile
from jobs.benches.two_tower import small_tower
from medmm_ray.config import Config
from medmm_ray.service.allocator import TRIM_S
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.deployment import running
from medmm_ray.service.keys import new_key, sha256
from medmm_ray.session import session

SETTLE_S = 2 * TRIM_S  # until what a replica gives back has gone back


class BenchConfig(Config):
    """With how much the service is attacked."""

    model: str | None = None
    """Checkpoint with an image tower; none: a small one of random weights."""
    families: tuple[Family, ...] = get_args(Family)
    """Kinds of attacks; slow senders come besides."""
    drawn: int = Field(10, ge=1)
    """Requests drawn from the OpenAPI page: of each operation so many that keep to it, and so many that do not."""
    every: int = Field(1, ge=1)
    """Of each kind's attacks each so-manieth is sent; 1: all."""
    at_once: int = Field(6, ge=1)
    """Attacks at a time."""
    slow_senders: int = 60
    """Senders of each kind that stop half-way."""
    body_timeout_s: float = 5.0
    """The service's patience with a body."""
    flood_s: float = 20.0
    """Seconds of bodies of 5 MB."""
    legal: int = Field(12, ge=1)
    """Rounds of requests of good will before the attacks, and after them."""
    max_body_mb: int = 64
    """The service's own bound of a body."""
    seed: int = 0
    """Start of all random numbers."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The rows."""
    with tempfile.TemporaryDirectory() as folder, serving(config, Path(folder)) as (url, known):
        page = httpx.get(f"{url}/openapi.json").json()
        attacks = list(slow(known.good, config.slow_senders, config.body_timeout_s + 2))
        for family in config.families:
            of_family = list(attacks_of(family, page, known, config.drawn, config.max_body_mb, config.seed))
            attacks += of_family[:: config.every]
        processes = [process_named("Reranker"), process_named("ProxyActor")]
        rounds = [_legal(known.good, number) for number in range(config.legal)]
        good_will = [attack for attacks_of_round in rounds for attack in attacks_of_round]

        # Twice: once leaves a tenth less than use does, by which threads happened to read the large ones.
        warm = asyncio.run(send_all([*good_will, *good_will], url, config.at_once))
        assert all(200 in outcome.statuses for outcome in warm), _counts(warm)
        before = _memory(processes)
        outcomes = asyncio.run(send_all(attacks, url, config.at_once))
        after = _memory(processes)
        asyncio.run(send_all(good_will, url, config.at_once))
        after_good_will = _memory(processes)
        _show(outcomes, console)
        yield from _answers(outcomes)
        yield from _health(config, url, known.good, console)
        assert [process.is_running() for process in processes] == [True, True]
        names = ("replica", "proxy")
        for name, first, last, in_use in zip(names, before, after, after_good_will, strict=True):
            console.print(f"MiB of the {name}: {first}, attacked {last}, used again {in_use}")
            ratio = last.own / first.own
            yield Measured(f"memory of the {name} after the attacks", first.own, last.own, ratio, "≤ 1.1", "MiB")
        leaks = _leaks()
    for file, line in leaks[:10]:
        console.print(f"{file}: {line}")
    yield Measured("lines of logs with a text of a request", 0, len(leaks), len(leaks), "≤ 0", "lines")


@contextmanager
def serving(config: BenchConfig, folder: Path) -> Iterator[tuple[str, Keys]]:
    """The address of a service with keys, and the keys."""
    known = Keys(new_key(), new_key(), new_key(), new_key())
    entries = [
        {"name": "good", "sha256": sha256(known.good), "scopes": ["admin"]},
        {"name": "metrics", "sha256": sha256(known.metrics), "scopes": ["metrics"]},
        {"name": "revoked", "sha256": sha256(known.revoked), "revoked": True},
        {"name": "expired", "sha256": sha256(known.expired), "expires": "2020-01-01"},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    model = config.model or _small_model(folder)
    serve_config = ServeConfig(
        model=model,
        port=0,
        num_cpus=0.5,
        keys=str(folder / "keys.yaml"),
        token_env="MEDMM_NO_SUCH_TOKEN",  # noqa: S106  # a name; the file alone counts
        max_body_mb=config.max_body_mb,
        body_timeout_s=config.body_timeout_s,
        max_wait_s=600,
        prefix_cache_mb=16,  # what is kept on purpose is no leak
    )
    with session(), running(serve_config) as url:
        yield url, known


def _small_model(folder: Path) -> str:
    model = reward_model(SERVED, "float32", "cpu", context=4096)
    model.add_image_tower(small_tower(folder / "tower"))
    model.save_pretrained(folder / "model")
    return str(folder / "model")


def _legal(key: str, number: int) -> list[Attack]:
    """Requests of good will, one of each kind: small ones, a large picture, a body of some MB."""
    from PIL import Image

    # As large as a film, of noise that no format makes small.
    noise = Image.effect_noise((2200, 2000), 40 + number)
    film = base64.b64encode(encoded(noise, "PNG")).decode()
    bodies: list[tuple[str, Mapping[str, Any]]] = []
    for path, body in BODIES.items():
        if path != "/v1/best_of_n":  # no policy is served
            bodies.append((path, body))
    bodies.append(("/v1/rerank", {**BODIES["/v1/rerank"], "image": film}))
    bodies.append(("/v1/score", {**BODIES["/v1/score"], "solutions": [f"w{i} w{number}" for i in range(200)]}))
    if number == 0:
        # As much as a request may hold: eight films beside the question's own.
        bodies.append(("/v1/rerank", {**BODIES["/v1/rerank"], "image": film, "reference_images": [film] * 8}))
    attacks = []
    for path, body in bodies:
        attacks.append(Attack("good will", path, [json_request(path, body, key)], num_with_key=1))
    return attacks


class _Memory(NamedTuple):
    """MiB of a process: its own, and with what it shares, of which large bodies make Ray's object store the most."""

    own: float
    with_shared: float

    def __str__(self) -> str:
        return f"{self.own:.0f} ({self.with_shared:.0f} with what it shares)"


def _memory(processes: Sequence[psutil.Process]) -> list[_Memory]:
    """What each process holds, once it has settled."""
    time.sleep(SETTLE_S)
    held: list[_Memory] = []
    for process in processes:
        # The object store is one for all, bounded by its size, and counted in each process that has read of it.
        held.append(_Memory(anonymous_bytes(process.pid) / 2**20, process.memory_info().rss / 2**20))
    return held


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many connections had which statuses."""
    counts = Counter(" ".join(map(str, outcome.statuses[:3])) or "none" for outcome in outcomes)
    return dict(sorted(counts.items()))


def _show(outcomes: Sequence[Outcome], console: Console) -> None:
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        families.setdefault(outcome.attack.family, []).append(outcome)
    for family, of_family in families.items():
        console.print(f"{family}: {len(of_family)} attacks, {_counts(of_family)}")
    for outcome in outcomes:
        if outcome.num_faults or outcome.num_open or outcome.is_unanswered:
            attack = outcome.attack
            statuses = list(outcome.statuses)
            console.print(
                f"[red]{attack.family}: {attack.name}: {statuses}, {outcome.seconds:.1f} s[/red]", markup=True
            )
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:3]
    for outcome in slowest:
        console.print(f"slowest: {outcome.attack.family}, {outcome.attack.name}: {outcome.seconds:.1f} s")


def _answers(outcomes: Sequence[Outcome]) -> Iterator[Measured]:
    number = len(outcomes)
    faults = sum(outcome.num_faults for outcome in outcomes)
    opened = sum(outcome.num_open for outcome in outcomes)
    unanswered = sum(outcome.is_unanswered for outcome in outcomes)
    yield Measured("attacks", 500, number, number, "≥ 500", "attacks")
    yield Measured("answered with 5xx", number, faults, faults, "≤ 0", "answers")
    yield Measured("answered with content and without a key", number, opened, opened, "≤ 0", "answers")
    yield Measured("not answered", number, unanswered, unanswered, "≤ 0", "attacks")


def _health(config: BenchConfig, url: str, key: str, console: Console) -> Iterator[Measured]:
    """How long `/health` takes while every path that takes one is sent bodies of 5 MB."""
    quiet = _asked(url, min(config.flood_s, 5.0))
    bodies = _large_bodies()
    flood: list[Attack] = []
    for path in BODIES:
        for body in bodies:
            flood.append(Attack("flood", path, [request_bytes("POST", path, body, key)], num_with_key=1))
    # In a process of its own: what sends 5 MB at a time keeps the threads beside it, which is no fault of the service.
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(in_new_process, _asked, url, config.flood_s)
        sent = 0
        while not asking.done():
            sent += len(asyncio.run(send_all(flood, url, 4)))
        busy = asking.result()
    console.print(f"bodies of 5 MB: {sent} in {config.flood_s:g} s, load {os.getloadavg()[0]:.1f}")
    theirs, ours = 1000 * quantile(quiet, 0.99), 1000 * quantile(busy, 0.99)
    yield Measured("/health while bodies of 5 MB are read, p99", theirs, ours, ours, "≤ 50", "ms")


def _large_bodies() -> list[bytes]:
    """Bodies of 5 MB: pictures that are sound JSON, and what costs a parser most."""
    rng = np.random.default_rng(0)
    picture = base64.b64encode(rng.bytes(3_900_000)).decode()
    case = BODIES["/v1/rerank"]
    values: list[object] = [
        {**case, "image": picture},
        {**case, "reference_images": [picture[:500_000]] * 10},
        {**case, "solutions": [["x" * 10] * 60] * 2500},
        [[]] * 1_200_000,
        {str(number): number for number in range(350_000)},
    ]
    return [json.dumps(value).encode() for value in values]


def _asked(url: str, seconds: float) -> list[float]:
    """Seconds that `/health` takes, asked for each 20 ms on one connection."""
    taken: list[float] = []
    ends = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as http:
        http.get("/health")
        while time.monotonic() < ends:
            started = time.monotonic()
            assert http.get("/health").status_code == 200
            taken.append(time.monotonic() - started)
            time.sleep(0.02)
    return taken


def _leaks() -> list[tuple[str, str]]:
    """Lines of the session's logs that hold `MARK`."""
    import ray

    lines: list[tuple[str, str]] = []
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    for file in folder.rglob("*"):
        if file.is_file():
            for line in file.read_text(errors="replace").splitlines():
                if MARK in line:
                    lines.append((file.name, line[:200]))
    return lines
