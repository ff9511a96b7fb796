"""Load on a service: loops of clients, requests at a set rate, and what came of each."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil

from medmm_ray.retries import Attempts, Retries


@dataclass(frozen=True)
class Reply:
    """One request: its status (0: no answer), when it was sent and how long it took (seconds), and its Retry-After."""

    status: int
    sent: float
    seconds: float
    retry_after: str | None = None
    body: bytes = b""


Send = Callable[[bytes], Coroutine[Any, Any, Reply]]


def quantile(seconds: Sequence[float], share: float) -> float:
    """The `share` quantile; NaN of nothing."""
    return float(np.quantile(seconds, share)) if seconds else float("nan")


def served(replies: Sequence[Reply]) -> list[float]:
    """Seconds of the requests that were answered with scores."""
    return [reply.seconds for reply in replies if reply.status == 200]


def statuses(replies: Sequence[Reply]) -> dict[int, int]:
    """How many requests had which status."""
    return dict(sorted(Counter(reply.status for reply in replies).items()))


class Client:
    """Posts bodies to a route of the service; with `retries`, what is refused for now again, by our client's rule."""

    def __init__(self, http: httpx.AsyncClient, path: str = "/v1/rerank", retries: Retries | None = None) -> None:
        self._http = http
        self._path = path
        self._retries = retries

    async def send(self, body: bytes) -> Reply:
        """Post one body."""
        sent = time.monotonic()
        if self._retries is None:
            return await self._post(body, sent)
        attempts = Attempts(self._retries)
        while True:
            reply = await self._post(body, sent)
            wait_s = attempts.wait_s(reply.status, reply.retry_after)
            if wait_s is None:
                return reply
            await asyncio.sleep(wait_s)

    async def _post(self, body: bytes, sent: float) -> Reply:
        try:
            response = await self._http.post(self._path, content=body)
        except httpx.HTTPError:
            return Reply(0, sent, time.monotonic() - sent)
        retry_after = response.headers.get("retry-after")
        return Reply(response.status_code, sent, time.monotonic() - sent, retry_after, response.content)


def http_client(url: str) -> httpx.AsyncClient:
    """Connections to the service, as many as there are requests."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    headers = {"Content-Type": "application/json"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits)


async def closed_loop(send: Send, bodies: Sequence[bytes], num_clients: int) -> tuple[list[Reply], float]:
    """The bodies, each client sending its next as soon as it has its answer; the replies, and the seconds of all."""
    waiting = list(reversed(bodies))
    replies: list[Reply] = []

    async def client() -> None:
        while waiting:
            replies.append(await send(waiting.pop()))

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return replies, time.monotonic() - started


async def open_loop(send: Send, body: Callable[[int], bytes], per_s: float, seconds: float) -> list[Reply]:
    """Requests at a set rate, whatever becomes of those before."""
    tasks: list[asyncio.Task[Reply]] = []
    started = time.monotonic()
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, started + number / per_s - time.monotonic()))
        tasks.append(asyncio.create_task(send(body(number))))
    return await asyncio.gather(*tasks)


def process_named(part: str) -> psutil.Process:
    """Ray's process whose title holds `part`, of this machine's the youngest."""
    matching = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if part in " ".join(process.info["cmdline"] or []) and "ray::" in " ".join(process.info["cmdline"] or []):
            matching.append(process)
    return max(matching, key=lambda process: process.info["create_time"])
