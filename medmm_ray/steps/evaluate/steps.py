"""Labels and step scores -> step metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels, arrow_schema
from medmm_ray.data.tables import error_kind
from medmm_ray.stats import metrics
from medmm_ray.stats.agreement import PairAgreement, queued_steps
from medmm_ray.stats.label_arrays import (
    UNLABELLED,
    WRONG,
    Codes,
    Steps,
    drop_texts,
    encode_labels,
    source_labels,
    steps_of,
)
from medmm_ray.stats.metrics import Bools, CalibrationBin, Floats, Histogram, ProcessBench
from medmm_ray.steps.evaluate.scored_questions import LogOdds

StepLabels = Mapping[str, Sequence[int | None]]
"""By solution: 1, 0 or None for each step."""
TRUTHS = ("phantom", "expert")
"""Sources that a model may be held to: what a judge says is itself to be measured."""


@dataclass(frozen=True, kw_only=True)
class AgreementInShort:
    """How far two label sources agree over all that they share: kappa with its interval, and equal first errors."""

    first: str
    second: str
    weighted: bool
    kappa: float | None
    low: float | None
    high: float | None
    agreement: float
    steps: int
    first_error: float | None
    solutions: int


@dataclass(frozen=True)
class RocCurve:
    """False and true positive rates, from (0, 0) to (1, 1); empty with one class only."""

    false: list[float]
    true: list[float]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Weights of steps (counts where all weigh the same) by label and by what the model calls them."""

    right_called_right: float
    right_called_wrong: float
    wrong_called_right: float
    wrong_called_wrong: float


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One arm's step metrics, pooled over the labelled steps of scored solutions, each step with its weight.

    Figures without data, or that need both classes, are None.
    """

    solutions: int
    steps: int
    right: int
    wrong: int
    weighted: bool
    effective: float
    """Equally weighted steps that would tell as much."""
    threshold: float
    confusion: Confusion
    auroc: float | None
    macro_f1: float | None
    ece: float | None
    kappa: float | None
    first_error: float | None
    processbench: ProcessBench
    minimum_on_last_step: float | None
    calibration: list[CalibrationBin]
    roc: RocCurve
    histogram: Histogram


@dataclass(frozen=True)
class ReferenceLabels:
    """What the scores are measured against: one source's labels, of the solutions of which it has any.

    `weights` has 1 / inclusion probability of each step where the labels are those of the expert's queue, else None.
    """

    source: str = ""
    labels: StepLabels = field(default_factory=dict)
    weights: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True)
class LabelsOfSolutions:
    """The labels of some solutions without their texts, and the failed rows of all, by source and kind.

    A source without a failed row is among the errors, with nothing counted.
    """

    encoded: pa.Table
    errors: dict[str, dict[str, int]]


def labels_of_solutions(labels: Iterable[pa.Table], solutions: pa.Table) -> LabelsOfSolutions:
    """The labels of `solutions` out of parts of any tables of labels."""
    solution_ids = pc.list_flatten(solutions["solutions"].combine_chunks()).field("solution_id")
    # The empty table gives the columns where there is no table of labels at all.
    encoded = [encode_labels(arrow_schema(Labels).empty_table())]
    errors: dict[str, dict[str, int]] = {}
    for part in labels:
        for source in part["source"].unique().to_pylist():
            errors.setdefault(source, {})
        for row in part.filter(pc.is_valid(part["error"])).select(["source", "error"]).to_pylist():
            kinds, kind = errors[row["source"]], error_kind(row["error"])
            kinds[kind] = kinds.get(kind, 0) + 1
        is_of_solutions = pc.is_in(part["solution_id"], solution_ids)
        encoded.append(encode_labels(part.filter(is_of_solutions)))
    return LabelsOfSolutions(pa.concat_tables(encoded), errors)


def reference_labels(
    sources: Sequence[str],
    solutions: pa.Table,
    encoded: pa.Table,
    review_queue: pa.Table | None = None,
) -> ReferenceLabels:
    """The labels of the first of `sources` that labels a step of `solutions`; empty ones where none does.

    `encoded` are label rows as `encode_labels` makes them. Several annotators count together, as in training. An
    expert's labels count within the queue that drew their steps, where there is one. Raises ValueError where the
    source's labels are of another number of steps.
    """
    steps = steps_of(drop_texts(solutions))
    by_source = source_labels(steps, encoded.combine_chunks())
    for source in sources:
        if source not in by_source:
            continue
        codes = by_source[source].codes
        misfit = by_source[source].misfit
        weight_N = None
        if source == "expert" and review_queue is not None and review_queue.num_rows:
            # A step that the queue did not draw has no known chance: a verdict of it cannot be weighted.
            weight_N = _queue_weights(steps, review_queue)
            codes = np.where(weight_N > 0, codes, np.int8(UNLABELLED))
        if misfit:
            raise ValueError(
                f"{misfit} {source} label rows are of another number of steps than their solution; they belong "
                "to another text. Label these solutions again."
            )
        if (codes >= WRONG).any():
            return _of_source(source, steps, codes, weight_N)
    return ReferenceLabels()


def _queue_weights(steps: Steps, review_queue: pa.Table) -> Floats:
    """1 / inclusion probability of each step, 0 of one that is not in the queue."""
    queue = queued_steps(steps, review_queue)
    weight_N = np.zeros(len(steps.solution))
    weight_N[queue.row] = 1.0 / queue.probability
    return weight_N


def _of_source(
    source: str,
    steps: Steps,
    codes: Codes,
    weight_N: Floats | None,
) -> ReferenceLabels:
    """Codes and weights of all steps, by solution."""
    solution_ids = steps.solution_ids.to_pylist()
    # Neutral and unlabelled steps have no side: both are None.
    values = [None if code < WRONG else int(code) for code in codes.tolist()]
    labels: dict[str, Sequence[int | None]] = {}
    weights: dict[str, Sequence[float]] = {}
    labelled_solutions = np.unique(steps.solution[codes != UNLABELLED])
    for solution in labelled_solutions.tolist():
        start = steps.first[solution]
        end = start + steps.length[solution]
        solution_id = solution_ids[solution]
        labels[solution_id] = values[start:end]
        if weight_N is not None:
            weights[solution_id] = weight_N[start:end].tolist()
    return ReferenceLabels(source, labels, None if weight_N is None else weights)


def agreement(pairs: Iterable[PairAgreement]) -> dict[str, AgreementInShort]:
    """The dataset report's pairs of sources, in short and by name (``judge_expert``, ...)."""
    return {f"{pair.first}_{pair.second}": _in_short(pair) for pair in pairs}


def _in_short(pair: PairAgreement) -> AgreementInShort:
    kappa = pair.overall_kappa
    same_first_error = pair.overall_first_error
    return AgreementInShort(
        first=pair.first,
        second=pair.second,
        weighted=pair.weighted,
        kappa=kappa.value,
        low=kappa.low,
        high=kappa.high,
        agreement=kappa.equal,
        steps=kappa.count,
        first_error=same_first_error.value if same_first_error else None,
        solutions=same_first_error.count if same_first_error else 0,
    )


@dataclass
class LabelledSteps:
    """The labelled steps of scored solutions, pooled; and each solution's first error by label and by score."""

    labels: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    num_solutions: int = 0
    first_labelled: list[int] = field(default_factory=list)
    first_scored: list[int] = field(default_factory=list)

    def arrays(self) -> tuple[Bools, Floats, Floats]:
        """Labels, scores and weights of the steps."""
        labels = np.array(self.labels, dtype=bool)
        return labels, np.array(self.scores, dtype=np.float64), np.array(self.weights, dtype=np.float64)


def labelled_steps(log_odds: LogOdds, reference: ReferenceLabels, threshold: float) -> LabelledSteps:
    """The labelled steps.

    First errors are sought in every solution; of the queue's (weighted) in those alone that are labelled whole.
    """
    pooled = LabelledSteps()
    for solution_id in sorted(reference.labels.keys() & log_odds.keys()):
        labels = reference.labels[solution_id]
        weights: Sequence[float] = [1.0] * len(labels)
        if reference.weights:
            weights = reference.weights[solution_id]
        shared_labels: list[int] = []
        shared_scores: list[float] = []
        for label, score, weight in zip(labels, log_odds[solution_id], weights, strict=True):
            if label is not None:
                shared_labels.append(label)
                shared_scores.append(score)
                pooled.weights.append(weight)
        if not shared_labels:
            continue
        pooled.num_solutions += 1
        pooled.labels += shared_labels
        pooled.scores += shared_scores
        # A step that nobody drew may be the first wrong one.
        if reference.weights is None or len(shared_labels) == len(labels):
            right = metrics.predicted_right(shared_scores, threshold).tolist()
            pooled.first_labelled.append(metrics.first_error(shared_labels))
            pooled.first_scored.append(metrics.first_error(right))
    return pooled


def step_figures(
    log_odds: LogOdds,
    reference: ReferenceLabels,
    threshold: float,
    num_bins: int,
) -> StepFigures:
    """One arm's step metrics.

    First errors are sought among the labelled steps; where these are drawn one by one (weighted), in solutions alone of
    which every step is labelled.
    """
    pooled = labelled_steps(log_odds, reference, threshold)
    # Arrays once: every figure below reads them.
    labels, scores, weights = pooled.arrays()
    probabilities = metrics.probability(scores)
    predicted = metrics.predicted_right(scores, threshold)
    bins = metrics.calibration(labels, probabilities, num_bins, weights)
    false_rate, true_rate = metrics.roc_curve(labels, scores, weights=weights)
    pairs = zip(pooled.first_labelled, pooled.first_scored, strict=True)
    same_first_error = [labelled == scored for labelled, scored in pairs]
    # A mean of nothing is no figure.
    first_error = None
    if same_first_error:
        first_error = sum(same_first_error) / len(same_first_error)
    scores_of_solutions = [scores_S.tolist() for scores_S in log_odds.values()]
    return StepFigures(
        solutions=pooled.num_solutions,
        steps=int(labels.size),
        right=int(labels.sum()),
        wrong=int((~labels).sum()),
        weighted=reference.weights is not None,
        effective=round(metrics.effective_size(weights), 1),
        threshold=threshold,
        confusion=_confusion(labels, predicted, weights),
        auroc=metrics.auroc(labels, scores, weights),
        macro_f1=metrics.macro_f1(labels, predicted, weights),
        ece=metrics.expected_calibration_error(bins),
        kappa=metrics.cohen_kappa(labels, predicted, weights),
        first_error=first_error,
        processbench=metrics.processbench_f1(pooled.first_labelled, pooled.first_scored),
        minimum_on_last_step=metrics.minimum_on_last_step(scores_of_solutions),
        calibration=bins,
        roc=RocCurve(false_rate, true_rate),
        histogram=metrics.histogram(labels, probabilities),
    )


def _confusion(labels: Bools, predicted: Bools, weights: Floats) -> Confusion:
    def total(mask: Bools) -> float:
        return round(float(weights[mask].sum()), 6)

    return Confusion(
        right_called_right=total(labels & predicted),
        right_called_wrong=total(labels & ~predicted),
        wrong_called_right=total(~labels & predicted),
        wrong_called_wrong=total(~labels & ~predicted),
    )


def all_references(
    solutions: pa.Table,
    encoded: pa.Table,
    review_queue: pa.Table | None = None,
) -> dict[str, ReferenceLabels]:
    """The labels of every source that labels a step of `solutions`, each as `reference_labels` gives it."""
    references = {}
    for source in sorted(set(encoded["source"].to_pylist())):
        # A source whose verdicts were all left open labels nothing.
        reference = reference_labels((source,), solutions, encoded, review_queue)
        if reference.source:
            references[source] = reference
    return references
