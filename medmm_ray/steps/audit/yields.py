"""What each label policy would keep for training, measured with the policies themselves on a sample of solutions."""

import hashlib
from collections.abc import Sequence
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

Row = dict[str, Any]


class Yields:
    """Keeps the label rows of `num_solutions` solutions, drawn by a hash of their ids, and applies every policy."""

    def __init__(self, steps: Steps, num_solutions: int, after_first_error: str) -> None:
        self.after_first_error = after_first_error
        ids = steps.solution_ids.to_pylist()
        chance = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids]
        self.chosen = np.array(sorted(range(len(ids)), key=chance.__getitem__)[:num_solutions], dtype=np.int64)
        self.ids = [ids[i] for i in self.chosen]
        self.num_steps = steps.length[self.chosen].tolist()
        self.row = steps.row
        self._wanted = pa.array(self.ids, pa.string())
        self._rows: list[Row] = []

    def keep(self, labels: pa.Table) -> None:
        """Take the chosen solutions' rows of a part of a labels table."""
        self._rows += labels.filter(pc.is_in(labels["solution_id"], self._wanted)).to_pylist()

    def figures(self, correct: Codes) -> list[Row]:
        """One entry a policy; `correct` is RIGHT, WRONG or -1 for each solution of the whole table."""
        known = [None if code < 0 else bool(code) for code in correct[self.chosen].tolist()]
        answered, right = (np.bincount(self.row, kind) for kind in (correct >= 0, correct == RIGHT))
        share = [float(right[r] / answered[r]) if answered[r] else None for r in self.row[self.chosen]]
        labels = labels_by_solution(self._rows)
        of_solution = [
            (labels.get(solution_id, []), *rest)
            for solution_id, *rest in zip(self.ids, self.num_steps, known, share, strict=True)
        ]
        return [self._of(policy, of_solution) for policy in POLICIES]

    def _of(self, policy: str, solutions: Sequence[tuple[Sequence[Labels], int, bool | None, float | None]]) -> Row:
        kept = kept_steps = refused = 0
        total, why = 0.0, ""
        rule = "keep" if policy == "advantage" else self.after_first_error  # it knows no other
        for labels, num_steps, correct, accuracy in solutions:
            try:
                found = targets(policy, labels, num_steps, rule, correct, accuracy)
            except ValueError as error:
                refused, why = refused + 1, why or str(error)
                continue
            trained = [target for target in found if target is not None]
            kept += bool(trained)
            kept_steps += len(trained)
            total += sum(trained)
        if policy == "consensus":
            settled = consensus_counts(consensus_status(*solution[:3]) for solution in solutions)
            refused = int(settled["consensus_not_continued"] + settled["consensus_failed"])
            why = f"{describe_consensus(settled)}." if refused else ""
        return {
            "policy": policy,
            "solutions": len(self.ids),
            "kept": kept,
            "steps": sum(self.num_steps),
            "kept_steps": kept_steps,
            "mean_target": round(total / kept_steps, 6) if kept_steps else None,
            "refused": refused,
            "why": why,
        }
