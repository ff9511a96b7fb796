"""What each label policy would keep for training, measured with the policies themselves on a sample of solutions."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels
from medmm_ray.stats.targets import (
    POLICIES,
    accuracy_of,
    consensus_counts,
    consensus_status,
    describe_consensus,
    labels_by_solution,
    targets,
)


@dataclass(frozen=True)
class _Sampled:
    """A solution: its steps, and how it and its question's solutions did."""

    solution_id: str
    num_steps: int
    correct: bool | None
    accuracy: float | None
    """Share of right ones among the row's solutions with an answer."""


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


class Yields:
    """Draws `num_solutions` solutions by a hash of their ids, keeps their label rows, and applies every policy."""

    def __init__(self, num_solutions: int, after_first_error: str) -> None:
        self.num_solutions = num_solutions
        self.after_first_error = after_first_error
        # The solutions of the lowest hashes so far, the highest of these first.
        self._heap: list[tuple[int, int, _Sampled]] = []
        self._num_offered = 0
        # Label rows as they are: the policies themselves are applied, on Python objects.
        self._rows: list[dict[str, Any]] = []
        self._solutions: list[_Sampled] | None = None

    def offer(self, solutions: pa.Table) -> None:
        """Let solutions without texts take part in the draw; all come before the first `keep`."""
        for row in solutions["solutions"].to_pylist():
            # A question's rows (samples, trees) have accuracies of their own: advantages compare what one policy drew.
            accuracy = accuracy_of(row)
            for solution in row:
                hashed = hashlib.blake2b(solution["solution_id"].encode(), digest_size=8).digest()
                # By a hash, so that the sample is the same whatever the order of the rows.
                rank = -int.from_bytes(hashed, "big")
                self._num_offered += 1
                if len(self._heap) == self.num_solutions and rank < self._heap[0][0]:
                    continue
                sampled = _Sampled(solution["solution_id"], solution["num_steps"], solution["correct"], accuracy)
                entry = (rank, -self._num_offered, sampled)
                push = heapq.heappush if len(self._heap) < self.num_solutions else heapq.heapreplace
                push(self._heap, entry)

    @property
    def solutions(self) -> list[_Sampled]:
        """The drawn solutions, the lowest hash first."""
        if self._solutions is None:
            self._solutions = [sampled for _, _, sampled in sorted(self._heap, reverse=True)]
        return self._solutions

    def keep(self, labels: pa.Table) -> None:
        """Take the drawn solutions' rows of a part of a labels table."""
        drawn_ids = [solution.solution_id for solution in self.solutions]
        is_drawn = pc.is_in(labels["solution_id"], pa.array(drawn_ids, pa.string()))
        self._rows += labels.filter(is_drawn).to_pylist()

    def figures(self) -> list[PolicyYield]:
        """What each policy keeps."""
        labels = labels_by_solution(self._rows)
        return [self._yield(policy, labels) for policy in POLICIES]

    def _yield(self, policy: str, labels: Mapping[str, Sequence[Labels]]) -> PolicyYield:
        # Advantages are of whole solutions: there is no first wrong step to stop at.
        rule = "keep" if policy == "advantage" else self.after_first_error
        num_used = num_steps = refused = 0
        total, why = 0.0, ""
        for solution in self.solutions:
            of_solution = labels.get(solution.solution_id, [])
            try:
                step_targets = targets(
                    policy, of_solution, solution.num_steps, rule, solution.correct, solution.accuracy
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
            statuses = [
                consensus_status(labels.get(solution.solution_id, []), solution.num_steps, solution.correct)
                for solution in self.solutions
            ]
            consensus = consensus_counts(statuses)
            refused = int(consensus["consensus_not_continued"] + consensus["consensus_failed"])
            why = f"{describe_consensus(consensus)}." if refused else ""
        return PolicyYield(
            policy=policy,
            solutions=len(self.solutions),
            kept=num_used,
            steps=sum(solution.num_steps for solution in self.solutions),
            kept_steps=num_steps,
            mean_target=round(total / num_steps, 6) if num_steps else None,
            refused=refused,
            why=why,
        )
