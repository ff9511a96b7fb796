"""What each label policy would keep for training, measured with the policies themselves on a sample of solutions."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels
from medmm_ray.stats.label_arrays import RIGHT, Codes, Steps
from medmm_ray.stats.targets import (
    POLICIES,
    consensus_counts,
    consensus_status,
    describe_consensus,
    labels_by_solution,
    targets,
)

BATCH = 10_000  # ids that are Python objects at a time


@dataclass(frozen=True)
class _Labelled:
    """What a policy makes targets of: a solution's label rows, and how it and its question's solutions did."""

    labels: Sequence[Labels]
    num_steps: int
    correct: bool | None
    accuracy: float | None
    """Share of right ones among the question's solutions with an answer."""


@dataclass(frozen=True, kw_only=True)
class PolicyYield:
    """What a policy keeps of `steps` in `solutions`; `why` names the first fault of those that it refused."""

    policy: str
    solutions: int
    kept: int
    steps: int
    kept_steps: int
    mean_target: float | None
    refused: int
    why: str


def _hashes(solution_ids: pa.Array) -> Iterator[tuple[bytes, int]]:
    """The hash of each id, and its place."""
    # In batches: as Python objects all ids at once would be most of what the report takes.
    for start in range(0, len(solution_ids), BATCH):
        for place, solution_id in enumerate(solution_ids.slice(start, BATCH).to_pylist(), start):
            yield hashlib.blake2b(solution_id.encode(), digest_size=8).digest(), place


class Yields:
    """Keeps the label rows of `num_solutions` solutions, drawn by a hash of their ids, and applies every policy."""

    def __init__(self, steps: Steps, num_solutions: int, after_first_error: str) -> None:
        self.after_first_error = after_first_error
        # By a hash, so that the sample is the same whatever the order of the rows.
        lowest = heapq.nsmallest(num_solutions, _hashes(steps.solution_ids))
        self.chosen = np.array([solution for _, solution in lowest], dtype=np.int64)
        self.ids = steps.solution_ids.take(pa.array(self.chosen)).to_pylist()
        self.num_steps = steps.length[self.chosen].tolist()
        self.row = steps.row
        self._chosen_ids = pa.array(self.ids, pa.string())
        self._rows: list[dict[str, Any]] = []

    def keep(self, labels: pa.Table) -> None:
        """Take the chosen solutions' rows of a part of a labels table."""
        is_chosen = pc.is_in(labels["solution_id"], self._chosen_ids)
        self._rows += labels.filter(is_chosen).to_pylist()

    def figures(self, correct: Codes) -> list[PolicyYield]:
        """What each policy keeps; `correct` is RIGHT, WRONG or -1 for each solution of the whole table."""
        answered = np.bincount(self.row, correct >= 0)
        right = np.bincount(self.row, correct == RIGHT)
        # A question's rows (samples, trees) have accuracies of their own: advantages compare what one policy drew.
        labels = labels_by_solution(self._rows)
        solutions = []
        for place, solution_id in enumerate(self.ids):
            solution = self.chosen[place]
            row = self.row[solution]
            solutions.append(
                _Labelled(
                    labels=labels.get(solution_id, []),
                    num_steps=self.num_steps[place],
                    correct=None if correct[solution] < 0 else bool(correct[solution]),
                    accuracy=float(right[row] / answered[row]) if answered[row] else None,
                )
            )
        return [self._yield(policy, solutions) for policy in POLICIES]

    def _yield(self, policy: str, solutions: Sequence[_Labelled]) -> PolicyYield:
        # Advantages are of whole solutions: there is no first wrong step to stop at.
        rule = "keep" if policy == "advantage" else self.after_first_error
        num_used = num_steps = refused = 0
        total, why = 0.0, ""
        for solution in solutions:
            try:
                step_targets = targets(
                    policy, solution.labels, solution.num_steps, rule, solution.correct, solution.accuracy
                )
            except ValueError as error:
                refused += 1
                why = why or str(error)
                continue
            trained = [target for target in step_targets if target is not None]
            num_used += bool(trained)
            num_steps += len(trained)
            total += sum(trained)
        if policy == "consensus":
            # This policy passes over what is not settled instead of raising.
            statuses = (consensus_status(s.labels, s.num_steps, s.correct) for s in solutions)
            consensus = consensus_counts(statuses)
            refused = int(consensus["consensus_not_continued"] + consensus["consensus_failed"])
            why = f"{describe_consensus(consensus)}." if refused else ""
        return PolicyYield(
            policy=policy,
            solutions=len(self.ids),
            kept=num_used,
            steps=sum(self.num_steps),
            kept_steps=num_steps,
            mean_target=round(total / num_steps, 6) if num_steps else None,
            refused=refused,
            why=why,
        )
