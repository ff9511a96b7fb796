"""What a text reward model is trained on: questions with their evidence and labelled solutions, out of tables."""

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
    rows: list[dict[str, Any]] = []
    for table in tables:
        rows += table.to_pylist()
    return labels_by_solution(rows)


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

    The first `max_solutions` and the best `num_documents` of each question are taken (None: all). Solutions without any
    target are left out. Equal ones (same steps, same targets) become one of their joint weight, which trains exactly
    the same at less cost.
    """
    questions_by_id: dict[str, dict[str, Any]] = {}
    for question in questions.to_pylist():
        if question["split"] == split and question["error"] is None:
            questions_by_id[question["question_id"]] = question
    documents_by_question = _documents_by_question(evidence, num_documents)
    rows: list[dict[str, Any]] = []
    for row in solutions.to_pylist():
        question_id = row["question_id"]
        if row["error"] is not None or question_id not in questions_by_id:
            continue
        labelled = labelled_solutions(row["solutions"], labels, policy, after_first_error, max_solutions)
        if not labelled:
            continue
        question = questions_by_id[question_id]
        rows.append(
            {
                "question_id": question_id,
                "question": question_with_options(question["question"], question["options"]),
                "documents": documents_by_question.get(question_id, []),
                "solutions": labelled,
            }
        )
    rows.sort(key=lambda row: str(row["question_id"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _documents_by_question(evidence: pa.Table, num_documents: int | None) -> dict[str, list[str]]:
    """The texts of each question's best documents."""
    documents_by_question: dict[str, list[str]] = {}
    for row in evidence.to_pylist():
        if row["error"] is None:
            documents = row["documents"][:num_documents]
            documents_by_question[row["question_id"]] = [document["text"] for document in documents]
    return documents_by_question


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
        solution_id, steps = solution["solution_id"], solution["steps"]
        step_targets = targets(
            policy, labels.get(solution_id, []), len(steps), after_first_error, solution["correct"], accuracy
        )
        if all(target is None for target in step_targets):
            continue
        # The same text may have other targets: labels are of a solution, and judges are not always of one mind.
        key = (tuple(steps), tuple(step_targets))
        if key not in merged:
            merged[key] = {"solution_id": solution_id, "steps": steps, "targets": step_targets, "weight": 0}
        merged[key]["weight"] += 1
    return list(merged.values())


def labels_of_solutions(
    questions: pa.Table,
    solutions: pa.Table,
    labels: Mapping[str, Sequence[Labels]],
    max_solutions: int | None = None,
    split: str = "train",
) -> Iterator[tuple[Sequence[Labels], int, bool | None]]:
    """Labels, number of steps and correctness of each solution that `labelled_questions` looks at, for
    `checked_consensus_counts`."""
    usable = questions.filter(pc.and_(pc.equal(questions["split"], split), pc.is_null(questions["error"])))
    of_usable = pc.is_in(solutions["question_id"], usable["question_id"].combine_chunks())
    rows = solutions.filter(pc.and_(of_usable, pc.is_null(solutions["error"])))
    for question_solutions in rows["solutions"].to_pylist():
        for solution in question_solutions[:max_solutions]:
            yield labels.get(solution["solution_id"], []), len(solution["steps"]), solution["correct"]


class RightSteps:
    """The share of right steps among the labelled ones of `labelled_questions`, as the loss weighs solutions."""

    def __init__(self) -> None:
        self._positive = 0.0
        self._total = 0

    def add(self, rows: pa.Table) -> None:
        """Count the targets of some questions."""
        for solutions in rows["solutions"].to_pylist():
            for solution in solutions:
                for target in solution["targets"]:
                    if target is not None:
                        self._positive += target * solution["weight"]
                        self._total += solution["weight"]

    @property
    def share(self) -> float:
        """The share; 0 without any labelled step."""
        return self._positive / self._total if self._total else 0.0
