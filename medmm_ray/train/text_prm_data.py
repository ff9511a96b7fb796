"""From tables to what a reward model is trained on: questions with their labelled solutions, pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.records import Labels
from medmm_ray.stats.targets import Target, accuracy_of, labels_by_solution, targets
from medmm_ray.text import question_with_options

_SOLUTION = pa.struct(
    {
        "solution_id": pa.string(),
        "steps": pa.list_(pa.string()),
        "targets": pa.list_(pa.float64()),
        "weight": pa.int64(),
    }
)
SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "documents": pa.list_(pa.string()),
        "solutions": pa.list_(_SOLUTION),
    }
)


def group_labels(tables: Iterable[pa.Table]) -> dict[str, list[Labels]]:
    """The rows of all labels tables by solution."""
    return labels_by_solution([row for table in tables for row in table.to_pylist()])


def labelled_questions(
    questions: pa.Table,
    evidence: pa.Table,
    solutions: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    policy: str,
    after_first_error: str = "collapse",
    max_solutions: int | None = None,
    num_documents: int | None = None,
    split: str = "train",
) -> pa.Table:
    """One row a question of `split` with its evidence and labelled solutions (`SCHEMA`), sorted by question_id.

    Of each question the first `max_solutions` and the best `num_documents` are taken (None: all). Solutions without any
    target are left out. Equal ones (same steps, same targets) become one of their joint weight, which trains exactly
    the same at less cost.
    """
    documents = {
        row["question_id"]: [document["text"] for document in row["documents"][:num_documents]]
        for row in evidence.to_pylist()
        if row["error"] is None
    }
    by_id = {q["question_id"]: q for q in questions.to_pylist() if q["split"] == split and q["error"] is None}
    rows = [
        {
            "question_id": row["question_id"],
            "question": question_with_options(question["question"], question["options"]),
            "documents": documents.get(row["question_id"], []),
            "solutions": kept,
        }
        for row in solutions.to_pylist()
        if row["error"] is None and (question := by_id.get(row["question_id"]))
        if (kept := labelled_solutions(row["solutions"], labels, policy, after_first_error, max_solutions))
    ]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["question_id"]), schema=SCHEMA)


def labelled_solutions(
    solutions: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Sequence[Labels]],
    policy: str,
    after_first_error: str = "collapse",
    max_solutions: int | None = None,
) -> list[dict[str, Any]]:
    """One question's first `max_solutions` solutions with their targets, equal ones merged."""
    accuracy = accuracy_of(solutions)
    merged: dict[tuple[tuple[str, ...], tuple[Target, ...]], dict[str, Any]] = {}
    for solution in solutions[:max_solutions]:
        name, steps = solution["solution_id"], solution["steps"]
        aims = targets(policy, labels.get(name, []), len(steps), after_first_error, solution["correct"], accuracy)
        if not any(aim is not None for aim in aims):
            continue
        first = merged.setdefault(
            (tuple(steps), tuple(aims)), {"solution_id": name, "steps": steps, "targets": aims, "weight": 0}
        )
        first["weight"] += 1
    return list(merged.values())


def labels_of_solutions(
    questions: pa.Table,
    solutions: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    max_solutions: int | None = None,
    split: str = "train",
) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
    """Of each solution that `labelled_questions` looks at: its labels, its number of steps, whether its answer is
    right."""
    usable = questions.filter(pc.and_(pc.equal(questions["split"], split), pc.is_null(questions["error"])))
    asked = pc.is_in(solutions["question_id"], usable["question_id"].combine_chunks())
    for row in solutions.filter(pc.and_(asked, pc.is_null(solutions["error"])))["solutions"].to_pylist():
        for solution in row[:max_solutions]:
            yield labels.get(solution["solution_id"], []), len(solution["steps"]), solution["correct"]


def positive_rate(rows: pa.Table) -> float:
    """The share of right steps among the labelled ones, for the figures: class imbalance, said."""
    aims = [
        (aim, solution["weight"])
        for solutions in rows["solutions"].to_pylist()
        for solution in solutions
        for aim in solution["targets"]
        if aim is not None
    ]
    total = sum(weight for _, weight in aims)
    return sum(aim * weight for aim, weight in aims) / total if total else 0.0
