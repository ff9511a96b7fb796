"""jobs/meds3.py: what a round is made of; and the phantoms told in words that its recipe learns from."""

from typing import Any

import pytest

from jobs import meds3
from jobs.graph import BY_NAME
from jobs.step import Run, load_recipe
from medmm_ray.ingest import IngestConfig, read_source
from medmm_ray.records import Solutions, to_arrow
from medmm_ray.sources.phantom import Case, captions, make_items
from medmm_ray.text import extract_answer, join_steps

MEDS3 = "jobs/recipes/meds3.yaml"


def solution(index: int, answer: str | None, correct: bool | None) -> dict[str, Any]:
    return {
        "solution_id": f"s{index}", "index": index, "text": "t", "steps": ["a"], "answer": answer, "correct": correct,
        "finish_reason": "stop", "seed": 0, "text_sha": "x",
    }  # fmt: skip


def test_a_rounds_policy_changes_what_it_makes_and_nothing_before() -> None:
    recipe = load_recipe([MEDS3])
    first, second, last = (
        Run(meds3.of_round(recipe, *which)) for which in ((None, False), ("p1", False), ("p1", True))
    )
    names = ["ingest", "curate", "train_policy", "sample", "tree_search", "train_text_prm"]
    assert [not first.skipped(BY_NAME[n]) for n in names] == [True] * 6
    assert [first.fingerprint(BY_NAME[n]) == second.fingerprint(BY_NAME[n]) for n in names] == [True] * 3 + [False] * 3
    assert [second.fingerprint(BY_NAME[n]) == last.fingerprint(BY_NAME[n]) for n in names[:5]] == [True] * 5
    assert [n for n in names if last.skipped(BY_NAME[n])] == ["train_policy", "tree_search", "train_text_prm"]
    assert recipe.without == load_recipe([MEDS3]).without


def test_the_next_policy_learns_from_right_solutions_alone() -> None:
    row = {
        "question_id": "q1", "policy": "p", "config_hash": "c", "num_requested": 3, "num_rejected": 0, "error": None,
        "solutions": [solution(0, "A", False), solution(1, "B", True), solution(2, None, None)],
    }  # fmt: skip
    [kept] = meds3.right_solutions(to_arrow(Solutions, [row])).to_pylist()
    assert [s["solution_id"] for s in kept["solutions"]] == ["s1"]


def test_figures_of_a_question() -> None:
    solutions = [solution(0, "A", False), solution(1, "A", False), solution(2, "B", True), solution(3, "B", True)]
    assert meds3.accuracies(solutions, [[2.0], [-3.0], [0.5], [1.0]]) == {
        "one sample": 0.5, "majority": 0.0, "prm-max": 0.0, "prm-vote-sum": 1.0,
    }  # fmt: skip
    assert meds3.accuracies([solution(0, None, None)], [[1.0]]) == dict.fromkeys(meds3.FIGURES, 0.0)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert meds3.main(["--help"]) == 0
    assert "rounds" in capsys.readouterr().out


def test_a_report_tells_what_the_picture_shows_and_the_worked_solutions_ignore_it() -> None:
    data = read_source(IngestConfig(source="phantom_reports", num_train=60, num_test=5, num_worked=2))
    assert [q.split for q in data.questions] == ["train"] * 60 + ["test"] * 5
    plain = make_items(0, "train", 60, 0)
    answers = []
    for told, item in zip(data.questions, plain, strict=False):
        report = told.question.removeprefix("Report: ").removesuffix(f" {item.question}")
        assert report in captions(item.case)
        assert (told.options, told.answer) == (item.options, item.answer)
        answers += [(extract_answer(join_steps(steps), told.options), told.answer) for steps in told.worked]
    assert all(stated for stated, _ in answers)
    right = sum(stated == gold for stated, gold in answers) / len(answers)
    assert 0.2 < right < 0.5  # blind: as often as the options are common
    assert all(not q.worked for q in data.questions[60:])
    assert isinstance(Case.from_annotation(data.images[0].annotation), Case)
