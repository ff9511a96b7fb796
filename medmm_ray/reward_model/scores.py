"""Results of scoring one solution: its text states and its step scores (`reference` shows how they are computed)."""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepScores:
    """One solution's scores: probabilities that each step is right, and their log-odds = text part + image part.

    Rank by log-odds: a probability saturates and makes ties. `error` is None, or ``kind: message`` and no scores.
    `num_documents` were read with it: fewer than with its neighbours where it is too long for all of them.
    """

    text_log_odds: list[float] = field(default_factory=list)
    image_log_odds: list[float] = field(default_factory=list)
    error: str | None = None
    num_documents: int = 0

    @property
    def log_odds(self) -> list[float]:
        """Log-odds that each step is right."""
        return [text + image for text, image in zip(self.text_log_odds, self.image_log_odds, strict=True)]

    @property
    def plus_probs(self) -> list[float]:
        """Probability that each step is right."""
        return cast(list[float], torch.tensor(self.log_odds, dtype=torch.float64).sigmoid().tolist())

    @property
    def min_plus_prob(self) -> float | None:
        """The worst step's probability; None without scores."""
        return min(self.plus_probs, default=None)

    @property
    def final_plus_prob(self) -> float | None:
        """The last step's probability; None without scores."""
        return self.plus_probs[-1] if self.plus_probs else None


@dataclass(frozen=True)
class StepAttention:
    """Where a step's attention lies on an image: `weights` [R, C] of its patches, rows from the top, which add up to 1,
    and `share`, what these patches have of the whole attention: the rest is on other image tokens."""

    weights: list[list[float]]
    share: float

    @classmethod
    def of(cls, weights_P: Tensor) -> "StepAttention":
        """From the patches' parts of the whole attention, row by row of a square."""
        side = math.isqrt(len(weights_P))
        share = float(weights_P.sum())
        # Where another image has it all, none is left to divide by.
        weights_RC = (weights_P / max(share, torch.finfo(weights_P.dtype).tiny)).reshape(side, side)
        return cls(weights_RC.tolist(), share)


@dataclass(frozen=True)
class SolutionStates:
    """What the text tower says of one solution: ``states_TD`` at its tags after the final norm, ``summaries_TD`` (the
    mean state of each step's tokens in the middle layer) and the text's log-odds [T, fp32]; or an error."""

    states_TD: Tensor
    summaries_TD: Tensor
    log_odds_T: Tensor
    error: str | None = None
    num_documents: int = 0
