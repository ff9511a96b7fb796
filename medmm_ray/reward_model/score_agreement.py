"""How well the scores of a reward model, say a quantised one, agree with another's on the same questions."""

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


@dataclass(frozen=True)
class _Pair:
    """One question's scores of both models, of the solutions that both could score."""

    original: list[StepScores]
    compared: list[StepScores]

    @classmethod
    def of(cls, original: Sequence[StepScores], compared: Sequence[StepScores]) -> "_Pair":
        """Two models' scores of one question, without what one of them could not score."""
        pair = cls([], [])
        for ours, theirs in zip(original, compared, strict=True):
            if ours.error is None and theirs.error is None:
                pair.original.append(ours)
                pair.compared.append(theirs)
        return pair

    @property
    def has_same_best(self) -> bool:
        """Whether both models rank the same solution first."""
        return _best(self.original) == _best(self.compared)


def score_agreement(original: RewardModel, compared: RewardModel, requests: Iterable[ScoreRequest]) -> ScoreAgreement:
    """Score `requests` with both models, compare what both could score.

    Raises ValueError where that is nothing.
    """
    requests = list(requests)
    num_unscored = 0
    pairs: list[_Pair] = []
    for ours, theirs in zip(original.score_many(requests), compared.score_many(requests), strict=True):
        pair = _Pair.of(ours, theirs)
        num_unscored += len(ours) - len(pair.original)
        if pair.original:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"none of the {len(requests)} questions has a solution that both models could score")
    original_T = _all_log_odds([pair.original for pair in pairs])
    compared_T = _all_log_odds([pair.compared for pair in pairs])
    log_odds_apart_T = (original_T - compared_T).abs()
    probs_apart_T = (original_T.sigmoid() - compared_T.sigmoid()).abs()
    return ScoreAgreement(
        num_steps=len(log_odds_apart_T),
        num_questions=len(pairs),
        mean_log_odds=float(log_odds_apart_T.mean()),
        max_log_odds=float(log_odds_apart_T.max()),
        mean_prob=float(probs_apart_T.mean()),
        max_prob=float(probs_apart_T.max()),
        spread=float(original_T.std(correction=0)),
        rank=spearman(original_T, compared_T),
        same_best=sum(pair.has_same_best for pair in pairs) / len(pairs),
        num_unscored=num_unscored,
    )


def _all_log_odds(questions: Sequence[Sequence[StepScores]]) -> Tensor:
    """Log-odds of all steps of all solutions [T, fp64], as `score` gives them in float32."""
    log_odds: list[float] = []
    for solutions in questions:
        for scores in solutions:
            log_odds += scores.log_odds
    return torch.tensor(log_odds).double()


def _best(scores: Sequence[StepScores]) -> int:
    return max(range(len(scores)), key=lambda i: min(scores[i].log_odds))


def spearman(first_N: Tensor, second_N: Tensor) -> float:
    """Correlation of ranks, ties at their mean rank; 1.0 for fewer than two values."""
    from scipy.stats import spearmanr

    if len(first_N) < 2:
        return 1.0
    return float(spearmanr(first_N.numpy(), second_N.numpy()).statistic)
