"""What each label source says: right, wrong, neutral and unlabelled steps, and the share of right ones by group."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medmm_ray.stats.agreement import LabelledSteps, in_queue, positions, source_order
from medmm_ray.stats.grouped_stats import (
    GroupedCounts,
    GroupedStats,
    GroupFigure,
    share_of_counts,
)
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, SourceCodes
from medmm_ray.stats.resampling import Resampling


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


class Balance:
    """The balance of each of some sources, taken from some questions at a time."""

    def __init__(self, sources: Iterable[str]) -> None:
        ordered = sorted(sources, key=source_order)
        self._by_source = {source: _SourceCounts(source) for source in ordered}

    def add(self, labelled: LabelledSteps, labels: Mapping[str, SourceCodes]) -> None:
        """Count what each source says of questions that were not there before."""
        for source, counts in self._by_source.items():
            counts.add(labelled, labels[source])

    def figures(self, resampling: Resampling) -> list[SourceBalance]:
        """The balance of each source, in the order of `source_order`."""
        return [counts.figures(resampling) for counts in self._by_source.values()]


class _SourceCounts:
    """What one source says so far."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.is_weighted = False
        self.cost = 0.0
        self.counts: Counter[str] = Counter()
        self.share = GroupedCounts(2)

    def add(self, labelled: LabelledSteps, labels: SourceCodes) -> None:
        """Count the steps of some questions; the expert's weigh 1 / their chance to enter the queue."""
        steps = labelled.steps
        codes = labels.codes
        by_code = {"right": RIGHT, "wrong": WRONG, "neutral": NEUTRAL, "unlabelled": UNLABELLED}
        for name, code in by_code.items():
            self.counts[name] += int((codes == code).sum())
        self.counts["solutions"] += labels.rows
        self.counts["failed"] += sum(labels.errors.values())
        self.counts["unknown"] += labels.unknown
        self.counts["misfit"] += labels.misfit
        self.cost += labels.cost
        # Neutral and unlabelled steps have no side: they stay out of the share.
        rows, weight = np.flatnonzero(codes >= WRONG), None
        if self.source == "expert" and labelled.queue is not None:
            rows, weight, _ = in_queue(rows, labelled.queue)
            self.is_weighted = True
        solution = steps.solution[rows]
        groupings = {name: groups.of(solution) for name, groups in labelled.groups.items()}
        groupings["position"] = positions(steps, rows)
        is_right = (codes[rows] == RIGHT).astype(np.int64)
        self.share.add(groupings, steps.question[solution], is_right, weight, labelled.cluster_Q)

    def figures(self, resampling: Resampling) -> SourceBalance:
        """The balance over all questions so far."""
        counts = self.counts
        return SourceBalance(
            source=self.source,
            solutions=counts["solutions"],
            right=counts["right"],
            wrong=counts["wrong"],
            neutral=counts["neutral"],
            unlabelled=counts["unlabelled"],
            failed=counts["failed"],
            unknown=counts["unknown"],
            misfit=counts["misfit"],
            share=self.share.stats(share_of_counts, resampling),
            weighted=self.is_weighted,
            cost=round(self.cost, 6),
        )


def balance_of(balances: Sequence[SourceBalance], source: str | None) -> SourceBalance | None:
    """The balance of one source, if it is among them."""
    return next((of_source for of_source in balances if of_source.source == source), None)
