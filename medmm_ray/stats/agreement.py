"""How far two label sources agree: Cohen's kappa and the first wrong step, overall and by group, with intervals.

Enters: `LabelledSteps`: the codes of each source over the steps of some questions, groups of solutions, the expert's
queue. Leaves: a `PairAgreement` for each pair of sources. Only steps that both call right or wrong count: a null is
"not labelled", a neutral step has nothing to agree on. Intervals resample questions, for the solutions of one question
resemble each other.

The expert's queue draws unsure steps more often than others: with an expert each step weighs 1 / its inclusion
probability (Hajek's estimator), in the figure and in its interval, so that both speak of all steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.stats.grouped_stats import (
    CountedFigure,
    GroupedCounts,
    GroupedStats,
    GroupFigure,
    Groups,
    share_of_counts,
)
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, Codes, Ints, Steps
from medmm_ray.stats.metrics import Bools, Floats, kappa_of_counts
from medmm_ray.stats.resampling import Resampling

SOURCES = ("judge", "monte_carlo", "tree_search", "expert", "phantom")
OF_A_PREFIX = ("monte_carlo", "tree_search")
"""Sources whose verdict is about all steps up to one: a right step vouches for those before it.

Beside them judge and truth are read as verdicts of prefixes too; an expert, who reads single steps, cannot be.
"""
POSITIONS = ("first", "middle", "last")


@dataclass(frozen=True)
class QueuedSteps:
    """The steps of the expert's queue, as rows of `Steps`, sorted; and the inclusion probability of each."""

    row: Ints
    probability: Floats


@dataclass(frozen=True)
class KappaFigure(CountedFigure):
    """Cohen's kappa of two sources, with the share of equal labels.

    `effective` is the number of equally weighted steps that would tell as much.
    """

    effective: float
    equal: float


@dataclass(frozen=True, kw_only=True)
class PairAgreement:
    """How far two sources agree, by group of solutions.

    `kappa` is by position in the solution too. `first_error` is the share of solutions with the same first wrong step
    (or none), where both sources settle it: all `looked_at` by both where both label whole solutions; where one labels
    only some steps, those it settles are no random sample.
    """

    first: str
    second: str
    weighted: bool
    """Whether each step weighs 1 / its chance to enter the expert's queue."""
    of: Literal["prefix", "step"]
    """What the two are compared on: steps, or prefixes where one source speaks of these."""
    outside_queue: int
    """Shared steps outside the queue, which do not count."""
    kappa: dict[str, dict[str, KappaFigure]]
    first_error: GroupedStats
    looked_at: int

    @property
    def overall_kappa(self) -> KappaFigure:
        """Kappa of all shared steps."""
        return self.kappa["all"]["all"]

    @property
    def overall_first_error(self) -> GroupFigure | None:
        """The share of the same first wrong step over all solutions in which both settle it; None without any."""
        return self.first_error["all"].get("all")


def queued_steps(steps: Steps, review_queue: pa.Table) -> QueuedSteps:
    """The queue's steps among `steps`; items of other solutions are left out."""
    # In Arrow, not in a dict: a queue names a few of millions of solutions.
    matches = pc.index_in(review_queue["solution_id"].combine_chunks(), steps.solution_ids)
    solution = np.asarray(pc.fill_null(matches, -1), dtype=np.int64)
    index = np.asarray(review_queue["step_index"], dtype=np.int64)
    probability = np.asarray(review_queue["inclusion_probability"], dtype=np.float64)
    num_steps = steps.length[solution] if len(steps.length) else 0
    is_step = (solution >= 0) & (index < num_steps)
    row = steps.first[solution[is_step]] + index[is_step]
    order = np.argsort(row)  # `in_queue` searches it
    return QueuedSteps(
        row[order],
        probability[is_step][order],
    )


def source_order(source: str) -> tuple[int, str]:
    """A sort key: the sources that are known here in the order of `SOURCES`, others behind them by name."""
    return (SOURCES.index(source) if source in SOURCES else len(SOURCES), source)


@dataclass(frozen=True)
class LabelledSteps:
    """The steps of some questions, what each source says of them, and the groups of their solutions.

    `queue` has the expert's; None where there is no queue. `cluster_Q` has the cluster of each question; None: each is
    its own.
    """

    steps: Steps
    codes: Mapping[str, Codes]
    groups: Mapping[str, Groups]
    queue: QueuedSteps | None
    cluster_Q: Ints | None = None


class Agreement:
    """The agreement of each pair of some sources, taken from some questions at a time."""

    def __init__(self, sources: Iterable[str]) -> None:
        ordered = sorted(sources, key=source_order)
        self._pairs = [_Pair(first, second) for first, second in combinations(ordered, 2)]

    def add(self, labelled: LabelledSteps) -> None:
        """Compare the sources on questions that were not there before."""
        for pair in self._pairs:
            pair.add(labelled)

    def figures(self, resampling: Resampling) -> list[PairAgreement]:
        """The pairs of sources that share a step, in the order of `source_order`."""
        figures = [pair.figures(resampling) for pair in self._pairs]
        return [pair for pair in figures if pair.kappa["all"]]


class _Pair:
    """What two sources share so far."""

    def __init__(self, first: str, second: str) -> None:
        self.first = first
        self.second = second
        self.of_prefixes = _speaks_of_prefixes(first, second)
        self.is_weighted = False
        self.outside_queue = 0
        self.looked_at = 0
        self.kappa = GroupedCounts(4)
        self.first_error = GroupedCounts(2)

    def add(self, labelled: LabelledSteps) -> None:
        """Count the shared steps and solutions of some questions."""
        steps = labelled.steps
        first_codes = _comparable_codes(labelled, self.first, self.of_prefixes)
        second_codes = _comparable_codes(labelled, self.second, self.of_prefixes)
        rows = np.flatnonzero((first_codes >= WRONG) & (second_codes >= WRONG))
        weight = None
        # An expert reads a sample: weighted by 1 / inclusion probability, it speaks of all steps.
        if labelled.queue is not None and "expert" in (self.first, self.second):
            rows, weight, num_outside = in_queue(rows, labelled.queue)
            self.is_weighted = True
            self.outside_queue += num_outside
        looked_at_by_first = looked_at(steps, labelled.codes[self.first])
        looked_at_by_second = looked_at(steps, labelled.codes[self.second])
        self.looked_at += int((looked_at_by_first & looked_at_by_second).sum())
        solution = steps.solution[rows]
        groupings = {name: groups.of(solution) for name, groups in labelled.groups.items()}
        groupings["position"] = positions(steps, rows)
        # In the order of `kappa_of_counts`.
        cell = 2 * first_codes[rows].astype(np.int64) + second_codes[rows]
        self.kappa.add(groupings, steps.question[solution], cell, weight, labelled.cluster_Q)
        self._add_first_errors(labelled)

    def _add_first_errors(self, labelled: LabelledSteps) -> None:
        """Whether both have the same first wrong step, of the solutions in which both settle it."""
        steps = labelled.steps
        first_wrong, first_settled = first_errors(
            steps,
            self.first,
            labelled.codes[self.first],
        )
        second_wrong, second_settled = first_errors(
            steps,
            self.second,
            labelled.codes[self.second],
        )
        solutions = np.flatnonzero(first_settled & second_settled)
        same = (first_wrong[solutions] == second_wrong[solutions]).astype(np.int64)
        groupings = {name: groups.of(solutions) for name, groups in labelled.groups.items()}
        self.first_error.add(groupings, steps.question[solutions], same, cluster_Q=labelled.cluster_Q)

    def figures(self, resampling: Resampling) -> PairAgreement:
        """The agreement over all questions so far, each kappa with its share of equal labels."""
        kappa: dict[str, dict[str, KappaFigure]] = {}
        for grouping, table in self.kappa.stats(kappa_of_counts, resampling).items():
            kappa[grouping] = {name: _kappa_figure(figure) for name, figure in table.items()}
        return PairAgreement(
            first=self.first,
            second=self.second,
            weighted=self.is_weighted,
            of="prefix" if self.of_prefixes else "step",
            outside_queue=self.outside_queue,
            kappa=kappa,
            first_error=self.first_error.stats(share_of_counts, resampling),
            looked_at=self.looked_at,
        )


def _speaks_of_prefixes(first: str, second: str) -> bool:
    """Whether one of the two labels prefixes and the other can be read so (see `OF_A_PREFIX`)."""
    mixed = (first in OF_A_PREFIX) != (second in OF_A_PREFIX)
    return mixed and "expert" not in (first, second)


def _comparable_codes(labelled: LabelledSteps, source: str, of_prefixes: bool) -> Codes:
    codes = labelled.codes[source]
    if of_prefixes and source not in OF_A_PREFIX:
        return prefixes(labelled.steps, codes)
    return codes


def _kappa_figure(figure: GroupFigure) -> KappaFigure:
    both_wrong, only_second, only_first, both_right = figure.cells
    total = sum((both_wrong, only_second, only_first, both_right))
    share_equal = (both_wrong + both_right) / total
    return KappaFigure(
        value=figure.value,
        low=figure.low,
        high=figure.high,
        count=figure.count,
        questions=figure.questions,
        effective=figure.effective,
        equal=round(share_equal, 6),
    )


def in_queue(rows: Ints, queue: QueuedSteps) -> tuple[Ints, Floats, int]:
    """Those of `rows` that lie in the queue, 1 / the inclusion probability of each, and how many lie outside."""
    inside = rows[np.isin(rows, queue.row)]
    probability = queue.probability[np.searchsorted(queue.row, inside)]
    return inside, 1.0 / probability, len(rows) - len(inside)


def positions(steps: Steps, rows: Ints) -> Groups:
    """Whether each step is its solution's first, last, or between; an only step is the first."""
    index = steps.index[rows]
    last = steps.length[steps.solution[rows]] - 1
    middle_or_last = np.where(
        index == last,
        POSITIONS.index("last"),
        POSITIONS.index("middle"),
    )
    return Groups(POSITIONS, np.where(index == 0, POSITIONS.index("first"), middle_or_last))


# The first wrong step


def first_errors(steps: Steps, source: str, codes: Codes) -> tuple[Ints, Bools]:
    """The index of each solution's first wrong step (-1: none), and whether the source settles it.

    It is settled where every step before the first wrong one, or without one every step, is labelled or neutral; of a
    source `OF_A_PREFIX` a right step vouches for those before it. An expert, who reads steps drawn one by one, settles
    only solutions read as a whole: of the others, those with an early error would be settled more often.
    """
    first_wrong = _first(steps, codes == WRONG)
    gap = _first(steps, codes == UNLABELLED)
    if source in OF_A_PREFIX:
        # Without a right step nothing is vouched for: -1 lies before the first one.
        last_right = np.full(len(steps.length), -1)
        right = np.flatnonzero(codes == RIGHT)
        last_right[steps.solution[right]] = steps.index[right]
        is_behind = steps.index > last_right[steps.solution]
        gap = _first(steps, (codes == UNLABELLED) & is_behind)
    settled = gap == steps.length if source == "expert" else gap >= first_wrong
    has_error = first_wrong < steps.length
    return np.where(has_error, first_wrong, -1), settled & looked_at(steps, codes)


def prefixes(steps: Steps, codes: Codes) -> Codes:
    """A source's verdicts of steps as those of the prefixes that end there: wrong from the first wrong step on.

    Right before it, while no step is unlabelled; a neutral step changes nothing.
    """
    first_wrong = _first(steps, codes == WRONG)
    gap = _first(steps, codes == UNLABELLED)
    right_or_unlabelled = np.where(
        steps.index < gap[steps.solution],
        RIGHT,
        UNLABELLED,
    )
    is_wrong = steps.index >= first_wrong[steps.solution]
    return np.where(is_wrong, WRONG, right_or_unlabelled).astype(np.int8)


def looked_at(steps: Steps, codes: Codes) -> Bools:
    """Solutions of which the source labels a step, or finds nothing to check in it."""
    is_looked_at = np.zeros(len(steps.length), dtype=bool)
    is_looked_at[steps.solution[codes >= NEUTRAL]] = True
    return is_looked_at


def _first(steps: Steps, mask: Bools) -> Ints:
    """The index of the first step of each solution where `mask` holds; its length where nowhere."""
    first = steps.length.copy()
    rows = np.flatnonzero(mask)[::-1]  # from the last step to the first
    first[steps.solution[rows]] = steps.index[rows]  # of several the last one written stays: the first step
    return first
