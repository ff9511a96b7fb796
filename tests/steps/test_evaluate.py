"""The report's figures on a run of three questions worked out by hand, and on a larger made-up run."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from medmm_ray.config import ConfigError, build
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.records import Image, Labels, Question, ReviewItem, Scores, Solution, Solutions, StepLabel, to_arrow
from medmm_ray.stats.agreement import KappaFigure, PairAgreement
from medmm_ray.stats.balance import SourceBalance
from medmm_ray.stats.label_arrays import encode_labels
from medmm_ray.stats.targets import targets
from medmm_ray.steps.evaluate import EvaluateConfig, EvaluationReport, StepEntry, environment, evaluate
from medmm_ray.steps.evaluate.scored_questions import Sample, samples_by_question
from medmm_ray.steps.evaluate.steps import ReferenceLabels, RocCurve, reference_labels, step_figures
from tests.doubles.synthetic import run

QUESTION = Question(
    question_id="q1", source="phantom", split="test", modality="radiology", difficulty="easy", question="What is it?",
    options=["x", "y"], answer="A", answer_type="choice", image_ids=["im1"], dataset="vqa_rad",
)  # fmt: skip


def solution(ident: str, answer: str | None, num_steps: int = 2) -> Solution:
    steps = [f"step {i}" for i in range(num_steps)]
    return Solution(
        solution_id=ident, index=0, text="", steps=steps, answer=answer,
        correct=None if answer is None else answer == "A", finish_reason="stop", seed=0, text_sha="",
    )  # fmt: skip


def solutions(question_id: str, found: list[Solution], error: str | None = None) -> Solutions:
    return Solutions(question_id=question_id, policy="p", config_hash="c", num_requested=2,
                     solutions=found, error=error)  # fmt: skip


def score(ident: str, arm: str, text: list[float], image: list[float], error: str | None = None) -> Scores:
    return Scores(question_id=f"q{ident[1]}", solution_id=ident, model="m", arm=arm, text_log_odds=text,
                  image_log_odds=image, error=error)  # fmt: skip


def labels(ident: str, source: str, found: list[int | None], annotator: str = "a", error: str | None = None) -> Labels:
    return Labels(question_id=f"q{ident[1]}", solution_id=ident, source=source, annotator=annotator,
                  steps=[StepLabel(label=y) for y in found], cost=0.5, error=error)  # fmt: skip


def small() -> dict[str, Any]:
    """q1: the image turns the choice to the right answer; q2: no score at all; q3: no solutions; q4: a faulty row."""
    questions = [
        QUESTION,
        replace(QUESTION, question_id="q2", difficulty="hard", image_ids=["im2"], dataset="slake"),
        replace(QUESTION, question_id="q3", difficulty="hard", image_ids=[], dataset="slake", published_type="open"),
        replace(QUESTION, question_id="q4", error="no_answer: the options lack it"),
        replace(QUESTION, question_id="q5", split="train"),
    ]
    made = [
        solutions("q1", [solution("s1a", "A"), solution("s1b", "B")]),
        solutions("q2", [solution("s2a", "A"), solution("s2b", None)]),
        solutions("q3", [], "engine: died"),
        solutions("q5", [solution("s5a", "A")]),
    ]
    scores = [
        score("s1a", "text_only", [1.0, -1.0], [0, 0]),
        score("s1b", "text_only", [1.0, 1.0], [0, 0]),
        score("s1a", "multimodal", [1.0, -1.0], [1.0, 4.0]),
        score("s1b", "multimodal", [1.0, 1.0], [0.0, -5.0]),
        *(score(i, arm, [], [], "image_empty: 0 bytes") for i in ("s2a", "s2b") for arm in ("text_only", "multimodal")),
    ]
    image = Image(image_id="im1", uri="file.png", sha256="", perceptual_hash="", width=1, height=1, split="test",
                  modality="radiology", diagnosis="", annotation="")  # fmt: skip
    return {
        "questions": to_arrow(Question, questions),
        "images": to_arrow(Image, [image]),
        "solutions": to_arrow(Solutions, made),
        "scores": to_arrow(Scores, scores),
        "labels": [
            to_arrow(Labels, [labels("s1a", "judge", [1, 1]), labels("s1b", "judge", [1, 1]),
                              labels("s5a", "judge", [], error="refused: no")]),
            to_arrow(Labels, [labels("s1a", "phantom", [None, 1]), labels("s1b", "phantom", [1, 0])]),
            to_arrow(Labels, [labels("s5a", "expert", [1, 0])]),
        ],
    }  # fmt: skip


def evaluated(config: EvaluateConfig, **tables: Any) -> dict[str, Any]:
    """The report as report.json has it."""
    report = evaluate(config, **tables).report
    content = to_json(report)
    assert from_json(EvaluationReport, content) == report
    document: dict[str, Any] = json.loads(content)
    return document


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    steps = [StepEntry("sample", rows=4, seconds=1.5)]
    return evaluated(EvaluateConfig(ns=(1, 2, 64)), **small(), steps=steps, environment={"cpus": 2})


def test_accuracy_of_three_questions(report: dict[str, Any]) -> None:
    value = report["accuracy"]
    assert report["ns"] == [1, 2]
    assert value["one_sample"]["value"] == pytest.approx((0.5 + 0.5 + 0) / 3, abs=1e-6)
    assert value["oracle"]["2"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert value["majority"]["2"]["value"] == pytest.approx(2 / 3, abs=1e-6)  # q1: a tie, the first; q2: one empty
    assert value["best_of_n"]["text_only"]["2"]["value"] == 0.0
    assert value["best_of_n"]["multimodal"]["2"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert value["best_of_n"]["multimodal"]["1"]["value"] == pytest.approx(0.5 / 3, abs=1e-6)
    assert value["sc_rm"]["multimodal"]["2"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert value["gain"]["best_of_n"]["2"] == {"value": pytest.approx(1 / 3, abs=1e-6), "low": 0.0, "high": 1.0}
    assert report["decoders"]["multimodal"]["best_of_n"] == value["best_of_n"]["multimodal"]["2"]
    assert report["decoders"]["text_only"]["majority"] == value["majority"]["2"]


def test_nothing_is_dropped_without_a_number(report: dict[str, Any]) -> None:
    assert report["counts"] == {
        "split": "test",
        "excluded": {"no_answer": 1},
        "questions": 3,
        "clusters": 3,
        "solutions": 4,
        "without_answer": 1,
        "questions_without_solutions": 1,
        "questions_with_fewer_than_n": 1,
        "scored": {"text_only": 2, "multimodal": 2},
        "unscored": {"text_only": 2, "multimodal": 2},
        "questions_without_scores": {"text_only": 2, "multimodal": 2},
        "errors": {
            "solutions": {"engine": 1},
            "scores": {"image_empty": 4},
            "judge_labels": {"refused": 1},
            "phantom_labels": {},
            "expert_labels": {},
        },
    }


def test_steps_take_their_truth_from_the_preferred_source(report: dict[str, Any]) -> None:
    step = report["step"]["multimodal"]
    assert report["reference"] == "phantom"
    assert (step["steps"], step["right"], step["wrong"], step["solutions"]) == (3, 2, 1, 2)
    assert step["auroc"] == 1.0
    assert step["macro_f1"] == 1.0
    assert step["processbench"] == {"erroneous": 1.0, "correct": 1.0, "f1": 1.0}
    assert report["step"]["text_only"]["auroc"] == 0.25
    assert report["largest_text_difference"] == 0.0


def test_what_the_labels_are_worth_comes_from_the_dataset_report() -> None:
    kappa = KappaFigure(value=0.7, low=0.6, high=0.8, equal=0.9, count=30, questions=9, effective=20.0)
    pair = PairAgreement(
        first="judge", second="expert", weighted=True, of="step", outside_queue=0, kappa={"all": {"all": kappa}},
        first_error={"all": {}}, looked_at=0,
    )  # fmt: skip
    worth = SourceBalance(
        source="judge", solutions=3, right=2, wrong=1, neutral=0, unlabelled=0, failed=0, unknown=0, misfit=0,
        share={"all": {}}, weighted=False, cost=0.5,
    )  # fmt: skip
    report = evaluated(EvaluateConfig(), **small(), balances=[worth], pairs=[pair])
    assert [(label["source"], label["right"], label["wrong"]) for label in report["labels"]] == [("judge", 2, 1)]
    assert report["agreement"] == {
        "judge_expert": {
            "first": "judge", "second": "expert", "weighted": True, "kappa": 0.7, "low": 0.6, "high": 0.8,
            "agreement": 0.9, "steps": 30, "first_error": None, "solutions": 0,
        }
    }  # fmt: skip
    assert {g["name"]: g["passed"] for g in report["gates"]}["judge_expert_kappa"] is False


def test_groups_gates_and_what_the_run_says(report: dict[str, Any]) -> None:
    assert list(report["by_difficulty"]) == ["easy", "hard"]
    assert report["by_difficulty"]["easy"]["questions"] == 1
    assert report["by_difficulty"]["easy"]["best_of_n"]["multimodal"]["value"] == 1.0
    assert report["by_difficulty"]["hard"]["one_sample"]["value"] == 0.25
    assert report["by_question"] == {}  # one text only
    assert {name: row["questions"] for name, row in report["by_dataset"].items()} == {"slake": 2, "vqa_rad": 1}
    assert report["by_dataset"]["vqa_rad"]["one_sample"] == {
        "value": 0.5,
        "low": None,
        "high": None,
    }  # of one question there is no interval
    assert {name: row["questions"] for name, row in report["by_published_type"].items()} == {"open": 1}
    assert {name: row["questions"] for name, row in report["by_answer_type"].items()} == {"choice": 3}
    gates = {gate["name"]: gate["passed"] for gate in report["gates"]}
    assert gates["judge_expert_kappa"] is None
    assert gates["multimodal_gain"] is True
    assert gates["text_unchanged_without_image"] is True
    assert report["steps"] == [{"name": "sample", "rows": 4, "seconds": 1.5}]
    assert report["environment"] == {"cpus": 2}


def test_questions_of_an_image_or_a_group_are_resampled_together() -> None:
    """q1 and q2 are about one image, q2 and q3 of one patient: one cluster, and no interval."""
    tables = small()
    rows = tables["questions"].to_pylist()
    rows[1] |= {"image_ids": ["im1", "im2"], "group": "vqa_rad/patient 7"}
    rows[2] |= {"group": "vqa_rad/patient 7"}
    report = evaluated(EvaluateConfig(), **{**tables, "questions": to_arrow(Question, rows)})
    assert (report["counts"]["questions"], report["counts"]["clusters"]) == (3, 1)
    assert report["accuracy"]["one_sample"] == {"value": pytest.approx(1 / 3, abs=1e-6), "low": None, "high": None}
    rows[2] |= {"group": "slake/patient 7"}
    apart = evaluated(EvaluateConfig(), **{**tables, "questions": to_arrow(Question, rows)})
    assert apart["counts"]["clusters"] == 2
    assert apart["accuracy"]["one_sample"]["low"] < 1 / 3 < apart["accuracy"]["one_sample"]["high"]


def test_an_example_shows_both_choices_and_exact_parts(report: dict[str, Any]) -> None:
    (example,) = report["examples"]
    assert example["kind"] == "rescued"
    assert [s["roles"] for s in example["solutions"]] == [["chosen_multimodal"], ["chosen_text_only", "best_wrong"]]
    assert example["images"] == [{"image_id": "im1", "uri": "file.png", "diagnosis": ""}]
    first, second = example["solutions"][0]["steps"]
    assert first == {
        "text": "step 0", "probability": 0.880797, "text_log_odds": 1.0, "image_log_odds": 1.0, "truth": None,
    }  # fmt: skip
    assert second["truth"] == 1


def test_each_label_source_and_each_data_set_has_its_step_figures(report: dict[str, Any]) -> None:
    by_source = report["step_by_source"]["multimodal"]
    assert {name: (row["steps"], row["auroc"]) for name, row in by_source.items()} == {
        "judge": (4, None),  # which calls all steps right
        "phantom": (3, 1.0),
    }
    assert report["step_by_source"]["text_only"]["phantom"]["auroc"] == 0.25
    (of_set,) = report["step_by_dataset"]["text_only"].items()
    assert of_set[0] == "vqa_rad"
    assert list(of_set[1]) == ["all"]
    assert report["step"]["text_only"]["confusion"] == {
        "right_called_right": 1.0, "right_called_wrong": 1.0, "wrong_called_right": 1.0, "wrong_called_wrong": 0.0,
    }  # fmt: skip


def test_kinds_of_errors_have_figures_of_their_own() -> None:
    """PRMBench's way: the same steps, once for all and once for their kind of error."""
    tables = small()
    rows = tables["questions"].to_pylist()
    rows[0] |= {"published_type": "circular"}
    report = evaluated(EvaluateConfig(), **{**tables, "questions": to_arrow(Question, rows)})
    table = report["step_by_dataset"]["multimodal"]["vqa_rad"]
    assert list(table) == ["all", "circular"]
    assert table["circular"] == table["all"]
    assert table["circular"]["macro_f1"] == 1.0


def test_the_answers_that_were_chosen_beside_the_right_ones(report: dict[str, Any]) -> None:
    assert report["answers"] == {"choice": {"A": {"A": 1, "none": 2}}}  # q2 and q3 have no score


def test_the_step_on_which_the_scorer_and_the_labels_differ_most() -> None:
    """s1a's second step, right, has log-odds -1 by the text; s1b's, wrong, +1: as sure, and the first comes first."""
    tables = small()
    text_only = tables["scores"].filter(pc.equal(tables["scores"]["arm"], "text_only"))
    report = evaluated(EvaluateConfig(), **{**tables, "scores": text_only})
    (case,) = report["disagreements"]
    assert (case["kind"], case["question_id"], case["step"]) == ("underrated", "q1", 1)
    assert [solution["solution_id"] for solution in case["solutions"]] == ["s1a"]
    assert case["solutions"][0]["steps"][1]["truth"] == 1
    assert case["images"] == [{"image_id": "im1", "uri": "file.png", "diagnosis": ""}]
    expert = to_arrow(Labels, [labels("s1b", "expert", [0, 1])])
    by_expert = evaluated(EvaluateConfig(), **{**tables, "scores": text_only, "labels": [expert, *tables["labels"]]})
    (case,) = by_expert["disagreements"]  # the expert's word, though the reference is the phantoms' truth
    assert (case["kind"], case["step"], by_expert["reference"]) == ("overrated", 0, "phantom")
    assert evaluated(EvaluateConfig(num_disagreements=0), **tables).get("disagreements") is None


def test_a_temperature_is_fitted_on_validation_questions_alone() -> None:
    """Of the validation steps, all of log-odds 2, two thirds are right: T = 2 / log 2, whatever the test steps say."""
    tables = small()
    questions = [*tables["questions"].to_pylist(), asdict(replace(QUESTION, question_id="q6", split="validation"))]
    solved = [*tables["solutions"].to_pylist(), asdict(solutions("q6", [solution("s6a", "A", num_steps=3)]))]
    scores = [*tables["scores"].to_pylist(), asdict(score("s6a", "multimodal", [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]))]
    phantom = to_arrow(Labels, [labels("s6a", "phantom", [1, 1, 0])])
    report = evaluated(
        EvaluateConfig(),
        questions=to_arrow(Question, questions),
        images=tables["images"],
        solutions=to_arrow(Solutions, solved),
        scores=to_arrow(Scores, scores),
        labels=[*tables["labels"], phantom],
    )
    assert list(report["temperature"]) == ["multimodal"]
    assert report["temperature"]["multimodal"]["temperature"] == pytest.approx(2 / math.log(2), rel=1e-4)
    assert report["temperature"]["multimodal"]["ece_before"] == report["step"]["multimodal"]["ece"]
    assert report["counts"]["questions"] == 3  # the validation question is none of them
    assert report["step"]["multimodal"]["steps"] == 3


def test_votes_over_drawn_subsets_state_their_error() -> None:
    """Of 12 samples 495 subsets of 4: 20 are drawn. Drawn anew with other seeds, the mean spreads as stated."""
    rng = np.random.default_rng(0)
    questions, solved = [], []
    for number in range(12):
        question_id = f"q{number:02d}"
        questions.append(replace(QUESTION, question_id=question_id, image_ids=[]))
        answers = rng.choice(["A", "B"], 12)
        made = [solution(f"{question_id}-{place}", answer) for place, answer in enumerate(answers.tolist())]
        solved.append(Solutions(question_id=question_id, policy="p", config_hash="c", num_requested=12, solutions=made))
    tables = {
        "questions": to_arrow(Question, questions), "images": to_arrow(Image, []), "labels": [],
        "solutions": to_arrow(Solutions, solved), "scores": to_arrow(Scores, []),
    }  # fmt: skip
    config = EvaluateConfig(ns=(1, 4, 12), num_subsets=20, bootstrap_samples=1)
    reports = [evaluate(config.model_copy(update={"seed": seed}), **tables).report for seed in range(40)]
    means = [report.accuracy.majority["4"].value for report in reports]
    stated = [report.accuracy.subset_error["4"] for report in reports]
    assert np.std(means, ddof=1) == pytest.approx(np.mean(stated), rel=0.25)
    assert (reports[0].accuracy.subset_error["1"], reports[0].accuracy.subset_error["12"]) == (0.0, 0.0)


def test_what_the_run_cost_beside_what_it_is_worth() -> None:
    """Best of 2 by the image answers a third, one sample a third too: 0 points. Where nothing was spent is no rate."""
    steps = [
        StepEntry("judge", rows=1, seconds=1.0, cost=1.5),
        StepEntry("score", rows=1, seconds=1.0, gpu_hours=2.0, gpu_dollars=6.0),
    ]
    report = evaluated(EvaluateConfig(), **small(), steps=steps)
    gain = 100 * (report["accuracy"]["best_of_n"]["multimodal"]["2"]["value"] - 1 / 3)
    assert (report["cost"]["dollars"], report["cost"]["gpu_hours"]) == (7.5, 2.0)
    assert report["cost"]["points"] == pytest.approx(gain, abs=1e-3)
    assert report["cost"]["points_per_gpu_hour"] == pytest.approx(gain / 2, abs=1e-3)
    free = evaluated(EvaluateConfig(), **small())["cost"]
    assert (free["points_per_100_dollars"], free["points_per_gpu_hour"]) == (None, None)


def test_a_split_without_solutions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no question of split 'validation' has a solution \(0 rows"):
        evaluate(EvaluateConfig(split="validation"), **small())


def test_a_score_of_another_number_of_steps_is_refused() -> None:
    tables = small()
    wrong = to_arrow(Scores, [score("s1a", "text_only", [1.0], [0.0])])
    with pytest.raises(ValueError, match="solution s1a, arm text_only: 1 text and 1 image scores for 2 steps"):
        evaluate(EvaluateConfig(), **{**tables, "scores": wrong})


def test_two_annotators_fill_each_other_and_must_agree_on_the_steps() -> None:
    tables = small()
    readers = [labels("s1a", "expert", [None, 1], "reader b"), labels("s1a", "expert", [0, None], "reader c"),
               labels("s1a", "expert", [None, None], "reader a")]  # fmt: skip
    report = evaluated(EvaluateConfig(), **{**tables, "labels": [to_arrow(Labels, readers)]})
    assert report["reference"] == "expert"
    assert (report["step"]["text_only"]["right"], report["step"]["text_only"]["wrong"]) == (1, 1)
    readers.append(labels("s1a", "expert", [1], "reader d"))
    with pytest.raises(ValueError, match="1 expert label rows are of another number of steps than their solution"):
        evaluate(EvaluateConfig(), **{**tables, "labels": [to_arrow(Labels, readers)]})


def test_readers_are_heard_by_majority_and_a_tie_is_no_truth() -> None:
    rows = [labels("s1a", "expert", [0, 0], "a"), labels("s1a", "expert", [1, 1], "b"),
            labels("s1a", "expert", [1, None], "c")]  # fmt: skip
    found = reference_labels(("expert",), small()["solutions"], encode_labels(to_arrow(Labels, rows)))
    assert found == ReferenceLabels("expert", {"s1a": [1, None]})
    assert targets("hybrid", rows, 2, "keep") == [1.0, None]


def queue(*steps: tuple[str, int, float]) -> pa.Table:
    return to_arrow(ReviewItem, [ReviewItem(question_id="q1", solution_id=s, step_index=i, stratum="x",
                                            inclusion_probability=p) for s, i, p in steps])  # fmt: skip


def test_an_experts_steps_weigh_what_their_chance_in_the_queue_was() -> None:
    rows = to_arrow(Labels, [labels("s1a", "expert", [1, 1]), labels("s1b", "expert", [0, 0])])
    drawn = queue(("s1a", 0, 0.5), ("s1a", 1, 0.1), ("s1b", 1, 1.0))
    found = reference_labels(("phantom", "expert"), small()["solutions"], encode_labels(rows), drawn)
    assert found == ReferenceLabels(
        "expert", {"s1a": [1, 1], "s1b": [None, 0]}, {"s1a": [2.0, 10.0], "s1b": [0.0, 1.0]}
    )
    report = evaluated(EvaluateConfig(), **{**small(), "labels": [rows]}, review_queue=drawn)
    step = report["step"]["text_only"]  # log-odds 1, -1 and 1: of right, right and wrong, with weights 2, 10 and 1
    assert (step["steps"], step["right"], step["wrong"], step["weighted"]) == (3, 2, 1, True)
    assert step["effective"] == round(13**2 / (4 + 100 + 1), 1)
    chance = (3 * 12 + 10 * 1) / 13**2
    assert step["kappa"] == pytest.approx((2 / 13 - chance) / (1 - chance))
    assert step["auroc"] == pytest.approx(1 / 12)  # half of the tie of weight 2
    p = 1 / (1 + math.exp(-1))
    assert step["ece"] == pytest.approx((3 * abs(p - 2 / 3) + 10 * abs(1 - p - 1)) / 13)
    assert step["macro_f1"] == pytest.approx((2 * 2 / (12 + 3) + 0) / 2)
    assert step["first_error"] == 0.0  # of s1a, which alone was read whole
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["ece"]["detail"] == "3 steps labelled by source 'expert', weighted; worth 2 equal ones"
    whole = evaluated(EvaluateConfig(), **{**small(), "labels": [rows]}, review_queue=queue())  # imported: no queue
    assert (whole["step"]["text_only"]["steps"], whole["step"]["text_only"]["weighted"]) == (4, False)


def test_a_model_is_not_held_to_the_judge() -> None:
    report = evaluated(EvaluateConfig(), **{**small(), "labels": small()["labels"][:1]})
    assert (report["reference"], report["step"]["multimodal"]["steps"]) == ("judge", 4)
    assert report["step"]["multimodal"]["ece"] is not None
    gates = {gate["name"]: gate for gate in report["gates"]}
    for name in ("model_reference_kappa", "ece"):
        assert (gates[name]["value"], gates[name]["passed"]) == (None, None)
        assert gates[name]["detail"] == "not measured: no expert's label and no known truth in this split"
    known = {gate["name"]: gate for gate in evaluated(EvaluateConfig(), **small())["gates"]}
    assert (known["ece"]["passed"], known["model_reference_kappa"]["passed"]) == (False, True)


def p(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))


def test_weights_of_one_change_no_figure() -> None:
    odds = {"s": np.array([2.0, -1.0, 0.5, -1.0])}
    plain, even = (
        ReferenceLabels("phantom", {"s": [1, 1, 0, 0]}),
        ReferenceLabels("expert", {"s": [1, 1, 0, 0]}, {"s": [4.0] * 4}),
    )
    found = [step_figures(odds, truth, 0.5, 10) for truth in (plain, even)]
    for own in found:  # of the pairs of a right and a wrong step 2 in order, 1 tied, 1 not; 2 of 4 called rightly
        assert (own.auroc, own.macro_f1, own.kappa, own.first_error) == (0.625, 0.5, 0.0, 0.0)
        assert own.ece == pytest.approx((abs(p(2.0) - 1) + abs(p(0.5) - 0) + 2 * abs(p(-1.0) - 0.5)) / 4)
        assert own.roc == RocCurve(false=[0.0, 0.0, 0.5, 1.0], true=[0.0, 0.5, 0.5, 1.0])


def test_without_scores_or_labels_there_is_still_a_report() -> None:
    tables = {**small(), "scores": to_arrow(Scores, []), "labels": []}
    report = evaluated(EvaluateConfig(), **tables)
    assert report["arms"] == []
    assert report["examples"] == []
    assert report["reference"] == ""
    assert report["accuracy"]["majority"]["2"]["value"] == pytest.approx(2 / 3, abs=1e-6)


def test_a_made_up_run(tmp_path: Path) -> None:
    tables = run(tmp_path)
    report = evaluated(EvaluateConfig(), **tables)
    assert report["ns"] == [1, 2, 4, 8, 16]
    assert report["n"] == 16
    best = {arm: report["accuracy"]["best_of_n"][arm]["16"] for arm in report["arms"]}
    assert report["arms"] == ["text_only", "multimodal", "shuffled_image"]
    assert best["multimodal"]["low"] > best["text_only"]["high"]
    assert abs(best["shuffled_image"]["value"] - report["accuracy"]["one_sample"]["value"]) < 0.2
    assert report["step"]["multimodal"]["auroc"] > 0.9 > 0.6 > report["step"]["text_only"]["auroc"]
    assert len(report["by_question"]) == 3
    assert len(report["examples"]) == 6
    assert {e["kind"] for e in report["examples"]} >= {"rescued", "agreed"}
    shuffled = {
        name: t.take(list(reversed(range(t.num_rows))))
        for name, t in tables.items()
        if name not in ("labels", "balances", "pairs")
    }
    worth = {name: tables[name] for name in ("balances", "pairs")}
    again = evaluated(EvaluateConfig(), **shuffled, labels=list(reversed(tables["labels"])), **worth)
    assert json.dumps(again, sort_keys=True) == json.dumps(report, sort_keys=True)


def test_samples_of_a_sliced_and_of_an_empty_table() -> None:
    table = small()["solutions"]
    assert samples_by_question(table.slice(1, 2)) == {
        "q2": [Sample("s2a", "A", True, 2), Sample("s2b", None, None, 2)],
        "q3": [],
    }
    assert samples_by_question(table.slice(0, 0)) == {}
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(3, 1)])
    assert [len(samples) for samples in samples_by_question(chunked).values()] == [2, 1]


def test_the_environment_names_its_packages() -> None:
    assert environment()["packages"]["python"].startswith("3.")


@pytest.mark.parametrize("part", ["text_log_odds", "image_log_odds"])
def test_scores_that_are_no_numbers_are_failed_rows_and_change_nothing_else(part: str) -> None:
    tables = small()
    rows = tables["scores"].to_pylist()
    broken = {**rows[3], part: [1.0, math.nan]}  # the multimodal arm's scores of s1b
    report = evaluated(
        EvaluateConfig(ns=(1, 2)), **{**tables, "scores": to_arrow(Scores, [*rows[:3], broken, *rows[4:]])}
    )
    assert report["counts"]["errors"]["scores"] == {"image_empty": 4, "not_finite": 1}
    assert report["counts"]["scored"] == {"text_only": 2, "multimodal": 1}
    assert report["counts"]["unscored"] == {"text_only": 2, "multimodal": 3}
    best = report["accuracy"]["best_of_n"]
    assert best["multimodal"]["2"]["value"] == pytest.approx(1 / 3, abs=1e-6)  # s1a, alone with a score
    assert best["multimodal"]["1"]["value"] == pytest.approx(0.5 / 3, abs=1e-6)
    assert (report["step"]["multimodal"]["steps"], report["step"]["text_only"]["steps"]) == (1, 3)
    assert report["largest_text_difference"] == 0.0


def test_votes_over_open_answers_are_those_of_grading() -> None:
    tables = small()
    question = replace(QUESTION, options=[], answer="pleural effusion", answer_type="open")
    answers = ["pneumonia", "the pleural effusion", "pneumonia", "Pleural effusions", "a pleural effusion"]
    made = [
        replace(solution(f"s1{i}", None), answer=a, correct="effusion" in a)
        for i, a in zip("abcde", answers, strict=True)
    ]
    report = evaluated(
        EvaluateConfig(ns=(5,)),
        **{**tables, "questions": to_arrow(Question, [question]), "labels": [], "scores": to_arrow(Scores, []),
           "solutions": to_arrow(Solutions, [replace(solutions("q1", made), num_requested=5)])},
    )  # fmt: skip
    assert report["accuracy"]["majority"]["5"]["value"] == 1.0


def test_config_is_strict() -> None:
    with pytest.raises(ConfigError, match="'aggregate'"):
        build(EvaluateConfig, {"aggregate": "median"}, "recipe")
    bounds: dict[str, Any] = {
        "threshold": 1.0, "ns": [0], "bootstrap_samples": 0, "calibration_bins": 0, "num_subsets": 0,
    }  # fmt: skip
    for name, value in [*bounds.items(), ("threshold", 0.0), ("ns", [])]:
        with pytest.raises(ConfigError, match=f"'{name}"):
            build(EvaluateConfig, {name: value}, "recipe")


def test_the_adjudicator_has_the_last_word_on_the_steps_that_he_decided() -> None:
    rows = [labels("s1a", "expert", [1, 0], "aaron"), labels("s1a", "expert", [None, 1], "adjudicator"),
            labels("s1a", "expert", [None, 0], "ben")]  # fmt: skip
    assert reference_labels(("expert",), small()["solutions"], encode_labels(to_arrow(Labels, rows))).labels == {
        "s1a": [1, 1]
    }
