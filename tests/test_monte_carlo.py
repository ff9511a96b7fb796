"""monte_carlo.py: which steps are continued, how often, and what their labels say; with a scripted engine."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from medmm_ray.engines.generator import Completion
from medmm_ray.monte_carlo import (
    MonteCarloConfig,
    Roller,
    Step,
    choose,
    known_label,
    monte_carlo,
    outcomes,
    prefix_text,
    rollout_label,
    uncertain_of,
    uncertain_steps,
)
from medmm_ray.records import Labels, StepLabel, from_dict, to_arrow
from medmm_ray.tables import RowError
from tests.fake_generator import FakeGenerator, Script

STEPS = ["Look.", "The heart is wide.", "So the answer is (B)."]
QUESTION = {"options": ["air", "fluid"], "answer": "B", "answer_type": "choice", "question": "What?", "split": "train"}


def solution(solution_id: str, steps: list[str] = STEPS, correct: bool | None = True) -> dict[str, Any]:
    return {"solution_id": solution_id, "steps": steps, "correct": correct}


def judged(question_id: str, solution_id: str, confidences: str) -> Labels:
    """h, m, l: the judge's confidence in each step."""
    words = {"h": "high", "m": "medium", "l": "low"}
    steps = [StepLabel(label=1, confidence=words.get(c)) for c in confidences]
    return Labels(
        question_id=question_id, solution_id=solution_id, source="judge", annotator="j", steps=steps, cost=0.0
    )


def test_uncertain_steps_are_found_by_question() -> None:
    rows = [judged("q2", "s9", "ll"), judged("q1", "s2", "hml"), judged("q3", "s5", "h-"), judged("q1", "s1", "lh")]
    table = to_arrow(Labels, rows)
    expected = [
        {"question_id": "q1", "uncertain": [{"solution_id": "s1", "step": 0}, {"solution_id": "s2", "step": 2}]},
        {"question_id": "q2", "uncertain": [{"solution_id": "s9", "step": 0}, {"solution_id": "s9", "step": 1}]},
    ]
    assert uncertain_steps(table).to_pylist() == expected
    assert uncertain_steps(pa.concat_tables([table.slice(0, 2), table.slice(2)])).to_pylist() == expected
    assert uncertain_steps(table.slice(2, 1)).to_pylist() == []
    assert uncertain_steps(to_arrow(Labels, [])).num_rows == 0


def test_a_prefix_ends_with_the_next_steps_mark() -> None:
    assert prefix_text(STEPS, 1) == "Step 1: Look.\nStep 2: The heart is wide.\nStep 3:"


def test_final_steps_are_known_and_equal_prefixes_are_continued_once() -> None:
    solutions = [solution("s1"), solution("s2", ["Look.", "Air.", "the answer is (A)."]), solution("s3", correct=None)]
    pairs = [("s1", 0), ("s2", 0), ("s2", 2), ("s3", 2)]
    uncertain = uncertain_of([{"solution_id": s, "step": i} for s, i in pairs], solutions)
    known, asked = choose(solutions, uncertain, max_share=1.0)
    assert known == [Step(1, 2)]
    assert asked == {
        "Step 1: Look.\nStep 2:": [Step(0, 0), Step(1, 0)],
        prefix_text(STEPS, 2): [Step(2, 2)],
    }


def test_the_share_bounds_what_is_continued() -> None:
    solutions = [solution(f"s{i}", [f"Step {i}.", "b", "the answer is (B)."]) for i in range(10)]
    uncertain = [Step(i, j) for i in range(10) for j in (0, 1)]
    for share, most in ((0.1, 3), (0.5, 15), (1.0, 20), (0.0, 0)):
        _, asked = choose(solutions, uncertain, share)
        assert sum(len(steps) for steps in asked.values()) == most
    few = choose(solutions, uncertain, 0.1)[1]
    assert few.items() <= choose(solutions, uncertain, 0.5)[1].items()
    assert few == choose(solutions, uncertain[::-1], 0.1)[1]


def test_a_continuation_without_an_answer_is_not_wrong() -> None:
    samples = [
        Completion(" so the answer is (B).", "stop", 0),
        Completion(" so the answer is (A).", "stop", 1),
        Completion(" so the answer is (B) and", "length", 2),
        Completion(" nothing.", "stop", 3),
    ]
    assert outcomes("Step 1: x\nStep 2:", samples, QUESTION) == [True, False]


def test_labels() -> None:
    quarter = [True, False, False, False]
    label = StepLabel(label=1, value=0.25, num_correct=1, num_rollouts=4, stopped_early=False)
    assert rollout_label(quarter, 0.0) == label
    assert rollout_label(quarter, 0.25).label == 0
    assert rollout_label([False, False], 0.0).label == 0
    assert rollout_label([], 0.0) == StepLabel(num_correct=0, num_rollouts=0)
    assert (known_label(True, 0.0).label, known_label(True, 0.0).value) == (1, 1.0)
    assert (known_label(False, 0.0).label, known_label(False, 0.0).num_rollouts) == (0, 0)


def run(script: Script, row: dict[str, Any], **config: Any) -> tuple[list[Labels], FakeGenerator]:
    fake = FakeGenerator(script)
    actor = Roller(MonteCarloConfig(max_share=1.0, **config), "m", "tiny", generator=fake)
    kind = pa.list_(pa.struct([("solution_id", pa.string()), ("step", pa.int64())]))
    uncertain = pa.array([row.pop("uncertain")], kind)
    batch = pa.Table.from_pylist([row]).append_column("uncertain", uncertain)

    async def work() -> list[pa.Table]:
        return [out async for out in actor(batch)]

    [table] = asyncio.run(work())
    [out] = table.to_pylist()
    assert out["question_id"] == "q1"
    return [from_dict(Labels, label) for label in out["labels"]], fake


def row(uncertain: list[tuple[str, int]] | None, **changes: Any) -> dict[str, Any]:
    pairs = None if uncertain is None else [{"solution_id": s, "step": i} for s, i in uncertain]
    solutions = [solution("s1"), solution("s2", correct=False), solution("s3")]
    return {"question_id": "q1", **QUESTION, "solutions": solutions, "uncertain": pairs, **changes}


def test_the_actor_labels_what_ran_and_nothing_else() -> None:
    script = lambda prompt, seed: " so the answer is (B)." if seed % 4 < 3 else " hm."  # noqa: E731
    labels, fake = run(script, row([("s1", 0), ("s2", 0), ("s2", 2)]))
    assert [label.solution_id for label in labels] == ["s1", "s2"]
    ran = StepLabel(label=1, value=1.0, num_correct=3, num_rollouts=3, stopped_early=False)
    assert labels[0].steps == [ran, StepLabel(), StepLabel()]
    assert labels[1].steps == [ran, StepLabel(), known_label(False, 0.0)]
    assert {label.source for label in labels} == {"monte_carlo"}
    assert labels[0].annotator.startswith("tiny@")
    [(prompt, n, seed)] = fake.requests
    assert prompt == "Question: What? (A) air (B) fluidStep 1: Look.\nStep 2:"
    assert (n, seed % 4096) == (4, 0)


def test_no_gold_answer_in_a_prompt() -> None:
    gold = row([("s1", 0)], answer="the secret", answer_type="open", options=[])
    _, fake = run(lambda prompt, seed: "", gold)
    assert all("secret" not in prompt for prompt, _, _ in fake.requests)


def test_nothing_uncertain_gives_an_empty_list() -> None:
    assert run(lambda prompt, seed: "", row(None))[0] == []
    assert run(lambda prompt, seed: "", row([]))[0] == []
    assert run(lambda prompt, seed: "", row([("s1", 0)], split="test"))[0] == []


def test_a_failed_continuation_is_an_error_and_no_label() -> None:
    def script(prompt: str, seed: int) -> str:
        if "heart" in prompt:
            raise RowError("prompt_too_long", "9 tokens")
        return " the answer is (A)."

    labels, _ = run(script, row([("s1", 0), ("s2", 0), ("s2", 1), ("s3", 1)]))
    assert [(label.solution_id, label.error) for label in labels] == [
        ("s1", None),
        ("s2", "prompt_too_long: 9 tokens"),
        ("s3", "prompt_too_long: 9 tokens"),
    ]
    assert [step.label for step in labels[1].steps] == [0, None, None]


def test_documents_need_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmm_ray.monte_carlo.attach", lambda ds, *_: ds)
    with pytest.raises(ValueError, match="num_documents=2 needs the table evidence"):
        monte_carlo(
            None,  # type: ignore[arg-type]
            MonteCarloConfig(num_documents=2),
            questions=pa.table({}),
            judge_labels=to_arrow(Labels, []),
            model="m",
            policy="p",
        )
