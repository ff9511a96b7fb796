"""A judge behind the OpenAI chat protocol, with a latency and with faults: ``python -m jobs.benches.chat_server …``.

It stands for a provider and counts what a provider would: how many requests it works on at a time, which answers it has
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
    """This judge's verdict on a step."""
    return hashlib.sha256(step.encode()).digest()[0] % 4 != 0


class ServerCounts:
    """What the provider counts."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.inside = 0
        self.busy_s = 0.0
        self.last_event = 0.0
        self.first_new = self.last_new = 0.0  # arrivals of requests that were not there before
        self.busy_at_last_new_s = 0.0
        self.started = self.busy_at_start_s = 0.0  # at the first arrival after `START_S`
        self.cached: set[bytes] = set()

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
            "faults": dict(self.faults),
            "tokens": dict(self.tokens),
        }


class ChatServer:
    """The routes of the server."""

    def __init__(self, latency_s: float, fault_rate: float, seed: int) -> None:
        self.latency_s, self.fault_rate, self.seed = latency_s, fault_rate, seed
        self.counts = ServerCounts()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A chat request: answered, or met by a fault."""
        self.counts.count_inside(+1)
        try:
            raw = await request.read()
            key, body = hashlib.sha256(raw).hexdigest(), json.loads(raw)
            # Neither tried again nor asked again because the answer did not fit: those come late, when all is done.
            if key not in self.counts.attempts and len(body["messages"]) == 2:
                self.counts.count_new()
            return await self._answered(request, body, key)
        except ConnectionResetError:  # who asked was killed
            return web.Response()
        finally:
            self.counts.count_inside(-1)

    async def _answered(self, request: web.Request, body: dict[str, Any], key: str) -> web.StreamResponse:
        self.counts.attempts[key] += 1
        fault = self._fault(key, len(body["messages"]))
        if fault:
            self.counts.faults[fault] += 1
        await asyncio.sleep(self.latency_s)
        if fault == "429":
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "1"})
        if fault == "500":
            return web.json_response({"error": {"message": "oh"}}, status=500)
        content = json.dumps(self._reply(body, fault == "misfit")).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(content)
        await response.prepare(request)
        # A provider bills what it generated, also where its bytes did not arrive whole.
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
        self.counts.delivered[key] += 1
        return response

    def _fault(self, key: str, num_messages: int) -> str:
        """Which fault this attempt meets, by the request and how often it came; empty without one."""
        noise = hashlib.sha256(f"{self.seed} {key} {self.counts.attempts[key]}".encode()).digest()
        if int.from_bytes(noise[:4], "big") / 2**32 >= self.fault_rate:
            return ""
        kind = FAULTS[noise[4] % len(FAULTS)]
        # Who was asked again because an answer did not fit gets one that does, so that every row can be labelled.
        return "" if kind == "misfit" and num_messages > 2 else kind

    def _reply(self, body: dict[str, Any], misfit: bool) -> dict[str, Any]:
        prompt = "".join(_texts(message["content"]) for message in body["messages"])
        content = "I would rather talk about the weather." if misfit else json.dumps(_verdicts(_solutions(body)))
        prompt_tokens, completion_tokens = len(prompt) // CHARACTERS_A_TOKEN, len(content) // CHARACTERS_A_TOKEN
        cached_tokens = self._cached_tokens(prompt)
        self.counts.tokens += Counter(prompt=prompt_tokens, cached=cached_tokens, completion=completion_tokens)
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        return {"model": body["model"], "choices": [choice], "usage": usage}

    def _cached_tokens(self, prompt: str) -> int:
        """Tokens of the prompt's beginning that an earlier, finished request had; then it is cached whole."""
        blocks, prefix_hash = [], hashlib.sha256()
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            prefix_hash.update(prompt[start : start + BLOCK].encode())
            blocks.append(prefix_hash.digest())
        num_cached = 0
        while num_cached < len(blocks) and blocks[num_cached] in self.counts.cached:
            num_cached += 1
        self.counts.cached |= set(blocks)
        return num_cached * BLOCK // CHARACTERS_A_TOKEN

    async def report(self, _: web.Request) -> web.Response:
        """What was counted since the last reset."""
        return web.json_response(self.counts.report())

    async def reset(self, _: web.Request) -> web.Response:
        """Count anew."""
        self.counts = ServerCounts()
        return web.json_response({})


def _texts(content: Any) -> str:
    """A message's texts, with the beginning of each image's data."""
    if isinstance(content, str):
        return content
    texts = [part["text"] if part["type"] == "text" else part["image_url"]["url"][:2000] for part in content]
    return "".join(texts)


def _solutions(body: dict[str, Any]) -> str:
    """The last part of the first user message: the solutions."""
    content = body["messages"][1]["content"]
    last: str = content if isinstance(content, str) else content[-1]["text"]
    return last


def _verdicts(text: str) -> dict[str, Any]:
    """The reply to a prompt's last part: about the steps of one solution, or of each of several."""
    starts = [match.end() for match in _SOLUTION.finditer(text)]
    if not starts:
        return {"steps": _steps(text)}
    solutions = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        solutions.append({"solution": number, "steps": _steps(text[start:end])})
    return {"solutions": solutions}


def _steps(text: str) -> list[dict[str, Any]]:
    entries = []
    for number, step in _STEP.findall(text):
        is_right = verdict(step)
        entry = {
            "step": int(number),
            "reason": "It agrees with the guideline and with the image." if is_right else "It does not.",
            "logical": True,
            "medical": is_right,
            "image_grounded": True,
            "verdict": "+" if is_right else "-",
            "confidence": "high",
        }
        entries.append(entry)
    return entries


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
