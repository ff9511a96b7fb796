"""Figures as pure functions on numbers: intervals, step metrics, calibration, agreement, first errors.

A number that is not finite is a fault of the caller, who leaves it out and counts it: every function that takes steps'
scores, probabilities, weights or figures raises ValueError with how many there are.

Legend of suffixes: Q questions, C clusters of questions, K sums, B resamples, F figures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RESAMPLE_CELLS = 2**22
"""Counts of rows in resamples that are held at a time: 32 MB."""


def finite(name: str, values: ArrayLike) -> Floats:
    """`values` as floats; raises ValueError where one is NaN or infinite."""
    x = np.asarray(values, dtype=np.float64)
    num_bad = x.size - int(np.isfinite(x).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} of {x.size} {name} are not finite numbers (NaN or infinite); expected finite ones: leave these "
            "out and count them"
        )
    return x


def _truths(name: str, values: ArrayLike) -> Bools:
    """`values` (booleans, or 0 and 1) as booleans; raises ValueError for anything else, NaN and None among it."""
    x = np.asarray(values)
    if x.dtype == np.bool_ or x.size == 0:
        return x.astype(bool)
    num_truths = sum(bool(value == 0 or value == 1) for value in x.ravel().tolist())
    num_bad = x.size - num_truths
    if num_bad:
        raise ValueError(f"{num_bad} of {x.size} {name} are neither true nor false; leave these out and count them")
    return x.astype(bool)


def probability(log_odds: ArrayLike) -> Floats:
    """The logistic function, without overflow."""
    x = np.asarray(log_odds, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


# Intervals


def bootstrap(
    values_QK: Floats,
    num_resamples: int,
    seed: int,
    clusters_Q: Ints | None = None,
) -> tuple[Floats, Floats]:
    """The 95 % interval of the mean of each column, over resamples of the rows (questions) or of their clusters.

    `clusters_Q` numbers the cluster of each row; None: each row is its own. Raises ValueError where a value is not
    finite: the mean would not be a number, and its interval one of other rows.
    """
    finite("values", values_QK)
    if not len(values_QK):
        undefined_K = np.full(values_QK.shape[1], np.nan)
        return undefined_K, undefined_K
    if clusters_Q is None:
        clusters_Q = np.arange(len(values_QK))
    ones_Q1 = np.ones((len(values_QK), 1))
    # Clusters differ in size: the mean of a resample is over as many rows as it happens to have.
    sums_CK = sums_by_cluster(np.hstack([values_QK, ones_Q1]), clusters_Q)
    return cluster_bootstrap(sums_CK, lambda sums_BK: sums_BK[:, :-1] / sums_BK[:, -1:], num_resamples, seed)


def sums_by_cluster(values_QK: Floats, clusters_Q: Ints) -> Floats:
    """The sums of the rows of each cluster [C, K], clusters in the order of their numbers."""
    order = np.argsort(clusters_Q, kind="stable")
    is_first = np.diff(clusters_Q[order], prepend=-1) > 0
    # Behind each start lie the rows of one cluster.
    starts = np.flatnonzero(is_first)
    if not starts.size:
        return np.zeros((0, values_QK.shape[1]))
    sums_CK: Floats = np.add.reduceat(values_QK[order], starts, axis=0)
    return sums_CK


def cluster_bootstrap(
    sums_QK: Floats,
    statistic: Callable[[Floats], Floats],
    num_resamples: int,
    seed: int,
) -> tuple[Floats, Floats]:
    """The 95 % interval of figures that are functions of sums over rows, resampling whole rows (questions, clusters).

    `statistic` takes sums [B, K] to figures [B, F]; a resample in which a figure is NaN does not count for it. The rows
    carry their weights in their sums, so that a weighted figure has a weighted interval. NaN without rows. Raises
    ValueError where a sum is not finite, or `num_resamples` is below 1.
    """
    num_rows = len(sums_QK)
    sums_QK = finite("sums over questions", sums_QK)
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected at least 1 (thousands, for an interval)")
    if num_rows == 0:
        num_figures = statistic(np.zeros((1, sums_QK.shape[1]))).shape[1]
        undefined_F = np.full(num_figures, np.nan)
        return undefined_F, undefined_F
    return percentile_interval(_resampled(sums_QK, statistic, num_resamples, seed), num_rows)


@lru_cache(maxsize=256)
def expanded_levels(num_rows: int) -> tuple[float, float]:
    """The percentiles, in percent, whose distance is a 95 % interval of a mean over so many independent rows.

    Few rows vary less in resamples than the rows of new data do: the middle 95 % of resamples of 10 rows cover some
    89 %. The levels are those at which a normal distribution has Student's quantile times sqrt(rows / (rows - 1)):
    the expanded percentile interval of Hesterberg (The American Statistician, 2015). 2.5 and 97.5 for many rows.
    """
    from scipy.special import ndtr, stdtrit

    # Of one row there is no spread: the resamples are all alike.
    if num_rows < 2:
        return 0.0, 100.0
    quantile = stdtrit(num_rows - 1, 0.975) * math.sqrt(num_rows / (num_rows - 1))
    # The interval is as wide to either side: levels are symmetric.
    low = 100 * float(ndtr(-quantile))
    return low, 100 - low


def percentile_interval(figures_BF: Floats, num_rows: int) -> tuple[Floats, Floats]:
    """The 95 % interval of each figure, from its values in resamples of `num_rows` rows; NaN where it has none."""
    levels = expanded_levels(num_rows)
    if len(figures_BF) and not np.isnan(figures_BF).any():
        low_F, high_F = np.percentile(figures_BF, levels, axis=0)
        return low_F, high_F
    # Figure by figure: each leaves out its own undefined resamples.
    low_F = np.full(figures_BF.shape[1], np.nan)
    high_F = low_F.copy()
    for column, values in enumerate(figures_BF.T):
        defined = values[~np.isnan(values)]
        if defined.size:
            low_F[column], high_F[column] = np.percentile(defined, levels)
    return low_F, high_F


def _resampled(
    sums_QK: Floats,
    statistic: Callable[[Floats], Floats],
    num_resamples: int,
    seed: int,
) -> Floats:
    """Figures [B, F] of `num_resamples` draws of as many rows as there are, with replacement."""
    rng = np.random.default_rng(seed)
    num_rows = len(sums_QK)
    even = np.full(num_rows, 1 / num_rows)
    block = max(1, RESAMPLE_CELLS // num_rows)
    figures = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        # How often each row is drawn is all that a sum over a resample needs.
        times_BQ = rng.multinomial(num_rows, even, size=size)
        figures.append(statistic(times_BQ @ sums_QK))
    return np.concatenate(figures)


# Steps: `labels` are booleans (right), `log_odds` the model's; both pooled over solutions, nulls already left out.
# `weights` count each step (1 without): with 1 / inclusion probability a figure of a sample speaks of the whole.
# A score, probability or weight that is not finite raises ValueError; a label other than true and false too.


def _weights(labels: Bools, weights: ArrayLike | None) -> Floats:
    return np.ones(labels.size) if weights is None else finite("step weights", weights)


def auroc(labels: Bools, log_odds: Floats, weights: Floats | None = None) -> float | None:
    """The chance that a right step scores above a wrong one, ties half; None where one class is missing.

    Raises ValueError for scores that are not finite: NaN would rank above every number.
    """
    labels = _truths("labels", labels)
    log_odds = finite("step scores", log_odds)
    weights = _weights(labels, weights)
    _, rank = np.unique(log_odds, return_inverse=True)
    right = np.bincount(rank, weights * labels)
    wrong = np.bincount(rank, weights * ~labels)
    if not labels.any() or labels.all():
        return None
    wrong_below = np.cumsum(wrong) - wrong / 2  # half of those at the same score
    return float(right @ wrong_below / (right.sum() * wrong.sum()))


def roc_curve(
    labels: Bools,
    log_odds: Floats,
    num_points: int = 101,
    weights: Floats | None = None,
) -> tuple[list[float], list[float]]:
    """False and true positive rates from (0, 0) to (1, 1), thinned to about `num_points`; empty with one class only."""
    labels = _truths("labels", labels)
    log_odds = finite("step scores", log_odds)
    if labels.all() or not labels.any():
        return [], []
    order = np.argsort(-log_odds, kind="stable")
    # Steps at the same score pass a threshold together: the curve has a point only behind the last of them.
    is_followed_by_lower = np.diff(log_odds[order])
    last_of_ties = np.append(np.flatnonzero(is_followed_by_lower), labels.size - 1)
    weights = _weights(labels, weights)[order]
    labels = labels[order]
    right = np.cumsum(weights * labels)
    wrong = np.cumsum(weights * ~labels)
    true_rates = np.append(0.0, right[last_of_ties] / right[-1])
    false_rates = np.append(0.0, wrong[last_of_ties] / wrong[-1])
    # Even steps along the curve's length, so that its steep part keeps its shape.
    length = true_rates + false_rates
    nearest = np.searchsorted(length, np.linspace(0, 2, num_points)).clip(max=length.size - 1)
    points = np.unique(nearest)
    return false_rates[points].tolist(), true_rates[points].tolist()


def predicted_right(log_odds: ArrayLike, threshold: float = 0.5) -> Bools:
    """A step is called right where its probability is at least `threshold`, a number above 0 and below 1."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a probability above 0 and below 1")
    return finite("step scores", log_odds) >= math.log(threshold / (1 - threshold))


def macro_f1(labels: Bools, predicted: Bools, weights: Floats | None = None) -> float | None:
    """The mean of the F1 of the right and of the wrong steps, pooled; a class nobody names has F1 0."""
    labels, predicted = _truths("labels", labels), _truths("predictions", predicted)
    if not labels.size:
        return None
    weights = _weights(labels, weights)
    f1_right = _f1(labels, predicted, weights)
    f1_wrong = _f1(~labels, ~predicted, weights)
    return (f1_right + f1_wrong) / 2


def _f1(labels: Bools, predicted: Bools, weights: Floats) -> float:
    """2 hits / (labelled + predicted) of one class."""
    total = float(weights @ labels + weights @ predicted)
    hits = float(weights @ (labels & predicted))
    return 2 * hits / total if total else 0.0


@dataclass(frozen=True)
class CalibrationBin:
    """Steps whose probability lies in [low, high): count, weight, mean probability and share of right ones."""

    low: float
    high: float
    count: int
    weight: float
    mean_probability: float | None
    share_right: float | None


def calibration(
    labels: Bools,
    probabilities: Floats,
    num_bins: int = 10,
    weights: Floats | None = None,
) -> list[CalibrationBin]:
    """The reliability curve: `num_bins` (1 or more) of equal width over [0, 1], the last one closed."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1")
    labels = _truths("labels", labels)
    probabilities = finite("probabilities", probabilities)
    weights = _weights(labels, weights)
    # The clip closes the last bin: a probability of exactly 1 belongs to it.
    bin_of_step = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for index in range(num_bins):
        inside = bin_of_step == index
        count = int(inside.sum())
        mean_probability = share_right = None
        if count:
            mean_probability = float(np.average(probabilities[inside], weights=weights[inside]))
            share_right = float(np.average(labels[inside], weights=weights[inside]))
        calibration_bin = CalibrationBin(
            low=index / num_bins,
            high=(index + 1) / num_bins,
            count=count,
            weight=float(weights[inside].sum()),
            mean_probability=mean_probability,
            share_right=share_right,
        )
        bins.append(calibration_bin)
    return bins


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float | None:
    """The mean of |mean probability - share right| over the bins, weighted by the steps in them."""
    total = sum(b.weight for b in bins)
    gaps = []
    for b in bins:
        if b.mean_probability is not None and b.share_right is not None:
            gaps.append(b.weight * abs(b.mean_probability - b.share_right))
    return sum(gaps) / total if total else None


@dataclass(frozen=True)
class Histogram:
    """Counts of right and of wrong steps by bin of the probability; `edges` are the bins' ends, one more than bins."""

    edges: list[float]
    right: list[int]
    wrong: list[int]


def histogram(labels: Bools, probabilities: Floats, num_bins: int = 20) -> Histogram:
    """Right and wrong steps over bins of equal width."""
    labels = _truths("labels", labels)
    probabilities = finite("probabilities", probabilities)
    # With the last edge, 1.0, in the last bin, as numpy counts.
    edges = np.linspace(0, 1, num_bins + 1)
    right, _ = np.histogram(probabilities[labels], edges)
    wrong, _ = np.histogram(probabilities[~labels], edges)
    return Histogram(edges.tolist(), right.tolist(), wrong.tolist())


# Agreement of two raters, and the size of weighted samples


def cohen_kappa(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> float | None:
    """Agreement of two raters beyond chance, on booleans; `weights` count each pair. None where chance agreement is 1.

    With weights 1 / inclusion probability it estimates the kappa of the whole from a stratified sample.
    """
    cell = 2 * _truths("labels", first).astype(np.int64) + _truths("labels", second)
    counts_4 = np.bincount(
        cell,
        None if weights is None else finite("weights", weights),
        minlength=4,
    )
    kappa = float(kappa_of_counts(counts_4.astype(np.float64)))
    return None if math.isnan(kappa) else kappa


def kappa_of_counts(counts_4: Floats) -> Floats:
    """Cohen's kappa of 2 x 2 tables [..., 4] of (weighted) counts; NaN where empty or where chance agreement is 1.

    The order is (first wrong, second wrong), (wrong, right), (right, wrong), (right, right).
    """
    cells_first = np.moveaxis(np.asarray(counts_4, dtype=np.float64), -1, 0)
    both_wrong, only_second, only_first, both_right = cells_first
    total = both_wrong + only_second + only_first + both_right
    first = only_first + both_right
    second = only_second + both_right
    # Of counts, not of shares: (observed - chance) / (1 - chance), both times total squared.
    observed = (both_wrong + both_right) * total
    chance = first * second + (total - first) * (total - second)
    room = total * total - chance
    is_defined = room > 1e-12 * total * total  # above what rounding leaves of a 0
    divisor = np.where(room > 0, room, 1.0)
    return np.where(is_defined, (observed - chance) / divisor, np.nan)


def effective_size(weights: ArrayLike) -> float:
    """Kish's effective sample size, (sum w)^2 / sum w^2: how many equally weighted draws tell as much."""
    w = finite("weights", weights)
    if not w.any():
        return 0.0
    return float(w.sum() ** 2 / (w @ w))


# Solutions: where the first wrong step is


def first_error(labels: Sequence[int | bool | None]) -> int:
    """The index of the first wrong step, -1 where there is none; a null is no error."""
    known_labels: dict[int, int | bool] = {}
    for index, label in enumerate(labels):
        if label is not None:
            known_labels[index] = label
    right = _truths("labels", list(known_labels.values()))
    for index, is_right in zip(known_labels, right, strict=True):
        if not is_right:
            return index
    return -1


@dataclass(frozen=True)
class ProcessBench:
    """The shares of erroneous and of correct solutions whose first error (-1: none) is found exactly.

    `f1` is their harmonic mean; None where either kind of solution is missing.
    """

    erroneous: float | None
    correct: float | None
    f1: float | None


def processbench_f1(reference: Sequence[int], predicted: Sequence[int]) -> ProcessBench:
    """ProcessBench's figures of first errors found beside those that there are."""
    erroneous_hits: list[bool] = []
    correct_hits: list[bool] = []
    for truth, guess in zip(reference, predicted, strict=True):
        hits = erroneous_hits if truth >= 0 else correct_hits
        hits.append(truth == guess)
    erroneous = _share(erroneous_hits)
    correct = _share(correct_hits)
    f1 = None
    if erroneous is not None and correct is not None:
        total = erroneous + correct
        f1 = 2 * erroneous * correct / total if total else 0.0
    return ProcessBench(erroneous, correct, f1)


def minimum_on_last_step(step_log_odds: Sequence[Sequence[float]]) -> float | None:
    """The share of solutions of two steps or more whose lowest score is the last (not also an earlier one).

    Above 0.4 the model has become one of outcomes, whatever its other figures say.
    """
    is_last = []
    for scores in step_log_odds:
        if len(scores) > 1:
            lowest = int(np.argmin(finite("step scores", scores)))
            is_last.append(lowest == len(scores) - 1)
    return _share(is_last)


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
