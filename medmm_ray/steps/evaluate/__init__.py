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
    subset_errors,
)
from medmm_ray.steps.evaluate.calibration import TemperatureScaling, scaled
from medmm_ray.steps.evaluate.examples import choose_disagreements, choose_examples
from medmm_ray.steps.evaluate.gates import gates_of
from medmm_ray.steps.evaluate.outcomes import COLUMNS, answer_table, outcomes
from medmm_ray.steps.evaluate.report import Counts, EvaluationReport, StepEntry, cost_benefit
from medmm_ray.steps.evaluate.scored_questions import (
    ARMS,
    LogOdds,
    ScoredQuestion,
    SplitTables,
    clusters,
    scored_questions,
    split_tables,
)
from medmm_ray.steps.evaluate.step_groups import GroupStepFigures, figures_by_data_set, figures_by_source
from medmm_ray.steps.evaluate.steps import (
    LabelsOfSolutions,
    ReferenceLabels,
    StepFigures,
    agreement,
    all_references,
    labelled_steps,
    labels_of_solutions,
    reference_labels,
    step_figures,
)

VERSION = 5  # of what a step makes: raise it when the same config makes something else
VALIDATION: Split = "validation"
"""The split on which temperatures are fitted: nothing is measured on it at the same time."""
__all__ = ["VALIDATION", "EvaluateConfig", "Evaluation", "EvaluationReport", "StepEntry", "environment", "evaluate"]


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
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
    )
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
    num_disagreements: int = Field(10, ge=0)
    """Steps that are shown on which the scorer is most sure of the opposite of an expert (without one: of the
    reference)."""
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
    measured = split_tables(
        config.split,
        questions,
        solutions,
        scores,
    )
    validation = split_tables(
        VALIDATION,
        questions,
        solutions,
        scores,
    )
    arms = _in_order(measured.log_odds)
    ns = _ns(config, measured)
    scored = scored_questions(
        measured,
        arms,
        config.aggregate,
        config.seed,
    )
    # Labels come as a stream that is read once: those of both splits are kept in one pass.
    both_solutions = measured.solutions
    if config.split != VALIDATION:
        both_solutions = pa.concat_tables([measured.solutions, validation.solutions])
    labels_of_both = labels_of_solutions(labels, both_solutions)
    encoded = labels_of_both.encoded
    reference = reference_labels(
        config.reference,
        measured.solutions,
        encoded,
        review_queue,
    )
    references = all_references(
        measured.solutions,
        encoded,
        review_queue,
    )
    # Fitted against the source that the measured steps are held to.
    validation_reference = ReferenceLabels()
    if reference.source and config.split != VALIDATION:
        validation_reference = reference_labels(
            (reference.source,),
            validation.solutions,
            encoded,
            review_queue,
        )
    step_tables = _step_tables(
        config,
        arms,
        scored,
        measured,
        reference,
        references,
    )
    # One seed for all figures: they rest on the same resamples, so that they may be compared.
    resampling = Resampling(config.bootstrap_samples, config.seed)
    clusters_Q = clusters(scored)
    by_question = chances(
        scored,
        arms,
        ns,
        config.num_subsets,
        clusters_Q,
    )
    over_n = accuracy(
        by_question,
        arms,
        ns,
        resampling,
        subset_errors(by_question, scored, ns, config.num_subsets),
    )
    text_difference = _largest_text_difference(measured.scores)
    agreement_by_name = agreement(pairs)
    n = ns[-1]
    errors = _errors(measured, labels_of_both)
    by_column = _accuracy_by_group(
        config,
        scored,
        by_question,
        arms,
        n,
        resampling,
    )
    table = outcomes(
        scored,
        by_question,
        arms,
    )
    # What both kinds of cases are looked up in.
    shown = (scored, arms, measured.solutions, images, measured.scores)
    report = EvaluationReport(
        title=config.title,
        config=identity(config),
        n=n,
        ns=ns,
        arms=arms,
        reference=reference.source,
        counts=_counts(
            measured,
            scored,
            by_question,
            arms,
            n,
            errors,
        ),
        accuracy=over_n,
        decoders=accuracy_by_decoder(
            scored,
            measured.log_odds,
            arms,
            clusters_Q,
            resampling,
        ),
        step=step_tables.step,
        temperature=_temperatures(
            config,
            arms,
            measured,
            reference,
            validation,
            validation_reference,
        ),
        step_by_dataset=step_tables.by_dataset,
        step_by_source=step_tables.by_source,
        answers=answer_table(table, arms),
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
        cost=cost_benefit(steps, over_n, arms, n),
        settings=dict(settings or {}),
        environment=dict(environment or {}),
        examples=choose_examples(
            *shown,
            reference.labels,
            num_examples=config.num_examples,
            seed=config.seed,
        ),
        disagreements=choose_disagreements(
            *shown,
            references.get("expert", reference).labels,
            measured.log_odds,
            config.num_disagreements,
        ),
        gates=gates_of(
            n,
            reference.source,
            over_n,
            step_tables.step.get("multimodal"),
            agreement_by_name.get("judge_expert"),
            text_difference,
        ),
    )
    return Evaluation(report, table)


@dataclass(frozen=True)
class _StepTables:
    """Step metrics by arm: against the reference, by data set, by label source."""

    step: dict[str, StepFigures]
    by_dataset: dict[str, dict[str, dict[str, GroupStepFigures]]]
    by_source: dict[str, dict[str, GroupStepFigures]]


def _step_tables(
    config: EvaluateConfig,
    arms: Sequence[str],
    scored: Sequence[ScoredQuestion],
    measured: SplitTables,
    reference: ReferenceLabels,
    references: Mapping[str, ReferenceLabels],
) -> _StepTables:
    tables = _StepTables(
        {},
        {},
        {},
    )
    threshold, num_bins = config.threshold, config.calibration_bins
    for arm in arms:
        log_odds = measured.log_odds[arm]
        # A threshold and bins for all, so that tables can be read side by side.
        tables.step[arm] = step_figures(
            log_odds,
            reference,
            threshold,
            num_bins,
        )
        tables.by_dataset[arm] = figures_by_data_set(
            scored,
            log_odds,
            reference,
            threshold,
            num_bins,
        )
        tables.by_source[arm] = figures_by_source(
            references,
            log_odds,
            threshold,
            num_bins,
        )
    return tables


def _temperatures(
    config: EvaluateConfig,
    arms: Sequence[str],
    measured: SplitTables,
    reference: ReferenceLabels,
    validation: SplitTables,
    validation_reference: ReferenceLabels,
) -> dict[str, TemperatureScaling]:
    """By arm, where both splits have labelled and scored steps of both classes."""
    temperatures = {}
    for arm in arms:
        if arm not in validation.log_odds or not validation_reference.source:
            continue
        fitted_on = labelled_steps(
            validation.log_odds[arm],
            validation_reference,
            config.threshold,
        )
        measured_steps = labelled_steps(
            measured.log_odds[arm],
            reference,
            config.threshold,
        )
        scaling = scaled(
            fitted_on,
            measured_steps,
            config.calibration_bins,
        )
        if scaling is not None:
            temperatures[arm] = scaling
    return temperatures


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
        tables[column] = accuracy_by_column(
            scored,
            by_question,
            arms,
            n,
            column,
            resampling,
            max_groups,
        )
    # The one text of all questions is no group.
    if len(tables["question"]) == 1:
        tables["question"] = {}
    return tables


def _ns(config: EvaluateConfig, measured: SplitTables) -> list[int]:
    """The N of the config up to the number of samples that was asked for, and that number where it is smaller."""
    solutions = measured.solutions
    if not any(measured.samples.values()):
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
    measured: SplitTables,
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
        split=measured.split,
        excluded=_error_counts(measured.questions),
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


def _errors(measured: SplitTables, labels: LabelsOfSolutions) -> dict[str, dict[str, int]]:
    """Failed rows by table and kind; label rows by source."""
    counts = {"solutions": _error_counts(measured.solutions), "scores": _error_counts(measured.scores)}
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
    for solution_id, text in zip(
        solution_ids,
        texts,
        strict=True,
    ):
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
