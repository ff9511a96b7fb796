"""What the dataset is held to."""

from typing import Literal

from pydantic import Field

from medmm_ray.config import Config, execution
from medmm_ray.stats.targets import AfterFirstError

Range = tuple[float, float]


class AuditConfig(Config):
    """What the dataset is held to; the targets are the MedMM framework's."""

    gates: Literal["report", "required"] = "report"
    """required: a gate that fails ends the step with an error, so that nothing is trained; the report is written."""
    sources: tuple[str, ...] = ("judge", "monte_carlo", "tree_search", "expert", "phantom")
    """Label sources that may speak for the dataset in balance and calibration; the first that has labels does."""
    min_kappa: float = 0.8
    """Agreement of judge and expert (Cohen's kappa) must lie above it."""
    positive_share: Range = (0.7, 0.8)
    """Range of the share of right steps among the labelled ones."""
    min_easy_positive: float = 0.9
    """Share of right steps in easy questions must lie above it."""
    hard_positive: Range = (0.6, 0.7)
    """Range of the share of right steps in hard questions."""
    mean_steps: Range = (8.0, 12.0)
    """Range of the mean number of steps of a solution."""
    usual_steps: tuple[int, int] = (5, 15)
    """Fewest and most steps of a solution that is not flagged."""
    modalities: tuple[str, ...] = ("radiology", "pathology", "clinical")
    """Modalities that must all be there."""
    max_cost_usd: float | None = 3000.0
    """Budget of what APIs and readers are paid, US dollars: judge 2,500, expert 500; null: none. Of the framework's
    3,900 the rest (Monte Carlo 400, GPUs 480) is GPU time, which no table books: --dry-run estimates it."""
    dollars_per_reviewed_step: float = Field(0.5, ge=0)
    """US dollars per verdict of a reader."""
    after_first_error: AfterFirstError = "collapse"
    """What steps after the first wrong one are trained on, where the report says what each label policy yields."""
    yield_solutions: int = Field(5000, ge=1)
    """Solutions, drawn by their ids, on which the yield of the label policies is measured."""
    bootstrap_samples: int = Field(1000, ge=1)
    """Resamples of the questions for the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""
    title: str = execution("Dataset report")
    """Title of the report."""
