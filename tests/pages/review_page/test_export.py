"""Verdicts become labels and question reviews; a growing set of them becomes tables that are written once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.graph import BY_NAME
from jobs.review_page import export, item_views
from jobs.step import Run, load_recipe, run_step
from medmm_ray.data.records import Labels, Question, QuestionReview, ReviewItem, StepLabel, from_dict
from medmm_ray.data.tables import Table, TableError
from medmm_ray.pages.review_page.export import export_verdicts, read_export, step_label, step_labels
from medmm_ray.pages.review_page.item_views import ItemViews
from medmm_ray.pages.review_page.verdicts import Verdict, VerdictLog
from medmm_ray.stats.targets import AnswerOutcome, hybrid
from tests.pages.review_page.phantom_run import RECIPE, make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, num_questions=3)


def say(run: Run, what: str = "steps") -> VerdictLog:
    """Two readers' and an adjudicator's verdicts on the queue's items, in the log."""
    shown = item_views(run).by_id
    log = VerdictLog(f"{run.root}/reader_verdicts/{what}")
    log.claim()
    numbers: dict[str, int] = {}

    def append(reader: str, item_id: str, verdict: str, **more: Any) -> None:
        numbers[reader] = numbers.get(reader, 0) + 1
        seen = more.pop("seen", shown[item_id].item.content_hash)
        log.append(
            Verdict(reader=reader, number=numbers[reader], item_id=item_id, seen=seen, verdict=verdict, **more)
        )  # fmt: skip

    if what == "steps":
        append("anna", "s0-0/1", "right", seconds=60.0)
        append("anna", "s0-0/2", "wrong", faults=["logical", "image_grounded"], feedback="The other side.")
        append("anna", "s1-0/1", "neutral")
        append("anna", "s1-0/2", "unsure", feedback="Too small.")
        append("anna", "s2-0/1", "right", seen="another text")
        append("ben", "s0-0/1", "right")
        append("ben", "s0-0/2", "right")
        append("cora", "s0-0/2", "right", adjudicates=True)
    else:
        append("anna", "q0", "keep", answer_right=True, difficulty="easy")
        append("anna", "q1", "drop", answer_right=False, feedback="Two options hold.")
        append("ben", "q1", "unsure")
        append("cora", "q1", "drop", adjudicates=True)
    return log


def test_what_a_verdict_is_as_a_label() -> None:
    def label(verdict: str, **more: Any) -> StepLabel:
        return step_label(Verdict(reader="r", number=1, item_id="i", seen="x", verdict=verdict, **more))

    assert label("right") == StepLabel(label=1, confidence="high", logical=True, medical=True, image_grounded=True)
    assert label("wrong") == StepLabel(label=0, confidence="high")
    assert label("wrong", faults=["medical"], feedback="No.") == StepLabel(
        label=0, confidence="high", logical=True, medical=False, image_grounded=True, reason="No."
    )
    assert label("neutral") == StepLabel(confidence="high", reason="nothing to check")
    assert label("unsure", feedback="Too dark.") == StepLabel()  # else it would train as a neutral step


def test_labels_of_readers_and_adjudicator_lie_side_by_side(run: Run) -> None:
    log = say(run)
    queue = run.table("review_queue").to_arrow().to_pylist()
    items = [from_dict(ReviewItem, row) for row in queue]
    tables = run.table("questions").to_arrow(), run.table("solutions").to_arrow()
    rows, figures = step_labels(log.read(), items, *tables)
    found = {(row.solution_id, row.annotator): [step.label for step in row.steps] for row in rows}
    num_steps = {row.solution_id: len(row.steps) for row in rows}
    rest, rest_1 = [None] * (num_steps["s0-0"] - 3), [None] * num_steps["s1-0"]
    assert found == {
        ("s0-0", "anna"): [None, 1, 0, *rest],
        ("s0-0", "ben"): [None, 1, 1, *rest],
        ("s0-0", "adjudicator"): [None, None, 1, *rest],
        ("s1-0", "anna"): rest_1,
    }
    assert figures == {
        "queue": 6, "read": 4, "read_twice": 2, "adjudicated": 1, "unsure": 1, "left_out": 1, "readers": 2,
        "verdicts": 7, "minutes": 1.0, "kappa_readers": 0.0, "kappa_readers_steps": 2,
    }  # fmt: skip
    # Of the adjudicated solution the other step keeps its readers' word; a neutral step trains as right.
    assert hybrid([row for row in rows if row.solution_id == "s0-0"], 3 + len(rest), AnswerOutcome(None, None))[:3] == [
        None,
        1.0,
        1.0,
    ]
    assert hybrid([row for row in rows if row.solution_id == "s1-0"], len(rest_1), AnswerOutcome(None, None))[:3] == [
        None,
        1.0,
        None,
    ]


def test_the_agreement_of_readers_is_weighted_and_has_an_interval_by_question(run: Run) -> None:
    shown = item_views(run).by_id
    says = {"s0-0/1": ("right", "right"), "s0-0/2": ("wrong", "right"), "s1-0/1": ("wrong", "wrong"),
            "s1-0/2": ("right", "right"), "s2-0/1": ("wrong", "wrong"), "s2-0/2": ("unsure", "right")}  # fmt: skip
    verdicts = [
        Verdict(reader=reader, number=number, item_id=item_id, seen=shown[item_id].item.content_hash, verdict=word)
        for number, (item_id, words) in enumerate(says.items(), 1)
        for reader, word in zip(("anna", "ben"), words, strict=True)
    ]
    queue = [from_dict(ReviewItem, row) for row in run.table("review_queue").to_arrow().to_pylist()]
    seldom = [replace(item, inclusion_probability=0.1 if item.step_index == 2 else 1.0) for item in queue]
    tables = run.table("questions").to_arrow(), run.table("solutions").to_arrow()
    plain, weighted = (step_labels(verdicts, items, *tables)[1] for items in (queue, seldom))
    # Weights 1, 10, 1, 10, 1: both right 11, both wrong 2, differ 10; anna calls 11 right, ben 21.
    chance = (11 * 21 + 12 * 2) / 23**2
    assert weighted["kappa_readers"] == pytest.approx((13 / 23 - chance) / (1 - chance), abs=1e-6)
    assert plain["kappa_readers"] == pytest.approx((4 / 5 - 12 / 25) / (1 - 12 / 25), abs=1e-6)
    assert weighted["kappa_readers_steps"] == 5
    assert weighted["kappa_readers_low"] < weighted["kappa_readers"] < weighted["kappa_readers_high"] == 1.0
    alike = [replace(verdict, verdict="right") for verdict in verdicts]
    assert not [name for name in step_labels(alike, queue, *tables)[1] if name.startswith("kappa")]


def test_an_export_is_named_by_what_it_holds(run: Run) -> None:
    log = say(run)
    name, number = export_verdicts(log)
    assert (export_verdicts(log), number) == ((name, 8), 8)
    assert read_export(log.uri, name) == log.read()
    log.append(Verdict(reader="ben", number=3, item_id="s2-0/1", seen="x", verdict="right"))
    later, number = export_verdicts(log)
    assert (later != name, number) == (True, 9)
    assert len(read_export(log.uri, name)) == 8
    path = Path(log.path) / "exports" / f"{name}.jsonl"
    path.write_text(path.read_text().replace('"unsure"', '"right"'))
    with pytest.raises(TableError, match="is not what was exported"):
        read_export(log.uri, name)
    with pytest.raises(TableError, match="--export writes an export"):
        read_export(log.uri, "0123")


def test_the_review_step_takes_an_export_and_its_fingerprint_says_which(run: Run) -> None:
    say(run)
    told = export(run)
    name = export_verdicts(VerdictLog(f"{run.root}/reader_verdicts/steps"))[0]
    assert f"review.verdicts={name}" in told
    words = [f"run={run.recipe.run}", "review.expert=readers", f"review.verdicts={name}", "review.review_steps=1000"]
    taken = Run(load_recipe([RECIPE, *words]))  # so many steps that the queue, which is drawn anew, has all
    step = BY_NAME["review"]
    run_step(taken, step)
    rows = [from_dict(Labels, row) for row in taken.table("expert_labels").to_arrow().to_pylist()]
    assert {(row.solution_id, row.source, row.annotator) for row in rows} == {
        ("s0-0", "expert", "anna"),
        ("s0-0", "expert", "ben"),
        ("s0-0", "expert", "adjudicator"),
        ("s1-0", "expert", "anna"),
    }
    manifest = taken.table("expert_labels").manifest()
    assert (manifest.config["verdicts"], manifest.figures["read"]) == (name, 4)
    assert taken.fingerprint(step) != run.fingerprint(step)
    assert taken.fingerprint(BY_NAME["train_text_prm"]) != run.fingerprint(BY_NAME["train_text_prm"])


def test_readers_need_an_export_and_only_they_have_one() -> None:
    for words in (["review.expert=readers"], ["review.expert=none", "review.verdicts=ab"]):
        with pytest.raises(ValueError, match="readers need an export"):
            load_recipe([RECIPE, *words])


def test_questions_go_in_and_their_reviews_come_out(run: Run) -> None:
    given = Run(run.recipe.model_copy(update={"review_page": run.recipe.review_page.model_copy(
        update={"what": "questions", "questions": run.uri("questions")})}))  # fmt: skip
    log = say(given, "questions")
    told = export(given)
    name = export_verdicts(log)[0]
    assert told.startswith(f"4 verdicts are in the export {name}, 4 reviews in ")
    table = Table(f"{run.root}/question_reviews/{name}", QuestionReview)
    found = {(r["question_id"], r["annotator"]): r for r in table.to_arrow().to_pylist()}
    assert {key: (r["keep"], r["answer_right"], r["difficulty"], r["comment"]) for key, r in found.items()} == {
        ("q0", "anna"): (True, True, "easy", ""),
        ("q1", "anna"): (False, False, None, "Two options hold."),
        ("q1", "ben"): (None, None, None, ""),
        ("q1", "adjudicator"): (False, None, None, ""),
    }
    assert table.manifest().upstream == {"questions": run.table("questions").manifest().fingerprint}


def test_a_case_has_what_the_judge_had_and_nothing_of_what_was_said(run: Run) -> None:
    views: ItemViews = item_views(run)
    assert list(views.by_id) == ["s0-0/1", "s0-0/2", "s1-0/1", "s1-0/2", "s2-0/1", "s2-0/2"]
    case = views.by_id["s1-0/2"]
    [question] = [r for r in run.table("questions").to_arrow().to_pylist() if r["question_id"] == "q1"]
    assert (case.question, case.options, case.step_index) == (question["question"], question["options"], 2)
    references = run.recipe.judge.num_references
    assert [p.image_id for p in case.pictures] == ["im1", *(f"im{3 + n}" for n in range(references))]
    assert [p.role for p in case.pictures] == ["query", *["reference"] * references]
    assert len(case.documents) == min(4, run.recipe.judge.num_documents)
    assert (case.answer, case.difficulty) == (None, None)
    assert set(views.image_uris) == {p.image_id for s in views.by_id.values() for p in s.pictures}
    assert views.following["s0-0/1"] is views.by_id["s0-0/2"]
    assert "s2-0/2" not in views.following
    before, after = views.by_id["s0-0/1"].item, views.by_id["s0-0/2"].item
    assert before.content_hash != after.content_hash


def test_another_answer_makes_another_question_to_review(run: Run) -> None:
    page = run.recipe.review_page.model_copy(update={"what": "questions"})
    given = Run(run.recipe.model_copy(update={"review_page": page}))
    first = item_views(given).by_id["q0"]
    assert first.answer in [*"ABCD"]
    assert (first.steps, first.step_index, first.documents, len(first.pictures)) == ([], None, [], 1)
    rows = [from_dict(Question, row) for row in run.table("questions").to_arrow().to_pylist()]
    other = [replace(row, answer="ABCD"[("ABCD".index(row.answer) + 1) % 4]) for row in rows]
    changed = make_run(Path(run.root) / "other", num_questions=3, questions=other)
    changed = Run(changed.recipe.model_copy(update={"review_page": page}))
    assert item_views(changed).by_id["q0"].item.content_hash != first.item.content_hash
