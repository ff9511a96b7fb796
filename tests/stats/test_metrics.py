"""Figures by hand, against scikit-learn where it has them, and against plain counting over all subsets."""

import itertools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from medmm_ray.stats import metrics

NAN = math.nan


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_probability_does_not_overflow() -> None:
    assert metrics.probability([-1000, 0, 1000]).tolist() == [0.0, 0.5, 1.0]
    assert metrics.probability(-50.0) == pytest.approx(math.exp(-50), rel=1e-12)


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
def test_aggregates_of_probabilities(how: metrics.Aggregate, reward: float) -> None:
    assert metrics.aggregate([logit(0.25), logit(0.5), logit(0.8)], how) == pytest.approx(logit(reward), rel=1e-12)


@pytest.mark.parametrize("how", ["min", "last", "mean", "product", "gmean", "min_after_first"])
def test_saturated_probabilities_still_rank(how: metrics.Aggregate) -> None:
    low, high = metrics.aggregate([40.0, 40.0], how), metrics.aggregate([41.0, 41.0], how)
    assert metrics.probability(low) == metrics.probability(high) == 1.0
    assert low < high < math.inf


def test_aggregate_of_one_step_and_of_none() -> None:
    assert metrics.aggregate([logit(0.3)], "min_after_first") == pytest.approx(logit(0.3))
    with pytest.raises(ValueError, match="without steps"):
        metrics.aggregate([])


def test_product_that_rounds_to_one_is_infinitely_sure() -> None:
    assert metrics.aggregate([1000.0], "product") == math.inf


def test_answer_codes_follow_first_appearance() -> None:
    assert metrics.answer_codes(["B", None, " b ", "", "A"]).tolist() == [0, -1, 0, -1, 1]
    assert metrics.answer_codes(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")).tolist() == list(range(26))


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
    assert metrics.answer_codes(open_answers).tolist() == [0, 1, 1, 0, 1, 2, 3]
    assert metrics.vote(open_answers) == 1  # three against two
    assert metrics.answer_codes(["true", "Yes", "no", "25mg", "25 milligrams"]).tolist() == [0, 0, 1, 2, 2]


def test_what_a_model_grades_as_the_reference_is_one_answer() -> None:
    answers = ["pneumonia", "fluid in the pleura", "pneumonia", "Fluid in the pleura", "hydrothorax", None]
    right = [False, True, False, True, True, None]
    assert metrics.answer_codes(answers, right).tolist() == [0, 1, 0, 1, 1, -1]
    assert metrics.answer_codes(answers).tolist() == [0, 1, 0, 1, 2, -1]
    correct = np.array([bool(x) for x in right])
    everything = np.ones((1, 6), dtype=bool)
    assert metrics.expected_vote(metrics.answer_codes(answers, right), correct, everything) == 1.0
    assert metrics.expected_vote(metrics.answer_codes(answers), correct, everything) == 0.0  # a tie: the first


def test_best_of_n_takes_the_first_of_equals_and_skips_the_unscored() -> None:
    assert metrics.best_of_n([NAN, 0.5, 2.0, 2.0]) == 2
    assert metrics.best_of_n([NAN, NAN]) is None
    assert metrics.best_of_n([]) is None
    assert metrics.best_of_n([NAN, -math.inf]) == 1
    assert metrics.best_of_n([1.0, math.inf, math.inf]) == 1  # sure beyond what a float can say


def test_votes() -> None:
    answers = ["A", "B", "B", None, None, None]
    assert metrics.vote(answers) == 1
    assert metrics.vote(["B", "A", "A", "B"]) == 0  # a tie: the first answer
    assert metrics.vote([None, ""]) is None
    assert metrics.vote([]) is None
    # A: .9; B: .4 + .45 = .85; an empty answer has no vote, whatever its reward.
    rewards = [logit(0.9), logit(0.4), logit(0.45), 9.0, 9.0, 9.0]
    assert metrics.vote(answers, rewards) == 0
    assert metrics.vote(["A", "B", "B"], [logit(0.6), logit(0.5), logit(0.5)], "sum") == 1
    assert metrics.vote(["A", "B", "B"], [logit(0.6), logit(0.5), logit(0.5)], "mean") == 0
    assert metrics.vote(["A", "B", "B"], [NAN, NAN, -3.0]) == 1
    assert metrics.vote(["A", "B"], [NAN, NAN]) is None


def test_a_vote_of_saturated_rewards_is_no_tie() -> None:
    assert metrics.vote(["A", "B"], [40.0, 41.0]) == 1
    assert metrics.vote(["A", "B"], [41.0, 40.0]) == 0


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
        assert metrics.vote(answers, both, rule) == exact_vote(answers, both.tolist(), rule) == 0
        both[-1] += 1e-12  # no tie any more
        assert metrics.vote(answers, both, rule) == exact_vote(answers, both.tolist(), rule) == 1


def test_sums_near_whole_numbers_are_compared_exactly() -> None:
    assert metrics.vote(["A", "B", "B"], [40.0, 0.0, 0.0]) == 1
    assert metrics.vote(["B", "B", "A"], [0.0, 0.0, 40.0]) == 0
    assert metrics.vote(["B", "B", "A", "A"], [0.0, 0.0, 40.0, -40.0]) == 0  # 1 and exactly 1
    assert metrics.vote(["B", "B", "A", "A"], [0.0, 0.0, 40.0, -39.9]) == 2
    assert metrics.vote(["B", "B", "A"], [0.0, 0.0, 40.0], "mean") == 2
    assert metrics.vote(["A", "B", "B", "B"], [0.3, 0.3, 0.3, 0.3], "mean") == 0


def test_named_decoders() -> None:
    answers = ["A", "B", "B", "C"]
    steps = [[2.0, 2.0, 2.0], [-2.0, 1.5, 1.0], [3.0, 0.0, 1.0], []]
    picked = {name: metrics.decode(name, answers, steps) for name in metrics.DECODERS}
    assert picked["majority"] == 1
    assert picked["best_of_n"] == 0
    assert picked["sc_rm"] == 0  # A .881; B .119 + .5
    assert picked["prm-max"] == 0
    assert picked["prm-vote-sum"] == 1  # A .881; B .731 + .731
    assert picked["prm-vote-mean"] == 0
    assert picked["prm-min-vote-sum"] == 1  # without the first step: A .881; B .731 + .5
    with pytest.raises(ValueError, match="unknown decoder 'bon'"):
        metrics.decode("bon", answers, steps)


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
        assert metrics.expected_best(rewards, correct, n) == pytest.approx(expected, abs=1e-12)
    assert metrics.expected_best(rewards, correct, 99) == float(correct[int(np.nanargmax(rewards))])
    assert metrics.expected_best(np.empty(0), np.empty(0, bool), 4) == 0.0


def test_expected_oracle() -> None:
    correct = np.array([True, False, False, False])
    assert [metrics.expected_oracle(correct, n) for n in (1, 2, 4, 64)] == [0.25, 0.5, 1.0, 1.0]
    assert metrics.expected_oracle(np.empty(0, bool), 4) == 0.0


def test_expected_vote_is_the_mean_over_all_subsets_where_they_are_few() -> None:
    answers = ["A", "B", "B", None, "A", "C", "B"]
    correct = np.array([a == "B" for a in answers])
    rewards = np.array([0.3, -1.0, 0.2, 2.0, -0.4, NAN, 0.9])
    codes = np.array([0, 1, 1, -1, 0, 2, 1])
    for n in range(1, 8):
        drawn = metrics.subsets(7, n, 128, seed=5)
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
            assert metrics.expected_vote(codes, correct, drawn, given) == pytest.approx(share)


def test_random_subsets_are_seeded_distinct_in_themselves_and_unbiased() -> None:
    drawn = metrics.subsets(64, 8, 200, seed=3)
    assert drawn.shape == (200, 64)
    assert (drawn.sum(axis=1) == 8).all()
    assert (drawn == metrics.subsets(64, 8, 200, seed=3)).all()
    assert (drawn != metrics.subsets(64, 8, 200, seed=4)).any()
    assert abs(metrics.subsets(64, 8, 20000, seed=3).mean(axis=0) - 1 / 8).max() < 0.012
    assert metrics.subsets(64, 99, 200, seed=3).all()


def test_expected_vote_without_votes() -> None:
    nobody = metrics.answer_codes([None, None])
    assert metrics.expected_vote(nobody, np.array([True, True]), metrics.subsets(2, 1, 9, 0)) == 0.0
    empty = metrics.answer_codes([])
    assert metrics.expected_vote(empty, np.empty(0, bool), metrics.subsets(1, 1, 9, 0)) == 0.0


def test_bootstrap_interval_is_that_of_the_binomial() -> None:
    values = np.stack([np.arange(400) < 100, np.ones(400)], axis=1).astype(np.float64)
    low, high = metrics.bootstrap(values, 4000, seed=0)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low.tolist() == pytest.approx([0.25 - half, 1.0], abs=0.004)
    assert high.tolist() == pytest.approx([0.25 + half, 1.0], abs=0.004)
    assert metrics.bootstrap(values, 4000, seed=0)[0].tolist() == low.tolist()
    assert np.isnan(metrics.bootstrap(np.empty((0, 2)), 10, 0)[0]).all()


@pytest.fixture
def steps() -> tuple[metrics.Bools, metrics.Floats]:
    rng = np.random.default_rng(7)
    labels = rng.random(500) < 0.7
    return labels, np.round(rng.normal(labels * 1.5 - 0.5, 1.2), 1)  # rounded: many ties


def test_step_metrics_equal_those_of_sklearn(steps: tuple[metrics.Bools, metrics.Floats]) -> None:
    labels, log_odds = steps
    called, other = log_odds >= 0.0, log_odds >= math.log(4)
    assert metrics.predicted_right(log_odds).tolist() == called.tolist()
    assert metrics.predicted_right(log_odds, 0.8).tolist() == other.tolist()
    assert metrics.auroc(labels, log_odds) == pytest.approx(sk.roc_auc_score(labels, log_odds), abs=1e-12)
    assert metrics.macro_f1(labels, called) == pytest.approx(sk.f1_score(labels, called, average="macro"), abs=1e-12)
    assert metrics.cohen_kappa(labels, other) == pytest.approx(sk.cohen_kappa_score(labels, other), abs=1e-12)
    weights = np.linspace(1, 4, 500)
    weighted = sk.cohen_kappa_score(labels, called, sample_weight=weights)
    assert metrics.cohen_kappa(labels, called, weights) == pytest.approx(weighted, abs=1e-12)
    weighted = sk.roc_auc_score(labels, log_odds, sample_weight=weights)
    assert metrics.auroc(labels, log_odds, weights) == pytest.approx(weighted, abs=1e-12)
    assert sk.auc(*metrics.roc_curve(labels, log_odds, 10_000, weights)) == pytest.approx(weighted, abs=1e-12)
    weighted = sk.f1_score(labels, called, average="macro", sample_weight=weights)
    assert metrics.macro_f1(labels, called, weights) == pytest.approx(weighted, abs=1e-12)
    false, true = metrics.roc_curve(labels, log_odds, num_points=10_000)
    assert sk.auc(false, true) == pytest.approx(sk.roc_auc_score(labels, log_odds), abs=1e-12)
    thin_false, thin_true = metrics.roc_curve(labels, log_odds, num_points=21)
    assert len(thin_false) <= 21
    assert (thin_false[0], thin_true[0], thin_false[-1], thin_true[-1]) == (0, 0, 1, 1)


def test_step_metrics_by_hand() -> None:
    labels = np.array([True, True, False, False])
    scores = np.array([2.0, -1.0, 0.0, -3.0])
    assert metrics.auroc(labels, scores) == 0.75
    called = metrics.predicted_right(scores)
    assert called.tolist() == [True, False, True, False]
    assert metrics.macro_f1(labels, called) == 0.5
    assert metrics.cohen_kappa(labels, called) == 0.0
    assert metrics.cohen_kappa([1, 1, 0, 0], [1, 1, 0, 1]) == 0.5


def test_step_metrics_without_data() -> None:
    none, one_class = np.empty(0, bool), np.array([True, True])
    assert metrics.auroc(one_class, np.array([1.0, 2.0])) is None
    assert metrics.roc_curve(one_class, np.array([1.0, 2.0])) == ([], [])
    assert metrics.roc_curve(none, np.empty(0)) == ([], [])
    assert metrics.macro_f1(none, none) is None
    assert metrics.macro_f1(one_class, one_class) == 0.5
    assert metrics.cohen_kappa([], []) is None
    assert metrics.cohen_kappa([1, 1], [1, 1]) is None
    assert metrics.expected_calibration_error(metrics.calibration(none, np.empty(0))) is None


def test_calibration_error_weights_bins_by_count() -> None:
    labels = np.array([True, False, True, True, False])
    p = np.array([0.95, 0.95, 0.9, 1.0, 0.15])
    bins = metrics.calibration(labels, p)
    assert [b.count for b in bins] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 4]
    assert bins[9].mean_probability == pytest.approx(0.95)
    assert bins[9].share_right == 0.75
    assert metrics.expected_calibration_error(bins) == pytest.approx(0.8 * 0.2 + 0.2 * 0.15)
    weighted = metrics.calibration(labels, p, weights=np.array([1.0, 5.0, 1.0, 1.0, 2.0]))
    assert ([b.count for b in weighted[1::8]], [b.weight for b in weighted[1::8]]) == ([1, 4], [2.0, 8.0])
    assert weighted[9].share_right == 3 / 8
    assert weighted[9].mean_probability == pytest.approx(0.95)
    gaps = 8 * (0.95 - 3 / 8) + 2 * 0.15
    assert metrics.expected_calibration_error(weighted) == pytest.approx(gaps / 10)


LABELS = np.array([True, True, False, False])
NOT_FINITE = np.array([2.0, NAN, 0.0, math.inf])


@pytest.mark.parametrize(
    "figure",
    [
        lambda: metrics.aggregate(NOT_FINITE.tolist()),
        lambda: metrics.decode("sc_rm", ["A"], [NOT_FINITE.tolist()]),
        lambda: metrics.auroc(LABELS, NOT_FINITE),
        lambda: metrics.auroc(LABELS, np.zeros(4), NOT_FINITE),
        lambda: metrics.roc_curve(LABELS, NOT_FINITE),
        lambda: metrics.predicted_right(NOT_FINITE),
        lambda: metrics.macro_f1(LABELS, LABELS, NOT_FINITE),
        lambda: metrics.calibration(LABELS, NOT_FINITE),
        lambda: metrics.calibration(LABELS, np.zeros(4), weights=NOT_FINITE),
        lambda: metrics.cohen_kappa(LABELS, LABELS, NOT_FINITE),
        lambda: metrics.effective_size(NOT_FINITE),
        lambda: metrics.minimum_on_last_step([[1.0, 2.0], NOT_FINITE.tolist()]),
        lambda: metrics.histogram(LABELS, NOT_FINITE),
        lambda: metrics.bootstrap(NOT_FINITE[:, None], 10, 0),
    ],
)
def test_what_is_not_finite_is_refused_with_its_number(figure: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^2 of 4 [a-z ]+ are not finite numbers \(NaN or infinite\)"):
        figure()


@pytest.mark.parametrize(
    "figure",
    [
        lambda: metrics.cohen_kappa([1, NAN, 0], [1, 1, 0]),
        lambda: metrics.cohen_kappa([1, 1, 0], np.array([1, None, 0])),
        lambda: metrics.auroc(np.array([1, NAN, 0]), np.zeros(3)),
        lambda: metrics.macro_f1(np.array([1, 2, 0]), np.zeros(3, dtype=bool)),
        lambda: metrics.first_error([1, NAN, 0]),  # type: ignore[list-item]
    ],
)
def test_a_label_that_is_neither_true_nor_false_is_refused(figure: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^1 of 3 [a-z]+ are neither true nor false"):
        figure()


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (lambda: metrics.predicted_right([0.0], 1.0), r"threshold is 1\.0; expected a probability above 0 and below 1"),
        (lambda: metrics.predicted_right([0.0], 0.0), r"threshold is 0\.0"),
        (lambda: metrics.calibration(LABELS, np.zeros(4), 0), "num_bins is 0; expected at least 1"),
        (lambda: metrics.bootstrap(np.zeros((3, 1)), 0, 0), "num_resamples is 0; expected at least 1"),
        (lambda: metrics.subsets(4, 0, 9, 0), "n is 0 and num_subsets 9; expected at least 1 of each"),
    ],
)
def test_settings_out_of_bounds_are_refused(figure: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        figure()


def test_first_errors() -> None:
    assert metrics.first_error([1, None, 0, 0]) == 2
    assert metrics.first_error([1, None]) == -1
    found = metrics.processbench_f1([2, 0, -1, -1], [2, 1, -1, -1])
    assert found == {"erroneous": 0.5, "correct": 1.0, "f1": pytest.approx(2 / 3)}
    assert metrics.processbench_f1([2], [2]) == {"erroneous": 1.0, "correct": None, "f1": None}
    assert metrics.processbench_f1([2, -1], [0, 0])["f1"] == 0.0


def test_minimum_on_last_step() -> None:
    assert metrics.minimum_on_last_step([[1, 0], [0, 1], [0, 0], [5]]) == pytest.approx(1 / 3)
    assert metrics.minimum_on_last_step([[5]]) is None


def test_histogram() -> None:
    found = metrics.histogram(np.array([True, False, True]), np.array([0.1, 0.9, 1.0]), num_bins=2)
    assert found == {"edges": [0.0, 0.5, 1.0], "right": [1, 1], "wrong": [0, 1]}
