"""What a two-tower model is measured by on the held-out questions while it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from medmm_ray.stats.decoders import expected_best, expected_oracle
from medmm_ray.train.text_prm import validation_figures


@dataclass(frozen=True)
class MeasuredQuestion:
    """A held-out question: of its labelled steps the scores and whether they are right; of its solutions the rewards
    and whether their answers are right."""

    scores: list[float]
    text_scores: list[float]
    is_right: list[bool]
    rewards: list[float]
    correct: list[bool]


def held_out_figures(questions: Sequence[MeasuredQuestion]) -> dict[str, float]:
    """Step AUROC, with the images (it selects the epoch) and by the text alone, and `rerank_figures`."""
    scores: list[float] = []
    text_scores: list[float] = []
    is_right: list[bool] = []
    for question in questions:
        scores += question.scores
        text_scores += question.text_scores
        is_right += question.is_right
    reranked = [(question.rewards, question.correct) for question in questions]
    figures = validation_figures(scores, is_right) | rerank_figures(reranked)
    # The baseline: what the images are worth is the difference.
    text_figures = validation_figures(text_scores, is_right)
    if text_figures:
        figures["validation_auroc_text_only"] = text_figures["validation_auroc"]
    return figures


def rerank_figures(questions: Sequence[tuple[Sequence[float], Sequence[bool]]]) -> dict[str, float]:
    """The shares of questions answered rightly by the solution of the highest reward, by one taken at random, and by
    the best that there is; empty without questions.

    Each question has its solutions' rewards and which of them are correct.
    """
    if not questions:
        return {}
    import numpy as np

    best_of_n: list[float] = []
    one_sample: list[float] = []
    oracle: list[float] = []
    for rewards, is_correct in questions:
        correct = np.array(is_correct, dtype=bool)
        best_of_n.append(expected_best(np.array(rewards), correct, len(correct)))
        one_sample.append(float(correct.mean()))
        oracle.append(expected_oracle(correct, len(correct)))
    return {
        "validation_best_of_n": mean(best_of_n),
        "validation_one_sample": mean(one_sample),
        "validation_oracle": mean(oracle),
    }
