"""MedS3's files: its evaluation sets, and the trajectories of its trees (Jiang et al. 2025).

`path` is a JSON list, or a folder of them. An evaluation entry is a conversation with the key in ``eval``; options are
the lettered lines at the end of its question, and a question without them is open (DrugDose). These are test questions.

A training entry has ``pos`` and ``neg``: trajectories [[step, value, rollout value], …], with two figures of the whole
behind or around them, or dicts of the same names. The value after back-propagation becomes a row of source
``tree_search``, the node's own rollouts one of source ``monte_carlo``; trajectories under ``pos`` end right.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from medmm_ray.data.records import StepLabel
from medmm_ray.data.source_files import Entry, Words, checked, files_at, stream_json
from medmm_ray.data.sources import (
    SolvedQuestion,
    SourceData,
    SourceLabels,
    SourceQuestion,
    SourceRequest,
    SourceSolution,
)
from medmm_ray.data.tables import RowError
from medmm_ray.text import extract_answer, join_steps, lettered_options

_MARK = re.compile(r"^\s*Step\s+\d+\s*: ?")
_STATED = re.compile(r"^The answer is (.+?)\.?$", re.IGNORECASE | re.DOTALL)


class _Node(Entry):
    step: str
    value: Any = None  # values at fault are an error of their row, not of the file
    rollout_value: Any = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, node: Any) -> Any:
        # What a longer list holds besides is passed over.
        if isinstance(node, list) and len(node) >= len(cls.model_fields):
            return dict(zip(cls.model_fields, node, strict=False))
        if not isinstance(node, dict):
            raise ValueError("a node [step, value, rollout value], or an object of these names")
        return node


def _nodes(trajectory: Any) -> Any:
    """The nodes of a trajectory in any of the three published forms, without the figures of the whole."""
    if not isinstance(trajectory, list):
        return trajectory
    # [[node, …], figure, figure] or [node, …, figure, figure].
    inner = trajectory[0] if trajectory and isinstance(trajectory[0], list) else trajectory
    if inner and isinstance(inner[0], (list, dict)):
        trajectory = inner
    nodes = []
    for node in trajectory:
        if node is not None and not isinstance(node, (int, float)):
            nodes.append(node)
    if not nodes:
        raise ValueError("a list of nodes [step, value, rollout value]")
    return nodes


Trajectories = list[Annotated[list[_Node], BeforeValidator(_nodes)]]


class _Tree(Entry):
    question: str
    answer: str
    pos: Trajectories | None
    neg: Trajectories | None


class _Turn(Entry):
    value: str


class _Key(Entry):
    answer: str
    type: Words = ""


class _Evaluation(Entry):
    conversations: Annotated[list[_Turn], Field(min_length=1)]
    eval: _Key


def read(request: SourceRequest) -> SourceData:
    """All questions of the files, in their order."""
    questions = [_question(name, split, row) for name, split, row in _entries(request)]
    return SourceData(questions=questions)


def solved(request: SourceRequest) -> Iterator[SolvedQuestion]:
    """The trajectories of each question; an evaluation question has none."""
    for _, _, row in _entries(request):
        if isinstance(row, _Evaluation):
            yield SolvedQuestion()
            continue
        _, options = lettered_options(row.question)
        right = [_solution(nodes, options, right=True) for nodes in row.pos or ()]
        wrong = [_solution(nodes, options, right=False) for nodes in row.neg or ()]
        yield SolvedQuestion(solutions=[*right, *wrong])


def _entries(request: SourceRequest) -> Iterator[tuple[str, str, _Tree | _Evaluation]]:
    limits = {"train": request.num_train, "test": request.num_test}
    num_read = {"train": 0, "test": 0}
    for uri in files_at(request.path):
        file = uri.rstrip("/").rpartition("/")[2]
        for number, entry in enumerate(stream_json(uri)):
            where = f"{uri} entry {number}"
            split = "test" if isinstance(entry, dict) and "conversations" in entry else "train"
            row = checked(_Evaluation, entry, where) if split == "test" else checked(_Tree, entry, where)
            # Behind the limit too entries are checked: a fault of the file is found at the first reading.
            limit = limits[split]
            if limit is None or num_read[split] < limit:
                num_read[split] += 1
                yield f"{file}-{number}", split, row


def _question(name: str, split: str, row: _Tree | _Evaluation) -> SourceQuestion:
    if isinstance(row, _Evaluation):
        text, answer = row.conversations[0].value, row.eval.answer
    else:
        text, answer = row.question, row.answer
    question, options = lettered_options(text)
    answer = answer.strip()
    stated = _STATED.match(answer)  # the trees' files say "The answer is B."
    return SourceQuestion(
        name=name,
        dataset=_dataset(name) if isinstance(row, _Evaluation) else "",
        topic=row.eval.type if isinstance(row, _Evaluation) else "",
        split=split,
        modality="clinical",
        question=question,
        options=options,
        answer=stated[1] if stated else answer,
        answer_type="choice" if options else "open",
    )


def _dataset(name: str) -> str:
    """The data set of an evaluation question: each has a file, and `name` is ``<file>-<number>``.

    >>> _dataset("MedMCQA.json-7")
    'medmcqa'
    """
    file = name.rpartition("-")[0]
    return file.removesuffix(".json").lower()


def _solution(nodes: Sequence[_Node], options: Sequence[str], right: bool) -> SourceSolution:
    steps = [_MARK.sub("", node.step) for node in nodes]
    text = join_steps(steps)
    return SourceSolution(
        text=text,
        steps=steps,
        answer=extract_answer(text, options),
        correct=right,
        labels=[
            _labels("tree_search", [node.value for node in nodes]),
            _labels("monte_carlo", [node.rollout_value for node in nodes]),
        ],
    )


def _labels(source: str, values: Sequence[Any]) -> SourceLabels:
    if not all(map(_is_value, values)):
        error = RowError("label_value", f"values of {source} must lie between 0 and 1: {list(values)}")
        return SourceLabels(source=source, annotator="meds3", error=str(error))
    return SourceLabels(
        source=source,
        annotator="meds3",
        steps=[StepLabel(value=value) for value in values],
    )


def _is_value(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)
