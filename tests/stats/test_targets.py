"""Label policies: exact targets from label rows."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.data.records import Labels, StepLabel, to_arrow
from medmm_ray.stats.label_arrays import NEUTRAL as NEUTRAL_CODE
from medmm_ray.stats.label_arrays import RIGHT as RIGHT_CODE
from medmm_ray.stats.label_arrays import UNLABELLED, encode_labels, source_labels, steps_of
from medmm_ray.stats.label_arrays import WRONG as WRONG_CODE
from medmm_ray.stats.targets import (
    Target,
    accuracy_of,
    checked_consensus_counts,
    consensus_status,
    describe_consensus,
    labels_by_solution,
    merge_annotators,
    targets,
)
from medmm_ray.train.text_prm_data import labelled_solutions, labels_of_solutions
from medmm_ray.train.two_tower_data import labels_of_states, questions_with_images

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


@pytest.mark.parametrize("policy", ["monte_carlo", "hybrid", "soft", "judge"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25, 1.5])
def test_a_value_that_is_no_probability_is_refused(policy: str, value: float) -> None:
    labels = [row("monte_carlo", StepLabel(value=0.5), StepLabel(value=value))]
    words = rf"monte_carlo labels of solution s1 \(question q1, annotator a\) have the value {value}; expected numbers"
    with pytest.raises(ValueError, match=words):
        targets(policy, labels, 2)


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


def test_consensus_says_nothing_of_a_solution_that_monte_carlo_did_not_reach() -> None:
    judged = row("judge", RIGHT, WRONG)
    assert targets("consensus", [judged, row("monte_carlo", rolled(0.5), NOBODY)], 2) == [None, None]
    failed = row("monte_carlo", error="prompt_too_long: 9 tokens")
    assert targets("consensus", [judged, failed], 2, correct=False) == [None, None]
    assert targets("consensus", [judged], 2, correct=False) == [None, None]


def test_a_right_answer_shows_consensus_that_no_prefix_is_lost() -> None:
    assert targets("consensus", [row("judge", RIGHT, NEUTRAL)], 2, correct=True) == [1.0, 1.0]
    assert targets("consensus", [row("judge", RIGHT, WRONG)], 2, correct=True) == [None, None]
    lost = [row("judge", RIGHT, RIGHT), row("monte_carlo", rolled(0.0), NOBODY)]  # another policy never gets there
    assert targets("consensus", lost, 2, correct=True) == [None, None]


@pytest.mark.parametrize(
    ("labels", "correct", "expected"),
    [
        ([row("judge", RIGHT, WRONG), row("monte_carlo", rolled(0.5), rolled(0.0))], False, "agreed"),
        ([row("judge", RIGHT, WRONG), row("monte_carlo", NOBODY, rolled(0.5))], False, "differed"),
        ([row("judge", RIGHT, WRONG), row("monte_carlo", rolled(0.5), NOBODY)], None, "not_continued"),
        ([row("judge", RIGHT, WRONG), row("monte_carlo", error="prompt_too_long: 9")], False, "failed"),
        ([row("judge", RIGHT, WRONG), row("monte_carlo", StepLabel(num_rollouts=0), NOBODY)], False, "failed"),
        ([row("judge", RIGHT, NOBODY), row("monte_carlo", rolled(0.5), rolled(0.0))], False, "not_judged"),
        ([row("judge", error="refused: no")], True, "not_judged"),
        ([row("judge", RIGHT, RIGHT)], True, "agreed"),
    ],
)
def test_what_consensus_knows_of_a_solution(labels: list[Labels], correct: bool | None, expected: str) -> None:
    assert consensus_status(labels, 2, correct) == expected


def test_one_failed_row_does_not_end_a_training_by_consensus() -> None:
    agreed = [row("judge", RIGHT, WRONG), row("monte_carlo", rolled(0.5), rolled(0.0))]
    failed = [row("judge", RIGHT, WRONG), row("monte_carlo", error="prompt_too_long: 9 tokens")]
    figures = checked_consensus_counts(
        [(agreed, 2, False), (failed, 2, False), ([row("judge", RIGHT)], 1, True), ([], 1, None)]
    )
    assert figures == {
        "consensus_agreed": 2, "consensus_differed": 0, "consensus_not_judged": 1, "consensus_not_continued": 0,
        "consensus_failed": 1,
    }  # fmt: skip
    assert describe_consensus(figures) == (
        "judge and Monte Carlo agree on 2 solutions and differ on 0; 2 cannot be settled (1 not judged, 1 with failed "
        "continuations)"
    )
    assert describe_consensus({**figures, "consensus_failed": 0.0, "consensus_not_judged": 0.0}).endswith("differ on 0")


def test_consensus_is_refused_where_monte_carlo_settles_nothing() -> None:
    wrong = ([row("judge", RIGHT, WRONG), row("monte_carlo", rolled(0.5), NOBODY)], 2, False)
    with pytest.raises(
        ValueError, match=r"of 2 judged solutions without a right answer it has that on none\. Run monte"
    ):
        checked_consensus_counts([wrong, wrong, ([row("judge", RIGHT)], 1, True)])


def test_the_solutions_that_consensus_counts_are_those_of_the_training() -> None:
    def one(name: str, correct: bool) -> dict[str, Any]:
        return {"solution_id": name, "steps": ["one"], "correct": correct}

    labels = {name: [row("judge", RIGHT)] for name in ("s1", "s2", "s3", "s4")}
    questions = pa.table({"question_id": ["q1", "q2", "q3"], "split": ["train", "test", "train"],
                          "error": pa.array([None, None, "no_answer: x"], pa.string())})  # fmt: skip
    solutions = pa.Table.from_pylist(
        [
            {"question_id": "q1", "solutions": [one("s1", True), one("s2", False)], "error": None},
            {"question_id": "q2", "solutions": [one("s3", True)], "error": None},
            {"question_id": "q3", "solutions": [one("s4", True)], "error": None},
        ],
        pa.schema({"question_id": pa.string(), "error": pa.string(), "solutions": pa.list_(pa.struct(
            {"solution_id": pa.string(), "steps": pa.list_(pa.string()), "correct": pa.bool_()}))}),
    )  # fmt: skip
    assert list(labels_of_solutions(questions, solutions, labels)) == [
        (labels["s1"], 1, True),
        (labels["s2"], 1, False),
    ]
    assert list(labels_of_solutions(questions, solutions, labels, max_solutions=1)) == [(labels["s1"], 1, True)]
    states = pa.table({"solution_id": ["s2", "s9", "s1"], "num_steps": [1, 3, 1],
                       "error": pa.array([None, None, "too_long: x"], pa.string())})  # fmt: skip
    assert list(labels_of_states(states, labels, solutions)) == [(labels["s2"], 1, False), ([], 3, None)]


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
        "states": [{"question_id": "q1", "solution_id": "s1", "num_steps": 2, "error": None, "place": [0, 0, 0]}],
        "questions": [{"question_id": "q1", "split": "train", "image_ids": ["i1"], "error": None}],
        "images": [{"image_id": "i1", "uri": "x.png", "diagnosis": "normal", "error": None}],
        "evidence": [],
        "solutions": [{"question_id": "q1", "solutions": solutions}],
    }
    arrow = {name: pa.Table.from_pylist(rows) for name, rows in tables.items()}
    [illustrated] = questions_with_images(
        labels=labels, policy="advantage", after_first_error="keep", **arrow
    ).to_pylist()
    assert illustrated["targets"] == [[1.0, None]]


def test_what_a_tree_found_is_no_part_of_the_accuracy_of_the_samples() -> None:
    found = [{"solution_id": s, "steps": ["one"], "correct": c} for s, c in (("s1", True), ("s2", False), ("t1", True))]
    tables = {
        "states": [{"question_id": "q1", "solution_id": "s1", "num_steps": 1, "error": None, "place": [0, 0, 0]}],
        "questions": [{"question_id": "q1", "split": "train", "image_ids": ["i1"], "error": None}],
        "images": [{"image_id": "i1", "uri": "x.png", "diagnosis": "normal", "error": None}],
        "evidence": [],
        "solutions": [{"question_id": "q1", "solutions": found[:2]}, {"question_id": "q1", "solutions": found[2:]}],
    }
    arrow = {name: pa.Table.from_pylist(rows) for name, rows in tables.items()}
    labels = {"s1": [row("monte_carlo", rolled(0.6))]}
    [illustrated] = questions_with_images(
        labels=labels, policy="advantage", after_first_error="keep", **arrow
    ).to_pylist()
    assert illustrated["targets"] == [[1.0]]  # .6 over .5, not below 2/3


def test_the_accuracy_of_a_question_is_that_of_its_answers() -> None:
    assert accuracy_of([{"correct": c} for c in (True, None, False, True, True)]) == 0.75
    assert accuracy_of([{"correct": None}]) is None


def test_consensus_says_nothing_where_a_search_ended_at_a_fault() -> None:
    failed = StepLabel(num_correct=0, num_rollouts=0, reason="prompt_too_long: 9 tokens")
    for steps in ([NOBODY, NOBODY, failed, WRONG], [rolled(0.5), failed, NOBODY, WRONG]):
        assert targets("consensus", [JUDGE, row("monte_carlo", *steps)], 4) == [None] * 4
    found = row("monte_carlo", rolled(0.5), rolled(0.0), failed, WRONG)  # all that is needed is there
    assert targets("consensus", [JUDGE, found], 4) == [1.0, 0.0, 0.0, 0.0]


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


def test_annotators_together_say_what_most_say_and_whole_tables_agree() -> None:
    a = row("judge", WRONG, RIGHT, NEUTRAL, NEUTRAL, NOBODY, RIGHT, annotator="a")
    b = row("judge", RIGHT, WRONG, WRONG, NOBODY, NOBODY, RIGHT, annotator="b")
    c = row("judge", RIGHT, NEUTRAL, NOBODY, NOBODY, NOBODY, WRONG, annotator="c")
    first, second = StepLabel(label=1, reason="b's"), StepLabel(label=1, reason="c's")
    assert merge_annotators([c, b, a], 6) == [RIGHT, NOBODY, WRONG, NEUTRAL, NOBODY, RIGHT]
    assert merge_annotators([row("judge", second, annotator="c"), row("judge", first, annotator="b")], 1) == [first]
    last = row("judge", NOBODY, NEUTRAL, RIGHT, WRONG, NOBODY, WRONG, annotator="adjudicator")
    assert merge_annotators([a, b, c, last], 6) == [RIGHT, NEUTRAL, RIGHT, WRONG, NOBODY, WRONG]
    assert targets("judge", [a, b, c], 6, "keep") == [1.0, None, 0.0, 1.0, None, 1.0]


CODES = {"+": RIGHT_CODE, "-": WRONG_CODE, "0": NEUTRAL_CODE, "?": UNLABELLED}


def by_hand(said: list[str], adjudicated: bool) -> str:
    """What readers say together of one step: + right, - wrong, 0 neutral, ? nothing; the first may decide alone."""
    if adjudicated and said and said[0] != "?":
        return said[0]
    right, wrong = said.count("+"), said.count("-")
    if right != wrong:
        return "+" if right > wrong else "-"
    return "0" if right == 0 and "0" in said else "?"


def entries_name(step: StepLabel) -> str:
    if step.label is not None:
        return "+" if step.label else "-"
    return "0" if step.confidence or step.reason else "?"


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("+-0?"), min_size=3, max_size=3), max_size=5), st.booleans())
def test_one_rule_for_annotators_in_rows_and_in_columns(said: list[list[str]], adjudicated: bool) -> None:
    entries = {"+": RIGHT, "-": WRONG, "0": NEUTRAL, "?": NOBODY}
    names = ["adjudicator" if adjudicated and not n else f"reader {n}" for n in range(len(said))]
    rows = [row("judge", *(entries[s] for s in own), annotator=name) for own, name in zip(said, names, strict=True)]
    solution = {"solution_id": "s1", "correct": True, "finish_reason": "stop", "num_steps": 3}
    steps = steps_of(pa.Table.from_pylist([{"question_id": "q1", "solutions": [solution]}]))
    found = source_labels(steps, encode_labels(to_arrow(Labels, rows)))
    codes = found["judge"].codes.tolist() if rows else [UNLABELLED] * 3
    together = merge_annotators(rows, 3)
    expected = [by_hand([own[i] for own in said], adjudicated) for i in range(3)]
    for found_codes in (codes, [CODES[entries_name(step)] for step in together]):
        assert found_codes == [CODES[sign] for sign in expected]


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
