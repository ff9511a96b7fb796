"""The report of a scorer: what `evaluate` hands to the page and to ``report.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medmm_ray.config import JsonObject
from medmm_ray.stats.balance import SourceBalance
from medmm_ray.steps.evaluate.accuracy import Accuracy, AccuracyOverN, GroupAccuracy
from medmm_ray.steps.evaluate.calibration import TemperatureScaling
from medmm_ray.steps.evaluate.examples import Example
from medmm_ray.steps.evaluate.gates import LimitGate
from medmm_ray.steps.evaluate.step_groups import GroupStepFigures
from medmm_ray.steps.evaluate.steps import AgreementInShort, StepFigures


@dataclass(frozen=True)
class StepEntry:
    """What a step of the run made, how long it took, and what it cost and failed at where that is known."""

    name: str
    rows: int
    seconds: float
    cost: float = 0.0
    errors: Mapping[str, int] = field(default_factory=dict)
    gpu_hours: float = 0.0
    gpu_dollars: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CostBenefit:
    """What the run cost, and what it is worth: points of best-of-N by the main arm above one sample.

    `dollars` are those of APIs and, at the price of the recipe's plan, of GPUs; a rate is None where nothing was spent.
    """

    dollars: float
    gpu_hours: float
    points: float
    points_per_100_dollars: float | None
    points_per_gpu_hour: float | None


def cost_benefit(steps: Sequence[StepEntry], accuracy: AccuracyOverN, arms: Sequence[str], n: int) -> CostBenefit:
    """The costs of all steps beside the gain; without an arm the gain is the majority's."""
    arm = "multimodal" if "multimodal" in arms else next(iter(arms), None)
    chosen = accuracy.best_of_n[arm][str(n)] if arm else accuracy.majority[str(n)]
    points = 100 * (chosen.value - accuracy.one_sample.value)
    dollars = sum(step.cost + step.gpu_dollars for step in steps)
    gpu_hours = sum(step.gpu_hours for step in steps)
    return CostBenefit(
        dollars=round(dollars, 6),
        gpu_hours=round(gpu_hours, 6),
        points=round(points, 4),
        # A run on what one owns has cost no dollars: a rate of it would be infinite.
        points_per_100_dollars=100 * points / dollars if dollars else None,
        points_per_gpu_hour=points / gpu_hours if gpu_hours else None,
    )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What went into the figures and what is missing; mappings are by arm, `errors` by table and kind."""

    split: str
    excluded: dict[str, int]
    """Questions whose own row has an error, by kind."""
    questions: int
    clusters: int
    """Independent groups of questions: those about one image, patient or source text are one."""
    solutions: int
    without_answer: int
    questions_without_solutions: int
    questions_with_fewer_than_n: int
    scored: dict[str, int]
    unscored: dict[str, int]
    questions_without_scores: dict[str, int]
    errors: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What a scorer is worth; every share is in [0, 1]."""

    title: str
    config: JsonObject
    """The settings of `EvaluateConfig` that made the figures."""
    n: int
    """The largest N."""
    ns: list[int]
    arms: list[str]
    reference: str
    """The label source that steps are measured against; empty where none has labels."""
    counts: Counts
    accuracy: AccuracyOverN
    decoders: dict[str, dict[str, Accuracy]]
    """By arm and decoder, over all samples of each question."""
    step: dict[str, StepFigures]
    """By arm."""
    temperature: dict[str, TemperatureScaling]
    """By arm; only where validation questions are scored (score.splits) and labelled."""
    step_by_dataset: dict[str, dict[str, dict[str, GroupStepFigures]]]
    """By arm, data set, and its own kind of question or error (``all``: all of them)."""
    step_by_source: dict[str, dict[str, GroupStepFigures]]
    """By arm and label source."""
    answers: dict[str, dict[str, dict[str, int]]]
    """By answer type, right answer and the answer that best-of-N of the main arm (else the majority) gives: questions.
    Letters and yes or no alone."""
    labels: list[SourceBalance]
    agreement: dict[str, AgreementInShort]
    """By the two sources' names, as ``judge_expert``."""
    largest_text_difference: float | None
    """Between the multimodal arm's text part and the text-only scores; None without both."""
    by_dataset: dict[str, GroupAccuracy]
    by_difficulty: dict[str, GroupAccuracy]
    by_modality: dict[str, GroupAccuracy]
    by_answer_type: dict[str, GroupAccuracy]
    by_published_type: dict[str, GroupAccuracy]
    """By the data set's own word for the kind of question, as closed and open."""
    by_topic: dict[str, GroupAccuracy]
    """By what the question is about, as the data set names it; empty where there are too many."""
    by_question: dict[str, GroupAccuracy]
    """By question text; empty where there are too many."""
    steps: list[StepEntry]
    cost: CostBenefit
    environment: JsonObject
    """Machine, packages and code revision."""
    examples: list[Example]
    gates: list[LimitGate]
    disagreements: list[Example] = field(default_factory=list)
    """Steps on which the main arm is most sure of the opposite of an expert, or of the reference without one."""
    settings: JsonObject = field(default_factory=dict)
    """By step of the run: the settings that decide what it made."""
