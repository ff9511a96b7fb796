"""steps/judge/verdicts.py: what a judge replies, as labels or as a named fault."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.data.records import StepLabel
from medmm_ray.data.tables import RowError
from medmm_ray.steps.judge.verdicts import verdicts


def entry(step: int | None, verdict: str, confidence: str = "high", **more: Any) -> dict[str, Any]:
    """An entry of the asked form; a wrong step fails its medical test."""
    tests = {"logical": True, "medical": verdict == "+", "image_grounded": True}
    number = {} if step is None else {"step": step}
    return {**number, **tests, "verdict": verdict, "confidence": confidence, **more}


THREE = [entry(1, "+"), entry(None, "-", "Low"), entry(3, "+", "medium")]


@pytest.mark.parametrize(
    ("reply", "labels", "confidences"),
    [
        ("1 0 1", [1, 0, 1], [None] * 3),
        ("+ - +", [1, 0, 1], [None] * 3),
        ("1 high\n0 low\n1 medium\n", [1, 0, 1], ["high", "low", "medium"]),
        ("Step 1: 1 High, Step 2: 0 low, Step 3: 1", [1, 0, 1], ["high", "low", None]),
        ("1 Step 2: 0 1", [1, 0, 1], [None] * 3),
        ("[1, 0, 1]", [1, 0, 1], [None] * 3),
        ('```json\n["+", "-", "+"]\n```', [1, 0, 1], [None] * 3),
    ],
)
def test_lines_that_fit(reply: str, labels: list[int], confidences: list[str | None]) -> None:
    [found] = verdicts(reply, [[1, 2, 3]], lines=True)
    assert [step.label for step in found] == labels
    assert [step.confidence for step in found] == confidences


@pytest.mark.parametrize(
    "prose",
    [
        "{}",
        "Sure, as guideline [1] says, {{so}}: {} Best [2, 0] {{wishes}}.",
        "```\n{}\n```",
        '<think>{{"steps": [1]}}, no</think>{}\n{{"steps": []}}',
    ],
)
def test_json_that_fits(prose: str) -> None:
    [found] = verdicts(prose.format(json.dumps({"steps": THREE})), [[1, 2, 3]])
    assert [step.label for step in found] == [1, 0, 1]
    assert [step.confidence for step in found] == ["high", "low", "medium"]


def test_an_answer_behind_a_long_draft_is_found() -> None:
    draft = json.dumps({"steps": [entry(i, "-") for i in range(1, 61)]})
    [found] = verdicts(f"{draft} No: {json.dumps({'steps': THREE})}", [[1, 2, 3]])
    assert [step.label for step in found] == [1, 0, 1]


def test_a_bare_list_is_an_answer_only_where_nothing_stands_around_it() -> None:
    bare = json.dumps(THREE)
    for reply in (bare, f"```json\n{bare}\n```\n"):
        assert [step.label for step in verdicts(reply, [[1, 2, 3]])[0]] == [1, 0, 1]
    for reply in (f"Sure: {bare}", f"{bare} So much for that."):
        with pytest.raises(RowError, match="judge gave no verdicts for 3 steps"):
            verdicts(reply, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("cited", "numbers"),
    [("As guideline [1] says, this is wrong.", [[1]]), ("See refs [1, 0].", [[1, 2]]), ("See [0]", [[1]])],
)
def test_a_citation_is_no_verdict(cited: str, numbers: list[list[int]]) -> None:
    said = json.dumps({"steps": [entry(number, "-") for number in numbers[0]]})
    assert [step.label for step in verdicts(f"{cited} {said}", numbers)[0]] == [0] * len(numbers[0])
    for lines in (False, True):
        with pytest.raises(RowError, match="judge gave no verdicts"):
            verdicts(cited, numbers, lines)


def test_the_three_tests_and_the_reason_are_kept() -> None:
    reply = (
        'Here [as asked] is {it}: {"steps": [{"step": 1, "reason": "Sharp.", "logical": true, "medical": true, '
        '"image_grounded": false, "verdict": "-", "confidence": "high"}]} Best {wishes}.'
    )
    assert verdicts(reply, [[1]]) == [
        [StepLabel(label=0, confidence="high", logical=True, medical=True, image_grounded=False, reason="Sharp.")]
    ]


def test_several_solutions_in_a_reply() -> None:
    def part(number: int, *labels: str) -> dict[str, Any]:
        return {"solution": number, "steps": [entry(i, label) for i, label in enumerate(labels, 1)]}

    reply = json.dumps({"solutions": [part(1, "+", "-"), part(2, "-")]})
    for said in (reply, f"As [1] and [2, 0] say: {reply}"):
        assert [[step.label for step in steps] for steps in verdicts(said, [[1, 2], [1]])] == [[1, 0], [0]]
    for solutions, fault in [
        ([part(1, "+", "-")], "judge gave 1 solutions' verdicts for 2"),
        ([part(1, "+"), part(2, "-")], "judge gave 1 verdicts for 2 steps"),
        ([part(2, "+", "-"), part(1, "-")], "judge's entry 1 is about another solution"),
    ]:
        with pytest.raises(RowError, match=fault):
            verdicts(json.dumps({"solutions": solutions}), [[1, 2], [1]])
    with pytest.raises(RowError, match="judge gave no verdicts for 2 steps"):
        verdicts(reply, [[1, 2]])  # one solution was asked about


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
        (
            "Step 1: +\nStep 3: -\nStep 2: +",
            "judge_reply: judge's verdict 2 is about step 3: 'Step 1: +\\nStep 3: -\\nStep 2: +'",
        ),
        (
            "Step 1: + Step 1: - Step 3: +",
            "judge_reply: judge's verdict 2 is about step 1: 'Step 1: + Step 1: - Step 3: +'",
        ),
        (json.dumps({"steps": []}), "judge_reply: judge gave no verdicts for 3 steps: '{\"steps\": []}'"),
    ],
)
def test_lines_that_do_not_fit(reply: str, fault: str) -> None:
    with pytest.raises(RowError) as error:
        verdicts(reply, [[1, 2, 3]], lines=True)
    assert str(error.value) == fault


def test_lines_about_one_step_have_its_number_or_none() -> None:
    for reply in ("+ high", "Step 2: + high"):
        assert verdicts(reply, [[2]], lines=True) == [[StepLabel(label=1, confidence="high")]]
    with pytest.raises(RowError, match="judge's verdict 2 is about step 1: 'Step 1: +"):
        verdicts("Step 1: + high", [[2]], lines=True)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (1, "judge's verdict 1 is '1', not an object with the three tests, verdict and confidence"),
        (entry(1, "?"), "judge's verdict 1 has the label '?', not '+' or '-'"),
        ({**entry(1, "+"), "verdict": None}, "judge's verdict 1 has the label 'none', not '+' or '-'"),
        (entry(1, "+", "sure"), "judge's verdict 1 has the confidence 'sure'"),
        (entry(1, "+", medical="maybe"), "judge's verdict 1 has medical 'maybe', not a truth"),
        (entry(1, "+", medical=None), "judge's verdict 1 has medical 'None', not a truth"),
        (entry(1, "+", logical=False), "judge's verdict 1 is '+' with logical false"),
        (
            entry(1, "+", logical=False, image_grounded=False),
            "judge's verdict 1 is '+' with logical and image_grounded false",
        ),
        (entry(1, "-", medical=True), "judge's verdict 1 is '-' with all three tests true"),
        (entry(2, "+"), 'judge\'s verdict 1 is about step 2: \'{"steps": [{"step": 2, '),
    ],
)
def test_entries_that_are_not_of_the_asked_form(said: Any, fault: str) -> None:
    with pytest.raises(RowError) as error:
        verdicts(json.dumps({"steps": [said]}), [[1]])
    assert str(error.value).startswith(f"judge_reply: {fault}")
    with pytest.raises(RowError) as error:
        verdicts(json.dumps({"solutions": [{"steps": [said]}, {"steps": [entry(1, "+")]}]}), [[1], [1]])
    assert str(error.value).startswith(f"judge_reply: {fault[:35]}")


@pytest.mark.parametrize("reply", ["1 0", "[1, 0]", '{"steps": [1, 0]}', '["+", "-"]'])
def test_bare_verdicts_are_no_answer_where_json_is_asked_for(reply: str) -> None:
    with pytest.raises(RowError, match="judge gave no verdicts for 2 steps|judge's verdict 1 is '[1+]', not an object"):
        verdicts(reply, [[1, 2]])


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
    st.sampled_from([([[1]], False), ([[1, 2]], False), ([[1], [1, 2]], False), ([[1, 2]], True)]),
)
def test_whatever_a_judge_replies_is_labels_or_a_named_fault(reply: str, asked: tuple[list[list[int]], bool]) -> None:
    numbers, lines = asked
    try:
        found = verdicts(reply, numbers, lines)
    except RowError:
        return
    assert list(map(len, found)) == list(map(len, numbers))


def test_half_of_a_surrogate_pair_in_a_reason_is_replaced() -> None:
    reply = json.dumps({"steps": [entry(1, "+", reason="bad \ud800 half")]})
    assert "\\ud800" in reply, "the reply itself is well-formed"
    assert verdicts(reply, [[1]])[0][0].reason == "bad \ufffd half"


def test_a_reply_of_brackets_or_digits_alone_is_a_named_fault() -> None:
    for reply in ("[" * 100_000, "[" * 50_000 + "]" * 50_000, '{"steps": [' + "9" * 5000 + "]}"):
        for lines in (False, True):
            with pytest.raises(RowError, match="judge gave no verdicts for 1 steps"):
                verdicts(reply, [[1]], lines)
