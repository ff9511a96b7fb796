"""sample.py: the filter, the rounds, ids and seeds; with a scripted engine."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from medmm_ray.config import digest
from medmm_ray.engines.generator import request_seed
from medmm_ray.records import Question, Solution, Solutions, from_dict, to_arrow
from medmm_ray.sample import SampleConfig, Sampler, draws, fault, sample
from tests.fake_generator import FakeGenerator, Script

GOOD = "Step 1: Look.\nStep 2: See {}.\nStep 3: So the answer is (B)."
CONFIG = SampleConfig(num_samples_train=4, num_samples_test=6, max_rounds=3, oversample=2.0)


def question(question_id: str = "q1", **changes: Any) -> Question:
    values = {
        "question_id": question_id,
        "source": "phantom",
        "split": "train",
        "modality": "radiology",
        "difficulty": "easy",
        "question": f"What is {question_id}?",
        "options": ["air", "fluid"],
        "answer": "B",
        "answer_type": "choice",
        "image_ids": ["im1"],
    }
    return Question(**{**values, **changes})


def run(script: Script, questions: list[Question], config: SampleConfig = CONFIG) -> tuple[list[Solutions], Any]:
    fake = FakeGenerator(script)
    actor = Sampler(config, "m", "tiny", "c0", generator=fake)

    async def work() -> list[pa.Table]:
        return [out async for out in actor(to_arrow(Question, questions))]

    [table] = asyncio.run(work())
    assert table.schema == to_arrow(Solutions, []).schema
    return [from_dict(Solutions, row) for row in table.to_pylist()], fake


def solution(**changes: Any) -> Solution:
    values = {
        "solution_id": "s1",
        "index": 0,
        "text": "t",
        "steps": ["a", "b", "c"],
        "answer": "A",
        "correct": True,
        "finish_reason": "stop",
        "seed": 0,
        "text_sha": "x",
    }
    return Solution(**{**values, **changes})


def test_what_the_filter_refuses() -> None:
    assert fault(solution(), 3, 9) is None
    assert fault(solution(finish_reason="length"), 3, 9) == "cut_off"
    assert fault(solution(steps=["a", "b"]), 3, 9) == "num_steps"
    assert fault(solution(steps=["a"] * 10), 3, 9) == "num_steps"
    assert fault(solution(answer=None), 3, 9) == "no_answer"


def test_how_much_a_round_draws() -> None:
    assert draws(16, 0, 3.0, 4096) == 16
    assert draws(5, 1, 1.5, 4096) == 8
    assert draws(5, 1, 3.0, 7) == 7
    assert draws(0, 1, 3.0, 100) == 0


def test_a_question_gets_what_its_split_asks() -> None:
    rows, fake = run(lambda prompt, seed: GOOD.format(seed), [question(), question("q2", split="test")])
    assert [(row.question_id, row.num_requested, len(row.solutions)) for row in rows] == [("q1", 4, 4), ("q2", 6, 6)]
    base = request_seed("q1", "c0", 0)
    assert fake.requests[0] == ("Question: What is q1? (A) air (B) fluid", 4, base)
    first = rows[0].solutions[1]
    assert first.steps == ["Look.", f"See {base + 1}.", "So the answer is (B)."]
    assert (first.seed, first.index, first.answer, first.correct) == (base + 1, 1, "B", True)
    assert first.solution_id == "s" + digest("q1", "tiny", "c0", 1)
    assert first.text_sha == digest(first.text)
    assert (rows[0].policy, rows[0].config_hash, rows[0].num_rejected) == ("tiny", "c0", 0)


def test_refused_samples_are_drawn_again_with_further_seeds() -> None:
    """The first 4 draws have one good one; the second round draws 3 x 2 more, of which 3 are good."""
    base = request_seed("q1", "c0", 0)
    good = {base + 1, base + 4, base + 6, base + 9, base + 10}
    script = lambda prompt, seed: GOOD.format(seed) if seed in good else "Step 1: Cut~"  # noqa: E731
    [row], fake = run(script, [question()])
    assert [(n, seed - base) for _, n, seed in fake.requests] == [(4, 0), (6, 4)]
    assert [s.index for s in row.solutions] == [1, 4, 6, 9]
    assert row.num_rejected == 6
    assert row.error is None


def test_surplus_is_not_rejected() -> None:
    base = request_seed("q1", "c0", 0)
    [row], _ = run(lambda prompt, seed: GOOD.format(seed) if seed > base else "no", [question()])
    assert [s.index for s in row.solutions] == [1, 2, 3, 4]
    assert row.num_rejected == 1


def test_a_question_that_cannot_be_filled_keeps_what_it_has() -> None:
    base = request_seed("q1", "c0", 0)
    [row], fake = run(lambda prompt, seed: GOOD.format(seed) if seed == base else "no", [question()])
    assert [n for _, n, _ in fake.requests] == [4, 6, 6]
    assert (row.num_requested, len(row.solutions), row.num_rejected, row.error) == (4, 1, 15, None)


def test_a_question_can_be_filled_up_with_what_was_refused() -> None:
    base = request_seed("q1", "c0", 0)
    texts = {0: "", 1: GOOD.format("it"), 2: "no"}
    script = lambda prompt, seed: texts.get(seed - base, "cut~")  # noqa: E731
    [row], _ = run(script, [question()], SampleConfig(num_samples_train=4, max_rounds=2, fill_up=True))
    assert [(s.index, s.finish_reason, s.answer) for s in row.solutions] == [
        (1, "stop", "B"),
        (2, "stop", None),
        (3, "length", None),
        (4, "length", None),
    ]
    assert (row.num_rejected, row.solutions[1].correct) == (12, None)


def test_the_batch_does_not_matter() -> None:
    script = lambda prompt, seed: GOOD.format(f"{prompt[-5:]}{seed}") if seed % 3 else "no"  # noqa: E731
    questions = [question(f"q{i}") for i in range(3)]
    together, _ = run(script, questions)
    alone = [run(script, [q])[0][0] for q in reversed(questions)]
    assert together == alone[::-1]


def test_a_fault_upstream_is_passed_on() -> None:
    [row], fake = run(lambda prompt, seed: "", [question(error="image_corrupt: im1")])
    assert row.error == "upstream: image_corrupt: im1"
    assert (row.solutions, fake.requests) == ([], [])


def test_a_fault_of_the_engine_is_the_rows() -> None:
    from medmm_ray.tables import RowError

    def script(prompt: str, seed: int) -> str:
        raise RowError("prompt_too_long", "9 tokens")

    [row], _ = run(script, [question()])
    assert row.error == "prompt_too_long: 9 tokens"
    assert row.solutions == []


def test_documents_need_evidence() -> None:
    with pytest.raises(ValueError, match="num_documents=2 needs the table evidence"):
        sample(None, SampleConfig(num_documents=2), model="m", policy="p", config_hash="c")  # type: ignore[arg-type]
