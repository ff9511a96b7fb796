"""audit/: the figures of a small dataset by hand, gates at their edges, and the job on tables of a run."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import audit as job
from jobs import pipeline
from jobs.graph import BY_NAME, MAKER
from jobs.step import Job, Run, load_recipe
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.records import (
    Count,
    Evidence,
    Image,
    Labels,
    Question,
    RetrievedImage,
    ReviewItem,
    Solutions,
    StepLabel,
    to_arrow,
)
from medmm_ray.data.sorted_rows import windows
from medmm_ray.data.tables import Manifest, Provenance, write_rows
from medmm_ray.engines.llm.ledger import Ledger
from medmm_ray.pages.dataset_page import render
from medmm_ray.stats.gates import figure_text, target_text
from medmm_ray.stats.grouped_stats import Figure
from medmm_ray.steps.audit import AuditConfig, AuditReport, GateError, audit, require
from medmm_ray.steps.audit.cost import CostFigures, LedgerFigures, cost_figures
from medmm_ray.steps.audit.gates import _gate, gates_of
from medmm_ray.steps.audit.leakage import leakage
from tests.stats.test_label_arrays import labelled, question, solution

TINY = "jobs/recipes/tiny.yaml"
CONFIG = AuditConfig(bootstrap_samples=50)


def asked(question_id: str, split: str, difficulty: str, modality: str, *image_ids: str, text: str = "") -> Question:
    return Question(question_id=question_id, source="s", split=split, modality=modality, difficulty=difficulty,
                    question=text or f"What of {question_id}?", options=["yes", "no"], answer="A",
                    answer_type="choice", image_ids=list(image_ids))  # fmt: skip


def picture(image_id: str, split: str, sha256: str = "") -> Image:
    return Image(image_id=image_id, uri="u", sha256=sha256 or image_id, perceptual_hash="0", width=1, height=1,
                 split=split, modality="radiology", diagnosis="", annotation="")  # fmt: skip


def manifest(name: str, **more: Any) -> Manifest:
    return Manifest(name=name, fingerprint="f", config={}, upstream={}, **more)


QUESTIONS = [
    asked("q1", "train", "easy", "radiology", "i1"),
    asked("q2", "train", "hard", "pathology", "i2"),
    asked("q3", "test", "hard", "radiology", "i3"),
]
IMAGES = [picture("i1", "train"), picture("i2", "train"), picture("i3", "test")]
SOLUTIONS = [
    question("q1", solution("s1", 2), solution("s2", 4, correct=False)),
    question("q2", solution("s3", 3, correct=None)),
    Solutions(question_id="q3", policy="p", config_hash="c", num_requested=2,
              num_drawn=7, rejected=[Count(kind="cut_off", count=4), Count(kind="no_answer", count=3)], solutions=[],
              error="engine: died"),
]  # fmt: skip
JUDGE = [
    labelled("s1", [1, 1]),
    labelled("s2", [1, 0, 0, None]),
    labelled("s3", [1, 1, 0]),
]
EXPERT = [labelled("s2", [None, 0, None, None], "expert"), labelled("s3", [0, None, None], "expert")]
QUEUE = [
    ReviewItem(question_id="q", solution_id=s, step_index=i, stratum="x", inclusion_probability=p)
    for s, i, p in (("s2", 1, 0.25), ("s3", 0, 0.5))
]


def audited(config: AuditConfig = CONFIG, **more: Any) -> AuditReport:
    tables: dict[str, Any] = {
        "questions": [to_arrow(Question, QUESTIONS)],
        "images": [to_arrow(Image, IMAGES)],
        "solutions": [to_arrow(Solutions, [row]) for row in SOLUTIONS],
        "labels": {"judge_labels": [to_arrow(Labels, JUDGE)], "expert_labels": [to_arrow(Labels, EXPERT)]},
        "review_queue": to_arrow(ReviewItem, QUEUE),
    }
    report = audit(config, **{**tables, **more})
    assert from_json(AuditReport, to_json(report)) == report
    return report


def report(config: AuditConfig = CONFIG, **more: Any) -> dict[str, Any]:
    """The report as dataset_report.json has it."""
    document: dict[str, Any] = json.loads(to_json(audited(config, **more)))
    return document


def test_counts_by_hand() -> None:
    found = report()
    assert found["coverage"]["splits"] == {"test": 1, "train": 2}
    assert found["coverage"]["difficulties"] == ["easy", "hard"]
    assert found["coverage"]["modalities"]["radiology"] == {
        "questions": 2, "with_image": 2, "images": 3, "solutions": 2, "by_difficulty": {"easy": 1, "hard": 1},
    }  # fmt: skip
    sampling = found["sampling"]
    assert sampling.pop("accuracy")["all"]["all"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert sampling == {
        "questions": 3, "requested": 5, "kept": 3, "drawn": 7, "rejected": {"cut_off": 4, "no_answer": 3},
        "short_questions": 1, "empty_questions": 1,
        "missing": 2, "without_answer": 1, "finish_reasons": {"stop": 3}, "errors": {"engine": 1},
    }  # fmt: skip
    assert found["steps"]["histogram"] == {"2": 1, "3": 1, "4": 1}
    assert found["steps"]["mean"]["value"] == 3.0
    assert (found["steps"]["few"], found["steps"]["many"]) == (3, 0)
    judge, expert = found["balance"]
    assert (judge["right"], judge["wrong"], judge["neutral"], judge["unlabelled"]) == (5, 3, 0, 1)
    assert judge["share"]["all"]["all"]["value"] == 0.625
    assert judge["share"]["difficulty"]["easy"]["value"] == 0.6
    assert judge["share"]["answer"]["no answer"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert not judge["weighted"]
    assert (expert["right"], expert["wrong"], expert["weighted"]) == (0, 2, True)
    kappa = found["agreement"][0]["kappa"]["all"]["all"]
    assert kappa["equal"] == pytest.approx(4 / 6, abs=1e-6)  # weights 4 (equal) and 2 (not)
    assert found["source"] == "judge"


def test_questions_about_one_image_are_one_cluster() -> None:
    alone = audited()
    pictured = [replace(row, image_ids=["i1"]) if row.question_id != "q3" else row for row in QUESTIONS]
    shared = audited(questions=[to_arrow(Question, pictured)])
    for judge, low_is_known in ((alone.balance[0], True), (shared.balance[0], False)):
        share = judge.share["all"]["all"]
        # q1 and q2 alone have labels: about one image they are a single cluster, which has no interval.
        assert (share.value, share.questions, share.low is not None) == (0.625, 2, low_is_known)
    assert (alone.steps.mean.low is not None, shared.steps.mean.low) == (True, None)
    assert alone.steps.mean.value == shared.steps.mean.value


GROWN = [question("q1", solution("t1", 2), solution("t2", 3, correct=False)), question("q2")]
BY_TREE = [
    Labels(question_id="q1", solution_id=name, source="tree_search", annotator="p@c", cost=0.0,
           steps=[StepLabel(label=label, value=value) for label, value in steps])
    for name, steps in (("t1", [(1, 0.5), (1, 1.0)]), ("t2", [(1, 0.5), (0, 0.25), (0, 0.0)]))
]  # fmt: skip


def test_trees_are_a_source_of_solutions_and_of_labels() -> None:
    judged = labelled("t2", [1, 1, 0])
    labels = {"judge_labels": [to_arrow(Labels, [*JUDGE, judged])], "tree_labels": [to_arrow(Labels, BY_TREE)]}
    with_trees = audited(labels=labels, tree_solutions=[to_arrow(Solutions, [row]) for row in GROWN])
    alone, found = report(), json.loads(to_json(with_trees))
    assert alone["trees"] == {"questions": 0, "solutions": 0, "right": 0}
    assert found["trees"] == {"questions": 1, "solutions": 2, "right": 1}
    assert found["sampling"] == alone["sampling"]
    assert found["coverage"]["modalities"]["radiology"]["solutions"] == 4
    mean = found["steps"]["mean"]
    assert (mean["value"], mean["count"], mean["questions"]) == (2.8, 5, 2)  # q1's samples and trees are one question's
    judge, tree = found["balance"]
    assert (tree["source"], tree["solutions"], tree["right"], tree["wrong"]) == ("tree_search", 2, 3, 2)
    assert tree["share"]["answer"]["right"]["value"] == 1.0
    assert tree["share"]["answer"]["wrong"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert (judge["right"], judge["wrong"]) == (7, 4)
    (pair,) = found["agreement"]
    assert (pair["first"], pair["second"], pair["of"], pair["looked_at"]) == ("judge", "tree_search", "prefix", 1)
    assert pair["kappa"]["all"]["all"]["count"] == 3
    assert pair["kappa"]["all"]["all"]["equal"] == pytest.approx(2 / 3, abs=1e-6)
    policies = {row["policy"]: row for row in found["policies"]}
    assert (policies["judge"]["solutions"], policies["tree_search"]["kept"]) == (5, 2)
    assert (policies["tree_search"]["kept_steps"], policies["tree_search"]["mean_target"]) == (5, 0.6)
    assert policies["tree_search_soft"]["mean_target"] == pytest.approx(0.45, abs=1e-6)
    assert "2 solutions more, of 1 questions; 50.0" in render(with_trees)
    assert "Tree search" not in render(audited())


def test_an_advantage_is_measured_from_the_samples_alone() -> None:
    steps = [StepLabel(label=1, value=0.6, num_correct=3, num_rollouts=5), *[StepLabel()] * 3]
    rolled = Labels(question_id="q", solution_id="s2", source="monte_carlo", annotator="a", steps=steps, cost=0.0)
    grown = [question("q1", solution("t1", 2), solution("t2", 2))]
    found = report(
        labels={"monte_carlo_labels": [to_arrow(Labels, [rolled])]}, tree_solutions=[to_arrow(Solutions, grown)]
    )
    advantage = next(row for row in found["policies"] if row["policy"] == "advantage")
    assert (advantage["kept_steps"], advantage["mean_target"]) == (1, 1.0)  # .6 over .5, not below 3/4


def test_the_order_of_rows_and_parts_changes_nothing() -> None:
    tables = [to_arrow(Solutions, [row]) for row in reversed(SOLUTIONS)]
    labels = {
        "judge_labels": [to_arrow(Labels, [row]) for row in reversed(JUDGE)],
        "expert_labels": [to_arrow(Labels, EXPERT[::-1])],
    }
    queue = to_arrow(ReviewItem, QUEUE[::-1])
    mixed = report(solutions=tables, labels=labels, review_queue=queue, questions=[to_arrow(Question, QUESTIONS[::-1])])
    assert mixed == report()


def test_tables_read_some_questions_at_a_time_give_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_their_question(rows: list[Labels]) -> list[Labels]:
        question_of = {solution.solution_id: row.question_id for row in SOLUTIONS for solution in row.solutions}
        return [replace(row, question_id=question_of[row.solution_id]) for row in rows]

    labels = {"all": [to_arrow(Labels, of_their_question([*JUDGE, *EXPERT]))]}
    whole = report(labels=labels)
    # A question a window.
    monkeypatch.setattr("medmm_ray.data.sorted_rows.BATCH_BYTES", 1)
    monkeypatch.setattr("medmm_ray.steps.audit.windows", partial(windows, num_bytes=1))
    assert report(labels=labels) == whole


def test_yield_of_the_label_policies() -> None:
    found = {row["policy"]: row for row in report(CONFIG.model_copy(update={"after_first_error": "drop"}))["policies"]}
    assert list(found) == [
        "judge", "monte_carlo", "hybrid", "consensus", "soft", "advantage", "outcome", "tree_search",
        "tree_search_soft",
    ]  # fmt: skip
    assert (found["judge"]["solutions"], found["judge"]["kept"], found["judge"]["kept_steps"]) == (3, 3, 7)
    assert found["judge"]["mean_target"] == pytest.approx(5 / 7, abs=1e-6)
    assert (found["outcome"]["kept"], found["outcome"]["kept_steps"], found["outcome"]["mean_target"]) == (2, 2, 0.5)
    assert (found["consensus"]["kept"], found["consensus"]["refused"]) == (1, 1)  # s1 by its right answer
    assert found["consensus"]["why"] == (
        "judge and Monte Carlo agree on 1 solutions and differ on 0; 2 cannot be settled (1 not judged, 1 without "
        "Monte Carlo on every step that it needs)."
    )
    lost = labelled("s3", [1, 1, 0], "monte_carlo")
    with_it = report(labels={"all": [to_arrow(Labels, [*JUDGE, lost])]})["policies"]
    consensus = next(row for row in with_it if row["policy"] == "consensus")
    assert (consensus["kept"], consensus["refused"], consensus["why"]) == (2, 0, "")
    failed = replace(lost, solution_id="s2", steps=[], error="prompt_too_long: 9 tokens")
    judged = [JUDGE[0], labelled("s2", [1, 0, 0, 1]), JUDGE[2]]
    with_it = report(labels={"all": [to_arrow(Labels, [*judged, lost, failed])]})["policies"]
    consensus = next(row for row in with_it if row["policy"] == "consensus")
    assert (consensus["kept"], consensus["refused"]) == (2, 1)
    assert consensus["why"].endswith("differ on 0; 1 cannot be settled (1 with failed continuations).")
    two = report(CONFIG.model_copy(update={"yield_solutions": 2}))["policies"]
    assert {row["solutions"] for row in two} == {2}


def test_an_advantage_is_measured_from_the_accuracy_of_the_question() -> None:
    ratios = [StepLabel(label=1, value=v, num_correct=n, num_rollouts=4) for v, n in ((0.75, 3), (0.75, 3), (0.25, 1))]
    steps = [*ratios, StepLabel(label=0, value=0.0, num_correct=0, num_rollouts=4)]
    rolled = Labels(question_id="q", solution_id="s2", source="monte_carlo", annotator="a", steps=steps, cost=0.0)
    found = report(labels={"monte_carlo_labels": [to_arrow(Labels, [rolled])]})["policies"]
    advantage = next(row for row in found if row["policy"] == "advantage")
    # q1 is right in 1 of 2: step 0 raises it to .75 (1), step 1 leaves it, steps 2 and 3 lower it (0, 0).
    assert (advantage["kept"], advantage["kept_steps"], advantage["refused"]) == (1, 3, 0)
    assert advantage["mean_target"] == pytest.approx(1 / 3, abs=1e-6)


def test_leaks_are_found_by_picture_bytes_and_text(tmp_path: Path) -> None:
    questions = [
        asked("q1", "train", "easy", "radiology", "i1"),
        asked("q2", "test", "easy", "radiology", "i1"),
        asked("q3", "train", "easy", "clinical", text="What is a Rash?"),
        asked("q4", "test", "easy", "clinical", text="what is a rash"),
    ]
    images = [picture("i1", "train"), picture("i2", "train", "same"), picture("i3", "test", "same")]
    shown = [
        Evidence(question_id=q, config_hash="c", documents=[],
                 images=[RetrievedImage(image_id=i, uri="u", diagnosis="", similarity=1.0) for i in ids])
        for q, ids in (("q1", ["i2", "i1"]), ("q2", ["i3"]), ("q3", []))
    ]  # fmt: skip
    found = leakage(
        [to_arrow(Question, questions)], [to_arrow(Image, images)], [to_arrow(Evidence, shown)], str(tmp_path)
    )
    assert [(check.name, check.count, check.checked, check.examples) for check in found] == [
        ("images_of_questions", 1, 1, ["i1"]),
        ("image_files", 1, 2, ["same"]),
        ("questions", 1, 4, ["q4"]),
        ("references_outside_training", 1, 3, ["q2"]),
        ("own_image_as_reference", 1, 3, ["q1"]),
    ]


def test_cost_is_what_the_rows_say_or_the_books_where_they_know_of_more() -> None:
    booked = {"judge_labels": manifest("judge_labels", cost=3.5), "solutions": manifest("solutions", cost=1.0)}
    rows = {"judge_labels": 3.0, "expert_labels": 2.0, "other": 0.0}
    found = cost_figures(rows, booked, {})
    tables = {"judge_labels": 3.5, "solutions": 1.0, "expert_labels": 2.0}
    assert found == CostFigures(tables=tables, ledgers={}, beyond_tables=0.0, readers=0.0, total=6.5)
    ledgers = {
        "gemini": Ledger(epoch=2, spent=4.0, answers=90, possibly_paid=0.75, lost_calls=3),
        "gpt": Ledger(epoch=1, spent=0.25, answers=5),
    }
    found = cost_figures(rows, booked, ledgers)
    assert (found.tables, found.beyond_tables, found.total) == (tables, 0.5, 7.0)
    assert found.ledgers["gemini"] == LedgerFigures(spent=4.0, answers=90, possibly_paid=0.75, lost_calls=3)
    read = {**booked, "expert_labels": manifest("expert_labels", figures={"verdicts": 1200.0})}
    found = cost_figures(rows, read, {}, dollars_per_verdict=0.5)
    assert (found.tables, found.readers, found.total) == (tables, 600.0, 606.5)
    paid = replace(SOLUTIONS[0], cost=0.5)
    cost = report(solutions=[to_arrow(Solutions, [paid, *SOLUTIONS[1:]])])["cost"]
    assert cost["tables"] == {"solutions": 0.5, "judge_labels": 0.75, "expert_labels": 0.5}
    assert cost["total"] == 1.75


@pytest.mark.parametrize(
    ("value", "target", "passed"),
    [
        (0.8, (0.8, None), False),
        (0.8000001, (0.8, None), True),
        (0.7, (0.7, 0.8), True),
        (0.8, (0.7, 0.8), True),
        (0.6999, (0.7, 0.8), False),
        (0.8001, (0.7, 0.8), False),
        (0.0, (None, 0), True),
        (1.0, (None, 0), False),
        (3900.0, (None, 3900.0), True),
        (None, (0.8, None), None),
    ],
)
def test_gates_at_their_edges(
    value: float | None, target: tuple[float | None, float | None], passed: bool | None
) -> None:
    figure = Figure(value, value, value)
    gate = _gate("judge_expert_kappa", "title", "kappa", figure, target)
    assert gate.passed is passed
    assert bool(gate.advice) is (passed is not True)


@pytest.mark.parametrize(
    ("low", "high", "passed", "certain"),
    [(0.71, 0.79, True, True), (0.65, 0.79, True, False), (0.85, 0.9, False, True), (0.1, 0.9, True, False)],
)
def test_a_gate_is_certain_where_its_interval_lies_on_one_side(
    low: float, high: float, passed: bool, certain: bool
) -> None:
    gate = _gate(
        "positive_share",
        "t",
        "share",
        Figure((low + high) / 2 + 0.2 * (low == 0.1), low, high),
        (0.7, 0.8),
    )
    assert (gate.passed, gate.certain) == (passed, certain)


def test_all_gates_of_a_small_dataset() -> None:
    found = {gate["name"]: gate for gate in report()["gates"]}
    assert {name: gate["passed"] for name, gate in found.items()} == {
        "judge_expert_kappa": False,
        "positive_share": False,
        "easy_positive": False,
        "hard_positive": True,
        "mean_steps": False,
        "modalities": False,
        "leakage": True,
        "cost": True,
    }
    assert found["modalities"]["detail"] == "missing: clinical"
    assert (found["easy_positive"]["value"], found["easy_positive"]["low"]) == (0.6, None)
    assert found["mean_steps"]["detail"] == "fewer than 5: 100.0 %, more than 15: 0.0 % of the solutions"
    assert "too weak" in found["positive_share"]["advice"]
    aimed = report(CONFIG.model_copy(update={"mean_steps": (1.0, 2.0), "max_cost_usd": 1.0, "modalities": ()}))
    changed = {gate["name"]: gate for gate in aimed["gates"]}
    assert [changed[name]["passed"] for name in ("mean_steps", "modalities", "cost")] == [False, True, False]
    assert "At most 9" not in changed["mean_steps"]["advice"]
    assert "judge.max_solutions" in changed["cost"]["advice"]


def test_figures_and_targets_in_words() -> None:
    words = {gate.name: (figure_text(gate.value, gate.unit), target_text(gate)) for gate in audited().gates}
    assert words == {
        "judge_expert_kappa": ("0.000", "> 0.8"),
        "positive_share": ("62.5 %", "70–80 %"),
        "easy_positive": ("60.0 %", "> 90 %"),
        "hard_positive": ("66.7 %", "60–70 %"),
        "mean_steps": ("3.00", "8–12"),
        "modalities": ("2", "≥ 3"),
        "leakage": ("0", "none"),
        "cost": ("$1.25", "≤ $3,000"),
    }
    assert figure_text(-0.25, "kappa") == "−0.250"
    assert figure_text(None, "kappa") == "–"


def test_required_gates_fail_with_the_figures_and_unknown_ones_do_not() -> None:
    with pytest.raises(GateError, match=r"5 of 8 quality gates fail: .*Right steps 62.5 %, wanted 70–80 %; .*"):
        require(audited().gates)
    nothing = audited(labels={}, solutions=[], review_queue=None)
    assert [gate.passed for gate in nothing.gates] == [None, None, None, None, None, False, True, True]
    assert "run judge" in nothing.gates[1].advice
    assert "run sample" in nothing.gates[4].advice
    require(gates_of(CONFIG.model_copy(update={"modalities": ()}), nothing))


def test_kappa_that_is_not_defined_is_unknown() -> None:
    alike = [labelled("s3", [1, None, None], "expert")]
    found = report(labels={"a": [to_arrow(Labels, JUDGE)], "b": [to_arrow(Labels, alike)]})
    assert found["gates"][0]["passed"] is None
    assert "call every shared step alike" in found["gates"][0]["advice"]


# The job


def made(root: Path, *names: str, words: tuple[str, ...] = ()) -> list[str]:
    """A run's folder with these tables; the words that name it."""
    arguments = [TINY, f"run={root}", *words]
    run = Run(load_recipe(arguments))
    rows: dict[str, Any] = {
        "questions": (QUESTIONS, "question_id"),
        "images": (IMAGES, "image_id"),
        "evidence": ([], "question_id"),
        "solutions": (SOLUTIONS, "question_id"),
        "judge_labels": (JUDGE, "question_id"),
        "monte_carlo_labels": ([], "question_id"),
        "expert_labels": (EXPERT, "question_id"),
        "review_queue": (QUEUE, "question_id"),
    }
    for name in names or tuple(rows):
        origin = Provenance(name=name, fingerprint=run.fingerprint(MAKER[name]), config={}, upstream={})
        write_rows(run.table(name), rows[name][0], origin, rows[name][1])
    return arguments


def test_the_job_runs_midway_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = made(tmp_path, "questions", "images", "solutions")
    (tmp_path / "api" / "gemini").mkdir(parents=True)
    ledger = {"epoch": 1, "spent": 2.0, "answers": 9, "possibly_paid": 0.5, "lost_calls": 1, "reserved": []}
    (tmp_path / "api" / "gemini" / "ledger.json").write_text(json.dumps(ledger))
    assert job.main(words) == 0
    shown = capsys.readouterr().out
    assert "not there yet: evidence, judge_labels" in shown
    found = json.loads((tmp_path / "dataset_report.json").read_text())
    assert found["missing"] == ["evidence", "judge_labels", "monte_carlo_labels", "expert_labels", "review_queue"]
    assert found["tables"]["solutions"]["rows"] == 3
    assert (found["cost"]["total"], list(found["cost"]["ledgers"])) == (2.5, ["gemini"])
    assert "possibly paid for 1 calls" in (tmp_path / "dataset_report.html").read_text()
    assert "Written before the run was complete" in (tmp_path / "dataset_report.html").read_text()


def test_trees_are_read_where_the_recipe_has_them(tmp_path: Path) -> None:
    words = made(tmp_path)
    assert job.main([*words, "without=[]"]) == 0
    found = json.loads((tmp_path / "dataset_report.json").read_text())
    assert found["missing"] == ["tree_solutions", "tree_labels"]
    run = Run(load_recipe([*words, "without=[]"]))
    for name, rows in (("trees", []), ("tree_solutions", GROWN), ("tree_labels", BY_TREE)):
        origin = Provenance(name=name, fingerprint=run.fingerprint(MAKER[name]), config={}, upstream={})
        write_rows(run.table(name), rows, origin, "question_id")
    for extra, sources in (((), ["judge", "expert"]), (("without=[]",), ["judge", "tree_search", "expert"])):
        assert job.main([*words, *extra]) == 0
        found = json.loads((tmp_path / "dataset_report.json").read_text())
        assert found["missing"] == []
        assert [row["source"] for row in found["balance"]] == sources
        assert ("tree_labels" in found["tables"]) == bool(extra)


def test_labels_count_while_they_are_made(tmp_path: Path) -> None:
    words = made(tmp_path, "questions", "images", "solutions")
    table = Run(load_recipe(words)).table("judge_labels")
    table.prepare()
    nested = pa.array([[asdict(row) for row in JUDGE[:2]]], pa.list_(pa.struct(list(table.schema))))
    table.write_part(pa.table({"question_id": ["q1"], "labels": nested}), "question_id", "labels")
    assert job.main(words) == 0
    found = json.loads((tmp_path / "dataset_report.json").read_text())
    assert found["missing"][1] == "judge_labels (1 questions so far)"
    (judge,) = found["balance"]
    assert (judge["right"], judge["wrong"]) == (3, 2)


def test_strict_ends_with_an_error_and_the_report_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = made(tmp_path)
    assert job.main(words) == 0
    (tmp_path / "dataset_report.html").unlink()
    assert job.main([*words, "--strict"]) == 1
    assert "quality gates fail" in capsys.readouterr().err
    assert (tmp_path / "dataset_report.html").is_file()
    assert job.main([*words, "gates=required"]) == 1
    lenient = ["min_kappa=-1", "positive_share=[0.0, 1.0]", "min_easy_positive=0", "mean_steps=[1, 4]", "modalities=[]"]
    assert job.main([*words, *lenient, "--strict"]) == 0


def test_the_step_makes_the_artifact_unless_required_gates_fail(tmp_path: Path) -> None:
    step = BY_NAME["audit"]
    run = Run(load_recipe(made(tmp_path)))
    job.run(Job(run, step))
    assert run.is_complete(step)
    (figures,) = (m.figures for m in run.manifests(step))
    assert (figures["positive_share"], figures["leakage"]) == (0.625, 0)
    for folder in (run.uri("dataset_report"), run.root):
        assert {"dataset_report.json", "dataset_report.html"} <= {p.name for p in Path(folder).iterdir()}
    strict = Run(load_recipe([TINY, f"run={tmp_path}", "audit.gates=required"]))
    assert strict.uri("dataset_report") != run.uri("dataset_report")
    page = tmp_path / "dataset_report.html"
    page.unlink()
    with pytest.raises(GateError):
        job.run(Job(strict, step))
    assert not strict.is_complete(step)
    assert page.is_file(), "what failed is to be read there"


def test_the_pipeline_ends_with_the_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = made(tmp_path)
    assert job.main(words) == 0
    run = Run(load_recipe(words))
    capsys.readouterr()
    pipeline.print_summary(run, [BY_NAME["audit"]], Console(width=120), 1.0)
    shown = capsys.readouterr().out
    assert "dataset: meets 4 of 8 quality gates" in shown
    assert "dataset_report.html" in shown


def test_streams_read_a_table_part_by_part(tmp_path: Path) -> None:
    run = Run(load_recipe(made(tmp_path)))
    parts = list(run.table("solutions").stream())
    assert pa.concat_tables(parts).sort_by("question_id")["question_id"].to_pylist() == ["q1", "q2", "q3"]
    assert list(run.table("evidence").stream()) == []
