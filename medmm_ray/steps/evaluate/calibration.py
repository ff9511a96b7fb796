"""Temperature scaling: one number a scorer, fitted on validation questions, and what it changes on those measured."""

from dataclasses import dataclass

import numpy as np

from medmm_ray.stats.metrics import (
    Bools,
    Floats,
    calibration,
    expected_calibration_error,
    finite,
    probability,
)
from medmm_ray.steps.evaluate.steps import LabelledSteps

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that are tried."""


@dataclass(frozen=True, kw_only=True)
class TemperatureScaling:
    """Log-odds divided by `temperature`, which was fitted on `steps` labelled steps of validation questions.

    Errors of calibration and log losses (in nats a step) are those of the measured questions, before and after: no
    step of theirs took part in the fit.
    """

    temperature: float
    steps: int
    ece_before: float | None
    ece_after: float | None
    log_loss_before: float
    log_loss_after: float


def fit_temperature(labels: Bools, log_odds: Floats, weights: Floats) -> float:
    """The temperature with the lowest weighted log loss, between `LOWEST` and `HIGHEST` (Guo et al., 2017).

    Raises ValueError where only one class is there: its loss is lowest at an end, whatever the scores.
    """
    from scipy.optimize import minimize_scalar

    if labels.all() or not labels.any():
        raise ValueError(f"all {labels.size} steps are of one class; a temperature needs right and wrong ones")
    log_odds = finite("step scores", log_odds)
    best = minimize_scalar(
        lambda log_t: log_loss(
            labels,
            log_odds / np.exp(log_t),
            weights,
        ),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def log_loss(labels: Bools, log_odds: Floats, weights: Floats) -> float:
    """The weighted mean of -log of the probability that each step's label was given."""
    # The log-odds of what the label says.
    signed = np.where(
        labels,
        log_odds,
        -log_odds,
    )
    return float(np.average(np.logaddexp(0.0, -signed), weights=weights))


def scaled(validation: LabelledSteps, measured: LabelledSteps, num_bins: int) -> TemperatureScaling | None:
    """The temperature of the validation steps, and its effect on the measured ones; None where either lacks a class."""
    labels, scores, weights = validation.arrays()
    if labels.all() or not labels.any() or not measured.labels:
        return None
    # From here on the validation steps play no part.
    temperature = fit_temperature(
        labels,
        scores,
        weights,
    )
    measured_labels, measured_scores, measured_weights = measured.arrays()

    def ece(log_odds: Floats) -> float | None:
        bins = calibration(
            measured_labels,
            probability(log_odds),
            num_bins,
            measured_weights,
        )
        return expected_calibration_error(bins)

    return TemperatureScaling(
        temperature=temperature,
        steps=len(labels),
        ece_before=ece(measured_scores),
        ece_after=ece(measured_scores / temperature),
        log_loss_before=log_loss(
            measured_labels,
            measured_scores,
            measured_weights,
        ),
        log_loss_after=log_loss(
            measured_labels,
            measured_scores / temperature,
            measured_weights,
        ),
    )
