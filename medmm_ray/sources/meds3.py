"""MedS3's files: its evaluation sets, and the trajectories of its trees (Jiang et al. 2025).

`path` is a JSON list, or a folder of them. An evaluation entry is a conversation with the key in ``eval``; options are
the lettered lines at the end of its question, and a question without them is open (DrugDose). These are test questions.

A training entry has ``pos`` and ``neg``: trajectories [[step, value, rollout value], …], with two figures of the whole
behind or around them, or dicts of the same names. The value after back-propagation becomes a row of source
``tree_search``, the node's own rollouts one of source ``monte_carlo``; trajectories under ``pos`` end right.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmm_ray.records import StepLabel
from medmm_ray.sources import (
    Request,
    Solved,
    SourceData,
    SourceLabels,
    SourceQuestion,
    SourceSolution,
    files_at,
    read_documents,
    require,
    stream_json,
)
from medmm_ray.tables import RowError
from medmm_ray.text import LETTERS, extract_answer, join_steps, one_line

_OPTION = re.compile(r"^\s*\(?([A-Z])[.)]\s+(.*)$")
_MARK = re.compile(r"^\s*Step\s+\d+\s*:\s*")
_STATED = re.compile(r"^The answer is (.+?)\.?$", re.IGNORECASE | re.DOTALL)


def read(request: Request) -> SourceData:
    """All questions of the files, in their order."""
    questions = [_question(name, split, row) for name, split, row in _entries(request)]
    return SourceData(questions=questions, documents=read_documents(request.documents_path))


def solved(request: Request) -> Iterator[Solved]:
    """The trajectories of each question; an evaluation question has none."""
    for _, _, row in _entries(request):
        _, options = lettered(_asked(row))
        found = [(kind, trajectory) for kind in ("pos", "neg") for trajectory in row.get(kind) or ()]
        yield Solved(solutions=[_solution(nodes(t), options, kind == "pos") for kind, t in found])


def _entries(request: Request) -> Iterator[tuple[str, str, dict[str, Any]]]:
    limits = {"train": request.num_train, "test": request.num_test}
    seen = {"train": 0, "test": 0}
    for uri in files_at(request.path):
        file = uri.rstrip("/").rpartition("/")[2]
        for number, row in enumerate(stream_json(uri)):
            where = f"{uri} entry {number}"
            split = "test" if "conversations" in row else "train"
            require(row, ("conversations", "eval") if split == "test" else ("question", "answer", "pos", "neg"), where)
            limit = limits[split]
            if limit is None or seen[split] < limit:
                seen[split] += 1
                yield f"{file}-{number}", split, row


def _asked(row: Mapping[str, Any]) -> str:
    return str(row["conversations"][0]["value"] if "conversations" in row else row["question"])


def _question(name: str, split: str, row: Mapping[str, Any]) -> SourceQuestion:
    question, options = lettered(_asked(row))
    answer = str(row["eval"]["answer"] if split == "test" else row["answer"]).strip()
    stated = _STATED.match(answer)  # the trees' files say "The answer is B."
    return SourceQuestion(
        name=name,
        split=split,
        modality="clinical",
        question=question,
        options=options,
        answer=stated[1] if stated else answer,
        answer_type="choice" if options else "open",
    )


def lettered(text: str) -> tuple[str, list[str]]:
    """A question and its options: the lettered lines at the end of the text, from A on without a gap.

    A line between them that bears no letter, or one out of turn, belongs to the option above it.

    >>> lettered("Which?\\nA. one\\nB. two,\\nor more")
    ('Which?', ['one', 'two, or more'])
    """
    lines = text.rstrip().split("\n")
    marked = [_OPTION.match(line) for line in lines]
    for start in (i for i in reversed(range(len(lines))) if (mark := marked[i]) and mark[1] == "A"):
        options: list[str] = []
        for line, mark in zip(lines[start:], marked[start:], strict=True):
            if mark and mark[1] == LETTERS[len(options) : len(options) + 1]:
                options.append(mark[2])
            else:
                options[-1] += f" {line}"
        if len(options) > 1:
            return "\n".join(lines[:start]).strip(), [one_line(option) for option in options]
    return text.strip(), []


def nodes(trajectory: Sequence[Any]) -> list[tuple[str, float | None, float | None]]:
    """A trajectory's steps, each with its value and its rollout value, in any of the three published forms."""
    inner = trajectory[0] if trajectory and isinstance(trajectory[0], list) else trajectory
    if inner and isinstance(inner[0], (list, dict)):
        trajectory = inner
    found = [step for step in trajectory if isinstance(step, (list, dict))]
    return [
        (step["step"], step.get("value"), step.get("rollout_value"))
        if isinstance(step, dict)
        else (step[0], *step[1:3])
        for step in found
    ]


def _solution(
    found: Sequence[tuple[str, float | None, float | None]], options: Sequence[str], right: bool
) -> SourceSolution:
    steps = [one_line(_MARK.sub("", text)) for text, _, _ in found]
    text = join_steps(steps)
    return SourceSolution(
        text=text,
        steps=steps,
        answer=extract_answer(text, options),
        correct=right,
        labels=[_labels("tree_search", [v for _, v, _ in found]), _labels("monte_carlo", [r for *_, r in found])],
    )


def _labels(source: str, values: Sequence[float | None]) -> SourceLabels:
    try:
        if not all(value is None or 0 <= value <= 1 for value in values):
            raise RowError("label_value", f"values of {source} must lie between 0 and 1: {list(values)}")
    except RowError as error:
        return SourceLabels(source=source, annotator="meds3", error=str(error))
    return SourceLabels(source=source, annotator="meds3", steps=[StepLabel(value=value) for value in values])
