"""How far two label sources agree: Cohen's kappa and the first wrong step, overall and by group, with intervals.

Enters: the codes of each source over all steps (`stats.label_arrays`), groups of solutions, the expert's queue. Leaves:
a `PairAgreement` for each pair of sources. Only steps that both call right or wrong count: a null is "not labelled", a
neutral step has nothing to agree on. Intervals resample questions, for the solutions of one question resemble each
other.

The expert's queue draws unsure steps more often than others: with an expert each step weighs 1 / its inclusion
probability (Hajek's estimator), in the figure and in its interval, so that both speak of all steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.stats.grouped_stats import (
    CountedFigure,
    GroupedStats,
    GroupFigure,
    Groups,
    Resampling,
    share_of_counts,
    stats_by_group,
)
from medmm_ray.stats.label_arrays import NEUTRAL, RIGHT, UNLABELLED, WRONG, Codes, Ints, Steps
from medmm_ray.stats.metrics import Bools, Floats, kappa_of_counts

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
class _Compared:
    """What every pair of sources is compared on."""

    steps: Steps
    codes: Mapping[str, Codes]
    groups: Mapping[str, Groups]
    queue: QueuedSteps | None
    resampling: Resampling


def agreement(
    steps: Steps,
    codes: Mapping[str, Codes],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> list[PairAgreement]:
    """The agreement of each pair of sources that share a step, in the order of `source_order`."""
    compared = _Compared(steps, codes, groups, queue, resampling)
    pairs = []
    for first, second in combinations(sorted(codes, key=source_order), 2):
        pair = _pair(compared, first, second)
        if pair.kappa["all"]:
            pairs.append(pair)
    return pairs


def _pair(compared: _Compared, first: str, second: str) -> PairAgreement:
    steps = compared.steps
    of_prefixes = _speaks_of_prefixes(first, second)
    first_codes = _comparable_codes(compared, first, of_prefixes)
    second_codes = _comparable_codes(compared, second, of_prefixes)
    rows = np.flatnonzero((first_codes >= WRONG) & (second_codes >= WRONG))
    weight = None
    num_outside = 0
    # An expert reads a sample: weighted by 1 / inclusion probability, it speaks of all steps.
    if compared.queue is not None and "expert" in (first, second):
        rows, weight, num_outside = in_queue(rows, compared.queue)
    looked_at_by_first = looked_at(steps, compared.codes[first])
    looked_at_by_second = looked_at(steps, compared.codes[second])
    looked_at_by_both = looked_at_by_first & looked_at_by_second
    return PairAgreement(
        first=first,
        second=second,
        weighted=weight is not None,
        of="prefix" if of_prefixes else "step",
        outside_queue=num_outside,
        kappa=_kappa(compared, rows, first_codes[rows], second_codes[rows], weight),
        first_error=_first_error_agreement(compared, first, second),
        looked_at=int(looked_at_by_both.sum()),
    )


def _speaks_of_prefixes(first: str, second: str) -> bool:
    """Whether one of the two labels prefixes and the other can be read so (see `OF_A_PREFIX`)."""
    mixed = (first in OF_A_PREFIX) != (second in OF_A_PREFIX)
    return mixed and "expert" not in (first, second)


def _comparable_codes(compared: _Compared, source: str, of_prefixes: bool) -> Codes:
    codes = compared.codes[source]
    if of_prefixes and source not in OF_A_PREFIX:
        return prefixes(compared.steps, codes)
    return codes


def _kappa(
    compared: _Compared,
    rows: Ints,
    first_codes: Codes,
    second_codes: Codes,
    weight: Floats | None,
) -> dict[str, dict[str, KappaFigure]]:
    """Kappa of the steps at `rows`, by group of solutions and by position, each figure with its share of equals."""
    steps = compared.steps
    solution = steps.solution[rows]
    groupings = {name: groups.of(solution) for name, groups in compared.groups.items()}
    groupings["position"] = positions(steps, rows)
    cell = 2 * first_codes.astype(np.int64) + second_codes  # the order of `kappa_of_counts`
    stats = stats_by_group(
        groupings,
        steps.question[solution],
        cell,
        4,
        kappa_of_counts,
        compared.resampling,
        weight,
    )
    kappa: dict[str, dict[str, KappaFigure]] = {}
    for grouping, table in stats.items():
        kappa[grouping] = {name: _kappa_figure(figure) for name, figure in table.items()}
    return kappa


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


def _first_error_agreement(compared: _Compared, first: str, second: str) -> GroupedStats:
    """The share of solutions with the same first wrong step, of those in which both sources settle it."""
    steps = compared.steps
    first_wrong, first_settled = first_errors(
        steps,
        first,
        compared.codes[first],
    )
    second_wrong, second_settled = first_errors(
        steps,
        second,
        compared.codes[second],
    )
    solutions = np.flatnonzero(first_settled & second_settled)
    same = (first_wrong[solutions] == second_wrong[solutions]).astype(np.int64)
    groupings = {name: groups.of(solutions) for name, groups in compared.groups.items()}
    return stats_by_group(
        groupings,
        steps.question[solutions],
        same,
        2,
        share_of_counts,
        compared.resampling,
    )
