"""An API model that answers from a script, in a thread beside the drivers that ask it: it outlives them.

It judges in lines (`judge.reply=lines`), writes questions and answers them: the same for the same request.
"""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from jobs.benches.model_server import Answer, ModelServer, Received, chat_completion, chat_usage
from medmm_ray.config import digest
from medmm_ray.engines.llm import store

_NUM_STEPS = re.compile(r"Reasoning to review, (\d+) steps")


class ScriptedApi(ModelServer):
    """Takes `pause_s` seconds for an answer."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s

    @property
    def endpoint(self) -> str:
        """What a config calls the endpoint."""
        return f"{self.address}/v1"

    @property
    def num_paid(self) -> int:
        """Answers that it gave, all together: a provider bills also those that found nobody to take them."""
        return self.traffic.answered.total()

    async def answer(self, request: Received) -> Answer:
        """What the request's schema asks for."""
        await asyncio.sleep(self.pause_s)
        message = {"content": reply_to(request.body)}
        return Answer(chat_completion(request.body["model"], message, chat_usage(100, 10)))


def reply_to(body: dict[str, Any]) -> str:
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
    # Words of two characters: questions that share few of them do not count as repeats.
    words = re.findall("..", noise)
    question = {
        "question": f"What is shown by {' '.join(words)}?",
        "options": [f"Finding {number}" for number in range(4)],
        "correct_answer": letter,
        "difficulty": "easy",
        "explanation": "It is seen.",
    }
    return json.dumps(question)


def text_of(content: Any) -> str:
    """What a message says, without its pictures."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\n".join(part["text"] for part in parts if "text" in part)


def verdicts(prompt: str) -> str:
    """A line for each step; a third of them is unsure, so that Monte Carlo has work."""
    match = _NUM_STEPS.search(prompt)
    assert match, "a judge's prompt states the number of steps"
    lines: list[str] = []
    for index in range(int(match[1])):
        number = int(digest(prompt, index), 16)
        confidence = ("high", "medium", "low")[number % 3]
        lines.append(f"{number % 2} {confidence}")
    return "\n".join(lines)


def stored_answers(run: Path) -> Counter[str]:
    """How often the answer to each request of a run is stored: twice where it was paid again though it was there."""
    answers: Counter[str] = Counter()
    for folder in run.glob("api/*/answers"):
        answers.update(stored.key for stored in store.stored_answers(str(folder)))
    return answers
