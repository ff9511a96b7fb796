"""Labels and step scores -> step metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from medmm_ray.data.records import Labels as LabelRow
from medmm_ray.data.records import arrow_schema
from medmm_ray.stats import metrics
from medmm_ray.stats.agreement import queue_of
from medmm_ray.stats.label_arrays import UNLABELLED, WRONG, source_labels, steps_of, thin, thin_labels
from medmm_ray.steps.evaluate.cases import LogOdds, Row

Labels = Mapping[str, Sequence[int | None]]
"""By solution: 1, 0 or None for each step."""
TRUTHS = ("phantom", "expert")
"""Sources that a model may be held to: what a judge says is itself to be measured."""


@dataclass(frozen=True)
class Truth:
    """What the scores are measured against: one source's labels, of the solutions of which it has any.

    `weights` has 1 / inclusion probability of each step where the labels are those of the expert's queue, else None.
    """

    source: str = ""
    labels: Labels = field(default_factory=dict)
    weights: Mapping[str, Sequence[float]] | None = None


def truth_of(
    reference: Sequence[str], solutions: pa.Table, labels: Iterable[pa.Table], review_queue: pa.Table | None = None
) -> Truth:
    """The first source of `reference` that labels a step of `solutions`; an empty `Truth` where none does.

    Several annotators count together, as in training. An expert's labels count within the queue that drew their steps,
    where there is one. Raises ValueError where the source's labels are of another number of steps.
    """
    steps = steps_of(thin(solutions))
    empty = thin_labels(arrow_schema(LabelRow).empty_table())
    by_source = source_labels(steps, pa.concat_tables([empty, *map(thin_labels, labels)]).combine_chunks())
    for source in (name for name in reference if name in by_source):
        found = by_source[source]
        codes, weight_N = found.codes, None
        if source == "expert" and review_queue is not None and review_queue.num_rows:
            queue, weight_N = queue_of(steps, review_queue), np.zeros(len(codes))
            weight_N[queue.row] = 1.0 / queue.probability
            codes = np.where(weight_N > 0, codes, np.int8(UNLABELLED))
        if not (codes >= WRONG).any() and not found.misfit:
            continue
        if found.misfit:
            raise ValueError(
                f"{found.misfit} {source} label rows are of another number of steps than their solution; they belong "
                "to another text. Label these solutions again."
            )
        said = np.unique(steps.solution[codes != UNLABELLED]).tolist()
        ids, first, last = steps.solution_ids.to_pylist(), steps.first, steps.first + steps.length
        values = [None if code < WRONG else int(code) for code in codes.tolist()]
        return Truth(
            source,
            {ids[i]: values[first[i] : last[i]] for i in said},
            None if weight_N is None else {ids[i]: weight_N[first[i] : last[i]].tolist() for i in said},
        )
    return Truth()


def agreement(pairs: Iterable[Row]) -> Row:
    """The dataset report's pairs of sources, in short and by name (``judge_expert``, ...)."""
    return {f"{pair['first']}_{pair['second']}": _in_short(pair) for pair in pairs}


def _in_short(pair: Row) -> Row:
    kappa, same = pair["kappa"]["all"]["all"], pair["first_error"]["all"].get("all")
    return {
        **{name: pair[name] for name in ("first", "second", "weighted")},
        "kappa": kappa["value"],
        **{end: kappa[end] for end in ("low", "high")},
        "agreement": kappa["equal"],
        "steps": kappa["count"],
        "first_error": same and same["value"],
        "solutions": same["count"] if same else 0,
    }


def step_figures(log_odds: LogOdds, truth: Truth, threshold: float, num_bins: int) -> Row:
    """One arm's step metrics, pooled over the labelled steps of scored solutions, each step with its weight.

    First errors are sought among the labelled steps; where these are drawn one by one (weighted), in solutions alone of
    which every step is labelled. Figures without data, or that need both classes, are None.
    """
    labels: list[int] = []
    scores: list[float] = []
    weights: list[float] = []
    first_true: list[int] = []
    first_called: list[int] = []
    shared_solutions = 0
    for solution in sorted(truth.labels.keys() & log_odds.keys()):
        own = truth.labels[solution]
        weight = truth.weights[solution] if truth.weights else [1.0] * len(own)
        shared = [(y, x, w) for y, x, w in zip(own, log_odds[solution], weight, strict=True) if y is not None]
        if shared:
            own_labels, own_scores, own_weights = zip(*shared, strict=True)
            labels += own_labels
            scores += own_scores
            weights += own_weights
            shared_solutions += 1
            if truth.weights is None or None not in own:
                first_true.append(metrics.first_error(own_labels))
                first_called.append(metrics.first_error(metrics.predicted_right(own_scores, threshold).tolist()))
    y, x, w = np.array(labels, dtype=bool), np.array(scores, dtype=np.float64), np.array(weights, dtype=np.float64)
    p, called = metrics.probability(x), metrics.predicted_right(x, threshold)
    bins = metrics.calibration(y, p, num_bins, w)
    false, true = metrics.roc_curve(y, x, weights=w)
    same = [a == b for a, b in zip(first_true, first_called, strict=True)]
    return {
        "solutions": shared_solutions,
        "steps": int(y.size),
        "right": int(y.sum()),
        "wrong": int((~y).sum()),
        "weighted": truth.weights is not None,
        "effective": round(metrics.effective_size(w), 1),
        "threshold": threshold,
        "auroc": metrics.auroc(y, x, w),
        "macro_f1": metrics.macro_f1(y, called, w),
        "ece": metrics.expected_calibration_error(bins),
        "kappa": metrics.cohen_kappa(y, called, w),
        "first_error": sum(same) / len(same) if same else None,
        "processbench": metrics.processbench_f1(first_true, first_called),
        "minimum_on_last_step": metrics.minimum_on_last_step([x.tolist() for x in log_odds.values()]),
        "calibration": [asdict(b) for b in bins],
        "roc": {"false": false, "true": true},
        "histogram": metrics.histogram(y, p),
    }
