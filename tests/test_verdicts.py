"""judge/verdicts.py: what a judge replies, as labels or as a named fault."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.judge.verdicts import verdicts
from medmm_ray.records import StepLabel
from medmm_ray.tables import RowError


@pytest.mark.parametrize(
    ("reply", "labels", "confidences"),
    [
        ("1 0 1", [1, 0, 1], [None] * 3),
        ("+ - +", [1, 0, 1], [None] * 3),
        ("1 high\n0 low\n1 medium\n", [1, 0, 1], ["high", "low", "medium"]),
        ("Step 1: 1 High, Step 2: 0 low, Step 3: 1", [1, 0, 1], ["high", "low", None]),
        ("[1, 0, 1]", [1, 0, 1], [None] * 3),
        ('["+", "-", "+"]', [1, 0, 1], [None] * 3),
        (
            'Sure:\n```json\n[{"step": 1, "label": "+", "confidence": "high"}, {"label": "-", "confidence": "Low"},'
            ' {"label": 1, "confidence": "medium"}]\n```',
            [1, 0, 1],
            ["high", "low", "medium"],
        ),
    ],
)
def test_replies_that_fit(reply: str, labels: list[int], confidences: list[str | None]) -> None:
    [found] = verdicts(reply, [[1, 2, 3]])
    assert [step.label for step in found] == labels
    assert [step.confidence for step in found] == confidences


def test_the_three_tests_are_kept() -> None:
    reply = (
        'Here [as asked] is {it}: {"steps": [{"step": 1, "reason": "Sharp.", "logical": true, "medical": true, '
        '"image_grounded": false, "verdict": "-", "confidence": "high"}]} Best {wishes}.'
    )
    assert verdicts(reply, [[1]]) == [
        [StepLabel(label=0, confidence="high", logical=True, medical=True, image_grounded=False, reason="Sharp.")]
    ]


def test_several_solutions_in_a_reply() -> None:
    def part(number: int, *labels: str) -> dict[str, Any]:
        steps = [{"step": i, "verdict": label, "confidence": "high"} for i, label in enumerate(labels, 1)]
        return {"solution": number, "steps": steps}

    reply = json.dumps({"solutions": [part(1, "+", "-"), part(2, "-")]})
    assert [[step.label for step in steps] for steps in verdicts(reply, [[1, 2], [1]])] == [[1, 0], [0]]
    for solutions, fault in [
        ([part(1, "+", "-")], "judge gave 1 solutions' verdicts for 2"),
        ([part(1, "+"), part(2, "-")], "judge gave 1 verdicts for 2 steps"),
        ([part(2, "+", "-"), part(1, "-")], "judge's entry 1 is about another solution"),
    ]:
        with pytest.raises(RowError, match=fault):
            verdicts(json.dumps({"solutions": solutions}), [[1, 2], [1]])


def test_reasons_are_kept() -> None:
    reply = '[{"step": 1, "label": "-", "confidence": "high", "reasoning": "The angle is sharp."}]'
    assert verdicts(reply, [[1]]) == [[StepLabel(label=0, confidence="high", reason="The angle is sharp.")]]


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("1 0", "judge_reply: judge gave 2 verdicts for 3 steps: '1 0'"),
        ("1 0 1 1", "judge_reply: judge gave 4 verdicts for 3 steps: '1 0 1 1'"),
        ("", "judge_reply: judge gave no verdicts for 3 steps: ''"),
        ("Step 1 is right, 10 of 10", "judge_reply: judge gave no verdicts for 3 steps: 'Step 1 is right, 10 of 10'"),
        ("[1, 2, 3]", "judge_reply: judge gave no verdicts for 3 steps: '[1, 2, 3]'"),
        ("[1, 0", "judge_reply: judge gave no verdicts for 3 steps: '[1, 0'"),
        ("[broken]", "judge_reply: judge gave no verdicts for 3 steps: '[broken]'"),
        ('[{"label": "?", "confidence": "low"}]', "judge_reply: judge's verdict 1 has the label '?', not '+' or '-'"),
        ('[{"label": "+", "confidence": "sure"}]', "judge_reply: judge's verdict 1 has the confidence 'sure'"),
        (
            '{"steps": [{"step": 1, "verdict": "+", "confidence": "low", "medical": "maybe"}]}',
            "judge_reply: judge's verdict 1 has medical 'maybe', not a truth",
        ),
        (
            '[{"step": 2, "label": "+", "confidence": "low"}]',
            'judge_reply: judge\'s verdict 1 is about step 2: \'[{"step": 2, "label": "+", "confidence": "low"}]\'',
        ),
    ],
)
def test_replies_that_do_not_fit(reply: str, fault: str) -> None:
    with pytest.raises(RowError) as error:
        verdicts(reply, [[1, 2, 3]])
    assert str(error.value) == fault


@settings(max_examples=50, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["steps", "solutions", "step", "verdict", "confidence", "medical"]), inner
                )
            ),
        ).map(json.dumps),
    ),
    st.sampled_from([[[1]], [[1, 2]], [[1], [1, 2]]]),
)
def test_whatever_a_judge_replies_is_labels_or_a_named_fault(reply: str, numbers: list[list[int]]) -> None:
    try:
        found = verdicts(reply, numbers)
    except RowError:
        return
    assert list(map(len, found)) == list(map(len, numbers))


def test_a_reply_of_brackets_or_digits_alone_is_a_named_fault() -> None:
    for reply in ("[" * 100_000, '{"steps": [' + "9" * 5000 + "]}"):
        with pytest.raises(RowError, match="judge gave no verdicts for 1 steps"):
            verdicts(reply, [[1]])
