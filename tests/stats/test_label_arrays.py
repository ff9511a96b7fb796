"""label_arrays.py: steps and verdicts of whole tables, without rows."""

from typing import Any

import pyarrow as pa

from medmm_ray.data.records import Labels, Solution, Solutions, StepLabel, to_arrow
from medmm_ray.stats.label_arrays import (
    NEUTRAL,
    RIGHT,
    UNLABELLED,
    WRONG,
    align_labels,
    drop_texts,
    encode_labels,
    source_labels,
    steps_of,
)


def solution(solution_id: str, num_steps: int, correct: bool | None = True) -> Solution:
    return Solution(solution_id=solution_id, index=0, text="long " * 100, steps=["one step"] * num_steps, answer="A",
                    correct=correct, finish_reason="stop", seed=0, text_sha=solution_id)  # fmt: skip


def question(question_id: str, *solutions: Solution) -> Solutions:
    return Solutions(question_id=question_id, policy="p", config_hash="c", num_requested=len(solutions),
                     solutions=list(solutions))  # fmt: skip


def labelled(solution_id: str, verdicts: list[int | None], source: str = "judge", **more: Any) -> Labels:
    row = {"annotator": "a", "cost": 0.25, **more}
    return Labels(question_id="q", solution_id=solution_id, source=source,
                  steps=[StepLabel(label=v) for v in verdicts], **row)  # fmt: skip


TABLE = to_arrow(Solutions, [question("q1", solution("s1", 3), solution("s2", 2)), question("q2", solution("s3", 1))])
STEPS = steps_of(drop_texts(TABLE))


def codes(*rows: Labels, source: str = "judge") -> list[int]:
    found = source_labels(STEPS, encode_labels(to_arrow(Labels, list(rows))))[source].codes
    return [int(code) for code in found]


def test_thin_solutions_hold_no_text() -> None:
    slim = drop_texts(TABLE.slice(1))
    assert slim["solutions"].to_pylist() == [
        [{"solution_id": "s3", "correct": True, "finish_reason": "stop", "num_steps": 1}]
    ]
    assert slim.column_names == [*(n for n in TABLE.column_names if n != "solutions"), "solutions"]
    parts = pa.concat_tables([drop_texts(TABLE.slice(0, 1)), slim])
    assert steps_of(parts).length.tolist() == STEPS.length.tolist() == [3, 2, 1]
    assert drop_texts(TABLE).nbytes < TABLE.nbytes / 5


def test_rows_about_one_question_share_its_number() -> None:
    more = to_arrow(Solutions, [question("q2", solution("t1", 1)), question("q0", solution("t2", 2))])
    steps = steps_of(pa.concat_tables([drop_texts(TABLE), drop_texts(more)]))
    assert steps.row.tolist() == [0, 0, 1, 2, 3]
    assert steps.question.tolist() == [0, 0, 1, 1, 2]


def test_a_verdict_is_the_label_else_the_value_else_neutral_or_nothing() -> None:
    steps = [StepLabel(label=0, value=0.9), StepLabel(value=0.25), StepLabel(confidence="high")]
    row = Labels(question_id="q", solution_id="s1", source="judge", annotator="a", steps=steps, cost=0.0)
    more = [StepLabel(value=0.0), StepLabel(reason="nothing to check")]
    other = Labels(question_id="q", solution_id="s2", source="judge", annotator="a", steps=more, cost=0.0)
    assert codes(row, other) == [WRONG, RIGHT, NEUTRAL, WRONG, NEUTRAL, UNLABELLED]


def test_readers_vote_and_the_adjudicator_has_the_last_word() -> None:
    readers = [
        labelled("s1", [1, 1, 0], annotator="one"),
        labelled("s1", [1, 0, 0], annotator="two"),
        labelled("s1", [0, None, 0], annotator="three"),
    ]
    assert codes(*readers)[:3] == [RIGHT, UNLABELLED, WRONG]  # a tie is no label
    last = labelled("s1", [None, 1, 1], annotator="adjudicator")
    assert codes(*readers, last)[:3] == codes(last, *readers)[:3] == [RIGHT, RIGHT, RIGHT]


def test_sources_lie_side_by_side_and_what_does_not_count_is_counted() -> None:
    rows = [
        labelled("s3", [0], "expert"),
        labelled("s1", [1, 1, 1]),
        labelled("s2", [1]),
        labelled("gone", [1, 1]),
        labelled("s3", [], error="refused: safety"),
        labelled("s3", [], error="refused: other words"),
    ]
    found = source_labels(STEPS, encode_labels(to_arrow(Labels, rows)))
    assert found["expert"].codes.tolist() == [UNLABELLED] * 5 + [WRONG]
    judge = found["judge"]
    assert judge.codes.tolist() == [RIGHT] * 3 + [UNLABELLED] * 3
    assert (judge.rows, judge.unknown, judge.misfit, judge.errors, judge.cost) == (3, 1, 1, {"refused": 2}, 1.25)


def test_a_value_that_is_no_probability_is_a_fault_of_its_row_and_no_verdict() -> None:
    steps = [[StepLabel(value=float("nan"))], [StepLabel(value=0.5), StepLabel(value=-1.0)]]
    rows = [Labels(question_id="q", solution_id=name, source="monte_carlo", annotator="a", steps=own, cost=0.0)
            for name, own in zip(("s3", "s2"), steps, strict=True)]  # fmt: skip
    good = Labels(question_id="q", solution_id="s1", source="monte_carlo", annotator="a", cost=0.0,
                  steps=[StepLabel(value=0.25), StepLabel(value=0.0), StepLabel()])  # fmt: skip
    found = source_labels(STEPS, encode_labels(to_arrow(Labels, [*rows, good])))["monte_carlo"]
    assert found.codes.tolist() == [RIGHT, WRONG, UNLABELLED, UNLABELLED, UNLABELLED, UNLABELLED]
    assert (found.rows, found.errors) == (1, {"label_value": 2})


def test_entries_are_placed_in_slices_too() -> None:
    labels = encode_labels(to_arrow(Labels, [labelled("s2", [1, 0]), labelled("s3", [0]), labelled("s1", [1, 1, 0])]))
    assert align_labels(STEPS, labels).row.tolist() == [3, 4, 5, 0, 1, 2]
    assert align_labels(STEPS, labels.slice(1)).row.tolist() == [5, 0, 1, 2]
    nothing = align_labels(steps_of(drop_texts(TABLE.slice(0, 0))), labels)
    assert (nothing.row.tolist(), nothing.unknown, nothing.misfit) == ([], 3, 0)
