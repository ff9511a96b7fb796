"""An OpenAI-compatible model on 127.0.0.1 that answers from a script and counts what it was paid for.

It runs beside the drivers that ask it, so that it outlives them: an answer that it sent whole is one that a provider
bills. It judges in lines (`judge.reply=lines`), writes questions and answers them: the same for the same request.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from medmm_ray.config import digest
from medmm_ray.engines.llm.store import parse_segment

_NUM_STEPS = re.compile(r"Reasoning to review, (\d+) steps")


class ScriptedApi(ThreadingHTTPServer):
    """`paid` counts the answers that it gave, all together."""

    daemon_threads = True

    def __init__(self, pause_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pause_s = pause_s
        self.paid = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        """What a config calls the endpoint."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedApi

    def do_POST(self) -> None:
        """Answer a chat request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.pause_s)
        text = answer(body)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        reply = {
            "id": "a",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }
        content = json.dumps(reply).encode()
        with self.server.lock:
            self.server.paid += 1
        with suppress(ConnectionError):  # who asked was killed
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a prompt is clinical text."""


@contextmanager
def scripted_api(pause_s: float) -> Iterator[ScriptedApi]:
    """A running server, which takes `pause_s` seconds for an answer."""
    with ScriptedApi(pause_s) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answer(body: dict[str, Any]) -> str:
    """The reply to a request: what its schema asks for, verdicts where it has none."""
    content = body["messages"][-1]["content"]
    prompt = text_of(content)
    shape = body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties", {})
    if not shape:
        return verdicts(prompt) if _NUM_STEPS.search(prompt) else "yes"  # a probe asks whether it can be reached
    noise = digest(content, body.get("seed"))
    letter = "ABCD"[int(noise, 16) % 4]
    if "question" not in shape:
        return json.dumps({"answer": letter})
    words = " ".join(noise[at : at + 2] for at in range(0, len(noise), 2))
    options = [f"Finding {number}" for number in range(4)]
    question = {"question": f"What is shown by {words}?", "options": options}
    return json.dumps({**question, "correct_answer": letter, "difficulty": "easy", "explanation": "It is seen."})


def text_of(content: Any) -> str:
    """What a message says, without its pictures."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\n".join(part["text"] for part in parts if "text" in part)


def verdicts(prompt: str) -> str:
    """A line for each step; a third of them is unsure, so that Monte Carlo has work."""
    match = _NUM_STEPS.search(prompt)
    assert match, "a judge's prompt states the number of steps"
    numbers = [int(digest(prompt, index), 16) for index in range(int(match[1]))]
    return "\n".join(f"{number % 2} {('high', 'medium', 'low')[number % 3]}" for number in numbers)


def stored_answers(run: Path) -> Counter[str]:
    """How often the answer to each request of a run is stored: twice where it was paid again though it was there."""
    answers: Counter[str] = Counter()
    for file in run.glob("api/*/answers/*/*.jsonl"):
        answers.update(list(parse_segment(file.read_bytes(), str(file))))
    return answers
