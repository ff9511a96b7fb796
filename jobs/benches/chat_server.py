"""A judge behind the OpenAI chat protocol, with a latency and with faults: ``python -m jobs.benches.chat_server …``.

It stands for a provider and keeps the provider's books: how many requests it works on at a time, which answers it has
handed over whole and how often, what they cost, what of a prompt it had cached. A step's verdict is a function of its
text (`verdict`), so that whoever asked can check that every label reached its own step.
"""

import asyncio
import hashlib
import json
import re
import sys
import time
from collections import Counter
from typing import Any

from aiohttp import web

FAULTS = ("429", "500", "cut", "garbled", "misfit")
START_S = 5.0  # in which a job is taken to start: Ray still has workers to launch
BLOCK = 512  # characters of a prompt that are cached together
CHARACTERS_A_TOKEN = 4
_STEP = re.compile(r"^Step (\d+): (.*)$", re.MULTILINE)
_SOLUTION = re.compile(r"^Solution (\d+), \d+ steps:$", re.MULTILINE)


def verdict(step: str) -> bool:
    """What this judge says of a step."""
    return hashlib.sha256(step.encode()).digest()[0] % 4 != 0


class Books:
    """What the provider counts."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.inside = 0
        self.busy_s = 0.0
        self.first = self.last = self.at = 0.0
        self.busy_then_s = 0.0  # at the last arrival of a new request
        self.started = self.busy_started_s = 0.0  # at the first arrival after `START_S`
        self.cached: set[bytes] = set()

    def moved(self, by: int) -> None:
        now = time.monotonic()
        self.busy_s += self.inside * (now - self.at) if self.at else 0.0
        self.at, self.inside = now, self.inside + by

    def new(self) -> None:
        """What arrived last is a request that was not seen before."""
        self.moved(0)
        self.first, self.last, self.busy_then_s = self.first or self.at, self.at, self.busy_s
        if not self.started and self.at - self.first >= START_S:
            self.started, self.busy_started_s = self.at, self.busy_s

    def report(self) -> dict[str, Any]:
        """`in_flight` is the mean from the first new request to the last one: while there was something to send.

        `in_flight_later` is that without the first `START_S` seconds, where there were more.
        """
        since = self.started or self.first
        return {
            "in_flight": self.busy_then_s / max(self.last - self.first, 1e-9),
            "in_flight_later": (self.busy_then_s - self.busy_started_s) / max(self.last - since, 1e-9),
            "inside": self.inside,
            "arrivals": self.attempts.total(),
            "requests": len(self.attempts),
            "delivered": self.delivered.total(),
            "twice": sum(number - 1 for number in self.delivered.values()),
            "faults": dict(self.faults),
            "tokens": dict(self.tokens),
        }


class ChatServer:
    def __init__(self, latency_s: float, fault_rate: float, seed: int) -> None:
        self.latency_s, self.fault_rate, self.seed = latency_s, fault_rate, seed
        self.books = Books()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.books.moved(+1)
        try:
            raw = await request.read()
            key, body = hashlib.sha256(raw).hexdigest(), json.loads(raw)
            # Neither tried again nor asked again because the answer did not fit: those come late, when all is done.
            if key not in self.books.attempts and len(body["messages"]) == 2:
                self.books.new()
            return await self._answered(request, body, key)
        except ConnectionResetError:  # who asked was killed
            return web.Response()
        finally:
            self.books.moved(-1)

    async def _answered(self, request: web.Request, body: dict[str, Any], key: str) -> web.StreamResponse:
        self.books.attempts[key] += 1
        fault = self._fault(key, len(body["messages"]))
        if fault:
            self.books.faults[fault] += 1
        await asyncio.sleep(self.latency_s)
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "1"})
        if fault == "500":
            return web.json_response({"error": {"message": "oh"}}, status=500)
        content = json.dumps(self._reply(body, fault == "misfit")).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(content)
        await response.prepare(request)
        if fault == "cut":
            await response.write(content[:100])
            assert request.transport is not None
            request.transport.close()
            return response
        if fault == "garbled":
            await response.write(content[:-20] + b" " * 20)
            return response
        await response.write(content)
        await response.write_eof()
        self.books.delivered[key] += 1
        return response

    def _fault(self, key: str, num_messages: int) -> str:
        """Which fault this attempt meets, by the request and how often it came; empty without one."""
        bits = hashlib.sha256(f"{self.seed} {key} {self.books.attempts[key]}".encode()).digest()
        if int.from_bytes(bits[:4], "big") / 2**32 >= self.fault_rate:
            return ""
        kind = FAULTS[bits[4] % len(FAULTS)]
        return "" if kind == "misfit" and num_messages > 2 else kind

    def _reply(self, body: dict[str, Any], misfit: bool) -> dict[str, Any]:
        prompt = "".join(_texts(message["content"]) for message in body["messages"])
        said = "I would rather talk about the weather." if misfit else json.dumps(_verdicts(_asked(body)))
        usage = {"prompt_tokens": len(prompt) // CHARACTERS_A_TOKEN, "completion_tokens": len(said) // 4}
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        cached = self._cached(prompt)
        self.books.tokens += Counter(
            prompt=usage["prompt_tokens"], cached=cached, completion=usage["completion_tokens"]
        )
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return {
            "model": body["model"],
            "choices": [choice],
            "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}},
        }

    def _cached(self, prompt: str) -> int:
        """Tokens of the prompt's beginning that an earlier, finished request had; then it is cached whole."""
        blocks, state = [], hashlib.sha256()
        for at in range(0, len(prompt) - BLOCK + 1, BLOCK):
            state.update(prompt[at : at + BLOCK].encode())
            blocks.append(state.digest())
        known = next((i for i, block in enumerate(blocks) if block not in self.books.cached), len(blocks))
        self.books.cached |= set(blocks)
        return known * BLOCK // CHARACTERS_A_TOKEN

    async def report(self, _: web.Request) -> web.Response:
        return web.json_response(self.books.report())

    async def reset(self, _: web.Request) -> web.Response:
        self.books = Books()
        return web.json_response({})


def _texts(content: Any) -> str:
    """A message's texts; of a picture the beginning of its data."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else part["image_url"]["url"][:2000] for part in content)


def _asked(body: dict[str, Any]) -> str:
    """The last part of the first user message: the solutions."""
    content = body["messages"][1]["content"]
    last: str = content if isinstance(content, str) else content[-1]["text"]
    return last


def _verdicts(asked: str) -> dict[str, Any]:
    places = [match.end() for match in _SOLUTION.finditer(asked)]
    if not places:
        return {"steps": _steps(asked)}
    parts = [asked[start:end] for start, end in zip(places, [*places[1:], len(asked)], strict=True)]
    return {"solutions": [{"solution": i, "steps": _steps(part)} for i, part in enumerate(parts, 1)]}


def _steps(text: str) -> list[dict[str, Any]]:
    return [
        {
            "step": int(number),
            "reason": "It agrees with the guideline and with the image." if verdict(step) else "It does not.",
            "logical": True,
            "medical": verdict(step),
            "image_grounded": True,
            "verdict": "+" if verdict(step) else "-",
            "confidence": "high",
        }
        for number, step in _STEP.findall(text)
    ]


def main(latency_s: float, fault_rate: float, seed: int) -> None:
    """Serve on a free port of this machine; the port is the first line of the output."""
    server = ChatServer(latency_s, fault_rate, seed)
    app = web.Application(client_max_size=1 << 28)
    app.add_routes(
        [
            web.post("/v1/chat/completions", server.chat),
            web.get("/report", server.report),
            web.post("/reset", server.reset),
        ]
    )

    async def serve() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
