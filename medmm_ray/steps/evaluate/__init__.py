"""Tables -> figures: what the scorer is worth.

Enter: questions, images, solutions, scores, labels and what the run says of itself. Leaves: an `EvaluationReport`
(``report.json``) and the table of each question's outcomes.

What counts: the questions of one split whose own row has no error (the others are counted under `counts.excluded`). A
question without solutions, or without one scored solution, counts as wrong and is counted; a solution without an answer
or without a score keeps its place among the N (`medmm_ray.stats.decoders` says what that means). A row of scores that
are not finite is a failed row of the kind `not_finite`, under `counts.errors`. Step metrics take their truth
from one source for the whole report, the first of `reference` that has labels in the split; nulls stay out. An expert's
steps weigh 1 / their chance to enter the review queue. Gates are held against truth alone, a phantom's or an expert's.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from medmm_ray.config import Config, JsonObject, Split, execution, identity
from medmm_ray.data.tables import code_revision, error_kind, package_versions
from medmm_ray.stats.agreement import PairAgreement
from medmm_ray.stats.balance import SourceBalance
from medmm_ray.stats.decoders import Aggregate
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate.accuracy import (
    Chances,
    GroupAccuracy,
    accuracy,
    accuracy_by_column,
    accuracy_by_decoder,
    chances,
)
from medmm_ray.steps.evaluate.examples import choose_examples
from medmm_ray.steps.evaluate.gates import gates_of
from medmm_ray.steps.evaluate.outcomes import COLUMNS, outcomes
from medmm_ray.steps.evaluate.report import Counts, EvaluationReport, StepEntry
from medmm_ray.steps.evaluate.scored_questions import (
    ARMS,
    LogOdds,
    Sample,
    ScoredQuestion,
    clusters,
    of_questions,
    samples_by_question,
    scored_questions,
    step_log_odds,
    without_not_finite,
)
from medmm_ray.steps.evaluate.steps import (
    LabelsOfSolutions,
    agreement,
    labels_of_solutions,
    reference_labels,
    step_figures,
)

VERSION = 5  # of what a step makes: raise it when the same config makes something else
__all__ = ["EvaluateConfig", "Evaluation", "EvaluationReport", "StepEntry", "environment", "evaluate"]


class EvaluateConfig(Config):
    """What is measured, against which labels, and how finely."""

    split: Split = "test"
    """The split that is measured."""
    ns: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Numbers of samples N; those above what was sampled fall away."""
    aggregate: Aggregate = "min"
    """What makes a solution's reward of its steps: min (Med-PRM), last, mean (VisualPRM), product, gmean."""
    reference: tuple[str, ...] = ("phantom", "expert", "judge")
    """Label sources that step metrics may be measured against; the first that has labels in the split is. Against a
    judge the figures are shown, but no gate is held to them."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability from which a step is called right, in macro-F1, kappa and first errors."""
    calibration_bins: int = Field(10, ge=1)
    """Bins of equal width of the calibration curve and of the ECE (weighted by count)."""
    bootstrap_samples: int = Field(2000, ge=1)
    """Resamples of the questions' clusters for the 95 % intervals; questions about one image or one patient are one."""
    num_subsets: int = Field(128, ge=1)
    """Random subsets per question and N over which votes are averaged; all subsets where there are no more."""
    max_groups: int = Field(12, ge=0)
    """A table by question text, and one by topic, is made where there are at most this many of them."""
    num_examples: int = Field(6, ge=0)
    """Example questions that are shown with their solutions."""
    seed: int = 0
    """Seed of subsets, bootstrap and choice of examples."""
    title: str = execution("Multimodal process reward model: report")
    """Title of the report."""


@dataclass(frozen=True)
class Evaluation:
    """The report, and the table of `outcomes` that its accuracies are means of."""

    report: EvaluationReport
    outcomes: pa.Table


def evaluate(
    config: EvaluateConfig,
    *,
    questions: pa.Table,
    images: pa.Table,
    solutions: pa.Table,
    scores: pa.Table,
    labels: Iterable[pa.Table],
    review_queue: pa.Table | None = None,
    balances: Sequence[SourceBalance] = (),
    pairs: Sequence[PairAgreement] = (),
    steps: Sequence[StepEntry] = (),
    settings: JsonObject | None = None,
    environment: JsonObject | None = None,
) -> Evaluation:
    """The report, and each question's part in it.

    `labels` are rows of any sources and splits, in parts that are held only while they are read; `images` needs the
    columns of `ExampleImage`; `review_queue` has the steps that an expert was asked about, with their inclusion
    probabilities; `balances` and `pairs` say what the labels of all splits are worth, as the dataset report has it;
    `settings` are those of all steps of the run, by step.

    Raises ValueError where the split has no solution at all, or a scored solution another number of scores than steps.
    """
    of_split = questions.filter(pc.equal(questions["split"], config.split)).sort_by("question_id")
    usable = of_split.filter(pc.is_null(of_split["error"]))
    solutions = of_questions(solutions, usable)
    scores = without_not_finite(of_questions(scores, usable))
    samples = samples_by_question(solutions)
    log_odds = step_log_odds(scores, samples)
    arms = _in_order(log_odds)
    ns = _ns(config, solutions, samples)
    scored = scored_questions(usable, samples, log_odds, arms, config.aggregate, config.seed)
    labels_of_split = labels_of_solutions(labels, solutions)
    reference = reference_labels(config.reference, solutions, labels_of_split.encoded, review_queue)
    # One seed for all figures: they rest on the same resamples, so that they may be compared.
    resampling = Resampling(config.bootstrap_samples, config.seed)
    step_metrics = {}
    for arm in arms:
        step_metrics[arm] = step_figures(log_odds[arm], reference, config.threshold, config.calibration_bins)
    clusters_Q = clusters(scored)
    by_question = chances(scored, arms, ns, config.num_subsets, clusters_Q)
    over_n = accuracy(by_question, arms, ns, resampling)
    text_difference = _largest_text_difference(scores)
    agreement_by_name = agreement(pairs)
    n = ns[-1]
    errors = _errors(solutions, scores, labels_of_split)
    by_column = _accuracy_by_group(config, scored, by_question, arms, n, resampling)
    report = EvaluationReport(
        title=config.title,
        config=identity(config),
        n=n,
        ns=ns,
        arms=arms,
        reference=reference.source,
        counts=_counts(config.split, of_split, scored, by_question, arms, n, errors),
        accuracy=over_n,
        decoders=accuracy_by_decoder(scored, log_odds, arms, clusters_Q, resampling),
        step=step_metrics,
        labels=list(balances),
        agreement=agreement_by_name,
        largest_text_difference=text_difference,
        by_dataset=by_column["dataset"],
        by_difficulty=by_column["difficulty"],
        by_modality=by_column["modality"],
        by_answer_type=by_column["answer_type"],
        by_published_type=by_column["published_type"],
        by_topic=by_column["topic"],
        by_question=by_column["question"],
        steps=list(steps),
        settings=dict(settings or {}),
        environment=dict(environment or {}),
        examples=choose_examples(
            scored,
            arms,
            solutions,
            images,
            scores,
            reference.labels,
            num_examples=config.num_examples,
            seed=config.seed,
        ),
        gates=gates_of(
            n,
            reference.source,
            over_n,
            step_metrics.get("multimodal"),
            agreement_by_name.get("judge_expert"),
            text_difference,
        ),
    )
    return Evaluation(report, outcomes(scored, by_question, arms))


def _in_order(arms: Iterable[str]) -> list[str]:
    """The arms in the order of `ARMS`, then those of other names."""
    present = set(arms)
    ordered = [arm for arm in ARMS if arm in present]
    return ordered + sorted(present.difference(ARMS))


def _accuracy_by_group(
    config: EvaluateConfig,
    scored: Sequence[ScoredQuestion],
    by_question: Chances,
    arms: Sequence[str],
    n: int,
    resampling: Resampling,
) -> dict[str, dict[str, GroupAccuracy]]:
    """The accuracy at N by each of `COLUMNS` and, where the texts are few, by question text."""
    tables = {}
    for column in (*COLUMNS, "question"):
        max_groups = config.max_groups if column in ("question", "topic") else None
        tables[column] = accuracy_by_column(scored, by_question, arms, n, column, resampling, max_groups)
    # The one text of all questions is no group.
    if len(tables["question"]) == 1:
        tables["question"] = {}
    return tables


def _ns(config: EvaluateConfig, solutions: pa.Table, samples: Mapping[str, Sequence[Sample]]) -> list[int]:
    """The N of the config up to the number of samples that was asked for, and that number where it is smaller."""
    if not any(samples.values()):
        raise ValueError(
            f"no question of split {config.split!r} has a solution ({solutions.num_rows} rows of solutions): nothing "
            "to evaluate. Look at the error column of the solutions, or name another split (evaluate.split=...)."
        )
    # What was asked for, not what came: a question with fewer samples keeps its place among the N.
    requested = max(solutions["num_requested"].to_pylist())
    largest = min(requested, max(config.ns))
    smaller = {n for n in config.ns if n < requested}
    return sorted(smaller | {largest})


def _counts(
    split: str,
    questions: pa.Table,
    scored: Sequence[ScoredQuestion],
    by_question: Chances,
    arms: Sequence[str],
    n: int,
    errors: dict[str, dict[str, int]],
) -> Counts:
    """What went in and what is missing; nothing leaves the figures without a number here."""
    num_samples = without_answer = without_solutions = with_fewer = 0
    for question in scored:
        num_samples += question.num_samples
        without_answer += int((question.codes < 0).sum())
        without_solutions += question.num_samples == 0
        with_fewer += question.num_samples < n
    num_scored: dict[str, int] = {}
    questions_without_scores: dict[str, int] = {}
    unscored: dict[str, int] = {}
    for arm in arms:
        num_scored[arm] = questions_without_scores[arm] = 0
        for question in scored:
            is_scored = ~np.isnan(question.rewards[arm])
            num_scored[arm] += int(is_scored.sum())
            # A question without samples is among them.
            questions_without_scores[arm] += not is_scored.any()
        unscored[arm] = num_samples - num_scored[arm]
    return Counts(
        split=split,
        excluded=_error_counts(questions),
        questions=len(scored),
        clusters=by_question.num_clusters,
        solutions=num_samples,
        without_answer=without_answer,
        questions_without_solutions=without_solutions,
        questions_with_fewer_than_n=with_fewer,
        scored=num_scored,
        unscored=unscored,
        questions_without_scores=questions_without_scores,
        errors=errors,
    )


def _errors(solutions: pa.Table, scores: pa.Table, labels: LabelsOfSolutions) -> dict[str, dict[str, int]]:
    """Failed rows by table and kind; label rows by source."""
    counts = {"solutions": _error_counts(solutions), "scores": _error_counts(scores)}
    for source, kinds in labels.errors.items():
        counts[f"{source}_labels"] = kinds
    return counts


def _error_counts(table: pa.Table) -> dict[str, int]:
    """The failed rows of a table by the kind of their error."""
    errors = filter(None, table["error"].to_pylist())
    return dict(Counter(map(error_kind, errors)))


def _largest_text_difference(scores: pa.Table) -> float | None:
    """The largest difference between the multimodal arm's text part and the text-only scores; None without both."""
    text_only = _text_log_odds(scores, "text_only")
    multimodal = _text_log_odds(scores, "multimodal")
    differences = []
    for solution_id in text_only.keys() & multimodal.keys():
        difference = np.abs(text_only[solution_id] - multimodal[solution_id])
        differences.append(float(difference.max()))
    return max(differences, default=None)


def _text_log_odds(scores: pa.Table, arm: str) -> LogOdds:
    """The text part of each step's log-odds, of one arm's rows without an error."""
    usable = pc.and_(pc.equal(scores["arm"], arm), pc.is_null(scores["error"]))
    rows = scores.filter(usable)
    solution_ids = rows["solution_id"].to_pylist()
    texts = rows["text_log_odds"].to_pylist()
    by_solution = {}
    for solution_id, text in zip(solution_ids, texts, strict=True):
        by_solution[solution_id] = np.asarray(text, dtype=np.float64)
    return by_solution


def environment() -> JsonObject:
    """Machine, packages and code revision of this process."""
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "revision": code_revision(),
        "packages": package_versions(),
    }
