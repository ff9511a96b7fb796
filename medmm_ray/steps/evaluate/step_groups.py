"""Step metrics by data set and by its own kinds of error, as the benchmarks of reward models report them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from medmm_ray.stats import metrics
from medmm_ray.stats.metrics import ProcessBench
from medmm_ray.steps.evaluate.scored_questions import LogOdds, ScoredQuestion
from medmm_ray.steps.evaluate.steps import ReferenceLabels, labelled_steps

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class GroupStepFigures:
    """The steps of some solutions; figures are None where there is nothing to measure.

    `macro_f1`, the mean of the F1 of right and of wrong steps, is VisualProcessBench's figure and, by kind of error,
    PRMBench's PRMScore.
    """

    solutions: int
    steps: int
    auroc: float | None
    ece: float | None
    kappa: float | None
    macro_f1: float | None
    processbench: ProcessBench


def figures_by_data_set(
    questions: Iterable[ScoredQuestion],
    log_odds: LogOdds,
    reference: ReferenceLabels,
    threshold: float,
    num_bins: int,
) -> dict[str, dict[str, GroupStepFigures]]:
    """By data set: the figures of all its steps, and of each of its published types. Only labelled ones are there."""
    solutions: dict[str, dict[str, list[str]]] = {}
    for scored in questions:
        labelled = [solution_id for solution_id in scored.solution_ids if solution_id in reference.labels]
        if not labelled or not scored.question.dataset:
            continue
        # All kinds first: the table begins with it.
        of_set = solutions.setdefault(scored.question.dataset, {ALL: []})
        of_set[ALL] += labelled
        if scored.question.published_type:
            of_set.setdefault(scored.question.published_type, []).extend(labelled)
    tables = {}
    for data_set in sorted(solutions):
        table = {}
        for kind, solution_ids in solutions[data_set].items():
            # Weights stay: they are looked up by solution.
            of_kind = replace(reference, labels={key: reference.labels[key] for key in solution_ids})
            table[kind] = group_figures(
                log_odds,
                of_kind,
                threshold,
                num_bins,
            )
        tables[data_set] = table
    return tables


def figures_by_source(
    references: Mapping[str, ReferenceLabels],
    log_odds: LogOdds,
    threshold: float,
    num_bins: int,
) -> dict[str, GroupStepFigures]:
    """By label source: how well the scores fit what it says, which of a judge is no measure of the scores alone."""
    figures = {}
    for source, reference in references.items():
        figures[source] = group_figures(
            log_odds,
            reference,
            threshold,
            num_bins,
        )
    return figures


def group_figures(log_odds: LogOdds, reference: ReferenceLabels, threshold: float, num_bins: int) -> GroupStepFigures:
    """The figures of the scored solutions that `reference` labels."""
    # Steps are pooled, not averaged by solution: long solutions count for more, as in the benchmarks.
    pooled = labelled_steps(
        log_odds,
        reference,
        threshold,
    )
    labels, scores, weights = pooled.arrays()
    predicted = metrics.predicted_right(scores, threshold)
    bins = metrics.calibration(
        labels,
        metrics.probability(scores),
        num_bins,
        weights,
    )
    return GroupStepFigures(
        solutions=pooled.num_solutions,
        steps=int(np.size(labels)),
        auroc=metrics.auroc(
            labels,
            scores,
            weights,
        ),
        ece=metrics.expected_calibration_error(bins),
        kappa=metrics.cohen_kappa(
            labels,
            predicted,
            weights,
        ),
        macro_f1=metrics.macro_f1(
            labels,
            predicted,
            weights,
        ),
        processbench=metrics.processbench_f1(pooled.first_labelled, pooled.first_scored),
    )
