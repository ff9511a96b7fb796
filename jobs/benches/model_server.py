"""A model behind an API on 127.0.0.1, in place of a provider: for benchmarks and tests, in a thread or as a process.

What it answers is a subclass's `answer`. The server sends that, whole or damaged on purpose, and counts what a provider
would: how many requests it works on at a time, which answers it has handed over whole and how often.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from aiohttp import web

START_S = 5.0  # in which a job is taken to start: Ray still has workers to launch
# How an answer leaves the server: nothing of it, its first bytes, other bytes at its end, or all as it is.
Transfer = Literal["none", "cut", "garbled", "whole"]


@dataclass(frozen=True)
class Received:
    """A request: its path with the query, as it was sent, and its JSON body, empty without one."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    key: str
    """Hash of the body: the same for the same request."""
    attempt: int
    """How often it has come by now."""


class Answer(NamedTuple):
    """What goes back; a body that is a text goes as it is, any other as JSON."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    transfer: Transfer = "whole"


def chat_completion(
    model: str | None, message: Mapping[str, Any], usage: Mapping[str, Any] | None, finish_reason: str = "stop"
) -> dict[str, Any]:
    """The body of an answer in the OpenAI chat protocol; `message` is what the assistant says."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {
        "id": "a",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def chat_usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """Tokens of a chat answer as the protocol states them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Traffic:
    """What the provider counts of the requests that were posted."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()  # also those of which not all arrived: they are paid
        self.delivered: Counter[str] = Counter()
        self.inside = 0
        self.busy_s = 0.0
        self.last_event = 0.0
        self.first_new = self.last_new = 0.0  # arrivals of requests that were not there before
        self.busy_at_last_new_s = 0.0
        self.started = self.busy_at_start_s = 0.0  # at the first arrival after `START_S`

    def count_inside(self, change: int) -> None:
        """Requests come in or go out; `busy_s` sums up the seconds of all that are inside."""
        now = time.monotonic()
        self.busy_s += self.inside * (now - self.last_event) if self.last_event else 0.0
        self.last_event, self.inside = now, self.inside + change

    def count_new(self) -> None:
        """What arrived last is a request that was not there before."""
        self.count_inside(0)
        now = self.last_event
        self.first_new, self.last_new, self.busy_at_last_new_s = self.first_new or now, now, self.busy_s
        if not self.started and now - self.first_new >= START_S:
            self.started, self.busy_at_start_s = now, self.busy_s

    def report(self) -> dict[str, Any]:
        """`in_flight` is the mean from the first new request to the last one: while there was something to send.

        `in_flight_later` is that without the first `START_S` seconds, where there were more.
        """
        seconds = max(self.last_new - self.first_new, 1e-9)
        later_seconds = max(self.last_new - (self.started or self.first_new), 1e-9)
        return {
            "in_flight": self.busy_at_last_new_s / seconds,
            "in_flight_later": (self.busy_at_last_new_s - self.busy_at_start_s) / later_seconds,
            "inside": self.inside,
            "arrivals": self.attempts.total(),
            "requests": len(self.attempts),
            "delivered": self.delivered.total(),
            "twice": sum(number - 1 for number in self.delivered.values()),
        }


class ModelServer:
    """The server; a subclass answers. ``GET /report`` tells what was counted, ``POST /reset`` counts anew."""

    def __init__(self) -> None:
        self.port = 0
        self.traffic = Traffic()

    @property
    def address(self) -> str:
        """Where it listens, once it is `open`."""
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, request: Received) -> Answer:
        """The answer to one request; it may take its time."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """What was counted since the last reset."""
        return self.traffic.report()

    def reset(self) -> None:
        """Count anew."""
        self.traffic = Traffic()

    async def open(self) -> web.AppRunner:
        """Listen on a free port, in the running event loop."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/report", self._report)
        app.router.add_post("/reset", self._reset)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # Whoever still waits for an answer when a test ends is not waited for.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        return runner

    async def _report(self, _: web.Request) -> web.Response:
        return web.json_response(self.report())

    async def _reset(self, _: web.Request) -> web.Response:
        self.reset()
        return web.json_response({})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        key, body = hashlib.sha256(raw).hexdigest(), json.loads(raw or "{}")
        if request.method == "GET":
            answer = await self.answer(Received("GET", request.raw_path, request.headers, body, key, 1))
            return _response(answer)
        traffic = self.traffic
        traffic.count_inside(+1)
        try:
            # Neither tried again nor asked again because the answer did not fit: those come late, when all is done.
            if key not in traffic.attempts and len(body.get("messages", ())) <= 2:
                traffic.count_new()
            traffic.attempts[key] += 1
            received = Received("POST", request.raw_path, request.headers, body, key, traffic.attempts[key])
            answer = await self.answer(received)
            traffic.answered[key] += answer.status == 200
            response, is_whole = await _send(request, answer)
            traffic.delivered[key] += is_whole and answer.status == 200
            return response
        except ConnectionError:  # who asked was killed
            return web.Response()
        finally:
            traffic.count_inside(-1)


async def _send(request: web.Request, answer: Answer) -> tuple[web.StreamResponse, bool]:
    """Send an answer; the response, and whether it went whole and right."""
    if request.transport is None:
        raise ConnectionResetError("who asked is gone")
    response = _response(answer)
    content = response.body
    assert isinstance(content, bytes), "not a stream"
    if answer.transfer == "none":
        request.transport.close()
        return response, False
    if answer.transfer == "cut":
        first = web.StreamResponse(status=answer.status, headers=answer.headers)
        first.content_length = len(content)
        await first.prepare(request)
        await first.write(content[:100])
        request.transport.close()
        return first, False
    if answer.transfer == "garbled":
        response.body = content[:-20] + b" " * 20
    await response.prepare(request)
    await response.write_eof()
    return response, answer.transfer == "whole"


def _response(answer: Answer) -> web.Response:
    content = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
    headers = {"Content-Type": "application/json", **answer.headers}
    return web.Response(status=answer.status, headers=headers, body=content.encode())


class Opens(Protocol):
    """What serves in the present event loop."""

    async def open(self) -> web.AppRunner:
        """Start to serve; gives what ends it."""


Server = TypeVar("Server", bound=Opens)


@contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """Run a server in a thread of this process, until the block ends."""
    loop = asyncio.new_event_loop()
    runner = loop.run_until_complete(server.open())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def as_process(server: ModelServer) -> None:
    """Serve until this process ends; the port is the first line of its output."""

    async def serve() -> None:
        await server.open()
        print(server.port, flush=True)
        await asyncio.Event().wait()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())
