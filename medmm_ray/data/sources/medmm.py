"""The published nested JSON of this project: what an export writes, and its reader.

`path` is one file, or a folder with a file a split (``train.json``, ``test.json``, …). An entry is a question with its
solutions; `entry` makes one and `solved_of` reads it back, exactly for what the format carries: not the split (that is
the file's name), sampling seeds, ids of solutions, reasons and costs of a judge, Monte Carlo's counts.

Of several annotators of one source the format holds what they say together (`targets.merge_annotators`: adjudicator,
else majority). A source that did not label a solution, or failed to, is null; a step that it did not label is null in
its list. The published format knows no trees: an entry's `tree_solutions`, and a solution's `tree_search_labels` and
`tree_search_values`, are there only where there is something in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from medmm_ray.config import ConfigError, Split, digest
from medmm_ray.data.records import Evidence, Labels, Question, RetrievedImage, Solution, StepLabel
from medmm_ray.data.sources import (
    Entry,
    Options,
    SolvedQuestion,
    SourceData,
    SourceImage,
    SourceLabels,
    SourceQuestion,
    SourceRequest,
    SourceSolution,
    Texts,
    Truth,
    checked,
    files_at,
    read_documents,
    stream_json,
)
from medmm_ray.data.tables import RowError
from medmm_ray.stats.targets import merge_annotators
from medmm_ray.text import TAG, tag_steps

ANNOTATOR = "published"


def _numbered(processed: str) -> str:
    processed = processed.replace("\n", " ").strip()
    steps = processed_steps(processed)
    if tag_steps(steps) != processed or _has_tag(steps):
        raise ValueError(f"'Step 1: ...{TAG} Step 2: ...{TAG}', each step once and in turn")
    return processed


def _has_tag(steps: Sequence[str]) -> bool:
    return any(TAG.strip() in step.split() for step in steps)


class _ExpertColumns(Entry):
    expert_label: Any
    feedback: Any


class _SolutionEntry(Entry):
    solution: str
    prm_processed_solution: Annotated[str, AfterValidator(_numbered)]
    answer: str | None
    score: Truth
    gemini_labels: Any  # labels at fault are an error of their row, not of the file
    gemini_confidence: Any
    monte_carlo_labels: Any
    expert_review: _ExpertColumns
    tree_search_labels: Any = None
    tree_search_values: Any = None


class _Reference(Entry):
    image_path: str
    diagnosis: str
    similarity: float


class _Entry(Entry):
    question_id: str
    data_source: str
    modality: str
    difficulty: str
    question: str
    image_path: Texts = Field(default_factory=list)
    options: Options
    correct_answer: str
    related_docs: Texts = Field(default_factory=list)
    related_images: list[_Reference] | None = None
    solutions: list[_SolutionEntry]
    tree_solutions: list[_SolutionEntry] = Field(default_factory=list)


def read(request: SourceRequest) -> SourceData:
    """All questions of the files, in their order, and the images that they name."""
    questions: list[SourceQuestion] = []
    images: dict[str, SourceImage] = {}
    for folder, split, row in _entries(request):
        question = _question(folder, split, row)
        questions.append(question)
        for uri in question.images:
            images.setdefault(uri, SourceImage(uri=uri, split=split, modality=question.modality))
    return SourceData(
        images=list(images.values()), questions=questions, documents=read_documents(request.documents_path)
    )


def solved(request: SourceRequest) -> Iterator[SolvedQuestion]:
    for _, _, row in _entries(request):
        yield _solved(row)


def _entries(request: SourceRequest) -> Iterator[tuple[str, str, _Entry]]:
    for uri in files_at(request.path):
        folder, _, file = uri.rpartition("/")
        split = file.removesuffix(".json")
        if split not in get_args(Split):
            known = ", ".join(f"{name}.json" for name in get_args(Split))
            raise ConfigError(f"{uri}: a file's name is the split of its questions, one of {known}")
        limit = {"train": request.num_train, "test": request.num_test}.get(split)
        for number, row in enumerate(stream_json(uri)):
            if number == limit:
                break
            yield folder, split, checked(_Entry, row, f"{uri} entry {number}")


def _question(folder: str, split: str, row: _Entry) -> SourceQuestion:
    answer = row.correct_answer
    return SourceQuestion(
        name=row.question_id,
        question_id=row.question_id,
        source=row.data_source,
        split=split,
        modality=row.modality,
        difficulty=row.difficulty,
        question=row.question,
        options=row.options,
        answer=answer,
        answer_type="choice" if row.options else "yes_no" if answer in ("yes", "no") else "open",
        images=[path if "://" in path or path.startswith("/") else f"{folder}/{path}" for path in row.image_path],
    )


# An entry


def entry(
    question: Question,
    solutions: Sequence[Solution],
    labels: Mapping[str, Sequence[Labels]],
    *,
    image_uris: Sequence[str] = (),
    evidence: Evidence | None = None,
    embedding: Sequence[float] | None = None,
    tree_solutions: Sequence[Solution] = (),
) -> dict[str, Any]:
    """One question in the published fields; `labels` are all rows of each solution, by its id.

    Raises RowError steps_unreadable for a solution whose tagged form would be read back as other steps.
    """
    return {
        "question_id": question.question_id,
        "data_source": question.source,
        "modality": question.modality,
        "difficulty": question.difficulty,
        "question": question.question,
        "image_path": list(image_uris) if len(image_uris) > 1 else next(iter(image_uris), None),
        "image_embedding": None if embedding is None else list(embedding),
        "options": question.options,
        "correct_answer": question.answer,
        "related_docs": [document.text for document in evidence.documents] if evidence else [],
        "related_images": [
            {"image_path": image.uri, "diagnosis": image.diagnosis, "similarity": image.similarity}
            for image in (evidence.images if evidence else [])
        ],
        **{
            name: [_solution(solution, labels.get(solution.solution_id, ())) for solution in own]
            for name, own in (("solutions", solutions), ("tree_solutions", tree_solutions))
            if own or name == "solutions"
        },
    }


def _solution(solution: Solution, labels: Sequence[Labels]) -> dict[str, Any]:
    processed = tag_steps(solution.steps)
    if processed_steps(processed) != solution.steps or _has_tag(solution.steps):
        raise RowError("steps_unreadable", f"a step of {solution.solution_id} holds white space or marks of its own")
    judge, monte_carlo, expert, tree = (
        _chosen(labels, source) for source in ("judge", "monte_carlo", "expert", "tree_search")
    )
    grown = {
        "tree_search_labels": [step.label for step in tree or ()],
        "tree_search_values": [step.value for step in tree or ()],
    }
    return {
        "solution": solution.text,
        "prm_processed_solution": processed,
        "answer": solution.answer,
        "score": int(bool(solution.correct)),
        "gemini_labels": judge and [step.label for step in judge],
        "gemini_confidence": judge and [step.confidence for step in judge],
        "monte_carlo_labels": monte_carlo and [step.label for step in monte_carlo],
        "expert_review": {
            "reviewed": expert is not None,
            "expert_label": expert and [step.label for step in expert],
            "feedback": expert and [step.reason for step in expert],
        },
        **(grown if tree else {}),
    }


def _chosen(labels: Sequence[Labels], source: str) -> Sequence[StepLabel] | None:
    rows = [row for row in labels if row.source == source and row.error is None and row.steps]
    return merge_annotators(rows, len(rows[0].steps)) if rows else None


def processed_steps(processed: str) -> list[str]:
    """The steps of `tag_steps`' text, which numbers them from 1; where text stands before, they keep their marks.

    >>> processed_steps("Step 1:  Look. ки Step 2: Think. ки")
    [' Look.', 'Think.']
    >>> processed_steps("So. Step 1: Look. ки Step 2: Think. ки")
    ['So. Step 1: Look.', 'Step 2: Think.']
    """
    steps: list[str] = []
    head, mark, rest = processed.partition("Step 1: ")
    while mark:
        step, following, rest = rest.partition(f"{TAG} Step {len(steps) + 2}: ")
        steps.append(step if following else step.removesuffix(TAG))
        mark = following
    return [f"{head if i == 1 else ''}Step {i}: {step}" for i, step in enumerate(steps, 1)] if head else steps


def solved_of(row: Mapping[str, Any]) -> SolvedQuestion:
    """What an entry says of a question, besides the question."""
    return _solved(checked(_Entry, row, "the entry"))


def _solved(row: _Entry) -> SolvedQuestion:
    return SolvedQuestion(
        solutions=[_read_solution(solution) for solution in row.solutions],
        tree_solutions=[_read_solution(solution) for solution in row.tree_solutions],
        documents=row.related_docs,
        images=[
            RetrievedImage(
                image_id=f"im{digest(image.image_path)}",
                uri=image.image_path,
                diagnosis=image.diagnosis,
                similarity=image.similarity,
            )
            for image in row.related_images or ()
        ],
    )


def _read_solution(row: _SolutionEntry) -> SourceSolution:
    steps = processed_steps(row.prm_processed_solution)
    columns = {
        "judge": {"label": row.gemini_labels, "confidence": row.gemini_confidence},
        "monte_carlo": {"label": row.monte_carlo_labels},
        "expert": {"label": row.expert_review.expert_label, "reason": row.expert_review.feedback},
        "tree_search": {"label": row.tree_search_labels, "value": row.tree_search_values},
    }
    return SourceSolution(
        text=row.solution,
        steps=steps,
        answer=row.answer,
        correct=None if row.answer is None else row.score,
        labels=[_labels(source, found, len(steps)) for source, found in columns.items() if found["label"] is not None],
    )


_COLUMN: Mapping[str, tuple[str, TypeAdapter[list[Any]]]] = {
    "label": ("1, 0 and null", TypeAdapter(list[Literal[1, 0] | None])),
    "confidence": ("high, medium, low and null", TypeAdapter(list[Literal["high", "medium", "low"] | None])),
    "value": ("numbers from 0 to 1 and null", TypeAdapter(list[Annotated[float, Field(ge=0, le=1)] | None])),
    "reason": ("texts and null", TypeAdapter(list[str | None])),
}


def _labels(source: str, columns: Mapping[str, Any], num_steps: int) -> SourceLabels:
    try:
        found = {name: _column(source, name, values, num_steps) for name, values in columns.items()}
    except RowError as error:
        return SourceLabels(source=source, annotator=ANNOTATOR, error=str(error))
    steps = [StepLabel(**dict(zip(found, values, strict=True))) for values in zip(*found.values(), strict=True)]
    return SourceLabels(source=source, annotator=ANNOTATOR, steps=steps)


def _column(source: str, name: str, values: Any, num_steps: int) -> list[Any]:
    if values is None:
        return [None] * num_steps
    holds, column = _COLUMN[name]
    try:
        found = column.validate_python(values, strict=True)
    except ValidationError:
        raise RowError("label_value", f"each {name} of {source} must be one of {holds}: {values!r}") from None
    if len(found) != num_steps:
        raise RowError("label_count", f"{source} has other than {num_steps} entries for {num_steps} steps: {values}")
    return found
