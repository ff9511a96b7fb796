"""How far two label sources agree: Cohen's kappa and the first wrong step, overall and by group, with intervals.

Enters: the codes of each source over all steps (`stats.label_arrays`), groups of solutions, the expert's queue. Leaves:
one plain dict a pair of sources. Only steps that both call right or wrong count: a null is "not labelled", a neutral
step has nothing to agree on. Intervals resample questions, for the solutions of one question resemble each other.

The expert's queue draws unsure steps more often than others: with an expert each step weighs 1 / its inclusion
probability (Hajek's estimator), in the figure and in its interval, so that both speak of all steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.stats.grouped_stats import GroupedStats, Groups, Resampling, Row, share_of_counts, stats_by_group
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


def queued_steps(steps: Steps, review_queue: pa.Table) -> QueuedSteps:
    """The queue's steps among `steps`; items of other solutions are left out."""
    found = pc.index_in(review_queue["solution_id"].combine_chunks(), steps.solution_ids)
    owner = np.asarray(pc.fill_null(found, -1), dtype=np.int64)
    index = np.asarray(review_queue["step_index"], dtype=np.int64)
    known = (owner >= 0) & (index < (steps.length[owner] if len(steps.length) else 0))
    row = steps.first[owner[known]] + index[known]
    order = np.argsort(row)
    return QueuedSteps(row[order], np.asarray(review_queue["inclusion_probability"], dtype=np.float64)[known][order])


def source_order(source: str) -> tuple[int, str]:
    return (SOURCES.index(source) if source in SOURCES else len(SOURCES), source)


def agreement(
    steps: Steps,
    codes: Mapping[str, Codes],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> list[Row]:
    """One entry a pair of sources that share a step: tables of `kappa` and of `first_error`, by group of solutions.

    `kappa` is by position in the solution too, and each figure has `equal`, the share of equal labels. `first_error` is
    the share of solutions with the same first wrong step (or none), where both sources settle it: all `looked_at` by
    both where both label whole solutions; where one labels only some steps, those it settles are no random sample.
    """
    pairs = combinations(sorted(codes, key=source_order), 2)
    found = (_pair(steps, codes, pair, groups, queue, resampling) for pair in pairs)
    return [entry for entry in found if entry["kappa"]["all"]]


def _pair(
    steps: Steps,
    codes: Mapping[str, Codes],
    pair: tuple[str, str],
    groups: Mapping[str, Groups],
    queue: QueuedSteps | None,
    resampling: Resampling,
) -> Row:
    a, b = codes[pair[0]], codes[pair[1]]
    of_prefixes = len({source in OF_A_PREFIX for source in pair}) == 2 and "expert" not in pair
    if of_prefixes:
        a, b = (codes[s] if s in OF_A_PREFIX else prefixes(steps, codes[s]) for s in pair)
    shared = np.flatnonzero((a >= WRONG) & (b >= WRONG))
    weight, outside = None, 0
    if queue is not None and "expert" in pair:
        shared, weight, outside = in_queue(shared, queue)
    solution = steps.solution[shared]
    groupings = {name: group.of(solution) for name, group in groups.items()}
    groupings["position"] = positions(steps, shared)
    cell = 2 * a[shared].astype(np.int64) + b[shared]
    kappa = stats_by_group(groupings, steps.question[solution], cell, 4, kappa_of_counts, resampling, weight)
    for table in kappa.values():
        for figure in table.values():
            cells = figure.pop("cells")
            figure["equal"] = round((cells[0] + cells[3]) / sum(cells), 6)
    return {
        "first": pair[0],
        "second": pair[1],
        "weighted": weight is not None,
        "of": "prefix" if of_prefixes else "step",
        "outside_queue": outside,
        "kappa": kappa,
        "first_error": _first_error_agreement(steps, codes, pair, groups, resampling),
        "looked_at": int((looked_at(steps, codes[pair[0]]) & looked_at(steps, codes[pair[1]])).sum()),
    }


def in_queue(rows: Ints, queue: QueuedSteps) -> tuple[Ints, Floats, int]:
    """Those of `rows` that lie in the queue, 1 / the inclusion probability of each, and how many lie outside."""
    found = np.isin(rows, queue.row)
    inside = rows[found]
    return inside, 1.0 / queue.probability[np.searchsorted(queue.row, inside)], len(rows) - len(inside)


def positions(steps: Steps, rows: Ints) -> Groups:
    """Whether each step is its solution's first, last, or between; an only step is the first."""
    index, last = steps.index[rows], steps.length[steps.solution[rows]] - 1
    return Groups(POSITIONS, np.where(index == 0, 0, np.where(index == last, 2, 1)))


# The first wrong step


def first_errors(steps: Steps, source: str, codes: Codes) -> tuple[Ints, Bools]:
    """The index of each solution's first wrong step (-1: none), and whether the source settles it.

    It is settled where every step before the first wrong one, or without one every step, is labelled or neutral; of a
    source `OF_A_PREFIX` a right step vouches for those before it. An expert, who reads steps drawn one by one, settles
    only solutions read as a whole: of the others, those with an early error would be settled more often.
    """
    first, gap = _first(steps, codes == WRONG), _first(steps, codes == UNLABELLED)
    if source in OF_A_PREFIX:
        last_right = np.full(len(steps.length), -1)
        right = np.flatnonzero(codes == RIGHT)
        last_right[steps.solution[right]] = steps.index[right]
        gap = _first(steps, (codes == UNLABELLED) & (steps.index > last_right[steps.solution]))
    settled = gap == steps.length if source == "expert" else gap >= first
    return np.where(first < steps.length, first, -1), settled & looked_at(steps, codes)


def prefixes(steps: Steps, codes: Codes) -> Codes:
    """A source's verdicts of steps as those of the prefixes that end there: wrong from the first wrong step on.

    Right before it, while no step is unlabelled; a neutral step changes nothing.
    """
    first, gap = _first(steps, codes == WRONG), _first(steps, codes == UNLABELLED)
    unbroken = np.where(steps.index < gap[steps.solution], RIGHT, UNLABELLED)
    return np.where(steps.index >= first[steps.solution], WRONG, unbroken).astype(np.int8)


def looked_at(steps: Steps, codes: Codes) -> Bools:
    """Solutions of which the source labels a step, or finds nothing to check in it."""
    found = np.zeros(len(steps.length), dtype=bool)
    found[steps.solution[codes >= NEUTRAL]] = True
    return found


def _first(steps: Steps, mask: Bools) -> Ints:
    """The index of the first step of each solution where `mask` holds; its length where nowhere."""
    found = steps.length.copy()
    rows = np.flatnonzero(mask)[::-1]
    found[steps.solution[rows]] = steps.index[rows]  # of several the last one written stays: the first step
    return found


def _first_error_agreement(
    steps: Steps,
    codes: Mapping[str, Codes],
    pair: tuple[str, str],
    groups: Mapping[str, Groups],
    resampling: Resampling,
) -> GroupedStats:
    first, settled = zip(*(first_errors(steps, source, codes[source]) for source in pair), strict=True)
    both = np.flatnonzero(settled[0] & settled[1])
    same = (first[0][both] == first[1][both]).astype(np.int64)
    groupings = {name: group.of(both) for name, group in groups.items()}
    return stats_by_group(groupings, steps.question[both], same, 2, share_of_counts, resampling)
