"""`POST /v1/best_of_n` on a scripted policy: rounds, when they stop, what is refused, what is streamed."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient

from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend
from medmm_ray.service.best_of_n import BestOfNAnswer, Round
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.policy import GeneratorPolicy, PolicyConfig
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.rerank import ModelInput, Scored
from tests.doubles.fake_generator import FakeGenerator
from tests.service.web import OPTIONS, QUESTION, WITH_IMAGES, Scores, b64, png

B = "Step 1: The right angle is blunted.\nStep 2: So the answer is (B)."
C = "Step 1: The left angle is blunted.\nStep 2: So the answer is (C)."
LOOSE = "Step 1: The left angle is blunted.\nStep 2: Nobody knows."


def samples(*texts: str) -> Callable[[str, int], str]:
    """A script that gives the texts in turn, whatever the seed starts from, and then the last one again."""
    rest = iter(texts)
    return lambda prompt, seed: next(rest, texts[-1])


class Service:
    """The application over a script; notes how many solutions each scoring had."""

    def __init__(self, script: Callable[[str, int], str], reward: Callable[[str], float] = lambda text: 1.0) -> None:
        self.generator = FakeGenerator(script)
        self.scored: list[int] = []

        async def score(case: ModelInput) -> Scored:
            self.scored.append(len(case.solutions))
            scores = [Scores([2.0, reward(str(text))], [0.0, 0.0]) for text in case.solutions]
            return Scored(scores, num_tokens=10 * len(scores))

        policy = GeneratorPolicy(self.generator, PolicyConfig(num_documents=1))
        backend = Backend(score, ServeConfig(model="m"), WITH_IMAGES, Readiness([2.0]), policy=policy)
        self.web = TestClient(api(Models.single(backend), None), base_url="http://127.0.0.1:8000")

    def ask(self, **fields: Any) -> BestOfNAnswer:
        reply = self.web.post("/v1/best_of_n", json={"question": QUESTION, "options": OPTIONS, **fields})
        assert reply.status_code == 200, reply.text
        return BestOfNAnswer.model_validate(reply.json())


def test_a_vote_stops_when_it_is_settled() -> None:
    service = Service(samples(B))
    answer = service.ask(rule="majority", num_samples=12, round_size=3, reliability=None)
    # 6 of 12: the other 6 could still tie; 9 of 12 cannot be overtaken.
    assert (answer.choice.answer, answer.num_drawn, answer.stopped, answer.reliability) == ("B", 9, "settled", 1.0)
    assert service.scored == [3, 3, 3]
    assert [num for _, num, _ in service.generator.requests] == [3, 3, 3]
    first = service.generator.requests[0][2]
    assert [seed - first for _, _, seed in service.generator.requests] == [0, 3, 6]


def test_it_stops_when_it_is_sure_enough() -> None:
    # Beta(5, 1): P(x > 1/2) = 1 - 1/32.
    answer = Service(samples(B)).ask(rule="majority", num_samples=64, round_size=4, reliability=0.96)
    assert (answer.num_drawn, answer.stopped) == (4, "reliable")
    assert answer.reliability == pytest.approx(31 / 32)
    more = Service(samples(B)).ask(rule="majority", num_samples=64, round_size=4, reliability=0.97)
    assert more.num_drawn == 8


def test_the_best_of_all_is_the_answer() -> None:
    service = Service(samples(B, B, C, B), reward=lambda text: 3.0 if "(C)" in text else -1.0)
    answer = service.ask(num_samples=4, round_size=3, reliability=1.0)
    assert (answer.choice.answer, answer.choice.solution, answer.stopped, answer.num_drawn) == ("C", 2, "exhausted", 4)
    assert answer.ranking is not None
    assert answer.ranking.majority.answer == "B"
    assert answer.texts == [B, B, C, B]
    assert [step.text for step in answer.ranking.solutions[2].steps] == [
        "The left angle is blunted.",
        "So the answer is (C).",
    ]


def test_cost_is_counted_apart() -> None:
    service = Service(samples(B, C))
    answer = service.ask(rule="majority", num_samples=2, round_size=2)
    prompt = len(service.generator.requests[0][0])  # a character is a token there
    assert answer.cost.policy.prompt_tokens == 2 * prompt
    assert answer.cost.policy.cached_tokens == prompt // 8 * 8
    assert answer.cost.policy.completion_tokens == len(B) + len(C)
    assert answer.cost.scorer is not None
    assert answer.cost.scorer.prompt_tokens == 20


def test_what_is_no_solution_is_counted_and_not_scored() -> None:
    service = Service(samples(B + "~", LOOSE, "", C))
    answer = service.ask(rule="majority", num_samples=4, round_size=4)
    assert answer.rejected == {"cut_off": 1, "empty": 1, "no_answer": 1}
    assert (service.scored, answer.num_drawn, answer.choice.answer) == ([1], 4, "C")


def test_no_solution_at_all_is_an_answer() -> None:
    answer = Service(samples(LOOSE)).ask(num_samples=4, round_size=2)
    assert (answer.choice.answer, answer.ranking, answer.stopped) == (None, None, "exhausted")
    assert answer.rejected == {"no_answer": 4}


def test_the_policy_reads_the_documents_that_it_may() -> None:
    service = Service(samples(B))
    service.ask(documents=["Angles blunt.", "Hearts beat."], rule="majority", num_samples=1)
    prompt = service.generator.requests[0][0]
    assert prompt.startswith("Document 1: Angles blunt.\n\nQuestion: Which side shows the effusion? (A) none")
    assert "Hearts beat." not in prompt


def events_of(body: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in body.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_rounds_are_streamed() -> None:
    service = Service(samples(B, C, C, C, C, C))
    fields = {"rule": "majority", "num_samples": 6, "round_size": 2, "reliability": None, "stream": True}
    reply = service.web.post("/v1/best_of_n", json={"question": QUESTION, "options": OPTIONS, **fields})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert [name for name, _ in events] == ["round", "round", "round", "answer"]
    rounds = [Round.model_validate(data) for _, data in events[:3]]
    assert [round_.choice.answer for round_ in rounds] == ["B", "C", "C"]
    assert [[solution.index for solution in round_.solutions] for round_ in rounds] == [[0, 1], [2, 3], [4, 5]]
    assert [round_.texts for round_ in rounds] == [[B, C], [C, C], [C, C]]
    assert rounds[0].cost.policy.completion_tokens == len(B) + len(C)
    assert BestOfNAnswer.model_validate(events[3][1]).choice.answer == "C"


def failing(at: int, fault: RowError) -> Any:
    """A generator whose request number `at` (from 0) cannot be answered."""
    inner = FakeGenerator(samples(B, C))

    async def generate(prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> Sequence[Completion]:
        if len(inner.requests) == at:
            if fault.kind == "prompt_too_long":
                raise fault
            return [Completion("", fault.kind, seed + i, fault=fault) for i in range(n)]
        return await FakeGenerator.generate(inner, prompt, n, seed, sampling)

    inner.generate = generate  # type: ignore[method-assign, assignment]
    return inner


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("unavailable", 503, "gave none of 2 samples: unavailable: away"),
        ("prompt_too_long", 422, "prompt_too_long: away"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_policy_that_fails_at_once_is_an_error(kind: str, status: int, words: str, stream: bool) -> None:
    service = Service(samples(B))
    generator = failing(0, RowError(kind, "away"))
    service = Service(samples(B))
    service.generator.generate = generator.generate  # type: ignore[method-assign]
    body = {"question": QUESTION, "num_samples": 4, "round_size": 2, "stream": stream}
    reply = service.web.post("/v1/best_of_n", json=body)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
    assert words in reply.json()["detail"]
    assert ("retry-after" in reply.headers) == (status == 503)


def test_a_later_round_that_fails_keeps_what_there_is() -> None:
    service = Service(samples(B))
    service.generator.generate = failing(1, RowError("unavailable", "away")).generate  # type: ignore[method-assign]
    answer = service.ask(rule="majority", num_samples=4, round_size=2, reliability=1.0)
    assert (answer.choice.answer, answer.num_drawn, answer.rejected) == ("B", 4, {"unavailable": 2})


def test_a_fault_behind_the_first_round_is_an_event() -> None:
    service = Service(samples(B))
    service.generator.generate = failing(1, RowError("prompt_too_long", "away")).generate  # type: ignore[method-assign]
    body = {"question": QUESTION, "options": OPTIONS, "num_samples": 4, "round_size": 2, "stream": True}
    events = events_of(service.web.post("/v1/best_of_n", json={**body, "reliability": 1.0}).text)
    assert [name for name, _ in events] == ["round", "problem"]
    assert (events[1][1]["status"], events[1][1]["detail"]) == (422, "prompt_too_long: away")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_samples": 0}, "num_samples: 0: "),
        ({"num_samples": 257}, "num_samples: 257: "),
        ({"round_size": 0}, "round_size: 0: "),
        ({"reliability": 1.5}, "reliability: 1.5: "),
        ({"rule": "first"}, "rule: 'first': "),
        ({"solutions": [B]}, "solutions: unknown name; known names: "),
        ({"image": "no base64!"}, "image_encoding"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    service = Service(samples(B))
    reply = service.web.post("/v1/best_of_n", json={"question": QUESTION, "options": OPTIONS, **fields})
    assert reply.status_code == 422
    assert words in reply.json()["detail"]


def test_without_a_policy_there_is_nothing_to_sample_from() -> None:
    async def score(case: ModelInput) -> Scored:
        raise AssertionError

    web = TestClient(api(Models.single(Backend(score, ServeConfig(model="m"), WITH_IMAGES, Readiness([2.0]))), None))
    reply = web.post("http://127.0.0.1:8000/v1/best_of_n", json={"question": QUESTION})
    assert reply.status_code == 404
    assert "no policy is served; set policy.model" in reply.json()["detail"]


def test_text_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ray.serve")
    Service(samples(B)).ask(image=b64(png()), rule="majority", num_samples=2)
    assert "best_of_n: 2 of 2 samples, exhausted, 0 rejected" in caplog.text
    for words in ("angle", "effusion", "right"):
        assert words not in caplog.text
