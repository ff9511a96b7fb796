"""Solutions, labels and evidence that a data set brings, as the rows that the pipeline would have made itself.

Enters: a question's id and what its source says of it (`SolvedQuestion`). Leaves: its `Solutions`, `Labels` by table,
and `Evidence`. Ids are made as the pipeline makes them: a solution's from its question, the policy
``imported:<source>`` and its index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medmm_ray.config import digest
from medmm_ray.data.records import Evidence, Labels, RetrievedDocument, Solution, Solutions
from medmm_ray.data.sources import SolvedQuestion, SourceLabels, SourceSolution

TABLE_OF: Mapping[str, str] = {
    "judge": "judge_labels",
    "judge_llama": "judge_labels",
    "monte_carlo": "monte_carlo_labels",
    "tree_search": "monte_carlo_labels",
    "expert": "expert_labels",
}
"""The table that holds each source's labels of `solutions`; labels of `tree_solutions` are in tree_labels."""


@dataclass(frozen=True, kw_only=True)
class ImportedRows:
    """One question's rows; `labels` by the name of their table, `evidence` None where the data set has none."""

    solutions: Solutions
    tree_solutions: Solutions
    labels: Mapping[str, Sequence[Labels]] = field(default_factory=dict)
    evidence: Evidence | None = None


def imported_policy(source: str) -> str:
    """The `policy` of solutions that a data set brings."""
    return f"imported:{source}"


def imported_rows(
    question_id: str,
    solved: SolvedQuestion,
    policy: str,
    config_hash: str,
    tree_hash: str,
) -> ImportedRows:
    """The rows of one question; `tree_hash` is the config_hash of its tree_solutions."""
    solutions = _solutions(question_id, solved.solutions, policy, config_hash)
    tree_solutions = _solutions(question_id, solved.tree_solutions, policy, tree_hash)
    labels: dict[str, list[Labels]] = {}
    # Labels name their solution by the id that it has just got here.
    for solution, source in zip(solutions.solutions, solved.solutions, strict=True):
        for row in source.labels:
            labels.setdefault(TABLE_OF[row.source], []).append(_labels(question_id, solution, row))
    for solution, source in zip(tree_solutions.solutions, solved.tree_solutions, strict=True):
        tree_labels = labels.setdefault("tree_labels", [])
        for row in source.labels:
            tree_labels.append(_labels(question_id, solution, row))
    return ImportedRows(
        solutions=solutions,
        tree_solutions=tree_solutions,
        labels=labels,
        evidence=_evidence(question_id, solved, config_hash) if solved.documents or solved.images else None,
    )


def _solutions(question_id: str, sources: Sequence[SourceSolution], policy: str, config_hash: str) -> Solutions:
    solutions = []
    for index, source in enumerate(sources):
        solutions.append(
            _solution(
                question_id,
                source,
                policy,
                config_hash,
                index,
            )
        )
    return Solutions(
        question_id=question_id,
        policy=policy,
        config_hash=config_hash,
        num_requested=len(solutions),
        solutions=solutions,
    )


def _labels(question_id: str, solution: Solution, row: SourceLabels) -> Labels:
    return Labels(
        question_id=question_id,
        solution_id=solution.solution_id,
        source=row.source,
        annotator=row.annotator,
        steps=list(row.steps),
        cost=0.0,
        saw_answer=row.saw_answer,
        error=row.error,
    )


def _solution(question_id: str, source: SourceSolution, policy: str, config_hash: str, index: int) -> Solution:
    return Solution(
        solution_id=f"s{digest(question_id, policy, config_hash, index)}",
        index=index,
        text=source.text,
        steps=list(source.steps),
        answer=source.answer,
        correct=source.correct,
        finish_reason="stop",  # data sets hold whole solutions
        seed=0,
        text_sha=digest(source.text),
    )


def _evidence(question_id: str, solved: SolvedQuestion, config_hash: str) -> Evidence:
    """The documents in the data set's order; their scores are not known, so they fall by rank from 1."""
    # Data sets give their documents in order, and no scores.
    documents = []
    for rank, text in enumerate(solved.documents, 1):
        documents.append(
            RetrievedDocument(
                document_id=f"d{digest(text)}",
                text=text,
                score=1 / rank,
            )
        )
    return Evidence(question_id=question_id, config_hash=config_hash, documents=documents, images=list(solved.images))
