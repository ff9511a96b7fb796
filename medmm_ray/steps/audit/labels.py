"""What each label source says: right, wrong, neutral and unlabelled steps, and the share of right ones by group."""

from collections.abc import Mapping

import numpy as np

from medmm_ray.config import JsonObject
from medmm_ray.stats.agreement import QueuedSteps, in_queue, positions, source_order
from medmm_ray.stats.grouped_stats import GroupedStats, Groups, Resampling, share_of_counts, stats_by_group
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, SourceCodes, Steps


def balance(
    steps: Steps,
    labels: Mapping[str, SourceCodes],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> list[JsonObject]:
    """One entry a source: its counts, and the share of right steps among those that it calls right or wrong.

    The expert's share weighs each step of the queue by 1 / its inclusion probability; the counts are plain ones.
    """
    entries = []
    for source in sorted(labels, key=source_order):
        of_source = labels[source]
        weighting_queue = queue if source == "expert" else None
        entries.append(
            {
                "source": source,
                "solutions": of_source.rows,
                **_counts(of_source),
                "share": _shares_of_right_steps(steps, of_source, groups, weighting_queue, resampling),
                "weighted": weighting_queue is not None,
                "cost": round(of_source.cost, 6),
            }
        )
    return entries


def _counts(labels: SourceCodes) -> dict[str, int]:
    return {
        "right": int((labels.codes == RIGHT).sum()),
        "wrong": int((labels.codes == WRONG).sum()),
        "neutral": int((labels.codes == NEUTRAL).sum()),
        "unlabelled": int((labels.codes == UNLABELLED).sum()),
        "failed": sum(labels.errors.values()),
        "unknown": labels.unknown,
        "misfit": labels.misfit,
    }


def _shares_of_right_steps(
    steps: Steps,
    labels: SourceCodes,
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> GroupedStats:
    """The shares in all, by group of solutions and by position in the solution."""
    # Neutral and unlabelled steps have no side: they stay out of the share.
    labelled, weight = np.flatnonzero(labels.codes >= WRONG), None
    if queue is not None:
        labelled, weight, _ = in_queue(labelled, queue)
    solution = steps.solution[labelled]
    groupings = {name: group.of(solution) for name, group in groups.items()}
    groupings["position"] = positions(steps, labelled)
    right = (labels.codes[labelled] == RIGHT).astype(np.int64)
    return stats_by_group(groupings, steps.question[solution], right, 2, share_of_counts, resampling, weight)
