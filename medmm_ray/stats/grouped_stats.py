"""Figures by group with 95 % intervals, from counts by question: kappa, shares, ratios.

Intervals resample questions, for what one question's solutions say is not independent; the weights stay with their
entries, so that a weighted figure has a weighted interval. A value is None where it is not defined, the interval also
where there is a single question.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmm_ray.stats.metrics import Floats, cluster_bootstrap, effective_size

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


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn."""

    num: int
    seed: int


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
    """A figure for each name of each grouping, and for ``all``.

    Entry n counts `weight[n]` (1 without) in `cell[n]` of its groups' tables; `statistic` takes tables
    [..., num_cells] to figures. All figures share the resamples of the questions. Names without entries are left out.
    """
    # Numbers of the questions that have entries, without gaps: the rows that are resampled.
    _, cluster = np.unique(question, return_inverse=True)
    num_questions = int(cluster.max(initial=-1)) + 1
    everything = Groups(["all"], np.zeros(len(cell), dtype=np.int64))
    all_groupings = {"all": everything, **groupings}
    counts_by_grouping = []
    for groups in all_groupings.values():
        shape = (num_questions, len(groups.names), num_cells)
        counts_by_grouping.append(
            _counts(
                shape,
                cluster,
                groups.member,
                cell,
                weight,
            )
        )
    counts_QGC = np.concatenate(counts_by_grouping, axis=1)
    # All groups at once: they share the resamples, which are most of the work.
    estimates = _estimates(counts_QGC, statistic, resampling)
    tables: GroupedStats = {}
    for grouping, groups in all_groupings.items():
        table = tables[grouping] = {}
        sizes = np.bincount(groups.member, minlength=len(groups.names))
        for place, name in enumerate(groups.names):
            estimate = next(estimates)
            count = int(sizes[place])
            if count:
                group_weight = None if weight is None else weight[groups.member == place]
                table[name] = estimate.figure(count, group_weight)
    return tables


def _counts(
    shape: tuple[int, int, int],
    cluster: Ints,
    member: Ints,
    cell: Ints,
    weight: Floats | None,
) -> Floats:
    """Counts of `shape` [Q, G, C]: by question, group and cell."""
    _, num_groups, num_cells = shape
    # One bincount over a flat index in place of a loop over groups.
    flat_cell = (cluster * num_groups + member) * num_cells + cell
    counts = np.bincount(
        flat_cell,
        weight,
        minlength=int(np.prod(shape)),
    )
    return counts.astype(np.float64).reshape(shape)


@dataclass(frozen=True)
class _Estimate:
    """One group's value and interval (NaN: not defined), and what it was counted from."""

    value: float
    low: float
    high: float
    questions: int
    cells: list[float]

    def figure(self, count: int, weight: Floats | None) -> GroupFigure:
        """The figure of `count` entries with these weights."""
        low, high = _interval(self.low, self.high, self.questions)
        return GroupFigure(
            value=_number(self.value),
            low=low,
            high=high,
            count=count,
            questions=self.questions,
            effective=float(count) if weight is None else round(effective_size(weight), 1),
            cells=self.cells,
        )


def _estimates(
    counts_QGC: Floats,
    statistic: Callable[[Floats], Floats],
    resampling: Resampling,
) -> Iterator[_Estimate]:
    """The estimate of each group, in order; all groups share the resamples."""
    num_questions, num_groups, num_cells = counts_QGC.shape
    low_G, high_G = cluster_bootstrap(
        counts_QGC.reshape(num_questions, num_groups * num_cells),
        lambda sums_BK: statistic(sums_BK.reshape(len(sums_BK), num_groups, num_cells)),
        resampling.num,
        resampling.seed,
    )
    totals_GC = counts_QGC.sum(axis=0)
    value_G = statistic(totals_GC)
    questions_G = (counts_QGC.sum(axis=2) > 0).sum(axis=0)
    for group in range(num_groups):
        yield _Estimate(value_G[group], low_G[group], high_G[group], int(questions_G[group]), totals_GC[group].tolist())


def ratio(above_Q: Floats, below_Q: Floats, resampling: Resampling) -> CountedFigure:
    """A ratio of two sums over questions, such as steps a solution; `count` is the lower sum (`below_Q`'s)."""

    def quotient(sums_B2: Floats) -> Floats:
        above = sums_B2[:, :1]
        below = sums_B2[:, 1:]
        divisor = np.where(below > 0, below, 1.0)
        return np.where(below > 0, above / divisor, np.nan)

    # Questions without an entry add nothing, and must not count as questions.
    present = below_Q > 0
    sums_Q2 = np.stack([above_Q[present], below_Q[present]], axis=1).astype(np.float64)
    value = quotient(sums_Q2.sum(axis=0, keepdims=True))[0, 0]
    low, high = cluster_bootstrap(
        sums_Q2,
        quotient,
        resampling.num,
        resampling.seed,
    )
    num_questions = len(sums_Q2)
    low_end, high_end = _interval(low[0], high[0], num_questions)
    return CountedFigure(
        value=_number(value),
        low=low_end,
        high=high_end,
        count=int(below_Q.sum()),
        questions=num_questions,
    )


def _interval(low: float, high: float, num_questions: int) -> tuple[float | None, float | None]:
    # The resamples of a single question are all alike.
    if num_questions < 2:
        return None, None
    return _number(low), _number(high)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
