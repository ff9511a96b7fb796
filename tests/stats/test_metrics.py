"""Figures by hand, and against scikit-learn where it has them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sk

from medmm_ray.stats import decoders, metrics

NAN = math.nan


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_probability_does_not_overflow() -> None:
    assert metrics.probability([-1000, 0, 1000]).tolist() == [0.0, 0.5, 1.0]
    assert metrics.probability(-50.0) == pytest.approx(math.exp(-50), rel=1e-12)


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
        lambda: decoders.aggregate(NOT_FINITE.tolist()),
        lambda: decoders.decode("sc_rm", ["A"], [NOT_FINITE.tolist()]),
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
        (lambda: decoders.subsets(4, 0, 9, 0), "n is 0 and num_subsets 9; expected at least 1 of each"),
    ],
)
def test_settings_out_of_bounds_are_refused(figure: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        figure()


def test_first_errors() -> None:
    assert metrics.first_error([1, None, 0, 0]) == 2
    assert metrics.first_error([1, None]) == -1
    found = metrics.processbench_f1([2, 0, -1, -1], [2, 1, -1, -1])
    assert (found.erroneous, found.correct) == (0.5, 1.0)
    assert found.f1 == pytest.approx(2 / 3)
    assert metrics.processbench_f1([2], [2]) == metrics.ProcessBench(erroneous=1.0, correct=None, f1=None)
    assert metrics.processbench_f1([2, -1], [0, 0]).f1 == 0.0


def test_minimum_on_last_step() -> None:
    assert metrics.minimum_on_last_step([[1, 0], [0, 1], [0, 0], [5]]) == pytest.approx(1 / 3)
    assert metrics.minimum_on_last_step([[5]]) is None


def test_histogram() -> None:
    found = metrics.histogram(np.array([True, False, True]), np.array([0.1, 0.9, 1.0]), num_bins=2)
    assert found == metrics.Histogram(edges=[0.0, 0.5, 1.0], right=[1, 1], wrong=[0, 1])
