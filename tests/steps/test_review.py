"""review.py: the drawing of the queue, its probabilities, and the phantom expert."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medmm_ray.data.records import Labels, ReviewItem, Solution, Solutions, StepLabel, from_dict, to_arrow
from medmm_ray.data.sorted_rows import windows
from medmm_ray.data.sources.phantom import PhantomCase
from medmm_ray.stats.label_arrays import drop_texts, steps_of
from medmm_ray.steps.review import (
    DISAGREE,
    EXPERT,
    SURE,
    TRUTH,
    UNSURE,
    Expert,
    ReviewConfig,
    allocate_draws,
    disagreement_levels,
    draw_steps,
    queue,
    step_chances,
)

STEPS = ["Compare both lungs.", "The right costophrenic angle is blunted.", "The heart is wide.", "the answer is (A)."]
EFFUSION = PhantomCase(seed=1, kind="effusion", side="right", zone="lower", extent=0.8, contrast=1.0, difficulty="easy")


def solutions(question_id: str, *ids: str, steps: list[str] = STEPS) -> Solutions:
    return Solutions(
        question_id=question_id, policy="p", config_hash="c", num_requested=len(ids),
        solutions=[
            Solution(solution_id=i, index=n, text="t", steps=steps, answer="A", correct=True, finish_reason="stop",
                     seed=n, text_sha=i)
            for n, i in enumerate(ids)
        ],
    )  # fmt: skip


def labels(solution_id: str, source: str, verdicts: list[int | None], confidence: str | None = None) -> Labels:
    steps = [StepLabel(label=v, confidence=confidence) for v in verdicts]
    return Labels(question_id="q", solution_id=solution_id, source=source, annotator="a", steps=steps, cost=0.0)


TABLE = to_arrow(Solutions, [solutions("q1", "s1", "s2"), solutions("q2"), solutions("q3", "s3", steps=["one"])])


def test_steps_are_counted_through_the_nested_columns() -> None:
    for table in (TABLE, pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)]), TABLE.slice(0, 3)):
        steps = steps_of(drop_texts(table))
        assert steps.solution_ids.to_pylist() == ["s1", "s2", "s3"]
        assert steps.question.tolist() == [0, 0, 2]
        assert steps.first.tolist() == [0, 4, 8]
        assert steps.solution.tolist() == [0] * 4 + [1] * 4 + [2]
        assert steps.index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_disagreement_comes_from_both_sources() -> None:
    judge = [
        labels("gone", "judge", [1, 1], "high"),
        labels("s2", "judge", [1, 0, 1, 1], "high"),
        labels("s1", "judge", [1, 1, 1, 1], "low"),
    ]
    rolled = [labels("s1", "monte_carlo", [None, 0, 1, None]), labels("s2", "monte_carlo", [0, 0, 1, 0])]
    found = disagreement_levels(steps_of(drop_texts(TABLE)), to_arrow(Labels, judge), to_arrow(Labels, rolled))
    # Of s2 the judge calls step 1 wrong: the lost prefixes 1 and 3 are no contradiction, the good prefix 2 is one.
    assert found.tolist() == [UNSURE, DISAGREE, UNSURE, UNSURE, DISAGREE, SURE, DISAGREE, SURE, UNSURE]
    sliced = to_arrow(Labels, judge).slice(1)
    assert disagreement_levels(steps_of(drop_texts(TABLE)), sliced, to_arrow(Labels, rolled)).tolist() == found.tolist()
    nothing = to_arrow(Labels, [])
    assert disagreement_levels(steps_of(drop_texts(TABLE)), nothing, nothing).tolist() == [UNSURE] * 9


def test_judges_that_differ_disagree_and_failed_or_foreign_rows_say_nothing() -> None:
    own = steps_of(drop_texts(TABLE))
    first = labels("s1", "judge", [1, 1, None, 1], "high")
    second = replace(labels("s1", "judge", [1, 0, 1, None], "medium"), annotator="b")
    unsure = replace(labels("s1", "judge", [1, 0, 1, 1], "low"), annotator="b")
    failed = replace(labels("s2", "judge", [0, 0, 0, 0], "high"), error="refused: no")
    foreign = labels("s3", "expert", [0], "high")
    nothing = to_arrow(Labels, [])
    found = disagreement_levels(own, to_arrow(Labels, [first, second, failed, foreign]), nothing)
    assert found.tolist() == [SURE, DISAGREE, SURE, SURE] + [UNSURE] * 5
    found = disagreement_levels(own, to_arrow(Labels, [first, unsure]), nothing)
    assert found.tolist() == [UNSURE, DISAGREE, UNSURE, UNSURE] + [UNSURE] * 5
    # Where judges tie there is no verdict that Monte Carlo could contradict, before it and behind it there is one.
    rolled = [labels("s1", "monte_carlo", [0, None, 1, 1]), labels("s1", "tree_search", [0] * 4),
              replace(labels("s2", "monte_carlo", [0] * 4), error="engine: died")]  # fmt: skip
    found = disagreement_levels(own, to_arrow(Labels, [first, second]), to_arrow(Labels, rolled))
    assert found.tolist() == [DISAGREE, DISAGREE, SURE, SURE] + [UNSURE] * 5


def test_draws_are_dealt_evenly_and_small_strata_give_theirs_away() -> None:
    assert allocate_draws([100, 100, 100], 30) == [10, 10, 10]
    assert allocate_draws([2, 100, 100], 30) == [2, 14, 14]
    assert allocate_draws([2, 3, 1], 30) == [2, 3, 1]
    assert sum(allocate_draws([7, 100, 3, 50], 41)) == 41
    assert allocate_draws([], 10) == []


def test_chances_depend_on_the_step_alone() -> None:
    steps = steps_of(drop_texts(TABLE))
    chance = step_chances(["s1", "s2", "s3"], 0, steps)
    assert chance.shape == (2, 9)
    assert len(np.unique(chance)) == 18
    swapped = steps_of(drop_texts(TABLE.take([2, 0, 1])))
    assert step_chances(["s3", "s1", "s2"], 0, swapped)[:, 1:9].tolist() == chance[:, :8].tolist()
    assert step_chances(["s1", "s2", "s3"], 1, steps).tolist() != chance.tolist()


def test_chances_are_uniform_and_independent() -> None:
    table = to_arrow(Solutions, [solutions("q", *(f"s{i}" for i in range(2500)))])
    steps = steps_of(drop_texts(table))
    first, second = step_chances(steps.solution_ids.to_pylist(), 0, steps)
    for chance in (first, second):
        counts = np.histogram(chance, 10, (0, 1))[0]
        assert abs(counts - 1000).max() < 120
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert abs(np.corrcoef(first[1:], second[:-1])[0, 1]) < 0.04


def test_inclusion_probabilities_are_the_shares_drawn() -> None:
    """Over many seeds a step is drawn as often as its probability says."""
    stratum = np.array([0] * 20 + [1] * 4)
    rng = np.random.default_rng(0)
    times = np.zeros(24)
    for _ in range(3000):
        drawn, probability = draw_steps(stratum, rng.random((2, 24)), num_stratified=6, num_random=6)
        times += drawn > 0
    assert probability[0] == pytest.approx(1 - (1 - 3 / 20) * (1 - 6 / 24))
    assert probability[-1] == pytest.approx(1 - (1 - 3 / 4) * (1 - 6 / 24))
    assert abs(times / 3000 - probability).max() < 0.04
    drawn, _ = draw_steps(stratum, rng.random((2, 24)), num_stratified=6, num_random=0)
    assert [int((drawn[stratum == s] == 1).sum()) for s in (0, 1)] == [3, 3]


def test_steps_offered_some_at_a_time_are_drawn_as_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window gives the lowest chances of its own: those of all are among them."""
    rows = [solutions(f"q{i:02}", *(f"s{i:02}-{j}" for j in range(3))) for i in range(40)]
    questions = pa.table(
        {
            "question_id": [f"q{i:02}" for i in range(40)],
            "difficulty": ["easy", "hard", "easy", "medium"] * 10,
            "modality": ["radiology", "pathology"] * 20,
        }
    )
    judge = [
        replace(labels(f"s{i:02}-{j}", "judge", [1, 0, 1, 1], "low" if j else "high"), question_id=f"q{i:02}")
        for i in range(40)
        for j in range(3)
    ]
    nothing: list[pa.Table] = []
    tables = [to_arrow(Solutions, rows)], [questions], [to_arrow(Labels, judge)], nothing
    for config in (
        ReviewConfig(review_steps=60, random_share=0.3),
        ReviewConfig(review_steps=9, random_share=1.0),
        ReviewConfig(review_steps=9, random_share=0.0, seed=4),
    ):
        whole = queue(*tables, config)
        assert len(whole) >= 0.7 * config.review_steps
        with monkeypatch.context() as patched:
            patched.setattr("medmm_ray.data.sorted_rows.BATCH_BYTES", 1)
            patched.setattr("medmm_ray.steps.review.windows", partial(windows, num_bytes=1))
            assert queue(*tables, config) == whole


def test_nothing_to_draw_from() -> None:
    drawn, probability = draw_steps(np.array([], dtype=np.int64), np.zeros((2, 0)), 5, 5)
    assert (len(drawn), len(probability)) == (0, 0)


def test_the_odd_draw_goes_to_the_same_of_equal_strata_in_any_order_of_rows() -> None:
    rows = [solutions(f"q{n}", f"s{n}") for n in range(3)]
    asked = pa.table(
        {"question_id": ["q0", "q1", "q2"], "difficulty": ["easy", "hard", "medium"], "modality": ["clinical"] * 3}
    )
    table, nothing = to_arrow(Solutions, rows), to_arrow(Labels, [])
    config = ReviewConfig(review_steps=4, random_share=0.0)  # three strata of four steps: one of them gives two
    drawn = queue([table], [asked], [nothing], [], config)
    assert len(drawn) == 4
    for order in ([0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        assert queue([table.take(order)], [asked], [], [], config) == drawn


def test_the_queue_is_the_same_in_any_order_of_rows() -> None:
    rows = [solutions(f"q{i}", *(f"s{i}-{j}" for j in range(4))) for i in range(6)]
    questions = pa.table(
        {
            "question_id": [f"q{i}" for i in range(6)],
            "difficulty": ["easy"] * 5 + ["hard"],
            "modality": ["radiology"] * 6,
        }
    )
    judge = to_arrow(Labels, [labels(f"s{i}-{j}", "judge", [1] * 4, "high") for i in range(6) for j in range(4)])
    rolled = to_arrow(Labels, [labels("s0-0", "monte_carlo", [0, None, None, None])])
    config = ReviewConfig(review_steps=20, random_share=0.25)
    table = to_arrow(Solutions, rows)
    items = queue([table], [questions], [judge], [rolled], config)
    mixed = table.take([3, 1, 5, 0, 2, 4])
    other = queue([mixed.slice(0, 4), mixed.slice(4)], [questions.take([5, 4, 3, 2, 1, 0])], [judge], [rolled], config)
    assert items == other
    strata = {item.stratum for item in items}
    assert strata == {"easy/radiology/sure", "easy/radiology/disagree", "hard/radiology/sure", "random"}
    assert 15 <= len(items) <= 20
    [disputed] = [item for item in items if item.stratum == "easy/radiology/disagree"]
    assert (disputed.question_id, disputed.solution_id, disputed.step_index) == ("q0", "s0-0", 0)
    assert disputed.inclusion_probability == 1.0
    assert len({(item.solution_id, item.step_index) for item in items}) == len(items)
    assert to_arrow(ReviewItem, items).num_rows == len(items)
    assert queue([table], [questions], [judge], [rolled], ReviewConfig(review_steps=0)) == []


def expert(config: ReviewConfig, items: list[tuple[str, int]], **row: Any) -> list[Labels]:
    values = {
        "question_id": "q1",
        "source": "phantom",
        "split": "train",
        "options": ["effusion", "normal chest"],
        "answer": "A",
        "image_ids": ["im1"],
        "solutions": [{"solution_id": i, "steps": STEPS} for i in ("s1", "s2")],
    }
    images = pa.table({"image_id": ["im1"], "annotation": [EFFUSION.annotation()]})
    [out] = Expert(config, items, images)(pa.Table.from_pylist([{**values, **row}])).to_pylist()
    assert out["question_id"] == "q1"
    return [from_dict(Labels, label) for label in out["labels"]]


NEUTRAL = StepLabel(confidence="high", reason="nothing to check")
RIGHT, WRONG = StepLabel(label=1, confidence="high"), StepLabel(label=0, confidence="high")


def test_the_phantom_expert_answers_the_queue_only() -> None:
    [found] = expert(ReviewConfig(), [("s2", 0), ("s2", 2), ("elsewhere", 1)])
    assert (found.solution_id, found.source, found.annotator) == ("s2", "expert", EXPERT)
    assert found.steps == [NEUTRAL, StepLabel(), WRONG, StepLabel()]


def test_test_solutions_get_the_whole_truth() -> None:
    found = expert(ReviewConfig(), [("s1", 1)], split="test")
    assert [(f.solution_id, f.source) for f in found] == [("s1", "expert"), ("s1", "phantom"), ("s2", "phantom")]
    assert found[0].steps == [StepLabel(), RIGHT, StepLabel(), StepLabel()]
    assert found[1].steps == [NEUTRAL, RIGHT, WRONG, RIGHT]
    assert found[1].annotator == TRUTH


def test_without_an_expert_or_a_phantom_there_are_no_labels() -> None:
    assert expert(ReviewConfig(expert="none"), [("s1", 1)], split="test") == []
    assert expert(ReviewConfig(), [("s1", 1)], source="vqa_rad", split="test") == []
