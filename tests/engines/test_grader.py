"""engines/grader.py: by form, and by the word of a model behind a local server."""

import asyncio
from pathlib import Path

import pytest

from medmm_ray.config import ConfigError, build
from medmm_ray.engines.grader import EquivalenceConfig, Grader, GraderEngine, MakeGrader
from medmm_ray.engines.llm.access import connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig
from tests.doubles.api_server import chat_said, failed, serving

OPEN = {"question_id": "q1", "question": "What is seen?", "answer": "Pleural effusion", "answer_type": "open"}
CHOICE = {"question_id": "q2", "question": "Which?", "answer": "B", "answer_type": "choice"}


def graded(grader: Grader, question: dict[str, str], *answers: str | None) -> list[bool | None]:
    return asyncio.run(grader.grade(question, answers)).right


def test_by_form_alone() -> None:
    grader = MakeGrader(EquivalenceConfig(), None)()
    assert graded(grader, OPEN, "the pleural effusions", "hydrothorax", None) == [True, False, None]
    assert graded(grader, CHOICE, "B", "A", None) == [True, False, None]


def test_a_model_is_asked_where_the_forms_differ_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as server:
        engine = GraderEngine(kind="openai", model="gpt-4o")
        api = ApiConfig(endpoint=server.address, in_flight=1, max_attempts=1)

        def grader() -> Grader:
            return Grader(connect(engine, "gpt-4o", api, ApiBudget(str(tmp_path), api.limits), str(tmp_path)))

        server.script = [chat_said('{"same": true}'), chat_said('{"same": false}')]
        answers = ("hydrothorax", "pneumothorax", "Hydrothorax.", "pleural effusion", None)
        assert graded(grader(), OPEN, *answers) == [True, False, True, True, None]
        assert len(server.requests) == 2
        assert "Reference answer: Pleural effusion\\nAnswer: " in str(server.requests[0]["messages"]).replace(
            "\n", "\\n"
        )
        assert graded(grader(), OPEN, *answers) == [True, False, True, True, None]  # kept answers
        assert graded(grader(), CHOICE, "A", "B") == [False, True]
        assert len(server.requests) == 2

        server.script = [chat_said("I think so"), failed(500)]
        grades = asyncio.run(grader().grade(OPEN, ["something", "water", "Water", "pleural effusion", None]))
        assert grades.right == [None, None, None, True, None]  # failed is not wrong
        assert (grades.asked, grades.unanswered) == (2, 2)


def test_an_engine_needs_a_model_and_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"'engine\.model' is required"):
        build(EquivalenceConfig, {"engine": {"kind": "openai"}}, "test")
    engine = GraderEngine(kind="openai", model="m")
    with pytest.raises(ValueError, match="needs a folder"):
        MakeGrader(EquivalenceConfig(engine=engine), None)
