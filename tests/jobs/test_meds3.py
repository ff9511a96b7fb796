"""jobs/meds3.py: what a round is made of; and the phantoms told in words that its recipe learns from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import meds3
from jobs.graph import BY_NAME, MAKER, Step
from jobs.recipe import Recipe
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.records import Question, Solutions, to_arrow
from medmm_ray.data.sources.phantom import PhantomCase, captions, make_questions
from medmm_ray.data.tables import write_rows
from medmm_ray.steps.ingest import SourceConfig, read_source
from medmm_ray.text import extract_answer, join_steps
from medmm_ray.train.policy import PolicyConfig
from tests.doubles import tiny_reward_model as tiny

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


def asked(split: str) -> Question:
    return Question(
        question_id=f"q-{split}", source="s", split=split, modality="radiology", difficulty="easy", question="Which?",
        options=["air", "fluid"], answer="B", answer_type="choice", image_ids=[],
    )  # fmt: skip


def test_each_round_trains_the_next_policy_on_its_own_trees_and_the_last_one_only_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounds with a pipeline that writes its tables at once, real reward models, and a training that is noted."""
    runs: list[tuple[str | None, list[str]]] = []
    trained: list[tuple[str | None, list[str]]] = []

    def pipeline(recipe: Recipe, steps: Sequence[Step], console: Console) -> Run:
        run = Run(recipe)
        runs.append((run.given("policy"), [s.name for s in steps if not run.skipped(s)][-2:]))
        good = bool(run.given("policy"))
        found = [solution(0, "B", True), solution(1, "AB"[good], good), solution(2, "A", False)]
        row = {"policy": "p", "config_hash": "c", "num_requested": 3, "num_missing": 0, "num_drawn": 3,
               "rejected": [], "cost": 0.0, "solutions": found, "error": None}  # fmt: skip
        tables: dict[str, list[Any]] = {
            "questions": [asked("train"), asked("test")],
            "documents": [],
            "solutions": [{**row, "question_id": "q-test"}],
            "tree_solutions": [{**row, "question_id": "q-train"}],
        }
        for name, rows in tables.items():
            if not run.table(name).is_complete:
                key = "document_id" if name == "documents" else "question_id"
                write_rows(run.table(name), rows, Job(run, MAKER[name]).origin(name), key)
        for name in ("policy", "text_prm"):
            if not run.skipped(MAKER[name]) and not run.artifact(name).is_complete:
                run.artifact(name).prepare()
                tiny.save(Path(run.uri(name)), seed=len(runs))
                run.artifact(name).commit(Job(run, MAKER[name]).origin(name), 0.0, {})
        return run

    def train(
        config: PolicyConfig, questions: pa.Table, worked: pa.Table, documents: pa.Table, folder: str, name: str
    ) -> dict[str, float]:
        assert name.removeprefix("next_policy-") in Path(folder).parts
        trained.append((config.base, [s["solution_id"] for row in worked.to_pylist() for s in row["solutions"]]))
        return {}

    monkeypatch.setattr(meds3, "run_pipeline", pipeline)
    monkeypatch.setattr(meds3, "train_policy", train)
    recipe = load_recipe([MEDS3, f"run={tmp_path}"])
    figures = meds3.rounds(recipe, Console(quiet=True))
    first, second, third = (policy for policy, _ in runs)
    assert first is None
    assert second != third
    assert Path(str(second)).parent == Path(str(third)).parent == tmp_path / "next_policy"
    assert [steps for _, steps in runs] == [["tree_search", "train_text_prm"]] * 2 + [["curate", "sample"]]
    own = Run(meds3.of_round(recipe, None, False)).uri("policy")
    assert trained == [(own, ["s0"]), (second, ["s0", "s1"])]
    assert [row["one sample"] for row in figures] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [row["majority"] for row in figures] == [0.0, 1.0, 1.0]
    assert meds3.rounds(recipe, Console(quiet=True)) == figures
    assert len(trained) == 2  # a second run trains nothing again


def test_a_dry_run_has_a_line_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    found = meds3.planned(load_recipe([MEDS3]))
    assert [(line.step, line.work) for line in found.lines] == [
        ("round 0", "train_policy, tree_search, sample, train_text_prm"),
        ("round 1", "train_policy, tree_search, sample, train_text_prm"),
        ("round 2", "sample"),
    ]
    first, second, last = (line.tokens for line in found.lines)
    assert first - second == 500 * (185 + 350) * 4  # the first policy is trained on worked solutions, 4 epochs
    assert 0 < last < second
    assert meds3.main([MEDS3, "--dry-run", "run=s3://bucket/run"]) == 0
    shown = capsys.readouterr().out
    assert "round 2" in shown
    assert "total" in shown


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert meds3.main(["--help"]) == 0
    assert "rounds" in capsys.readouterr().out


def test_a_report_tells_what_the_picture_shows_and_the_worked_solutions_ignore_it() -> None:
    data = read_source(SourceConfig(name="phantom_reports", num_train=60, num_test=5, num_worked=2))
    assert [q.split for q in data.questions] == ["train"] * 60 + ["test"] * 5
    plain = make_questions(0, "train", 60, 0)
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
    assert isinstance(PhantomCase.from_annotation(data.images[0].annotation), PhantomCase)
