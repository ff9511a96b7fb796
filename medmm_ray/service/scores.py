"""`POST /v1/score`: the probabilities of the steps, without a ranking. Pure: from log-odds to the answer."""

from pydantic import Field

from medmm_ray.service.evidence import RetrievedEvidence
from medmm_ray.service.messages import Answer
from medmm_ray.service.rerank import Arm, Case, Scored, Usage, arm_of, step_totals
from medmm_ray.stats import metrics


class ScoreRequest(Case):
    """A question, what is known about it, and the solutions whose steps to score."""


class SolutionScores(Answer):
    """The scores of one solution's steps."""

    index: int
    """Position in the request, from 0."""
    probabilities: list[float]
    """Probability that each step is right, in order; empty where the solution could not be scored."""
    text_log_odds: list[float]
    """The part of each step's log-odds that question, documents and the solution so far contribute."""
    image_log_odds: list[float]
    """The part that the images contribute; exactly 0 without an image."""
    error: str | None = None
    """Why the solution could not be scored."""


class ScoreAnswer(Answer):
    """The scores of all solutions, in the request's order."""

    model: str
    arm: Arm
    """Whether an image took part in the scores."""
    solutions: list[SolutionScores]
    warnings: list[str] = Field(default=[])
    """What of the request is outside of what the model was trained on, so that the scores may be worth less."""
    evidence: RetrievedEvidence | None = None
    """What was retrieved, where `retrieve` asked for it."""
    usage: Usage | None = None
    """What the request cost; null where it was not counted."""


def score_answer(request: ScoreRequest, scored: Scored, model: str, warnings: list[str]) -> ScoreAnswer:
    """The answer to `request` from the log-odds of its solutions, in its order."""
    solutions: list[SolutionScores] = []
    for index, score in enumerate(scored.solutions):
        totals = step_totals(score)
        has_scores = totals.error is None
        # From the sum of the parts: theirs would not multiply to it.
        probabilities = metrics.probability(totals.log_odds).tolist()
        solutions.append(
            SolutionScores(
                index=index,
                probabilities=probabilities,
                # A value that is no number cannot be said in JSON.
                text_log_odds=list(score.text_log_odds) if has_scores else [],
                image_log_odds=list(score.image_log_odds) if has_scores else [],
                error=totals.error,
            )
        )
    return ScoreAnswer(
        model=model,
        arm=arm_of(request),
        solutions=solutions,
        warnings=warnings,
        evidence=scored.evidence,
        usage=scored.usage,
    )
