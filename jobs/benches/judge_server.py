"""A judge behind the OpenAI chat protocol, with a latency and with faults: ``python -m jobs.benches.judge_server …``.

It stands for a provider and also counts what its answers cost and what of a prompt it had cached. A step's verdict is a
function of its text (`verdict`), so that whoever asked can check that every label reached its own step.
"""

import asyncio
import hashlib
import json
import re
import sys
from collections import Counter
from typing import Any, Literal

from jobs.benches.model_server import Answer, ModelServer, Received, as_process, chat_completion, chat_usage

Fault = Literal["429", "500", "cut", "garbled", "misfit"]
FAULTS: tuple[Fault, ...] = ("429", "500", "cut", "garbled", "misfit")
BLOCK = 512  # characters of a prompt that are cached together
CHARACTERS_A_TOKEN = 4
MISFIT = "I would rather talk about the weather."
_STEP = re.compile(r"^Step (\d+): (.*)$", re.MULTILINE)
_SOLUTION = re.compile(r"^Solution (\d+), \d+ steps:$", re.MULTILINE)


def verdict(step: str) -> bool:
    """This judge's verdict on a step."""
    return hashlib.sha256(step.encode()).digest()[0] % 4 != 0


class JudgeServer(ModelServer):
    """Answers after `latency_s` seconds; a share `fault_rate` of the attempts meets a fault."""

    def __init__(self, latency_s: float, fault_rate: float, seed: int) -> None:
        super().__init__()
        self.latency_s, self.fault_rate, self.seed = latency_s, fault_rate, seed
        self.faults: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.cached: set[bytes] = set()

    async def answer(self, request: Received) -> Answer:
        """A judgement, or a fault."""
        if request.path != "/v1/chat/completions":
            return Answer({"error": {"message": f"no such path: {request.path}"}}, 404)
        fault = self._fault(request)
        if fault:
            self.faults[fault] += 1
        await asyncio.sleep(self.latency_s)
        if fault == "429":
            return Answer({"error": {"message": "slow down"}}, 429, {"Retry-After": "1"})
        if fault == "500":
            return Answer({"error": {"message": "oh"}}, 500)
        # A provider bills what it generated, also where its bytes did not arrive whole.
        reply = self._reply(request.body, fault == "misfit")
        return Answer(reply, transfer=fault if fault in ("cut", "garbled") else "whole")

    def report(self) -> dict[str, Any]:
        """The traffic, faults by their kind and tokens since the last reset."""
        return {**super().report(), "faults": dict(self.faults), "tokens": dict(self.tokens)}

    def reset(self) -> None:
        """Count anew, with an empty cache."""
        super().reset()
        self.faults, self.tokens, self.cached = Counter(), Counter(), set()

    def _fault(self, request: Received) -> Fault | None:
        """Which fault this attempt meets, by the request and how often it came."""
        noise = hashlib.sha256(f"{self.seed} {request.key} {request.attempt}".encode()).digest()
        if int.from_bytes(noise[:4], "big") / 2**32 >= self.fault_rate:
            return None
        fault = FAULTS[noise[4] % len(FAULTS)]
        # Who was asked again because an answer did not fit gets one that does, so that every row can be labelled.
        return None if fault == "misfit" and len(request.body["messages"]) > 2 else fault

    def _reply(self, body: dict[str, Any], misfit: bool) -> dict[str, Any]:
        texts = [_texts(message["content"]) for message in body["messages"]]
        prompt = "".join(texts)
        content = MISFIT if misfit else json.dumps(_verdicts(_solutions(body)))
        prompt_tokens = len(prompt) // CHARACTERS_A_TOKEN
        completion_tokens = len(content) // CHARACTERS_A_TOKEN
        cached_tokens = self._cached_tokens(prompt)
        self.tokens += Counter(prompt=prompt_tokens, cached=cached_tokens, completion=completion_tokens)
        usage = chat_usage(prompt_tokens, completion_tokens, cached_tokens)
        return chat_completion(body["model"], {"content": content}, usage)

    def _cached_tokens(self, prompt: str) -> int:
        """Tokens of the prompt's beginning that an earlier, finished request had; then it is cached whole."""
        blocks, prefix_hash = [], hashlib.sha256()
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            prefix_hash.update(prompt[start : start + BLOCK].encode())
            blocks.append(prefix_hash.digest())
        num_cached = 0
        while num_cached < len(blocks) and blocks[num_cached] in self.cached:
            num_cached += 1
        self.cached |= set(blocks)
        return num_cached * BLOCK // CHARACTERS_A_TOKEN


def _texts(content: Any) -> str:
    """A message's texts, with the beginning of each image's data."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            # Enough to tell images apart, as a prompt cache does.
            texts.append(part["image_url"]["url"][:2000])
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


if __name__ == "__main__":
    as_process(JudgeServer(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
