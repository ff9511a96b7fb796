"""What each label source says: right, wrong, neutral and unlabelled steps, and the share of right ones by group."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medmm_ray.stats.agreement import QueuedSteps, in_queue, positions, source_order
from medmm_ray.stats.grouped_stats import (
    GroupedStats,
    GroupFigure,
    Groups,
    Resampling,
    share_of_counts,
    stats_by_group,
)
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, SourceCodes, Steps


@dataclass(frozen=True, kw_only=True)
class SourceBalance:
    """One source's steps by what it says of them, and the share of right ones among those it calls right or wrong."""

    source: str
    solutions: int
    right: int
    wrong: int
    neutral: int
    unlabelled: int
    failed: int
    """Label rows with an error."""
    unknown: int
    """Label rows of a solution that is not there."""
    misfit: int
    """Label rows of another number of steps than their solution."""
    share: GroupedStats
    weighted: bool
    """Whether each step weighs 1 / its chance to enter the expert's queue; the counts are plain ones."""
    cost: float

    @property
    def overall_share(self) -> GroupFigure | None:
        """The share of right steps over all groups; None without a step that is called right or wrong."""
        return self.share["all"].get("all")


def balance(
    steps: Steps,
    labels: Mapping[str, SourceCodes],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> list[SourceBalance]:
    """The balance of each source, in the order of `source_order`.

    The expert's share weighs each step of the queue by 1 / its inclusion probability.
    """
    balances = []
    for source in sorted(labels, key=source_order):
        of_source = labels[source]
        weighting_queue = queue if source == "expert" else None
        balances.append(
            SourceBalance(
                source=source,
                solutions=of_source.rows,
                right=int((of_source.codes == RIGHT).sum()),
                wrong=int((of_source.codes == WRONG).sum()),
                neutral=int((of_source.codes == NEUTRAL).sum()),
                unlabelled=int((of_source.codes == UNLABELLED).sum()),
                failed=sum(of_source.errors.values()),
                unknown=of_source.unknown,
                misfit=of_source.misfit,
                share=_shares_of_right_steps(steps, of_source, groups, weighting_queue, resampling),
                weighted=weighting_queue is not None,
                cost=round(of_source.cost, 6),
            )
        )
    return balances


def balance_of(balances: list[SourceBalance], source: str | None) -> SourceBalance | None:
    """The balance of one source, if it is among them."""
    return next((of_source for of_source in balances if of_source.source == source), None)


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
