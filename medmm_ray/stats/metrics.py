"""Every figure, as pure functions on numbers: rewards and decoders, accuracy over N, intervals, step and label metrics.

Step scores are log-odds of ``+``, never probabilities: a float32 probability saturates at 1.0 and its ties would be
broken by accident, so a reward too is the log-odds of the aggregate, exact where the aggregate itself rounds to 1.

Accuracy at N is the expectation over all subsets of N of the M samples at hand, without replacement: in closed form for
one sample, best-of-N and the oracle; for votes the mean over all subsets where they are few, else over `num_subsets`
seeded random ones. N >= M uses all M. Ties go to the first sample, everywhere; sums of rewards are compared exactly, so
that rounding neither makes a tie nor breaks one. Answers are one where grading finds them equal (`text.equal_key`). An
empty answer never votes and is never right.

A reward of NaN means "no score": the sample keeps its place among the N, but a scorer can neither choose it nor let it
vote. Everywhere else a number that is not finite is a fault of the caller, who leaves it out and counts it: every
function that takes steps' scores, probabilities, weights or figures raises ValueError with how many there are.

Legend of suffixes: Q questions, K figures, M samples of a question, S subsets, A distinct answers, T steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medmm_ray.text import equal_key

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Aggregate = Literal["min", "last", "mean", "product", "gmean", "min_after_first"]
NEAR = 1e-9
"""Relative difference up to which sums of rewards are compared exactly: far more than the rounding of a float sum."""


def _finite(name: str, values: ArrayLike) -> Floats:
    """`values` as floats; raises ValueError where one is NaN or infinite."""
    x = np.asarray(values, dtype=np.float64)
    missing = x.size - int(np.isfinite(x).sum())
    if missing:
        raise ValueError(
            f"{missing} of {x.size} {name} are not finite numbers (NaN or infinite); expected finite ones: leave these "
            "out and count them"
        )
    return x


def _truths(name: str, values: ArrayLike) -> Bools:
    """`values` (booleans, or 0 and 1) as booleans; raises ValueError for anything else, NaN and None among it."""
    x = np.asarray(values)
    if x.dtype == np.bool_ or x.size == 0:
        return x.astype(bool)
    strange = x.size - sum(bool(value == 0 or value == 1) for value in x.ravel().tolist())
    if strange:
        raise ValueError(f"{strange} of {x.size} {name} are neither true nor false; leave these out and count them")
    return x.astype(bool)


# Rewards: from the steps of a solution to one number


def probability(log_odds: ArrayLike) -> Floats:
    """The logistic function, without overflow."""
    x = np.asarray(log_odds, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


def _log_probability(log_odds: Floats) -> Floats:
    return -np.logaddexp(0.0, -log_odds)


def _log_odds_of_log(log_p: float) -> float:
    """log(p / (1 - p)) from log p, exact for p near 0 and near 1."""
    if log_p == 0.0:
        return math.inf
    return log_p - (math.log(-math.expm1(log_p)) if log_p > -math.log(2) else math.log1p(-math.exp(log_p)))


def aggregate(step_log_odds: Sequence[float] | Floats, how: Aggregate = "min") -> float:
    """The reward of a solution from its steps' log-odds: the log-odds of the aggregate of its step probabilities.

    `min` (Med-PRM's), `last`, `mean` (VisualPRM's), `product`, `gmean` (product to the power 1/T), `min_after_first`
    (MedS3's min(x_2..x_T), where x_1 is a fixed root; of a single step that step). Raises ValueError without steps, and
    where a step's score is not finite: such a solution has no reward.
    """
    x = _finite("step scores", step_log_odds)
    if x.size == 0:
        raise ValueError("a solution without steps has no reward; expected at least one step score")
    if how == "last":
        return float(x[-1])
    if how == "min":
        return float(x.min())
    if how == "min_after_first":
        return float(x[1:].min() if x.size > 1 else x[0])
    if how == "mean":
        return float(np.logaddexp.reduce(_log_probability(x)) - np.logaddexp.reduce(_log_probability(-x)))
    log_p = float(_log_probability(x).sum())
    return _log_odds_of_log(log_p if how == "product" else log_p / x.size)


# Decoders: from samples to one answer


@dataclass(frozen=True)
class Decoder:
    """A rule that picks an answer: take the best sample, or let the answers' samples vote with their rewards."""

    aggregate: Aggregate | None
    rule: Literal["best", "sum", "mean"]


DECODERS: dict[str, Decoder] = {
    "majority": Decoder(None, "sum"),
    "best_of_n": Decoder("min", "best"),  # Med-PRM
    "sc_rm": Decoder("min", "sum"),  # Med-PRM's headline: argmax_a of the sum of the rewards of a's samples
    "prm-max": Decoder("last", "best"),  # MedS3's names from here on
    "prm-minmax": Decoder("min_after_first", "best"),
    "prm-vote-sum": Decoder("last", "sum"),
    "prm-vote-mean": Decoder("last", "mean"),
    "prm-min-vote-sum": Decoder("min_after_first", "sum"),
    "prm-min-vote-mean": Decoder("min_after_first", "mean"),
    "prm-mean-vote-sum": Decoder("mean", "sum"),
    "prm-prod-vote-sum": Decoder("product", "sum"),
    "prm-gmean-vote-sum": Decoder("gmean", "sum"),
}


def answer_codes(answers: Sequence[str | None], graded_right: Sequence[bool | None] | Bools | None = None) -> Ints:
    """Answers as integers in the order of their first appearance, -1 an empty one; equal where grading calls them so.

    `graded_right`: where a model graded the answers to an open question. All that it calls the same as the reference
    are one answer, whatever their form.
    """
    keys = [equal_key(answer) if answer else "" for answer in answers]
    if graded_right is not None:
        right_keys = dict.fromkeys(key for key, right in zip(keys, graded_right, strict=True) if key and right)
        keys = [next(iter(right_keys)) if key in right_keys else key for key in keys]
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(key, len(codes)) if key else -1 for key in keys], dtype=np.int64)


def best_of_n(rewards: Sequence[float] | Floats) -> int | None:
    """The index of the highest reward, the first of equals, NaN left out; None where no sample has one."""
    known = np.asarray(rewards, dtype=np.float64)
    scored = np.flatnonzero(~np.isnan(known))
    return int(scored[known[scored].argmax()]) if scored.size else None


def vote(
    answers: Sequence[str | None],
    rewards: Sequence[float] | Floats | None = None,
    rule: Literal["sum", "mean"] = "sum",
) -> int | None:
    """The index of the first sample with the winning answer; None where nobody votes.

    Without `rewards` each sample counts one (majority vote, self-consistency); with them, the probability of its reward
    (SC+RM for `sum`).
    """
    codes = answer_codes(answers)
    ballots = _ballots(codes, None if rewards is None else np.asarray(rewards, dtype=np.float64))
    if not ballots.voters.any():
        return None
    winner = int(_winners(ballots, np.ones((1, codes.size), dtype=bool), rule)[0])
    return int(np.flatnonzero(codes == winner)[0])


def decode(name: str, answers: Sequence[str | None], step_log_odds: Sequence[Sequence[float]]) -> int | None:
    """The index of the sample that the named decoder picks (of a vote: the first with the winning answer).

    `step_log_odds` is empty for a sample without scores. Raises ValueError for an unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; known: {', '.join(DECODERS)}")
    decoder = DECODERS[name]
    if decoder.aggregate is None:
        return vote(answers)
    rewards = [aggregate(x, decoder.aggregate) if len(x) else math.nan for x in step_log_odds]
    return best_of_n(rewards) if decoder.rule == "best" else vote(answers, rewards, decoder.rule)


@dataclass(frozen=True)
class _Ballots:
    """The `weight` of each sample; `voters` have an answer and a score. `rewards` is None where each counts one."""

    codes: Ints
    voters: Bools
    weight: Floats
    rewards: Floats | None

    def terms(self, answer: int, subset_M: Bools) -> tuple[list[float], int]:
        """Numbers whose exact sum is that of the weights of an answer's voters in a subset; and how many vote.

        A weight above a half is 1 less its complement, which tells rewards apart whose probabilities both round to 1.
        """
        assert self.rewards is not None
        rewards = self.rewards[self.voters & subset_M & (self.codes == answer)]
        low, high = rewards[rewards <= 0], rewards[rewards > 0]
        return [*probability(low).tolist(), float(high.size), *(-probability(-high)).tolist()], rewards.size


def _ballots(codes: Ints, rewards: Floats | None) -> _Ballots:
    if rewards is None:
        return _Ballots(codes, codes >= 0, np.ones(codes.size), None)
    scored = ~np.isnan(rewards)
    known = np.where(scored, rewards, 0.0)
    return _Ballots(codes, (codes >= 0) & scored, probability(known), known)


def _winners(ballots: _Ballots, subsets_SM: Bools, rule: Literal["sum", "mean"]) -> Ints:
    """The winning answer code of each subset, -1 where nobody votes. Ties: the answer that appears first in it."""
    num_answers = int(ballots.codes.max(initial=-1)) + 1
    if num_answers == 0:
        return np.full(len(subsets_SM), -1, dtype=np.int64)
    one_hot_MA = (ballots.codes[:, None] == np.arange(num_answers)) & ballots.voters[:, None]
    cast_SM = subsets_SM.astype(np.float64)
    count_SA = cast_SM @ one_hot_MA
    share = 1.0 / np.maximum(count_SA, 1.0) if rule == "mean" else 1.0
    sum_SA = np.where(count_SA > 0, cast_SM @ (one_hot_MA * ballots.weight[:, None]) * share, -np.inf)
    num_samples = ballots.codes.size
    first_SA = np.where(subsets_SM[:, :, None] & one_hot_MA, np.arange(num_samples)[:, None], num_samples).min(axis=1)
    leads_SA = (count_SA > 0) & (sum_SA >= sum_SA.max(axis=1, keepdims=True) * (1 - NEAR))
    if ballots.rewards is not None:  # counts are exact as they are
        for subset in np.flatnonzero(leads_SA.sum(axis=1) > 1):
            best = _highest(ballots, np.flatnonzero(leads_SA[subset]).tolist(), subsets_SM[subset], rule)
            leads_SA[subset] = np.isin(np.arange(num_answers), best)
    winner_S = np.where(leads_SA, first_SA, num_samples + 1).argmin(axis=1)
    return np.where((count_SA > 0).any(axis=1), winner_S, -1)


def _highest(ballots: _Ballots, answers: Sequence[int], subset_M: Bools, rule: Literal["sum", "mean"]) -> list[int]:
    """Those of `answers` whose sum (or mean) of weights is the highest, compared without rounding."""
    best: list[int] = []
    for answer in answers:
        terms, votes = ballots.terms(answer, subset_M)
        ahead = 0.0
        if best:
            best_terms, best_votes = ballots.terms(best[0], subset_M)
            times, best_times = (best_votes, votes) if rule == "mean" else (1, 1)
            # fsum rounds once, at the end, so that its sign is exact.
            ahead = math.fsum([*terms * times, *(-term for term in best_terms * best_times)])
        best = [answer] if ahead > 0 else [*best, answer] if ahead == 0 else best
    return best


# Accuracy of one question, in expectation over subsets of n of its samples


@lru_cache(maxsize=4096)
def _best_weights(num_samples: int, n: int) -> Floats:
    """The chance that the sample of rank r (0: best) is the best of a random subset of n: C(M-1-r, n-1) / C(M, n)."""
    total = math.comb(num_samples, n)
    return np.array([math.comb(num_samples - 1 - r, n - 1) / total for r in range(num_samples)])


def expected_best(rewards: Floats, correct: Bools, n: int) -> float:
    """The chance that the sample with the highest reward of n random ones is right: exact. NaN: never the best."""
    if not correct.size:
        return 0.0
    order = np.argsort(-rewards, kind="stable")  # NaN is sorted to the end
    right = correct[order] & ~np.isnan(rewards[order])
    return float(_best_weights(correct.size, min(n, correct.size)) @ right)


def expected_oracle(correct: Bools, n: int) -> float:
    """The chance that at least one of n random samples is right: 1 - C(wrong, n) / C(M, n), exact."""
    if not correct.size:
        return 0.0
    n = min(n, correct.size)
    return 1.0 - math.comb(int((~correct).sum()), n) / math.comb(correct.size, n)


@lru_cache(maxsize=64)
def _all_subsets(num_samples: int, n: int) -> Bools:
    rows = np.array(list(combinations(range(num_samples), n)))
    mask = np.zeros((len(rows), num_samples), dtype=bool)
    np.put_along_axis(mask, rows, True, axis=1)
    return mask


def subsets(num_samples: int, n: int, num_subsets: int, seed: int) -> Bools:
    """Subsets of n of the samples as rows of a mask [S, M]: all of them where there are at most `num_subsets`.

    Raises ValueError where n or `num_subsets` is below 1.
    """
    if n < 1 or num_subsets < 1:
        raise ValueError(f"n is {n} and num_subsets {num_subsets}; expected at least 1 of each")
    n = min(n, num_samples)
    if math.comb(num_samples, n) <= num_subsets:
        return _all_subsets(num_samples, n)
    shuffled = np.random.default_rng([seed, n]).random((num_subsets, num_samples)).argpartition(n - 1, axis=1)
    mask = np.zeros((num_subsets, num_samples), dtype=bool)
    np.put_along_axis(mask, shuffled[:, :n], True, axis=1)
    return mask


def expected_vote(
    codes: Ints,
    correct: Bools,
    subsets_SM: Bools,
    rewards: Floats | None = None,
    rule: Literal["sum", "mean"] = "sum",
) -> float:
    """The share of subsets whose winning answer is right; without `rewards` a plain majority vote."""
    if not codes.size:
        return 0.0
    right_A = np.zeros(int(codes.max(initial=-1)) + 2, dtype=bool)  # the last entry is the one of code -1: never right
    right_A[codes[(codes >= 0) & correct]] = True
    return float(right_A[_winners(_ballots(codes, rewards), subsets_SM, rule)].mean())


# Intervals


def bootstrap(values_QK: Floats, num_resamples: int, seed: int) -> tuple[Floats, Floats]:
    """The 95 % percentile interval of the mean of each column, over resamples of the rows (questions).

    Raises ValueError where a value is not finite: the mean would not be a number, and its interval one of other rows.
    """
    return cluster_bootstrap(values_QK, lambda sums_BK: sums_BK / max(len(values_QK), 1), num_resamples, seed)


def cluster_bootstrap(
    sums_QK: Floats, statistic: Callable[[Floats], Floats], num_resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """The 95 % percentile interval of figures that are functions of sums over rows, resampling whole rows (questions).

    `statistic` takes sums [B, K] to figures [B, F]; a resample in which a figure is NaN does not count for it. The rows
    carry their weights in their sums, so that a weighted figure has a weighted interval. NaN without rows. Raises
    ValueError where a sum is not finite, or `num_resamples` is below 1.
    """
    num_rows, sums_QK = len(sums_QK), _finite("sums over questions", sums_QK)
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected at least 1 (thousands, for an interval)")
    if num_rows == 0:
        empty = np.full(statistic(np.zeros((1, sums_QK.shape[1]))).shape[1], np.nan)
        return empty, empty
    rng, even = np.random.default_rng(seed), np.full(num_rows, 1 / num_rows)
    block = max(1, 2**22 // num_rows)  # resamples at a time: 32 MB of counts
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    figures_BF = np.concatenate([statistic(rng.multinomial(num_rows, even, size=size) @ sums_QK) for size in sizes])
    low, high = np.full((2, figures_BF.shape[1]), np.nan)
    for column, values in enumerate(figures_BF.T):
        counted = values[~np.isnan(values)]
        if counted.size:
            low[column], high[column] = np.percentile(counted, [2.5, 97.5])
    return low, high


# Steps: `labels` are booleans (right), `log_odds` the model's; both pooled over solutions, nulls already left out.
# `weights` count each step (1 without): with 1 / inclusion probability a figure of a sample speaks of the whole.
# A score, probability or weight that is not finite raises ValueError; a label other than true and false too.


def _weights(labels: Bools, weights: ArrayLike | None) -> Floats:
    return np.ones(labels.size) if weights is None else _finite("step weights", weights)


def auroc(labels: Bools, log_odds: Floats, weights: Floats | None = None) -> float | None:
    """The chance that a right step scores above a wrong one, ties half; None where one class is missing.

    Raises ValueError for scores that are not finite: NaN would rank above every number.
    """
    labels, log_odds = _truths("labels", labels), _finite("step scores", log_odds)
    weight = _weights(labels, weights)
    _, place = np.unique(log_odds, return_inverse=True)
    right, wrong = np.bincount(place, weight * labels), np.bincount(place, weight * ~labels)
    if not labels.any() or labels.all():
        return None
    return float(right @ (np.cumsum(wrong) - wrong / 2) / (right.sum() * wrong.sum()))


def roc_curve(
    labels: Bools, log_odds: Floats, num_points: int = 101, weights: Floats | None = None
) -> tuple[list[float], list[float]]:
    """False and true positive rates from (0, 0) to (1, 1), thinned to about `num_points`; empty with one class only."""
    labels, log_odds = _truths("labels", labels), _finite("step scores", log_odds)
    if labels.all() or not labels.any():
        return [], []
    order = np.argsort(-log_odds, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(log_odds[order])), labels.size - 1)
    weight = _weights(labels, weights)[order]
    right, wrong = np.cumsum(weight * labels[order]), np.cumsum(weight * ~labels[order])
    true, false = np.append(0.0, right[ends] / right[-1]), np.append(0.0, wrong[ends] / wrong[-1])
    # Even steps along the curve's length, so that its steep part keeps its shape.
    length = true + false
    kept = np.unique(np.searchsorted(length, np.linspace(0, 2, num_points)).clip(max=length.size - 1))
    return false[kept].tolist(), true[kept].tolist()


def predicted_right(log_odds: ArrayLike, threshold: float = 0.5) -> Bools:
    """A step is called right where its probability is at least `threshold`, a number above 0 and below 1."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a probability above 0 and below 1")
    return _finite("step scores", log_odds) >= math.log(threshold / (1 - threshold))


def macro_f1(labels: Bools, predicted: Bools, weights: Floats | None = None) -> float | None:
    """The mean of the F1 of the right and of the wrong steps, pooled; a class nobody names has F1 0."""
    labels, predicted = _truths("labels", labels), _truths("predictions", predicted)
    if not labels.size:
        return None
    scores, weight = [], _weights(labels, weights)
    for truth, guess in ((labels, predicted), (~labels, ~predicted)):
        named = float(weight @ truth + weight @ guess)
        scores.append(2 * float(weight @ (truth & guess)) / named if named else 0.0)
    return sum(scores) / 2


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
    labels: Bools, probabilities: Floats, num_bins: int = 10, weights: Floats | None = None
) -> list[CalibrationBin]:
    """The reliability curve: `num_bins` (1 or more) of equal width over [0, 1], the last one closed."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1")
    labels, probabilities = _truths("labels", labels), _finite("probabilities", probabilities)
    weights = _weights(labels, weights)
    place = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for index in range(num_bins):
        inside = place == index
        count, weight = int(inside.sum()), weights[inside]
        mean = float(np.average(probabilities[inside], weights=weight)) if count else None
        right = float(np.average(labels[inside], weights=weight)) if count else None
        edges = (index / num_bins, (index + 1) / num_bins)
        bins.append(CalibrationBin(*edges, count, float(weight.sum()), mean, right))
    return bins


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float | None:
    """The mean of |mean probability - share right| over the bins, weighted by the steps in them."""
    total = sum(b.weight for b in bins)
    gaps = (b.weight * abs(b.mean_probability - b.share_right) for b in bins if b.count)  # type: ignore[operator]
    return sum(gaps) / total if total else None


def cohen_kappa(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> float | None:
    """Agreement of two raters beyond chance, on booleans; `weights` count each pair. None where chance agreement is 1.

    With weights 1 / inclusion probability it estimates the kappa of the whole from a stratified sample.
    """
    cell = 2 * _truths("labels", first).astype(np.int64) + _truths("labels", second)
    counts_4 = np.bincount(cell, None if weights is None else _finite("weights", weights), minlength=4)
    kappa = float(kappa_of_counts(counts_4.astype(np.float64)))
    return None if math.isnan(kappa) else kappa


def kappa_of_counts(counts_4: Floats) -> Floats:
    """Cohen's kappa of 2 x 2 tables [..., 4] of (weighted) counts; NaN where empty or where chance agreement is 1.

    The order is (first wrong, second wrong), (wrong, right), (right, wrong), (right, right).
    """
    both_wrong, only_second, only_first, both_right = np.moveaxis(np.asarray(counts_4, dtype=np.float64), -1, 0)
    total = both_wrong + only_second + only_first + both_right
    # Of counts, not of shares: (observed - chance) / (1 - chance), both times total squared.
    first, second = only_first + both_right, only_second + both_right
    observed, chance = (both_wrong + both_right) * total, first * second + (total - first) * (total - second)
    room = total * total - chance
    return np.where(room > 1e-12 * total * total, (observed - chance) / np.where(room > 0, room, 1.0), np.nan)


def effective_size(weights: ArrayLike) -> float:
    """Kish's effective sample size, (sum w)^2 / sum w^2: how many equally weighted draws tell as much."""
    w = _finite("weights", weights)
    return float(w.sum() ** 2 / (w @ w)) if w.any() else 0.0


# Solutions: where the first wrong step is


def first_error(labels: Sequence[int | bool | None]) -> int:
    """The index of the first wrong step, -1 where there is none; a null is no error."""
    known = {i: label for i, label in enumerate(labels) if label is not None}
    right = _truths("labels", list(known.values()))
    return next((i for i, is_right in zip(known, right, strict=True) if not is_right), -1)


def processbench_f1(reference: Sequence[int], predicted: Sequence[int]) -> dict[str, float | None]:
    """ProcessBench: the shares of erroneous and of correct solutions whose first error (-1: none) is found exactly.

    `f1` is their harmonic mean; None where either kind of solution is missing.
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for truth, guess in zip(reference, predicted, strict=True):
        hits[truth >= 0].append(truth == guess)
    erroneous, correct = (sum(h) / len(h) if h else None for h in (hits[True], hits[False]))
    f1 = None
    if erroneous is not None and correct is not None:
        f1 = 2 * erroneous * correct / (erroneous + correct) if erroneous + correct else 0.0
    return {"erroneous": erroneous, "correct": correct, "f1": f1}


def minimum_on_last_step(step_log_odds: Sequence[Sequence[float]]) -> float | None:
    """The share of solutions of two steps or more whose lowest score is the last (not also an earlier one).

    Above 0.4 the model has become one of outcomes, whatever its other figures say.
    """
    longer = [_finite("step scores", x) for x in step_log_odds if len(x) > 1]
    return sum(int(np.argmin(x)) == len(x) - 1 for x in longer) / len(longer) if longer else None


def histogram(labels: Bools, probabilities: Floats, num_bins: int = 20) -> dict[str, Any]:
    """Counts of right and of wrong steps over bins of equal width of the probability."""
    labels, probabilities = _truths("labels", labels), _finite("probabilities", probabilities)
    edges = np.linspace(0, 1, num_bins + 1)
    right, wrong = (np.histogram(probabilities[mask], edges)[0].tolist() for mask in (labels, ~labels))
    return {"edges": edges.tolist(), "right": right, "wrong": wrong}
