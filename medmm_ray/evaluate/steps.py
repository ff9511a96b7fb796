"""Labels and step scores -> step metrics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray import metrics
from medmm_ray.evaluate.cases import LogOdds, Row, list_entries
from medmm_ray.targets import ADJUDICATOR

Labels = Mapping[str, Sequence[int | None]]
"""By solution: 1, 0 or None for each step."""
LabelSets = dict[str, dict[str, list[int | None]]]


def label_sets(tables: Iterable[pa.Table]) -> LabelSets:
    """By source and solution: the label of each step.

    Of several annotators it is the adjudicator's, else that of the first (by name) that labels the step. Failed rows
    are left out. Raises ValueError where two annotators disagree on the number of steps.
    """
    found: LabelSets = {}
    for table in tables:
        kept = table.filter(pc.is_null(table["error"])).sort_by("annotator")
        is_last_word = pc.equal(kept["annotator"], ADJUDICATOR)
        kept = pa.concat_tables([kept.filter(is_last_word), kept.filter(pc.invert(is_last_word))]).combine_chunks()
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
