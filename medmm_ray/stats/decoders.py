"""From step scores to one answer: rewards, the decoders that pick by them, and how often what they pick is right.

Step scores are log-odds of ``+``, never probabilities: a float32 probability saturates at 1.0 and its ties would be
broken by accident, so a reward too is the log-odds of the aggregate, exact where the aggregate itself rounds to 1.

Accuracy at N is the expectation over all subsets of N of the M samples at hand, without replacement: in closed form for
one sample, best-of-N and the oracle; for votes the mean over all subsets where they are few, else over `num_subsets`
seeded random ones. N >= M uses all M. Ties go to the first sample, everywhere; sums of rewards are compared exactly, so
that rounding neither makes a tie nor breaks one. Answers are one where grading finds them equal (`text.equal_key`). An
empty answer never votes and is never right.

A reward of NaN means "no score": the sample keeps its place among the N, but a scorer can neither choose it nor let it
vote.

Legend of suffixes: M samples of a question, S subsets, A distinct answers.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np

from medmm_ray.stats.metrics import Bools, Floats, Ints, finite, probability
from medmm_ray.text import equal_key

Aggregate = Literal["min", "last", "mean", "product", "gmean", "min_after_first"]
VoteRule = Literal["sum", "mean"]
NEAR = 1e-9
"""Relative difference up to which sums of rewards are compared exactly: far more than the rounding of a float sum."""


# Rewards: from the steps of a solution to one number


def _log_probability(log_odds: Floats) -> Floats:
    return np.asarray(-np.logaddexp(0.0, -log_odds))


def _log_odds_of_log(log_p: Floats) -> Floats:
    """log(p / (1 - p)) from log p, exact for p near 0 and near 1; infinite where p is 1."""
    # 1 - p = 1 - exp(log p): expm1 keeps its digits where p is near 1, log1p where p is near 0.
    near_one = log_p > -math.log(2)
    with np.errstate(divide="ignore"):
        log_not_p = np.where(
            near_one,
            np.log(-np.expm1(np.where(near_one, log_p, -1.0))),
            np.log1p(-np.exp(np.where(near_one, -1.0, log_p))),
        )
    return np.asarray(log_p - log_not_p)


def aggregate(step_log_odds: Sequence[float] | Floats, how: Aggregate = "min") -> float:
    """`aggregates` of one solution."""
    x = finite("step scores", step_log_odds)
    return float(aggregates(x, np.array([x.size]), how)[0])


def aggregates(step_log_odds: Floats, num_steps: Ints, how: Aggregate = "min") -> Floats:
    """The reward of each solution from its steps' log-odds: the log-odds of the aggregate of its step probabilities.

    Of solution i `num_steps[i]` entries of `step_log_odds` count, behind those of the solutions before it. `min`
    (Med-PRM's), `last`, `mean` (VisualPRM's), `product`, `gmean` (product to the power 1/T), `min_after_first`
    (MedS3's min(x_2..x_T), where x_1 is a fixed root; of a single step that step). The order of the steps changes no
    bit of a mean or product. Raises ValueError for a solution without steps, and where a step's score is not finite:
    such a solution has no reward.
    """
    x = finite("step scores", step_log_odds)
    if not num_steps.size:
        return np.zeros(0)
    if num_steps.min() < 1:
        raise ValueError("a solution without steps has no reward; expected at least one step score")
    ends = np.cumsum(num_steps)
    starts = ends - num_steps
    if how == "last":
        return x[ends - 1]
    if how == "min":
        return np.asarray(np.minimum.reduceat(x, starts))
    if how == "min_after_first":
        after_first = x.copy()
        # An infinite first step is never the lowest.
        after_first[starts[num_steps > 1]] = math.inf
        return np.asarray(np.minimum.reduceat(after_first, starts))
    # Summed from the lowest up: the same steps in another order must not differ by rounding, which would break a tie.
    solution = np.repeat(np.arange(num_steps.size), num_steps)
    x = x[np.lexsort((x, solution))]
    if how == "mean":
        # log of the sum of the p less log of the sum of the 1 - p: the division by T cancels.
        log_right = np.logaddexp.reduceat(_log_probability(x), starts)
        log_wrong = np.logaddexp.reduceat(_log_probability(-x), starts)
        return np.asarray(log_right - log_wrong)
    log_p = np.add.reduceat(_log_probability(x), starts)
    return _log_odds_of_log(log_p if how == "product" else log_p / num_steps)


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
        keys = _with_one_right_key(keys, graded_right)
    code_of_key: dict[str, int] = {}
    codes = []
    for key in keys:
        code = code_of_key.setdefault(key, len(code_of_key)) if key else -1
        codes.append(code)
    return np.array(codes, dtype=np.int64)


def _with_one_right_key(keys: Sequence[str], graded_right: Sequence[bool | None] | Bools) -> list[str]:
    """The keys with all those of answers that are graded right replaced by the first of them."""
    right_keys: dict[str, None] = {}  # a dict keeps the order in which they appear
    for key, right in zip(keys, graded_right, strict=True):
        if key and right:
            right_keys[key] = None
    first_right = next(iter(right_keys), "")
    return [first_right if key in right_keys else key for key in keys]


def best_of_n(rewards: Sequence[float] | Floats) -> int | None:
    """The index of the highest reward, the first of equals, NaN left out; None where no sample has one."""
    rewards_M = np.asarray(rewards, dtype=np.float64)
    scored = np.flatnonzero(~np.isnan(rewards_M))
    if not scored.size:
        return None
    best = rewards_M[scored].argmax()  # argmax gives the first of equals
    return int(scored[best])


def vote(
    answers: Sequence[str | None],
    rewards: Sequence[float] | Floats | None = None,
    rule: VoteRule = "sum",
) -> int | None:
    """The index of the first sample with the winning answer; None where nobody votes.

    Without `rewards` each sample counts one (majority vote, self-consistency); with them, the probability of its reward
    (SC+RM for `sum`).
    """
    rewards_M = None if rewards is None else np.asarray(rewards, dtype=np.float64)
    return vote_of_codes(answer_codes(answers), rewards_M, rule)


def vote_of_codes(codes: Ints, rewards_M: Floats | None = None, rule: VoteRule = "sum") -> int | None:
    """`vote` of answers that are numbered already (`answer_codes`)."""
    ballots = _ballots(codes, rewards_M)
    if not ballots.voters.any():
        return None
    all_samples_SM = np.ones((1, codes.size), dtype=bool)
    winner = int(_winners(ballots, all_samples_SM, rule)[0])
    return int(np.flatnonzero(codes == winner)[0])


def decode(
    name: str,
    answers: Sequence[str | None],
    step_log_odds: Sequence[Sequence[float]],
) -> int | None:
    """The index of the sample that the named decoder picks (of a vote: the first with the winning answer).

    `step_log_odds` is empty for a sample without scores. Raises ValueError for an unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f"unknown decoder {name!r}; known: {', '.join(DECODERS)}")
    decoder = DECODERS[name]
    if decoder.aggregate is None:
        return vote(answers)
    rewards: list[float] = []
    for scores in step_log_odds:
        reward = aggregate(scores, decoder.aggregate) if len(scores) else math.nan
        rewards.append(reward)
    if decoder.rule == "best":
        return best_of_n(rewards)
    return vote(answers, rewards, decoder.rule)


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
        votes = self.voters & subset_M & (self.codes == answer)
        rewards = self.rewards[votes]
        low = rewards[rewards <= 0]
        high = rewards[rewards > 0]
        complements = probability(-high)
        terms = [
            *probability(low).tolist(),
            float(high.size),
            *(-complements).tolist(),
        ]
        return terms, rewards.size


def _ballots(codes: Ints, rewards: Floats | None) -> _Ballots:
    has_answer = codes >= 0
    if rewards is None:
        return _Ballots(
            codes,
            has_answer,
            np.ones(codes.size),
            None,
        )
    scored = ~np.isnan(rewards)
    # Zero in place of NaN, which would spread through the matrix products; such a sample is no voter.
    rewards = np.where(scored, rewards, 0.0)
    return _Ballots(
        codes,
        has_answer & scored,
        probability(rewards),
        rewards,
    )


def _winners(ballots: _Ballots, subsets_SM: Bools, rule: VoteRule) -> Ints:
    """The winning answer code of each subset, -1 where nobody votes. Ties: the answer that appears first in it."""
    num_answers = int(ballots.codes.max(initial=-1)) + 1
    if num_answers == 0:
        return np.full(len(subsets_SM), -1, dtype=np.int64)
    gives_answer_MA = ballots.codes[:, None] == np.arange(num_answers)
    votes_MA = gives_answer_MA & ballots.voters[:, None]
    in_subset_SM = subsets_SM.astype(np.float64)  # a product of floats is BLAS's, one of booleans a slow loop
    count_SA = in_subset_SM @ votes_MA
    sum_SA = in_subset_SM @ (votes_MA * ballots.weight[:, None])
    if rule == "mean":
        sum_SA = sum_SA * (1.0 / np.maximum(count_SA, 1.0))
    sum_SA = np.where(count_SA > 0, sum_SA, -np.inf)
    highest_S1 = sum_SA.max(axis=1, keepdims=True)
    leads_SA = (count_SA > 0) & (sum_SA >= highest_S1 * (1 - NEAR))
    if ballots.rewards is not None:  # counts are exact as they are
        _settle_near_ties(leads_SA, ballots, subsets_SM, rule)
    return _first_leader(leads_SA, votes_MA, subsets_SM)


def _settle_near_ties(leads_SA: Bools, ballots: _Ballots, subsets_SM: Bools, rule: VoteRule) -> None:
    """Leave, in place, only those leaders of each subset whose exact sums are the highest."""
    num_answers = leads_SA.shape[1]
    near_ties = np.flatnonzero(leads_SA.sum(axis=1) > 1)
    for subset in near_ties:
        leaders = np.flatnonzero(leads_SA[subset]).tolist()
        best = _highest(ballots, leaders, subsets_SM[subset], rule)
        leads_SA[subset] = np.isin(np.arange(num_answers), best)


def _first_leader(leads_SA: Bools, votes_MA: Bools, subsets_SM: Bools) -> Ints:
    """Of each subset's leading answers the one whose first vote comes first; -1 where nobody votes."""
    num_leaders_S = leads_SA.sum(axis=1)
    winner_S = np.where(num_leaders_S > 0, leads_SA.argmax(axis=1), -1)
    # Where one answer leads, which is almost everywhere, the order of the votes does not matter.
    ties = np.flatnonzero(num_leaders_S > 1)
    num_samples = subsets_SM.shape[1]
    votes_SMA = subsets_SM[ties, :, None] & votes_MA
    sample_M1 = np.arange(num_samples)[:, None]
    # No vote: a place behind the last sample; no leader: one behind that, so that it is never the first.
    first_vote_SA = np.where(votes_SMA, sample_M1, num_samples).min(axis=1, initial=num_samples)
    winner_S[ties] = np.where(leads_SA[ties], first_vote_SA, num_samples + 1).argmin(axis=1)
    return winner_S


def _highest(ballots: _Ballots, answers: Sequence[int], subset_M: Bools, rule: VoteRule) -> list[int]:
    """Those of `answers` whose sum (or mean) of weights is the highest, compared without rounding."""
    best = [answers[0]]
    best_terms, best_votes = ballots.terms(answers[0], subset_M)
    for answer in answers[1:]:
        terms, votes = ballots.terms(answer, subset_M)
        # Means are compared as sums over a common denominator: each sum times the votes of the opposite answer.
        times, best_times = (best_votes, votes) if rule == "mean" else (1, 1)
        negated = list(map(operator.neg, best_terms))
        ahead = math.fsum(terms * times + negated * best_times)  # rounds once, at the end: its sign is exact
        if ahead > 0:
            best, best_terms, best_votes = [answer], terms, votes
        elif ahead == 0:
            best.append(answer)
    return best


# Accuracy of one question, in expectation over subsets of n of its samples


@lru_cache(maxsize=4096)
def _best_weights(num_samples: int, n: int) -> Floats:
    """The chance that the sample of rank r (0: best) is the best of a random subset of n: C(M-1-r, n-1) / C(M, n)."""
    num_subsets = math.comb(num_samples, n)
    return np.array([math.comb(num_samples - 1 - rank, n - 1) / num_subsets for rank in range(num_samples)])


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
    num_wrong = int((~correct).sum())
    return 1.0 - math.comb(num_wrong, n) / math.comb(correct.size, n)


@lru_cache(maxsize=64)
def _all_subsets(num_samples: int, n: int) -> Bools:
    members = np.array(list(combinations(range(num_samples), n)))
    return _mask(members, num_samples)


def _mask(members_SN: Ints, num_samples: int) -> Bools:
    mask_SM = np.zeros((len(members_SN), num_samples), dtype=bool)
    np.put_along_axis(mask_SM, members_SN, True, axis=1)
    return mask_SM


def subsets(num_samples: int, n: int, num_subsets: int, seed: int) -> Bools:
    """Subsets of n of the samples as rows of a mask [S, M]: all of them where there are at most `num_subsets`.

    Raises ValueError where n or `num_subsets` is below 1.
    """
    if n < 1 or num_subsets < 1:
        raise ValueError(f"n is {n} and num_subsets {num_subsets}; expected at least 1 of each")
    n = min(n, num_samples)
    if math.comb(num_samples, n) <= num_subsets:
        return _all_subsets(num_samples, n)
    # The n lowest of M random numbers are a random subset: one draw for all subsets at once.
    numbers_SM = np.random.default_rng([seed, n]).random((num_subsets, num_samples))
    lowest_first_SM = numbers_SM.argpartition(n - 1, axis=1)
    return _mask(lowest_first_SM[:, :n], num_samples)


def expected_vote(
    codes: Ints,
    correct: Bools,
    subsets_SM: Bools,
    rewards: Floats | None = None,
    rule: VoteRule = "sum",
) -> float:
    """The share of subsets whose winning answer is right; without `rewards` a plain majority vote."""
    return expected_votes(codes, correct, [subsets_SM], rewards, rule)[0]


def expected_votes(
    codes: Ints,
    correct: Bools,
    subsets: Sequence[Bools],
    rewards: Floats | None = None,
    rule: VoteRule = "sum",
) -> list[float]:
    """`expected_vote` of several sets of subsets [S, M] at once: a call for each takes most of its time in calls."""
    if not codes.size:
        return [0.0] * len(subsets)
    num_answers = int(codes.max(initial=-1)) + 1
    right_A = np.zeros(num_answers + 1, dtype=bool)  # the last entry is the one of code -1: never right
    right_A[codes[(codes >= 0) & correct]] = True
    winners_S = _winners(_ballots(codes, rewards), np.concatenate(subsets), rule)
    ends = np.cumsum([len(subsets_SM) for subsets_SM in subsets])
    return [float(is_right_S.mean()) for is_right_S in np.split(right_A[winners_S], ends[:-1])]
