"""When to stop sampling solutions of a question: whether the chosen answer can still change, and how likely it will.

Enters: the answers and rewards of the first n of N samples, and the rule that chooses among them. Leaves: a `Standing`.
Samples are exchangeable: they are drawn independently from one policy. Two grounds to stop before N:

The choice is **settled**: no further sample can change it. In a vote a sample adds at most one, so a lead of more than
the N - n samples to come stands. Of best-of-N nothing is settled before N: a reward has no upper bound.

It is **reliable**: the chance that the answer chosen now is the one chosen at N.

- Majority: Adaptive-Consistency's Beta criterion (Aggarwal et al. 2023, arXiv 2305.11860), the posterior chance that
  the leader's share of the votes is larger than the runner-up's, ``P(x > 1/2), x ~ Beta(v1 + 1, v2 + 1)``.
- By rewards: ``n/N + (1 - n/N) q``. The highest of N exchangeable rewards is among the first n with chance n/N exactly.
  Else the answer is assumed to stay where it is right, and q is the chance of that by the rewards: that at least one of
  the samples which state it is right as a whole, ``1 - prod(1 - p_i)``. The assumptions: rewards are calibrated, which
  evaluation measures, and samples are wrong independently of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import betainc

from medmm_ray.stats import decoders
from medmm_ray.stats.metrics import Floats, Ints, probability

Rule = Literal["best_of_n", "sc_rm", "majority"]
RULES: tuple[Rule, ...] = get_args(Rule)
_ROUNDING = 1e-9  # more than that of a sum of some hundred weights


@dataclass(frozen=True)
class Standing:
    """Where a choice stands. `chosen` is the sample that is chosen now (of a vote: the first with the winning answer),
    None where no sample can be; `reliability` the chance that its answer is also the one chosen at N."""

    chosen: int | None
    reliability: float
    is_settled: bool

    def suffices(self, reliability: float | None) -> bool:
        """Whether sampling may stop; None asks for certainty."""
        return self.is_settled or (reliability is not None and self.reliability >= reliability)


def standing(rule: Rule, answers: Sequence[str | None], rewards: Sequence[float], num_samples: int) -> Standing:
    """The standing after the first samples of `num_samples`.

    `rewards` are log-odds, NaN without a score; `majority` does not look at them. Raises ValueError where there are
    more answers than samples, or not as many rewards.
    """
    num_drawn = len(answers)
    if num_drawn > num_samples or len(rewards) != num_drawn:
        raise ValueError(
            f"{num_drawn} answers and {len(rewards)} rewards of {num_samples} samples; expected as many rewards as "
            "answers, and no more than samples"
        )
    num_left = num_samples - num_drawn
    chosen = _chosen(rule, answers, rewards)
    if chosen is None:
        return Standing(None, 0.0, is_settled=num_left == 0)
    codes = decoders.answer_codes(answers)
    weights = _weights(rule, codes, rewards)
    # An answer that nobody gave yet is a rival of weight 0.
    leader, rival = _two_highest(codes, weights, int(codes[chosen]))
    # Sums of rewards are rounded: a lead that is no larger than that settles nothing.
    is_settled = rule != "best_of_n" and leader - rival > num_left + _ROUNDING
    if num_left == 0 or is_settled:
        return Standing(chosen, 1.0, is_settled=True)
    if rule == "majority":
        # P(x > 1/2) of Beta(a, b) is P(x < 1/2) of Beta(b, a).
        reliability = float(betainc(rival + 1, leader + 1, 0.5))
    else:
        share_drawn = num_drawn / num_samples
        is_right = _right(weights[(codes == codes[chosen]) & (codes >= 0)])
        reliability = share_drawn + (1 - share_drawn) * is_right
    return Standing(chosen, reliability, is_settled=False)


def _right(probabilities: Floats) -> float:
    """The chance that at least one of independent samples is right."""
    return float(1.0 - np.prod(1.0 - probabilities))


def _chosen(rule: Rule, answers: Sequence[str | None], rewards: Sequence[float]) -> int | None:
    if rule == "best_of_n":
        return decoders.best_of_n(rewards)
    return decoders.vote(answers, rewards if rule == "sc_rm" else None)


def _weights(rule: Rule, codes: Ints, rewards: Sequence[float]) -> Floats:
    """Each sample's vote, 0 without an answer or, where rewards count, without a score."""
    if rule == "majority":
        return (codes >= 0).astype(np.float64)
    # A sample without a score has no vote, as in `decoders`.
    scored = np.nan_to_num(probability(rewards), nan=0.0)
    return np.where(codes >= 0, scored, 0.0)


def _two_highest(codes: Ints, weights: Floats, leader: int) -> tuple[float, float]:
    """The weight of the leading answer, and of the strongest other one; 0 of an answer that is none."""
    sums: dict[int, float] = {}
    for code in np.unique(codes[codes >= 0]).tolist():
        sums[code] = float(weights[codes == code].sum())
    of_leader = sums.pop(leader, 0.0)
    return of_leader, max(sums.values(), default=0.0)
