"""How far the scores of a reward model, say a quantised one, are from another's on the same questions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medmm_ray.reward_model.model import RewardModel
from medmm_ray.reward_model.request import ScoreRequest
from medmm_ray.reward_model.scores import StepScores


@dataclass(frozen=True)
class ScoreAgreement:
    """Over all steps: absolute differences of log-odds and of probabilities, mean and largest; `spread`, the standard
    deviation of the original's log-odds, beside which they are to be seen; `rank`, Spearman's correlation of the
    log-odds. Over all questions: `same_best`, the share whose best solution (by its smallest step) is the same.
    `num_unscored` solutions are left out: one of the models has an error in place of their scores."""

    num_steps: int
    num_questions: int
    mean_log_odds: float
    max_log_odds: float
    mean_prob: float
    max_prob: float
    spread: float
    rank: float
    same_best: float
    num_unscored: int


def score_agreement(original: RewardModel, other: RewardModel, requests: Iterable[ScoreRequest]) -> ScoreAgreement:
    """Score `requests` with both models, compare what both could score.

    Raises ValueError where that is nothing.
    """
    asked = list(requests)
    pairs = list(zip(original.score_many(asked), other.score_many(asked), strict=True))
    both = [[(a, b) for a, b in zip(*pair, strict=True) if a.error is None and b.error is None] for pair in pairs]
    num_unscored = sum(len(pair[0]) for pair in pairs) - sum(map(len, both))
    both = [scores for scores in both if scores]
    if not both:
        raise ValueError(f"none of the {len(asked)} questions has a solution that both models could score")
    ours_T, theirs_T = (
        torch.tensor([x for scores in both for pair in scores for x in pair[side].log_odds]).double() for side in (0, 1)
    )
    apart_T = (ours_T - theirs_T).abs()
    probs_T = (ours_T.sigmoid() - theirs_T.sigmoid()).abs()
    best = [_best([a for a, _ in scores]) == _best([b for _, b in scores]) for scores in both]
    return ScoreAgreement(
        len(apart_T), len(both), float(apart_T.mean()), float(apart_T.max()), float(probs_T.mean()),
        float(probs_T.max()), float(ours_T.std(correction=0)), spearman(ours_T, theirs_T), sum(best) / len(best),
        num_unscored,
    )  # fmt: skip


def _best(scores: Sequence[StepScores]) -> int:
    return max(range(len(scores)), key=lambda i: min(scores[i].log_odds))


def spearman(one_N: Tensor, other_N: Tensor) -> float:
    """Correlation of ranks, ties at their mean rank; 1.0 for fewer than two values."""
    if len(one_N) < 2:
        return 1.0
    return float(torch.corrcoef(torch.stack([_ranks(one_N), _ranks(other_N)]))[0, 1])


def _ranks(values_N: Tensor) -> Tensor:
    _, group_N, counts_G = torch.unique(values_N, return_inverse=True, return_counts=True)
    last_G = counts_G.cumsum(0).double()
    ranks_N: Tensor = (last_G - (counts_G - 1) / 2)[group_N]
    return ranks_N
