"""agreement.py: kappa by hand, the first wrong step, and the weights of the expert's queue."""

from collections.abc import Mapping

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from medmm_ray.data.records import ReviewItem, Solutions, to_arrow
from medmm_ray.stats.agreement import (
    Agreement,
    LabelledSteps,
    PairAgreement,
    QueuedSteps,
    first_errors,
    prefixes,
    queued_steps,
)
from medmm_ray.stats.grouped_stats import Groups
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, Codes, Steps, drop_texts, steps_of
from medmm_ray.stats.metrics import cohen_kappa, kappa_of_counts
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.review import draw_steps
from tests.stats.test_label_arrays import question, solution

HOW = Resampling(200, 0)
LETTERS = {"+": RIGHT, "-": WRONG, "0": NEUTRAL, "?": UNLABELLED}


def code(text: str) -> Codes:
    return np.array([LETTERS[letter] for letter in text.replace(" ", "")], dtype=np.int8)


def steps(*lengths: list[int]) -> Steps:
    """Steps of questions with solutions of these lengths."""
    rows = [
        question(f"q{q}", *(solution(f"s{q}.{i}", length) for i, length in enumerate(own)))
        for q, own in enumerate(lengths)
    ]
    return steps_of(drop_texts(to_arrow(Solutions, rows)))


def agreement(
    order: Steps, codes: Mapping[str, Codes], groups: Mapping[str, Groups], queue: QueuedSteps | None, how: Resampling
) -> list[PairAgreement]:
    """The agreement of sources whose questions are all there at once."""
    pairs = Agreement(codes)
    pairs.add(LabelledSteps(order, codes, groups, queue))
    return pairs.figures(how)


def test_kappa_and_equal_labels_by_hand() -> None:
    order = steps([4, 4], [4])
    judge, truth = code("++-- +++- +0-+"), code("+--- +++- ++++")
    groups = {"answer": Groups(("wrong", "right"), np.array([0, 1, 1]))}
    (found,) = agreement(order, {"phantom": truth, "judge": judge}, groups, None, HOW)
    assert (found.first, found.second, found.weighted) == ("judge", "phantom", False)
    # Of 11 shared steps 9 are equal; the judge calls 7 right, the truth 7: chance (49 + 16) / 121.
    kappa = (9 / 11 - 65 / 121) / (1 - 65 / 121)
    overall = found.overall_kappa
    assert overall.value == pytest.approx(kappa, abs=1e-6)
    assert overall.equal == pytest.approx(9 / 11, abs=1e-6)
    assert (overall.count, overall.questions) == (11, 2)
    wrong = found.kappa["answer"]["wrong"]
    assert (wrong.value, wrong.count, wrong.low) == (0.5, 4, None)  # one question
    assert {name: f.count for name, f in found.kappa["position"].items()} == {"first": 3, "middle": 5, "last": 3}
    assert found.kappa["position"]["first"].value is None  # both call each first step right
    # First errors: 2 and 1; 3 and 3; 2 and none.
    assert found.first_error["all"]["all"].value == pytest.approx(1 / 3, abs=1e-6)
    assert found.first_error["answer"]["right"].value == 0.5
    assert found.looked_at == 3


def test_sources_that_share_no_step_are_no_pair_and_pairs_are_in_order() -> None:
    order = steps([2], [2])
    sides = {"expert": code("+- ??"), "tree_search": code("?? +-"), "judge": code("+- --"), "mine": code("++ ??")}
    pairs = [(p.first, p.second) for p in agreement(order, sides, {}, None, HOW)]
    assert pairs == [("judge", "tree_search"), ("judge", "expert"), ("judge", "mine"), ("expert", "mine")]


def test_kappa_of_counts_at_its_edges() -> None:
    tables = np.array([[0, 0, 0, 0], [0, 0, 0, 7], [5, 0, 0, 5], [0, 5, 5, 0], [25, 25, 25, 25], [0, 3, 0, 7.0]])
    assert kappa_of_counts(tables).tolist() == pytest.approx([np.nan, np.nan, 1, -1, 0, 0], nan_ok=True)
    assert cohen_kappa([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]) == pytest.approx((0.8 - 0.48) / 0.52)


def test_first_errors_that_a_source_settles() -> None:
    order = steps([3, 3, 3, 3, 3, 3])
    found, settled = first_errors(order, "judge", code("+-- +++ ?-+ +?? +0+ ???"))
    assert found.tolist() == [1, -1, 1, -1, -1, -1]
    assert settled.tolist() == [True, True, False, False, True, False]
    # A right prefix vouches for the steps before it; behind the last right one a gap stays a gap.
    _, settled = first_errors(order, "monte_carlo", code("?+- ??+ ?-+ +?- ?-? ???"))
    assert settled.tolist() == [True, True, True, False, False, False]
    # An expert settles solutions that are read as a whole.
    _, settled = first_errors(order, "expert", code("+-- -?? 00+ ??+ ??- ???"))
    assert settled.tolist() == [True, False, True, False, False, False]


def test_a_judge_beside_monte_carlo_is_read_by_prefixes() -> None:
    order = steps([4, 3], [3])
    judge = code("+-+0 +0+ ?+-")
    assert prefixes(order, judge).tolist() == code("+--- +++ ??-").tolist()
    sides = {"judge": judge, "monte_carlo": code("+-?- +?- ?+-"), "expert": code("?-+? ??? +??")}
    found = {(p.first, p.second): p for p in agreement(order, sides, {}, None, HOW)}
    pair = found["judge", "monte_carlo"]
    # Shared prefixes: + and -, - of the neutral step; + and its contradiction; - at the end: 5 of 6 are equal.
    assert pair.of == "prefix"
    assert pair.overall_kappa.count == 6
    assert pair.overall_kappa.equal == pytest.approx(5 / 6, abs=1e-6)
    assert found["monte_carlo", "expert"].of == found["judge", "expert"].of == "step"


def test_the_queue_weighs_an_expert_by_one_over_the_chance_to_be_asked() -> None:
    order = steps([2, 2], [2])
    items = [("s0.0", 0, 0.5), ("s0.1", 1, 0.1), ("s1.0", 0, 1.0), ("gone", 0, 0.5), ("s1.0", 9, 0.5)]
    table = to_arrow(
        ReviewItem,
        [
            ReviewItem(question_id="q", solution_id=s, step_index=i, stratum="x", inclusion_probability=p)
            for s, i, p in items
        ],
    )
    queue = queued_steps(order, table)
    assert queue.row.tolist() == [0, 3, 4]
    assert queue.probability.tolist() == [0.5, 0.1, 1.0]
    judge, expert = code("++ +- -+"), code("+? -- +?")
    found = agreement(order, {"judge": judge, "expert": expert}, {}, queue, HOW)[0]
    # Step 0 (weight 2) and 3 (weight 10) are equal, step 4 (weight 1) is not; step 2 lies outside the queue.
    overall = found.overall_kappa
    assert (found.weighted, found.outside_queue, overall.count) == (True, 1, 3)
    assert overall.equal == pytest.approx(12 / 13, abs=1e-6)
    assert overall.value == pytest.approx((12 / 13 - (2 * 3 + 11 * 10) / 169) / (1 - (2 * 3 + 11 * 10) / 169), abs=1e-6)
    assert overall.effective == pytest.approx(13**2 / 105, abs=0.05)


def test_the_weighted_kappa_covers_the_truth_where_the_plain_one_is_biased() -> None:
    """A queue that draws disputed steps far more often, 100 times; the truth is that of all 16,000 steps."""
    rng = np.random.default_rng(5)
    order = steps(*[[8] * 10 for _ in range(200)])
    num = len(order.solution)
    skill = np.repeat(rng.normal(0.75, 0.1, 200), 80)  # solutions of a question resemble each other
    truth = (rng.random(num) < skill).astype(np.int8)
    judge = np.where(rng.random(num) < 0.1, 1 - truth, truth).astype(np.int8)
    unsure = rng.random(num) < np.where(judge != truth, 0.6, 0.05)
    whole = cohen_kappa_score(judge, truth)
    plain, weighted, covered = [], [], 0
    for _ in range(100):
        drawn, probability = draw_steps(unsure.astype(np.int64), rng.random((2, num)), 320, 80)
        row = np.flatnonzero(drawn)
        expert = np.full(num, UNLABELLED, dtype=np.int8)
        expert[row] = truth[row]
        sides = {"judge": judge, "expert": expert}
        figure, biased = (
            agreement(order, sides, {}, queue, HOW)[0].overall_kappa
            for queue in (QueuedSteps(row, probability[row]), None)
        )
        assert figure.value is not None and figure.low is not None and figure.high is not None  # noqa: PT018 - types
        assert biased.value is not None
        weighted.append(figure.value)
        plain.append(biased.value)
        covered += figure.low <= whole <= figure.high
    assert np.mean(weighted) == pytest.approx(whole, abs=0.015)
    assert np.mean(plain) < whole - 0.2
    assert covered >= 88
