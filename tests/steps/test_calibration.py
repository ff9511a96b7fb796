"""Temperatures: what they find again, on what they are fitted, and what is said where they cannot be."""

import numpy as np
import pytest

from medmm_ray.stats.metrics import probability
from medmm_ray.steps.evaluate.calibration import fit_temperature, log_loss, scaled
from medmm_ray.steps.evaluate.steps import LabelledSteps


def drawn_steps(num: int, temperature: float, seed: int) -> LabelledSteps:
    """Steps whose labels follow the probabilities of their scores divided by `temperature`."""
    rng = np.random.default_rng(seed)
    true_log_odds = rng.normal(0.5, 1.5, num)
    labels = rng.random(num) < probability(true_log_odds)
    return LabelledSteps(
        labels=labels.astype(int).tolist(),
        scores=(temperature * true_log_odds).tolist(),
        weights=[1.0] * num,
        num_solutions=num,
    )


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_drawn_steps_is_found_again(temperature: float) -> None:
    scaling = scaled(drawn_steps(4000, temperature, 0), drawn_steps(4000, temperature, 1), 10)
    assert scaling is not None
    assert scaling.temperature == pytest.approx(temperature, rel=0.08)
    assert scaling.steps == 4000
    assert scaling.ece_after is not None
    assert scaling.ece_after < 0.03
    if temperature != 1.0:
        assert scaling.ece_before is not None
        assert scaling.ece_before > 2 * scaling.ece_after
        assert scaling.log_loss_before > scaling.log_loss_after


def test_the_fit_is_the_lowest_log_loss_and_weighs_its_steps() -> None:
    labels = np.array([True, True, False])
    log_odds = np.array([2.0, 2.0, 2.0])
    # Two of three right at one score: best at log-odds log 2, so T = 2 / log 2; with weight 3 on the wrong one at
    # log-odds log (2 / 3), which no positive temperature reaches.
    assert fit_temperature(labels, log_odds, np.ones(3)) == pytest.approx(2 / np.log(2), rel=1e-4)
    assert fit_temperature(labels, log_odds, np.array([1.0, 1.0, 3.0])) == pytest.approx(20.0, rel=1e-3)
    assert log_loss(labels, log_odds, np.ones(3)) == pytest.approx((2 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 3)


def test_one_class_alone_has_no_temperature() -> None:
    of_one_class = LabelledSteps(labels=[1, 1], scores=[1.0, 2.0], weights=[1.0, 1.0])
    both = drawn_steps(50, 1.0, 0)
    assert scaled(of_one_class, both, 10) is None
    assert scaled(both, LabelledSteps(), 10) is None
    with pytest.raises(ValueError, match="all 2 steps are of one class"):
        fit_temperature(np.array([True, True]), np.array([1.0, 2.0]), np.ones(2))
