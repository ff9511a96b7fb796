"""Paired tests beside scipy's exact ones, and against how often they err where there is nothing to find."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from medmm_ray.stats.paired import SIGN_SETS, holm, paired_differences, sign_flip_test
from medmm_ray.stats.resampling import Resampling

RESAMPLING = Resampling(500, 0)


def column(better: int, worse: int, same: int) -> np.ndarray:
    return np.array([1.0] * better + [-1.0] * worse + [0.0] * same)[:, None]


@pytest.mark.parametrize(("better", "worse", "same"), [(7, 1, 3), (5, 5, 0), (0, 4, 2), (3, 2, 8)])
def test_of_questions_right_or_wrong_it_is_mcnemars_exact_test(better: int, worse: int, same: int) -> None:
    expected = stats.binomtest(better, better + worse).pvalue
    assert sign_flip_test(column(better, worse, same), 0)[0] == pytest.approx(expected, abs=1e-12)


def test_many_clusters_take_random_signs() -> None:
    expected = stats.binomtest(70, 110).pvalue  # .0054
    found = sign_flip_test(column(70, 40, 300), 0)[0]
    assert found == pytest.approx(expected, abs=0.003)
    assert sign_flip_test(column(200, 0, 0), 0)[0] == 1 / (SIGN_SETS + 1)  # never 0


def test_rounding_makes_no_difference_larger() -> None:
    sums = np.array([0.1, 0.2, 0.3, -0.6])[:, None]  # of sum 0 but for rounding: every set of signs is as large
    assert sign_flip_test(sums, 0)[0] == 1.0


def test_holm() -> None:
    assert holm([0.04, 0.01, 0.03, 0.5]).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([]).tolist() == []


def test_a_difference_by_hand() -> None:
    first = np.array([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0], [0.25, 1.0]])
    second = np.array([[1.0, 1.0], [0.75, 1.0], [1.0, 1.0], [0.0, 1.0]])
    changed, same = paired_differences(first, second, np.array([0, 0, 1, 2]), RESAMPLING)
    assert (changed.first, changed.second, changed.difference) == (0.4375, 0.6875, 0.25)
    assert (changed.better, changed.worse, changed.questions, changed.clusters) == (2, 1, 4, 3)
    # Sums by cluster 1.25, 0 and -.25, together 1: every set of signs gives 1 or 1.5.
    assert (changed.p_value, changed.adjusted_p) == (1.0, 1.0)
    assert changed.low is not None
    assert changed.high is not None
    assert changed.low < 0.25 < changed.high
    assert (same.difference, same.p_value, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    # .25 more for each cluster, and the second figure is the same for all: 2 of 8 sets of signs, and no second test.
    raised = first + np.array([0.25, 0.0])
    better, _ = paired_differences(first, raised, np.array([0, 0, 1, 2]), RESAMPLING)
    assert (better.p_value, better.adjusted_p) == (0.25, 0.25)
    alone, _ = paired_differences(first, second, np.zeros(4, dtype=np.int64), RESAMPLING)
    assert (alone.low, alone.p_value, alone.adjusted_p, alone.clusters) == (None, None, None, 1)


def errors_of(seeds: Sequence[int], by_cluster: bool) -> float:
    """How often p < .05 says of two equal ways that they differ, where the questions of an image go one way."""
    errors = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        image = np.repeat(np.arange(25), rng.integers(3, 10, 25))
        leaning = rng.choice([-0.95, 0.95], 25)[image]
        change = np.where(rng.random(len(image)) < 0.5, np.sign(leaning + rng.uniform(-1, 1, len(image))), 0.0)
        clusters = image if by_cluster else np.arange(len(image))
        figure = paired_differences(np.zeros((len(image), 1)), change[:, None], clusters, Resampling(1, 0))[0]
        assert figure.p_value is not None
        errors += figure.p_value < 0.05
    return errors / len(seeds)


def test_questions_of_an_image_are_no_independent_evidence() -> None:
    assert errors_of(range(60), by_cluster=True) < 0.12
    assert errors_of(range(60), by_cluster=False) > 0.15
