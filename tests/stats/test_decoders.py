"""Rewards, votes and accuracy at N by hand, in exact decimals, and against plain counting over all subsets."""

import itertools
import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import Any, get_args

import numpy as np
import pytest

from medmm_ray.stats import decoders, metrics

NAN = math.nan


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("how", "reward"),
    [
        ("min", 0.25),
        ("last", 0.8),
        ("mean", (0.25 + 0.5 + 0.8) / 3),
        ("product", 0.1),
        ("gmean", 0.1 ** (1 / 3)),
        ("min_after_first", 0.5),
    ],
)
def test_aggregates_of_probabilities(how: decoders.Aggregate, reward: float) -> None:
    assert decoders.aggregate([logit(0.25), logit(0.5), logit(0.8)], how) == pytest.approx(logit(reward), rel=1e-12)


def test_rewards_of_many_solutions_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    num_steps = rng.integers(1, 12, 50)
    steps = np.split(rng.normal(1, 4, num_steps.sum()), np.cumsum(num_steps)[:-1])
    for how in get_args(decoders.Aggregate):
        rewards = decoders.aggregates(np.concatenate(steps), num_steps, how)
        assert rewards.tolist() == [decoders.aggregate(x, how) for x in steps]
    assert decoders.aggregates(np.zeros(0), np.zeros(0, dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("how", ["mean", "product", "gmean"])
def test_the_order_of_equal_steps_breaks_no_tie(how: decoders.Aggregate) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        steps = rng.normal(0, 3, 9)
        assert decoders.aggregate(steps, how) == decoders.aggregate(rng.permutation(steps), how)


@pytest.mark.parametrize("how", ["min", "last", "mean", "product", "gmean", "min_after_first"])
def test_saturated_probabilities_still_rank(how: decoders.Aggregate) -> None:
    low, high = decoders.aggregate([40.0, 40.0], how), decoders.aggregate([41.0, 41.0], how)
    assert metrics.probability(low) == metrics.probability(high) == 1.0
    assert low < high < math.inf


def test_aggregate_of_one_step_and_of_none() -> None:
    assert decoders.aggregate([logit(0.3)], "min_after_first") == pytest.approx(logit(0.3))
    with pytest.raises(ValueError, match="without steps"):
        decoders.aggregate([])


def test_product_that_rounds_to_one_is_infinitely_sure() -> None:
    assert decoders.aggregate([1000.0], "product") == math.inf


def test_answer_codes_follow_first_appearance() -> None:
    assert decoders.answer_codes(["B", None, " b ", "", "A"]).tolist() == [0, -1, 0, -1, 1]
    assert decoders.answer_codes(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")).tolist() == list(range(26))


def test_answers_are_one_where_grading_calls_them_the_same() -> None:
    open_answers = [
        "pneumonia",
        "the pleural effusion",
        "Pleural effusions.",
        "pneumonia",
        "a pleural effusion",
        "?",
        "!",
    ]
    assert decoders.answer_codes(open_answers).tolist() == [0, 1, 1, 0, 1, 2, 3]
    assert decoders.vote(open_answers) == 1  # three against two
    assert decoders.answer_codes(["true", "Yes", "no", "25mg", "25 milligrams"]).tolist() == [0, 0, 1, 2, 2]


def test_what_a_model_grades_as_the_reference_is_one_answer() -> None:
    answers = ["pneumonia", "fluid in the pleura", "pneumonia", "Fluid in the pleura", "hydrothorax", None]
    right = [False, True, False, True, True, None]
    assert decoders.answer_codes(answers, right).tolist() == [0, 1, 0, 1, 1, -1]
    assert decoders.answer_codes(answers).tolist() == [0, 1, 0, 1, 2, -1]
    correct = np.array([bool(x) for x in right])
    everything = np.ones((1, 6), dtype=bool)
    assert decoders.expected_vote(decoders.answer_codes(answers, right), correct, everything) == 1.0
    assert decoders.expected_vote(decoders.answer_codes(answers), correct, everything) == 0.0  # a tie: the first


def test_best_of_n_takes_the_first_of_equals_and_skips_the_unscored() -> None:
    assert decoders.best_of_n([NAN, 0.5, 2.0, 2.0]) == 2
    assert decoders.best_of_n([NAN, NAN]) is None
    assert decoders.best_of_n([]) is None
    assert decoders.best_of_n([NAN, -math.inf]) == 1
    assert decoders.best_of_n([1.0, math.inf, math.inf]) == 1  # sure beyond what a float can say


def test_votes() -> None:
    answers = ["A", "B", "B", None, None, None]
    assert decoders.vote(answers) == 1
    assert decoders.vote(["B", "A", "A", "B"]) == 0  # a tie: the first answer
    assert decoders.vote([None, ""]) is None
    assert decoders.vote([]) is None
    # A: .9; B: .4 + .45 = .85; an empty answer has no vote, whatever its reward.
    rewards = [logit(0.9), logit(0.4), logit(0.45), 9.0, 9.0, 9.0]
    assert decoders.vote(answers, rewards) == 0
    assert decoders.vote(["A", "B", "B"], [logit(0.6), logit(0.5), logit(0.5)], "sum") == 1
    assert decoders.vote(["A", "B", "B"], [logit(0.6), logit(0.5), logit(0.5)], "mean") == 0
    assert decoders.vote(["A", "B", "B"], [NAN, NAN, -3.0]) == 1
    assert decoders.vote(["A", "B"], [NAN, NAN]) is None


def test_a_vote_of_saturated_rewards_is_no_tie() -> None:
    assert decoders.vote(["A", "B"], [40.0, 41.0]) == 1
    assert decoders.vote(["A", "B"], [41.0, 40.0]) == 0


def exact_vote(answers: Sequence[str | None], rewards: Sequence[float], rule: str) -> int | None:
    """The vote in decimals of 60 digits: no sum of it is rounded where a double would be."""
    with localcontext() as context:
        context.prec = 60
        totals: dict[str, list[Decimal]] = {}
        for answer, reward in zip(answers, rewards, strict=True):
            if answer and not math.isnan(reward):
                totals.setdefault(answer, []).append(1 / (1 + (-Decimal(reward)).exp()))
        values = {a: sum(own, Decimal(0)) / (len(own) if rule == "mean" else 1) for a, own in totals.items()}
        best = max(values.values(), default=Decimal(0))
        # Decimals are rounded at the 60th digit.
        leaders = [a for a, value in values.items() if best - value < Decimal("1e-50")]
    scored = [a if a and not math.isnan(r) else None for a, r in zip(answers, rewards, strict=True)]
    return scored.index(leaders[0]) if leaders else None


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_equal_sums_of_rewards_are_a_tie_whatever_their_order(rule: Any) -> None:
    """A float sum of the same numbers in another order differs in its last bit, in a quarter of these cases."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        rewards = np.round(rng.uniform(-3, 3, size=5), 1)
        other = rng.permutation(rewards)
        answers, both = ["A", "B"] * 5, np.stack([rewards, other], axis=1).ravel()
        assert decoders.vote(answers, both, rule) == exact_vote(answers, both.tolist(), rule) == 0
        both[-1] += 1e-12  # no tie any more
        assert decoders.vote(answers, both, rule) == exact_vote(answers, both.tolist(), rule) == 1


def test_sums_near_whole_numbers_are_compared_exactly() -> None:
    assert decoders.vote(["A", "B", "B"], [40.0, 0.0, 0.0]) == 1
    assert decoders.vote(["B", "B", "A"], [0.0, 0.0, 40.0]) == 0
    assert decoders.vote(["B", "B", "A", "A"], [0.0, 0.0, 40.0, -40.0]) == 0  # 1 and exactly 1
    assert decoders.vote(["B", "B", "A", "A"], [0.0, 0.0, 40.0, -39.9]) == 2
    assert decoders.vote(["B", "B", "A"], [0.0, 0.0, 40.0], "mean") == 2
    assert decoders.vote(["A", "B", "B", "B"], [0.3, 0.3, 0.3, 0.3], "mean") == 0


def test_named_decoders() -> None:
    answers = ["A", "B", "B", "C"]
    steps = [[2.0, 2.0, 2.0], [-2.0, 1.5, 1.0], [3.0, 0.0, 1.0], []]
    picked = {name: decoders.decode(name, answers, steps) for name in decoders.DECODERS}
    assert picked["majority"] == 1
    assert picked["best_of_n"] == 0
    assert picked["sc_rm"] == 0  # A .881; B .119 + .5
    assert picked["prm-max"] == 0
    assert picked["prm-vote-sum"] == 1  # A .881; B .731 + .731
    assert picked["prm-vote-mean"] == 0
    assert picked["prm-min-vote-sum"] == 1  # without the first step: A .881; B .731 + .5
    with pytest.raises(ValueError, match="unknown decoder 'bon'"):
        decoders.decode("bon", answers, steps)


def brute(rewards: list[float], correct: list[bool], n: int) -> float:
    """The share of all subsets whose best scored sample, the first of equals, is right."""
    subsets = list(itertools.combinations(range(len(correct)), n))
    hits = 0
    for subset in subsets:
        scored = [i for i in subset if not math.isnan(rewards[i])]
        if scored:
            highest = max(rewards[i] for i in scored)
            hits += correct[next(i for i in scored if rewards[i] == highest)]
    return hits / len(subsets)


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    rewards = np.round(rng.normal(size=8), 1)
    rewards[[2, 5]] = rewards[3], NAN
    correct = rng.random(8) < 0.4
    for n in range(1, 9):
        expected = brute(rewards.tolist(), correct.tolist(), n)
        assert decoders.expected_best(rewards, correct, n) == pytest.approx(expected, abs=1e-12)
    assert decoders.expected_best(rewards, correct, 99) == float(correct[int(np.nanargmax(rewards))])
    assert decoders.expected_best(np.empty(0), np.empty(0, bool), 4) == 0.0


def test_expected_oracle() -> None:
    correct = np.array([True, False, False, False])
    assert [decoders.expected_oracle(correct, n) for n in (1, 2, 4, 64)] == [0.25, 0.5, 1.0, 1.0]
    assert decoders.expected_oracle(np.empty(0, bool), 4) == 0.0


def test_expected_vote_is_the_mean_over_all_subsets_where_they_are_few() -> None:
    answers = ["A", "B", "B", None, "A", "C", "B"]
    correct = np.array([a == "B" for a in answers])
    rewards = np.array([0.3, -1.0, 0.2, 2.0, -0.4, NAN, 0.9])
    codes = np.array([0, 1, 1, -1, 0, 2, 1])
    for n in range(1, 8):
        drawn = decoders.subsets(7, n, 128, seed=5)
        assert len(drawn) == math.comb(7, n)
        for given in (None, rewards):
            hits = 0
            for subset in itertools.combinations(range(7), n):
                ballots: dict[str, float] = {}
                for i in subset:
                    weight = 1.0 if given is None else 1 / (1 + math.exp(-given[i]))
                    if answers[i] and not math.isnan(weight):
                        ballots[str(answers[i])] = ballots.get(str(answers[i]), 0.0) + weight
                hits += bool(ballots) and max(ballots, key=ballots.__getitem__) == "B"  # the first of equals
            share = hits / math.comb(7, n)
            assert decoders.expected_vote(codes, correct, drawn, given) == pytest.approx(share)


def test_random_subsets_are_seeded_distinct_in_themselves_and_unbiased() -> None:
    drawn = decoders.subsets(64, 8, 200, seed=3)
    assert drawn.shape == (200, 64)
    assert (drawn.sum(axis=1) == 8).all()
    assert (drawn == decoders.subsets(64, 8, 200, seed=3)).all()
    assert (drawn != decoders.subsets(64, 8, 200, seed=4)).any()
    assert abs(decoders.subsets(64, 8, 20000, seed=3).mean(axis=0) - 1 / 8).max() < 0.012
    assert decoders.subsets(64, 99, 200, seed=3).all()


def test_several_sets_of_subsets_at_once_are_each_of_them() -> None:
    rng = np.random.default_rng(4)
    codes, rewards = rng.integers(-1, 3, 12), rng.normal(0, 2, 12)
    correct = codes == 1
    sets = [decoders.subsets(12, n, 20, 0) for n in (1, 2, 5, 12)]
    one_by_one = [decoders.expected_vote(codes, correct, subsets, rewards) for subsets in sets]
    assert decoders.expected_votes(codes, correct, sets, rewards) == one_by_one
    assert len(set(one_by_one)) > 1


def test_expected_vote_without_votes() -> None:
    nobody = decoders.answer_codes([None, None])
    assert decoders.expected_vote(nobody, np.array([True, True]), decoders.subsets(2, 1, 9, 0)) == 0.0
    empty = decoders.answer_codes([])
    assert decoders.expected_vote(empty, np.empty(0, bool), decoders.subsets(1, 1, 9, 0)) == 0.0
