"""Med-PRM's own training and test files: questions with solutions and step labels of every kind (Yun et al. 2025).

`path` is a JSON list, or a folder of them; a file with "test" in its name holds test questions. An entry is a question
with ``solutions``, as the authors published it, or one flattened solution, as reviewers of the set pass it on.

A solution's steps are what its tags (" ки") end; labels must be as many, else their row is an error ``label_count``
that quotes them. prm_gemini_label is the judge's, prm_llama_label a second judge's (source ``judge_llama``, which no
label policy reads), prm_hard_label and prm_soft_label are Monte Carlo's label and value. Both judges saw the right
answer, and were asked about wrong solutions only: a right one has all steps right unseen, and its annotator is
`UNJUDGED`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from medmm_ray.records import StepLabel
from medmm_ray.sources import (
    Request,
    Solved,
    SourceData,
    SourceDocument,
    SourceLabels,
    SourceQuestion,
    SourceSolution,
    files_at,
    read_documents,
    require,
    stream_json,
)
from medmm_ray.tables import RowError
from medmm_ray.text import TAG, one_line, split_steps

JUDGES = {"prm_gemini_label": ("judge", "gemini"), "prm_llama_label": ("judge_llama", "llama")}
UNJUDGED = "unjudged"
HARD, SOFT = "prm_hard_label", "prm_soft_label"
TEXTS = ("prm_processed_solution", "full_solution")

_OPTION = re.compile(r"^\s*\(?[A-Z][.)]\s*(.*)$", re.MULTILINE)
_TAG = re.compile(rf"\s*{TAG.strip()}(?!\w)\s*")


def read(request: Request) -> SourceData:
    """All questions, and the documents that come with them."""
    questions, documents = [], {}
    for name, split, row in _entries(request):
        questions.append(_question(name, split, row))
        documents.update(dict.fromkeys(row.get("related_docs") or ()))
    own = [SourceDocument(corpus="med_prm", title="", text=text) for text in documents]
    return SourceData(questions=questions, documents=[*own, *read_documents(request.documents_path)])


def solved(request: Request) -> Iterator[Solved]:
    """Each question's solutions with their labels, and its documents in the order of the file."""
    for _, _, row in _entries(request):
        gold = str(row["correct_answer"]).strip()
        solutions = row.get("solutions", [row])
        yield Solved(solutions=[_solution(s, gold) for s in solutions], documents=row.get("related_docs") or ())


def _entries(request: Request) -> Iterator[tuple[str, str, dict[str, Any]]]:
    limits = {"train": request.num_train, "test": request.num_test}
    seen = {"train": 0, "test": 0}
    for uri in files_at(request.path):
        file = uri.rstrip("/").rpartition("/")[2]
        split = "test" if "test" in file else "train"
        for number, row in enumerate(stream_json(uri)):
            require(row, ("question_id", "question", "options", "correct_answer"), f"{uri} entry {number}")
            limit = limits[split]
            if limit is None or seen[split] < limit:
                seen[split] += 1
                yield f"{file}-{number}", split, row


def _question(name: str, split: str, row: Mapping[str, Any]) -> SourceQuestion:
    options = row["options"]
    if isinstance(options, str):
        options = _OPTION.findall(options)
    return SourceQuestion(
        name=name,
        split=split,
        modality="clinical",
        question=str(row["question"]).strip(),
        options=[str(option).strip() for option in options],
        answer=str(row["correct_answer"]),
        answer_type="choice" if options else "open",
    )


def _solution(row: Mapping[str, Any], gold: str) -> SourceSolution:
    processed = next((str(row[name]) for name in TEXTS if row.get(name)), "")
    text = str(row.get("solution") or _TAG.sub(" ", processed).strip())
    steps = tagged_steps(processed) if processed else split_steps(text)[1]
    answer = row.get("answer", row.get("model_answer")) or None
    right = next((bool(row[name]) for name in ("score", "orm_label", "is_correct") if row.get(name) is not None), None)
    if answer is None:
        right = None
    elif right is None:
        right = answer == gold
    labels = list(_labels(row, len(steps), right))
    return SourceSolution(text=text, steps=steps, answer=answer, correct=right, labels=labels)


def tagged_steps(text: str) -> list[str]:
    """The steps that tags end, without their marks.

    >>> tagged_steps("Step 1: Look. ки Step 2: Think. ки")
    ['Look.', 'Think.']
    """
    pieces = [split_steps(piece) for piece in _TAG.split(text) if piece.strip()]
    return [one_line(" ".join((preamble, *steps))) for preamble, steps in pieces]


def _labels(row: Mapping[str, Any], num_steps: int, right: bool | None) -> Iterator[SourceLabels]:
    for name, (source, annotator) in JUDGES.items():
        if row.get(name) is not None:
            made = _row(source, UNJUDGED if right and all(row[name]) else annotator, num_steps, {name: row[name]})
            yield replace(made, saw_answer=True)
    if row.get(HARD) is not None or row.get(SOFT) is not None:
        yield _row("monte_carlo", "med_prm", num_steps, {n: row[n] for n in (HARD, SOFT) if row.get(n) is not None})


def _row(source: str, annotator: str, num_steps: int, found: Mapping[str, Sequence[float]]) -> SourceLabels:
    try:
        for name, values in found.items():
            if len(values) != num_steps:
                raise RowError("label_count", f"{name} has {len(values)} labels for {num_steps} steps: {values}")
            if not all(0 <= value <= 1 and (name == SOFT or value in (0, 1)) for value in values):
                raise RowError("label_value", f"{name} must hold 0 and 1, or fractions between: {values}")
    except RowError as error:
        return SourceLabels(source=source, annotator=annotator, error=str(error))
    hard = next((values for name, values in found.items() if name != SOFT), [None] * num_steps)
    soft = found.get(SOFT, [None] * num_steps)
    steps = [StepLabel(label=None if h is None else int(h), value=s) for h, s in zip(hard, soft, strict=True)]
    return SourceLabels(source=source, annotator=annotator, steps=steps)
