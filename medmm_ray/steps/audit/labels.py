"""What each label source says: right, wrong, neutral and unlabelled steps, and the share of right ones by group."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medmm_ray.stats.agreement import QueuedSteps, in_queue, positions, source_order
from medmm_ray.stats.grouped_stats import Groups, Resampling, share_of_counts, stats_by_group
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, SourceCodes, Steps

Row = dict[str, Any]


def balance(
    steps: Steps,
    labels: Mapping[str, SourceCodes],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> list[Row]:
    """One entry a source: its counts, and the share of right steps among those that it calls right or wrong.

    The expert's share weighs each step of the queue by 1 / its inclusion probability; the counts are plain ones.
    """
    return [
        {
            "source": source,
            "solutions": labels[source].rows,
            **_counts(labels[source]),
            "share": _shares(steps, labels[source], groups, queue if source == "expert" else None, resampling),
            "weighted": source == "expert" and queue is not None,
            "cost": round(labels[source].cost, 6),
        }
        for source in sorted(labels, key=source_order)
    ]


def _counts(found: SourceCodes) -> dict[str, int]:
    names = {"right": RIGHT, "wrong": WRONG, "neutral": NEUTRAL, "unlabelled": UNLABELLED}
    return {
        **{name: int((found.codes == code).sum()) for name, code in names.items()},
        "failed": sum(found.errors.values()),
        "unknown": found.unknown,
        "misfit": found.misfit,
    }


def _shares(
    steps: Steps, found: SourceCodes, groups: Mapping[str, Groups], queue: QueuedSteps | None, resampling: Resampling
) -> Row:
    rows, weight = np.flatnonzero(found.codes >= WRONG), None
    if queue is not None:
        rows, weight, _ = in_queue(rows, queue)
    solution = steps.solution[rows]
    groupings = {name: group.of(solution) for name, group in groups.items()}
    groupings["position"] = positions(steps, rows)
    right = (found.codes[rows] == RIGHT).astype(np.int64)
    return stats_by_group(groupings, steps.question[solution], right, 2, share_of_counts, resampling, weight)
