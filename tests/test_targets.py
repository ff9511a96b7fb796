"""Label policies: exact targets from label rows."""

import pyarrow as pa
import pytest

from medmm_ray.records import Labels, StepLabel
from medmm_ray.targets import Target, accuracy_of, labels_by_solution, targets
from medmm_ray.train.cached import illustrated_questions
from medmm_ray.train.labelled import labelled_solutions
from medmm_ray.train.two_tower import TwoTowerConfig

RIGHT, WRONG = StepLabel(label=1, confidence="high"), StepLabel(label=0, confidence="low")
NEUTRAL = StepLabel(confidence="high", reason="nothing to check")
NOBODY = StepLabel()


def row(source: str, *steps: StepLabel, annotator: str = "a", error: str | None = None) -> Labels:
    return Labels(
        question_id="q1", solution_id="s1", source=source, annotator=annotator, steps=list(steps), cost=0.0, error=error
    )  # fmt: skip


def rolled(value: float) -> StepLabel:
    return StepLabel(value=value, num_correct=round(4 * value), num_rollouts=4)


JUDGE = row("judge", RIGHT, WRONG, RIGHT, NEUTRAL)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("collapse", [1.0, 0.0, 0.0, 0.0]), ("keep", [1.0, 0.0, 1.0, 1.0]), ("drop", [1.0, 0.0, None, None])],
)
def test_steps_after_the_first_error(rule: str, expected: list[Target]) -> None:
    assert targets("judge", [JUDGE], 4, rule) == expected


def test_a_neutral_step_is_right_before_the_first_error_and_an_unlabelled_one_is_nothing() -> None:
    assert targets("judge", [row("judge", NEUTRAL, NOBODY, RIGHT)], 3) == [1.0, None, 1.0]


def test_monte_carlo_is_right_while_one_continuation_is() -> None:
    labels = [row("monte_carlo", rolled(0.25), NOBODY, rolled(0.0), rolled(1.0))]
    assert targets("monte_carlo", labels, 4, "keep") == [1.0, None, 0.0, 1.0]


def test_monte_carlos_own_label_holds_where_it_has_one() -> None:
    strict = StepLabel(label=0, value=0.25, num_correct=1, num_rollouts=4)
    assert targets("monte_carlo", [row("monte_carlo", strict)], 1) == [0.0]


def test_hybrid_takes_the_expert_then_monte_carlo_then_the_judge() -> None:
    labels = [
        row("judge", WRONG, WRONG, RIGHT, RIGHT),
        row("monte_carlo", rolled(0.5), rolled(0.5), NOBODY, rolled(0.0)),
        row("expert", NOBODY, WRONG, NOBODY, NOBODY),
    ]
    assert targets("hybrid", labels, 4, "keep") == [1.0, 0.0, 1.0, 0.0]


def test_soft_keeps_the_fraction() -> None:
    labels = [row("judge", RIGHT, RIGHT, WRONG), row("monte_carlo", rolled(0.25), NOBODY, NOBODY)]
    assert targets("soft", labels, 3) == [0.25, 1.0, 0.0]


def test_soft_collapses_after_a_fraction_of_nought() -> None:
    assert targets("soft", [row("monte_carlo", rolled(0.75), rolled(0.0), rolled(0.5))], 3) == [0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0, 0.0, 0.0), [1.0, 0.0, 0.0]), ((1.0, 0.5, 0.0), [None, None, None]), ((0.0, 0.5, 0.5), [None] * 3)],
)
def test_consensus_keeps_a_solution_whose_first_error_both_see(
    values: tuple[float, ...], expected: list[Target]
) -> None:
    labels = [row("judge", RIGHT, WRONG, RIGHT), row("monte_carlo", *map(rolled, values))]
    assert targets("consensus", labels, 3) == expected


def test_consensus_without_an_error_is_all_right() -> None:
    labels = [row("judge", RIGHT, NEUTRAL), row("monte_carlo", rolled(0.5), rolled(0.25))]
    assert targets("consensus", labels, 2) == [1.0, 1.0]


def test_consensus_is_refused_where_monte_carlo_did_not_run_up_to_the_judges_first_error() -> None:
    labels = [row("judge", RIGHT, WRONG), row("monte_carlo", rolled(0.5), NOBODY)]
    with pytest.raises(ValueError, match=r"solution s1 has it on 1 of 2\. Run monte_carlo with mode=verify"):
        targets("consensus", labels, 2)


YES, NO = StepLabel(label=1, stopped_early=True), StepLabel(label=0, value=0.0, num_correct=0, num_rollouts=16)
FAILED = StepLabel(num_correct=0, num_rollouts=0, reason="16 continuations: 16 cut off, 0 without an answer")


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        ([YES, NO, NOBODY, NOBODY], [1.0, 0.0, 0.0, 0.0]),
        ([NO, NOBODY, NOBODY, NOBODY], [None] * 4),  # the first error is earlier
        ([YES, YES, YES, NO], [None] * 4),  # it is later
        ([NOBODY, YES, NOBODY, NO], [None] * 4),  # it is not the judge's, wherever it is
        ([YES, FAILED, NOBODY, NO], [None] * 4),  # nobody knows
    ],
)
def test_consensus_needs_no_more_than_the_search_for_the_first_error(
    searched: list[StepLabel], expected: list[Target]
) -> None:
    assert targets("consensus", [JUDGE, row("monte_carlo", *searched)], 4) == expected


def test_advantage_is_the_sign_of_each_steps_gain_and_no_gain_is_not_trained_on() -> None:
    labels = [row("monte_carlo", *map(rolled, (0.5, 0.75, 0.75, 0.0, 0.0, 0.25)))]
    gains = [None, 1.0, None, 0.0, None, 1.0]
    assert targets("advantage", labels, 6, "keep") == gains
    assert targets("advantage", labels, 6, "keep", accuracy=0.75) == [0.0, *gains[1:]]
    assert targets("advantage", labels, 6, "keep", accuracy=0.5) == [None, *gains[1:]]
    gap = [row("monte_carlo", rolled(0.5), NOBODY, rolled(0.0))]
    assert targets("advantage", gap, 3, "keep", accuracy=0.25) == [1.0, None, None]
    with pytest.raises(ValueError, match="'advantage' needs after_first_error='keep', not 'collapse'"):
        targets("advantage", labels, 6)


@pytest.mark.parametrize("policy", ["soft", "advantage"])
def test_ratios_of_draws_that_stopped_early_are_refused(policy: str) -> None:
    early = StepLabel(label=1, value=1.0, num_correct=1, num_rollouts=1, stopped_early=True)
    with pytest.raises(
        ValueError, match=f"'{policy}' needs whole ratios, .* of solution s1 stopped early: .* reads .46"
    ):
        targets(policy, [row("monte_carlo", rolled(0.5), early)], 2, "keep")
    assert targets("hybrid", [row("monte_carlo", rolled(0.5), early)], 2) == [1.0, 1.0]


def test_the_first_steps_gain_is_over_the_accuracy_of_all_solutions() -> None:
    solutions = [{"solution_id": s, "steps": ["one", "two"], "correct": c} for s, c in (("s1", True), ("s2", False))]
    labels = {"s1": [row("monte_carlo", rolled(0.75), rolled(0.75))]}
    [made] = labelled_solutions(solutions, labels, "advantage", "keep", max_solutions=1)
    assert made["targets"] == [1.0, None]  # .75 over .5
    tables = {
        "states": [{"question_id": "q1", "solution_id": "s1", "num_steps": 2, "error": None}],
        "questions": [{"question_id": "q1", "split": "train", "image_ids": ["i1"], "error": None}],
        "images": [{"image_id": "i1", "uri": "x.png", "diagnosis": "normal", "error": None}],
        "evidence": [],
        "solutions": [{"question_id": "q1", "solutions": solutions}],
    }
    config = TwoTowerConfig(label_policy="advantage", after_first_error="keep")
    arrow = {name: pa.Table.from_pylist(rows) for name, rows in tables.items()}
    [illustrated] = illustrated_questions(config, labels=labels, **arrow).to_pylist()
    assert illustrated["targets"] == [[1.0, None]]


def test_what_a_tree_found_is_no_part_of_the_accuracy_of_the_samples() -> None:
    found = [{"solution_id": s, "steps": ["one"], "correct": c} for s, c in (("s1", True), ("s2", False), ("t1", True))]
    tables = {
        "states": [{"question_id": "q1", "solution_id": "s1", "num_steps": 1, "error": None}],
        "questions": [{"question_id": "q1", "split": "train", "image_ids": ["i1"], "error": None}],
        "images": [{"image_id": "i1", "uri": "x.png", "diagnosis": "normal", "error": None}],
        "evidence": [],
        "solutions": [{"question_id": "q1", "solutions": found[:2]}, {"question_id": "q1", "solutions": found[2:]}],
    }
    config = TwoTowerConfig(label_policy="advantage", after_first_error="keep")
    arrow = {name: pa.Table.from_pylist(rows) for name, rows in tables.items()}
    labels = {"s1": [row("monte_carlo", rolled(0.6))]}
    [illustrated] = illustrated_questions(config, labels=labels, **arrow).to_pylist()
    assert illustrated["targets"] == [[1.0]]  # .6 over .5, not below 2/3


def test_the_accuracy_of_a_question_is_that_of_its_answers() -> None:
    assert accuracy_of([{"correct": c} for c in (True, None, False, True, True)]) == 0.75
    assert accuracy_of([{"correct": None}]) is None


def test_consensus_says_nothing_where_the_judge_did_not_judge_all() -> None:
    assert targets("consensus", [row("judge", RIGHT, NOBODY)], 2) == [None, None]


@pytest.mark.parametrize(
    ("correct", "expected"),
    [(True, [None, None, 1.0]), (False, [None, None, 0.0]), (None, [None, None, None])],
)
def test_outcome_labels_the_last_step_alone(correct: bool | None, expected: list[Target]) -> None:
    assert targets("outcome", [], 3, correct=correct) == expected


def test_experts_vote_and_the_adjudicator_decides() -> None:
    two = [row("expert", RIGHT, RIGHT, annotator="a"), row("expert", RIGHT, WRONG, annotator="b")]
    assert targets("hybrid", two, 2) == [1.0, None]
    assert targets("hybrid", [*two, row("expert", RIGHT, WRONG, annotator="adjudicator")], 2) == [1.0, 0.0]


def test_two_monte_carlo_runs_average_softly() -> None:
    labels = [row("monte_carlo", rolled(0.25), annotator="a"), row("monte_carlo", rolled(0.75), annotator="b")]
    assert targets("soft", labels, 1) == [0.5]


def test_a_failed_row_is_no_label() -> None:
    assert targets("judge", [row("judge", error="timeout: no answer")], 2) == [None, None]


def test_labels_of_another_number_of_steps_are_refused_with_ids() -> None:
    with pytest.raises(ValueError, match=r"judge labels of solution s1 \(question q1, annotator a\) are 4 for 3 steps"):
        targets("judge", [JUDGE], 3)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="label policy 'jugde' is unknown"):
        targets("jugde", [JUDGE], 4)
    with pytest.raises(ValueError, match="after_first_error is 'cut'"):
        targets("judge", [JUDGE], 4, "cut")


def test_plain_rows_become_records_grouped_by_solution() -> None:
    plain = {
        "question_id": "q1", "solution_id": "s1", "source": "judge", "annotator": "a", "cost": 0.0, "error": None,
        "steps": [{"label": 1, "value": None, "confidence": "high", "num_correct": None, "num_rollouts": None,
                   "stopped_early": None, "reason": None}],
    }  # fmt: skip
    expected = [row("judge", RIGHT)]
    assert labels_by_solution([plain, {**plain, "solution_id": "s2", "source": "expert"}])["s1"] == expected


def test_labels_of_another_text_are_refused_with_their_ids_when_training_data_is_made() -> None:
    solution = {"solution_id": "s1", "steps": ["one", "two"], "correct": True}
    with pytest.raises(ValueError, match=r"judge labels of solution s1 \(question q1, annotator a\) are 4 for 2 steps"):
        labelled_solutions([solution], {"s1": [JUDGE]}, "judge")


def test_a_trees_labels_hard_and_soft() -> None:
    steps = [StepLabel(label=1, value=0.5), StepLabel(label=0, value=0.25), StepLabel(label=1, value=1.0)]
    row = Labels(question_id="q", solution_id="s", source="tree_search", annotator="p@c", steps=steps, cost=0.0)
    assert targets("tree_search", [row], 3, "keep") == [1.0, 0.0, 1.0]
    assert targets("tree_search_soft", [row], 3, "keep") == [0.5, 0.25, 1.0]
    assert targets("tree_search", [], 3) == targets("judge", [row], 3) == [None, None, None]
