"""Figures by group with 95 % intervals, from counts by question: kappa, shares, ratios. Questions may come in parts.

Intervals resample questions, for what one question's solutions say is not independent, or clusters of questions (those
about one image, or of one patient) where they are told; the weights stay with their entries, so that a weighted figure
has a weighted interval. A value is None where it is not defined, the interval also where there is a single cluster.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmm_ray.stats.metrics import Floats, effective_size, sums_by_cluster
from medmm_ray.stats.resampling import CountRows, Resampling

Ints = NDArray[np.int64]

DIFFICULTIES = ("easy", "medium", "hard")


def easy_first(name: str) -> tuple[int, str]:
    """Sort key of names of groups: difficulties from easy to hard, then all others by name."""
    return (DIFFICULTIES.index(name) if name in DIFFICULTIES else len(DIFFICULTIES), name)


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, each None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class CountedFigure(Figure):
    """A figure of `count` entries (steps or solutions) of so many questions."""

    count: int
    questions: int


@dataclass(frozen=True)
class GroupFigure(CountedFigure):
    """The figure of a group of entries, with the (weighted) counts that it was made of.

    `effective` is the number of equally weighted entries that would tell as much.
    """

    effective: float
    cells: list[float]


GroupedStats = dict[str, dict[str, GroupFigure]]
"""By grouping and name: a figure."""


@dataclass(frozen=True)
class Groups:
    """A way to group entries: the names, and for each entry the number of its name."""

    names: Sequence[str]
    member: Ints

    def of(self, entries: Ints) -> "Groups":
        """The grouping of some of the entries, given by their numbers."""
        return Groups(self.names, self.member[entries])


def share_of_counts(counts_2: Floats) -> Floats:
    """Hits / all of counts [..., 2] of (misses, hits); NaN where there are none."""
    total = counts_2.sum(axis=-1)
    # Both branches of `where` are computed: 1 in place of 0 avoids numpy's warnings.
    divisor = np.where(total > 0, total, 1.0)
    return np.where(
        total > 0,
        counts_2[..., 1] / divisor,
        np.nan,
    )


def stats_by_group(
    groupings: Mapping[str, Groups],
    question: Ints,
    cell: Ints,
    num_cells: int,
    statistic: Callable[[Floats], Floats],
    resampling: Resampling,
    weight: Floats | None = None,
) -> GroupedStats:
    """The figures of `GroupedCounts` of entries that are all there at once."""
    counts = GroupedCounts(num_cells)
    counts.add(groupings, question, cell, weight)
    return counts.stats(statistic, resampling)


class GroupedCounts:
    """Counts by question, group and cell, taken from some questions' entries at a time; and figures of them.

    Entry n counts `weight[n]` (1 without) in `cell[n]` of its groups' tables. All calls of `add` have the same
    groupings, and each cluster's entries come in one of them.
    """

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self._names: dict[str, Sequence[str]] = {}
        self._rows: CountRows | None = None
        self._totals_GC: Floats = np.zeros((0, num_cells))
        self._sizes: Ints = np.zeros(0, dtype=np.int64)
        """Entries of each group."""
        self._questions: Ints = np.zeros(0, dtype=np.int64)
        """Questions that have any in it."""
        self._clusters: Ints = np.zeros(0, dtype=np.int64)
        """Clusters that have any in it."""
        self._weights: list[tuple[Floats, list[Ints]]] = []
        """Of weighted entries, which an expert reads and are few: the weights, and the group in each grouping."""

    def add(
        self,
        groupings: Mapping[str, Groups],
        question: Ints,
        cell: Ints,
        weight: Floats | None = None,
        cluster_Q: Ints | None = None,
    ) -> None:
        """Count entries of questions that were not there before.

        `cluster_Q` has the cluster of each question, in the order that is resampled; None: each is its own.
        """
        everything = Groups(["all"], np.zeros(len(cell), dtype=np.int64))
        all_groupings = {"all": everything, **groupings}
        rows = self._begun(all_groupings, is_weighted=weight is not None)
        # Of the questions that have entries, without gaps.
        questions, row = np.unique(question, return_inverse=True)
        num_questions = len(questions)
        counts_by_grouping = []
        sizes = []
        for groups in all_groupings.values():
            shape = (num_questions, len(groups.names), self.num_cells)
            counts_by_grouping.append(
                _counts(
                    shape,
                    row,
                    groups.member,
                    cell,
                    weight,
                )
            )
            sizes.append(np.bincount(groups.member, minlength=len(groups.names)))
        counts_QGC = np.concatenate(counts_by_grouping, axis=1)
        counts_QK = counts_QGC.reshape(num_questions, rows.num_columns)
        clusters = questions if cluster_Q is None else cluster_Q[questions]
        # The rows that are resampled: what a cluster's questions say is drawn together or not at all.
        of_clusters = sums_by_cluster(counts_QK, clusters)
        rows.append(of_clusters)
        # Row after row onto what there is: to the last bit as if all rows were summed at once.
        self._totals_GC = np.concatenate([self._totals_GC[np.newaxis], counts_QGC]).sum(axis=0)
        self._sizes = self._sizes + np.concatenate(sizes)
        self._questions = self._questions + (counts_QGC.sum(axis=2) > 0).sum(axis=0)
        self._clusters = self._clusters + (of_clusters.reshape(-1, *counts_QGC.shape[1:]).sum(axis=2) > 0).sum(axis=0)
        # Kept as they are: a sum of squares by group would round otherwise than all at once.
        if weight is not None:
            self._weights.append((weight, [groups.member for groups in all_groupings.values()]))

    def _begun(self, all_groupings: Mapping[str, Groups], is_weighted: bool) -> CountRows:
        if self._rows is None:
            self._names = {name: groups.names for name, groups in all_groupings.items()}
            num_groups = sum(map(len, self._names.values()))
            self._rows = CountRows(num_groups * self.num_cells, np.float64 if is_weighted else np.uint32)
            self._totals_GC = np.zeros((num_groups, self.num_cells))
            self._sizes = np.zeros(num_groups, dtype=np.int64)
            self._questions = np.zeros(num_groups, dtype=np.int64)
            self._clusters = np.zeros(num_groups, dtype=np.int64)
        return self._rows

    def stats(
        self,
        statistic: Callable[[Floats], Floats],
        resampling: Resampling,
    ) -> GroupedStats:
        """A figure for each name of each grouping, and for ``all``; names without entries are left out.

        `statistic` takes tables [..., num_cells] to figures. All figures share the resamples of the questions.
        """
        rows = self._rows
        if rows is None:
            return {"all": {}}
        num_groups = len(self._sizes)
        # All groups at once: they share the resamples, which are most of the work.
        low_G, high_G = resampling.interval(
            rows,
            lambda sums_BK: statistic(sums_BK.reshape(len(sums_BK), num_groups, self.num_cells)),
        )
        value_G = statistic(self._totals_GC)
        tables: GroupedStats = {}
        group = 0
        for place, (grouping, names) in enumerate(self._names.items()):
            table = tables[grouping] = {}
            for number, name in enumerate(names):
                if self._sizes[group]:
                    low, high = _interval(low_G[group], high_G[group], int(self._clusters[group]))
                    table[name] = GroupFigure(
                        value=_number(value_G[group]),
                        low=low,
                        high=high,
                        count=int(self._sizes[group]),
                        questions=int(self._questions[group]),
                        effective=self._effective(place, number, int(self._sizes[group])),
                        cells=self._totals_GC[group].tolist(),
                    )
                group += 1
        return tables

    def _effective(self, grouping: int, number: int, count: int) -> float:
        """Equally weighted entries that tell as much as those of a group."""
        if not self._weights:
            return float(count)
        of_group = [weight[members[grouping] == number] for weight, members in self._weights]
        return round(effective_size(np.concatenate(of_group)), 1)


def _counts(
    shape: tuple[int, int, int],
    question: Ints,
    member: Ints,
    cell: Ints,
    weight: Floats | None,
) -> Floats:
    """Counts of `shape` [Q, G, C]: by question, group and cell."""
    _, num_groups, num_cells = shape
    # One bincount over a flat index in place of a loop over groups.
    flat_cell = (question * num_groups + member) * num_cells + cell
    counts = np.bincount(
        flat_cell,
        weight,
        minlength=int(np.prod(shape)),
    )
    return counts.astype(np.float64).reshape(shape)


class RatioCounts:
    """Two sums of whole numbers by question, as steps and solutions, taken from some questions at a time."""

    def __init__(self) -> None:
        self._rows = CountRows(2, np.uint32)
        self._totals_2 = np.zeros(2)
        self._num_questions = 0

    def add(self, above_Q: Floats, below_Q: Floats, cluster_Q: Ints | None = None) -> None:
        """Sums of questions that were not there before; `cluster_Q` as `GroupedCounts.add` has it."""
        # Questions without an entry add nothing, and must not count as questions.
        present = np.flatnonzero(below_Q > 0)
        sums_Q2 = np.stack([above_Q[present], below_Q[present]], axis=1).astype(np.float64)
        self._rows.append(sums_by_cluster(sums_Q2, present if cluster_Q is None else cluster_Q[present]))
        self._totals_2 += sums_Q2.sum(axis=0)
        self._num_questions += len(present)

    def figure(self, resampling: Resampling) -> CountedFigure:
        """The ratio of the sums over all questions; `count` is the lower sum."""
        low, high = resampling.interval(self._rows, _quotient)
        low_end, high_end = _interval(low[0], high[0], len(self._rows))
        return CountedFigure(
            value=_number(_quotient(self._totals_2[np.newaxis])[0, 0]),
            low=low_end,
            high=high_end,
            count=int(self._totals_2[1]),
            questions=self._num_questions,
        )


def _quotient(sums_B2: Floats) -> Floats:
    above = sums_B2[:, :1]
    below = sums_B2[:, 1:]
    divisor = np.where(below > 0, below, 1.0)
    return np.where(below > 0, above / divisor, np.nan)


def _interval(low: float, high: float, num_clusters: int) -> tuple[float | None, float | None]:
    # The resamples of a single cluster are all alike.
    if num_clusters < 2:
        return None, None
    return _number(low), _number(high)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
