"""Med-PRM's own training and test files: questions with solutions and step labels of every kind (Yun et al. 2025).

`path` is a JSON list, or a folder of them; a file with "test" in its name holds test questions. An entry is a question
with ``solutions``, as the authors published it, or one flattened solution, as reviewers of the set pass it on. Options
are a list, an object by their letters (MedQA's files), or lettered lines.

A solution's steps are what its tags (" ки") end, byte for byte: `text.tag_steps` gives the processed text back. Labels
must be as many, else their row is an error ``label_count`` that quotes them. prm_gemini_label is the judge's,
prm_llama_label a second judge's (source ``judge_llama``, which no label policy reads), prm_hard_label and
prm_soft_label are Monte Carlo's label and value. Both judges saw the right answer, and were asked about wrong solutions
only: a right one has all steps right unseen, and its annotator is `UNJUDGED`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from medmm_ray.data.records import StepLabel
from medmm_ray.data.source_files import Entry, Options, Texts, Truth, Words, checked, files_at, stream_json
from medmm_ray.data.sources import (
    SolvedQuestion,
    SourceData,
    SourceDocument,
    SourceLabels,
    SourceQuestion,
    SourceRequest,
    SourceSolution,
)
from medmm_ray.data.tables import RowError
from medmm_ray.text import have_marks, reference_steps, step_mark

JUDGES = {
    "prm_gemini_label": ("judge", "gemini"),
    "prm_llama_label": ("judge_llama", "llama"),
}
UNJUDGED = "unjudged"
DATASETS = {"med_qa": "medqa", "medmc_qa": "medmcqa", "pubmed_qa": "pubmedqa"}
"""The usual names of data sets that `data_source` names in other words."""
HARD, SOFT = "prm_hard_label", "prm_soft_label"

_OPTION = re.compile(r"^\s*\(?([A-Z])[.)]\s*(.*)$", re.MULTILINE)
_TAG = re.compile(r"\s*ки(?!\w)\s*")


def _lettered(value: Any) -> Any:
    return dict(_OPTION.findall(value)) if isinstance(value, str) else value


class _SolutionFields(Entry):
    solution: str | None = None
    prm_processed_solution: str | None = None
    full_solution: str | None = None
    answer: str | None = None
    model_answer: str | None = None
    score: Truth | None = None
    orm_label: Truth | None = None
    is_correct: Truth | None = None
    prm_gemini_label: Any = None  # labels at fault are an error of their row, not of the file
    prm_llama_label: Any = None
    prm_hard_label: Any = None
    prm_soft_label: Any = None


class _QuestionFields(_SolutionFields):
    question_id: Any
    data_source: Words = ""
    question: str
    options: Annotated[Options, BeforeValidator(_lettered)]
    correct_answer: str
    related_docs: Texts = Field(default_factory=list)
    solutions: list[_SolutionFields] = Field(default_factory=list)

    @property
    def solved(self) -> Sequence[_SolutionFields]:
        """The question's solutions: of a flattened entry itself."""
        return self.solutions if "solutions" in self.model_fields_set else [self]


def read(request: SourceRequest) -> SourceData:
    """All questions, and the documents that come with them."""
    questions = []
    texts: dict[str, None] = {}  # a dict keeps their order
    for name, split, row in _entries(request):
        questions.append(_question(name, split, row))
        texts.update(dict.fromkeys(row.related_docs))
    related = [SourceDocument(corpus="med_prm", title="", text=text) for text in texts]
    return SourceData(questions=questions, documents=related)


def solved(request: SourceRequest) -> Iterator[SolvedQuestion]:
    """Each question's solutions with their labels, and its documents in the order of the file."""
    for _, _, row in _entries(request):
        gold = row.correct_answer.strip()
        solutions = [_solution(solution, gold) for solution in row.solved]
        yield SolvedQuestion(solutions=solutions, documents=row.related_docs)


def _entries(request: SourceRequest) -> Iterator[tuple[str, str, _QuestionFields]]:
    limits = {"train": request.num_train, "test": request.num_test}
    num_read = {"train": 0, "test": 0}
    for uri in files_at(request.path):
        file = uri.rstrip("/").rpartition("/")[2]
        split = "test" if "test" in file else "train"
        for number, entry in enumerate(stream_json(uri)):
            # Also behind the limit: a fault of the file is found at the first reading.
            row = checked(
                _QuestionFields,
                entry,
                f"{uri} entry {number}",
            )
            limit = limits[split]
            if limit is None or num_read[split] < limit:
                num_read[split] += 1
                yield f"{file}-{number}", split, row


def _question(name: str, split: str, row: _QuestionFields) -> SourceQuestion:
    return SourceQuestion(
        name=name,
        dataset=DATASETS.get(row.data_source, row.data_source),
        split=split,
        modality="clinical",
        question=row.question.strip(),
        options=list(map(str.strip, row.options)),
        answer=row.correct_answer,
        answer_type="choice" if row.options else "open",
    )


def _solution(row: _SolutionFields, gold: str) -> SourceSolution:
    processed = row.prm_processed_solution or row.full_solution or ""
    text = row.solution or _TAG.sub(" ", processed).strip()
    steps = stored_steps(processed or text)
    answer = (row.answer if "answer" in row.model_fields_set else row.model_answer) or None
    right = _is_right(row, answer, gold)
    labels = list(
        _labels(
            row.model_dump(include={*JUDGES, HARD, SOFT}),
            len(steps),
            right,
        )
    )
    return SourceSolution(text=text, steps=steps, answer=answer, correct=right, labels=labels)


def _is_right(row: _SolutionFields, answer: str | None, gold: str) -> bool | None:
    """What the file says of the answer, else whether it is the right one; None without an answer."""
    if answer is None:
        return None
    # One field, under the names of the forms in which the set is passed on.
    for stored in (row.score, row.orm_label, row.is_correct):
        if stored is not None:
            return stored
    return answer == gold


def stored_steps(solution: str) -> list[str]:
    """The steps of a processed or raw solution, as they are scored again: without their marks where these count from 1,
    as `text.tag_steps` writes them anew; with them where they do not, or where text stands before the first.

    >>> stored_steps("Step 1:  Look. ки Step 2: Think. ки")
    [' Look.', 'Think.']
    >>> stored_steps("So. Step 1: Look. ки Step 2: Think. ки")
    ['So. Step 1: Look.', 'Step 2: Think.']
    """
    steps = list(map(str.strip, reference_steps(solution)))
    marks = [f"{step_mark(number)} " for number in range(1, len(steps) + 1)]
    plain = list(map(str.removeprefix, steps, marks))
    # A list whose steps all carry marks would not be numbered anew when it is scored.
    count_from_one = all(map(str.startswith, steps, marks))
    return plain if count_from_one and not have_marks(plain) else steps


def _labels(row: Mapping[str, Any], num_steps: int, right: bool | None) -> Iterator[SourceLabels]:
    stored = {name: values for name, values in row.items() if values is not None}
    for name, (source, annotator) in JUDGES.items():
        if name in stored:
            # The authors called the steps of right answers right without asking the judge.
            was_not_asked = right and stored[name] == [1] * num_steps
            labels = _row(
                source,
                UNJUDGED if was_not_asked else annotator,
                num_steps,
                {name: stored[name]},
            )
            yield replace(labels, saw_answer=True)
    of_monte_carlo = {}
    for name in (HARD, SOFT):
        if name in stored:
            of_monte_carlo[name] = stored[name]
    if of_monte_carlo:
        yield _row("monte_carlo", "med_prm", num_steps, of_monte_carlo)


def _row(source: str, annotator: str, num_steps: int, columns: Mapping[str, Any]) -> SourceLabels:
    """The labels in `columns`, by the fields' names: `SOFT` are values, any other one labels."""
    try:
        for name, values in columns.items():
            _check(name, values, num_steps)
    except RowError as error:
        return SourceLabels(source=source, annotator=annotator, error=str(error))
    no_numbers = [None] * num_steps
    values = columns.get(SOFT, no_numbers)
    labels = no_numbers
    for name, numbers in columns.items():
        if name != SOFT:
            labels = numbers
            break
    steps = []
    for label, value in zip(labels, values, strict=True):
        steps.append(StepLabel(label=None if label is None else int(label), value=value))
    return SourceLabels(source=source, annotator=annotator, steps=steps)


def _check(name: str, values: Any, num_steps: int) -> None:
    """Raise RowError where a field's values are no labels of so many steps."""
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise RowError("label_value", f"{name} must be a list of numbers from 0 to 1, not {values!r}")
    if len(values) != num_steps:
        raise RowError("label_count", f"{name} has {len(values)} labels for {num_steps} steps: {values}")
    if not all(0 <= value <= 1 and (name == SOFT or value in (0, 1)) for value in values):
        raise RowError("label_value", f"{name} must hold 0 and 1, or fractions between: {values}")
