"""Labels and step scores -> step metrics, label counts, agreement between sources."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray import metrics
from medmm_ray.evaluate.cases import LogOdds, Row, list_entries

Labels = Mapping[str, Sequence[int | None]]
"""By solution: 1, 0 or None for each step."""
LabelSets = dict[str, dict[str, list[int | None]]]
SOURCES = ("judge", "monte_carlo", "tree_search", "expert", "phantom")


def label_sets(tables: Iterable[pa.Table]) -> LabelSets:
    """By source and solution: the label of each step; of several annotators the first (by name) that labels a step.

    Failed rows are left out. Raises ValueError where two annotators disagree on the number of steps.
    """
    found: LabelSets = {}
    for table in tables:
        kept = table.filter(pc.is_null(table["error"])).sort_by("annotator")
        ids, sources = kept["solution_id"].to_pylist(), kept["source"].to_pylist()
        for solution, source, entries in zip(ids, sources, list_entries(kept, "steps", ("label",)), strict=True):
            own = [entry["label"] for entry in entries]
            of_source = found.setdefault(source, {})
            before = of_source.setdefault(solution, own)
            if len(before) != len(own):
                raise ValueError(
                    f"solution {solution}: {source} labels of {len(before)} and of {len(own)} steps; expected one "
                    "entry a step from every annotator. Label it again."
                )
            of_source[solution] = [new if old is None else old for old, new in zip(before, own, strict=True)]
    return found


def label_counts(tables: Iterable[pa.Table]) -> Row:
    """By source: solutions, steps labelled right (`positive`), wrong and null, failed rows, cost in US dollars."""
    names = ("solutions", "positive", "negative", "null", "failed")
    counts: dict[str, Counter[str]] = {}
    cost: dict[str, float] = {}
    for table in tables:
        columns = [table[name].to_pylist() for name in ("source", "error", "cost")]
        for source, error, spent, entries in zip(*columns, list_entries(table, "steps", ("label",)), strict=True):
            count = counts.setdefault(source, Counter(dict.fromkeys(names, 0)))
            cost[source] = cost.get(source, 0.0) + spent
            count["failed" if error else "solutions"] += 1
            if not error:
                count.update({1: "positive", 0: "negative", None: "null"}[entry["label"]] for entry in entries)
    return {source: {**counts[source], "cost": round(cost[source], 6)} for source in sorted(counts, key=_source_order)}


def agreement(sets: LabelSets, review_queue: pa.Table | None = None) -> Row:
    """Each pair of sources (``judge_expert``, …) over the steps that both label.

    kappa, share of equal labels, share of solutions with the same first error among those steps, and their numbers.
    The expert's queue draws unsure steps more often: there `kappa` weighs each step by 1 / its inclusion probability,
    and so speaks of all steps; `kappa_queue` is the plain one over the queue.
    """
    chance: dict[tuple[str, int], float] = {}
    if review_queue is not None:
        columns = (review_queue[name].to_pylist() for name in ("solution_id", "step_index", "inclusion_probability"))
        chance = {(solution, step): p for solution, step, p in zip(*columns, strict=True)}
    table = {}
    for first, second in combinations(sorted(sets, key=_source_order), 2):
        pairs: list[tuple[int, int, float]] = []
        same_first_error: list[bool] = []
        for solution in sorted(sets[first].keys() & sets[second].keys()):
            both = enumerate(zip(sets[first][solution], sets[second][solution], strict=True))
            shared = [
                (a, b, 1 / chance.get((solution, step), 1.0))
                for step, (a, b) in both
                if a is not None and b is not None
            ]
            if shared:
                a, b, _ = zip(*shared, strict=True)
                pairs += shared
                same_first_error.append(metrics.first_error(a) == metrics.first_error(b))
        if pairs:
            labels_a, labels_b, weights = (np.array(column) for column in zip(*pairs, strict=True))
            queued = bool(chance) and "expert" in (first, second)
            table[f"{first}_{second}"] = {
                "first": first,
                "second": second,
                "kappa": metrics.cohen_kappa(labels_a, labels_b, weights if queued else None),
                "kappa_queue": metrics.cohen_kappa(labels_a, labels_b) if queued else None,
                "agreement": float((labels_a == labels_b).mean()),
                "first_error": sum(same_first_error) / len(same_first_error),
                "steps": len(pairs),
                "solutions": len(same_first_error),
            }
    return table


def step_figures(log_odds: LogOdds, truth: Labels, threshold: float, num_bins: int) -> Row:
    """One arm's step metrics, pooled over the labelled steps of scored solutions.

    First errors are sought among the labelled steps. Figures without data, or that need both classes, are None.
    """
    labels: list[int] = []
    scores: list[float] = []
    first_true: list[int] = []
    first_called: list[int] = []
    for solution in sorted(truth.keys() & log_odds.keys()):
        shared = [(y, x) for y, x in zip(truth[solution], log_odds[solution], strict=True) if y is not None]
        if shared:
            own_labels, own_scores = zip(*shared, strict=True)
            labels += own_labels
            scores += own_scores
            first_true.append(metrics.first_error(own_labels))
            first_called.append(metrics.first_error(metrics.predicted_right(own_scores, threshold).tolist()))
    y, x = np.array(labels, dtype=bool), np.array(scores, dtype=np.float64)
    p, called = metrics.probability(x), metrics.predicted_right(x, threshold)
    bins = metrics.calibration(y, p, num_bins)
    false, true = metrics.roc_curve(y, x)
    same = [a == b for a, b in zip(first_true, first_called, strict=True)]
    return {
        "solutions": len(first_true),
        "steps": int(y.size),
        "right": int(y.sum()),
        "wrong": int((~y).sum()),
        "threshold": threshold,
        "auroc": metrics.auroc(y, x),
        "macro_f1": metrics.macro_f1(y, called),
        "ece": metrics.expected_calibration_error(bins),
        "kappa": metrics.cohen_kappa(y, called),
        "first_error": sum(same) / len(same) if same else None,
        "processbench": metrics.processbench_f1(first_true, first_called),
        "minimum_on_last_step": metrics.minimum_on_last_step([x.tolist() for x in log_odds.values()]),
        "calibration": [asdict(b) for b in bins],
        "roc": {"false": false, "true": true},
        "histogram": metrics.histogram(y, p),
    }


def _source_order(source: str) -> tuple[int, str]:
    return (SOURCES.index(source) if source in SOURCES else len(SOURCES), source)
