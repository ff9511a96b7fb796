"""The published nested JSON of this project: what an export writes, and its reader.

`path` is one file, or a folder with a file a split (``train.json``, ``test.json``, …). An entry is a question with its
solutions; `entry` makes one and `solved` reads it back, exactly for what the format carries: not the split (that is
the file's name), sampling seeds, ids of solutions, reasons and costs of a judge, Monte Carlo's counts.

Of several annotators of one source the format holds what they say together (`targets.merge_annotators`: adjudicator,
else majority). A source that did not label a solution, or failed to, is null; a step that it did not label is null in
its list. The published format knows no trees: an entry's `tree_solutions`, and a solution's `tree_search_labels` and
`tree_search_values`, are there only where there is something in them; so are a question's `published_type`, `topic` and
`group`. `data_source` is the question's data set, and both its `dataset` and its `source` when it is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from medmm_ray.config import ConfigError, Split, digest
from medmm_ray.data.records import Evidence, Labels, Question, RetrievedImage, Solution, StepLabel
from medmm_ray.data.source_files import Entry, Options, Texts, Truth, checked, files_at, stream_json
from medmm_ray.data.sources import (
    SolvedQuestion,
    SourceData,
    SourceImage,
    SourceLabels,
    SourceQuestion,
    SourceRequest,
    SourceSolution,
)
from medmm_ray.data.tables import RowError
from medmm_ray.stats.targets import merge_annotators
from medmm_ray.text import TAG, tag_steps

ANNOTATOR = "published"


def _numbered(processed: str) -> str:
    """The processed solution in one line; refused where its steps are not tagged, and numbered from 1, in turn."""
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
    published_type: str = ""
    topic: str = ""
    group: str = ""
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
            # The first question that names an image gives its split.
            images.setdefault(uri, SourceImage(uri=uri, split=split, modality=question.modality))
    return SourceData(images=list(images.values()), questions=questions)


def solved(request: SourceRequest) -> Iterator[SolvedQuestion]:
    """What each entry says of its question, besides the question."""
    for _, _, row in _entries(request):
        yield _solved(row)


def _entries(request: SourceRequest) -> Iterator[tuple[str, str, _Entry]]:
    for uri in files_at(request.path):
        folder, _, file = uri.rpartition("/")
        split = file.removesuffix(".json")
        if split not in get_args(Split):
            names = ", ".join(f"{name}.json" for name in get_args(Split))
            raise ConfigError(f"{uri}: a file's name is the split of its questions, one of {names}")
        limit = {"train": request.num_train, "test": request.num_test}.get(split)
        for number, row in enumerate(stream_json(uri)):
            if number == limit:
                break
            yield folder, split, checked(_Entry, row, f"{uri} entry {number}")


def _question(folder: str, split: str, row: _Entry) -> SourceQuestion:
    answer_type = "open"
    if row.options:
        answer_type = "choice"
    elif row.correct_answer in ("yes", "no"):
        answer_type = "yes_no"
    return SourceQuestion(
        name=row.question_id,
        question_id=row.question_id,
        source=row.data_source,
        dataset=row.data_source,
        published_type=row.published_type,
        topic=row.topic,
        group=row.group,
        split=split,
        modality=row.modality,
        difficulty=row.difficulty,
        question=row.question,
        options=row.options,
        answer=row.correct_answer,
        answer_type=answer_type,
        images=[_image_uri(folder, path) for path in row.image_path],
    )


def _image_uri(folder: str, path: str) -> str:
    is_absolute = "://" in path or path.startswith("/")
    return path if is_absolute else f"{folder}/{path}"


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
    images = list(image_uris)
    documents = evidence.documents if evidence else []
    references = evidence.images if evidence else []
    related_images = []
    for image in references:
        related_images.append(
            {
                "image_path": image.uri,
                "diagnosis": image.diagnosis,
                "similarity": image.similarity,
            }
        )
    row = {
        "question_id": question.question_id,
        "data_source": question.dataset or question.source,
        "modality": question.modality,
        "difficulty": question.difficulty,
        "question": question.question,
        # The published files have a text for one image, a list for several.
        "image_path": images if len(images) > 1 else next(iter(images), None),
        "image_embedding": None if embedding is None else list(embedding),
        "options": question.options,
        "correct_answer": question.answer,
        "related_docs": [document.text for document in documents],
        "related_images": related_images,
        "solutions": _solutions(solutions, labels),
    }
    # From here on no fields of the published format.
    for name in ("published_type", "topic"):
        if value := getattr(question, name):
            row[name] = value
    # A group in the data set's own words outlives an export, ids of images and questions do not.
    dataset, _, group = question.group.partition("/")
    if group and dataset == question.dataset:
        row["group"] = group
    if tree_solutions:
        row["tree_solutions"] = _solutions(tree_solutions, labels)
    return row


def _solutions(solutions: Sequence[Solution], labels: Mapping[str, Sequence[Labels]]) -> list[dict[str, Any]]:
    return [_solution(solution, labels.get(solution.solution_id, ())) for solution in solutions]


def _solution(solution: Solution, labels: Sequence[Labels]) -> dict[str, Any]:
    processed = tag_steps(solution.steps)
    if processed_steps(processed) != solution.steps or _has_tag(solution.steps):
        # Its labels would move to other steps.
        raise RowError("steps_unreadable", f"a step of {solution.solution_id} holds white space or marks of its own")
    judge = _merged(labels, "judge")
    monte_carlo = _merged(labels, "monte_carlo")
    expert = _merged(labels, "expert")
    tree = _merged(labels, "tree_search")
    entry = {
        "solution": solution.text,
        "prm_processed_solution": processed,
        "answer": solution.answer,
        "score": int(bool(solution.correct)),
        "gemini_labels": _field(judge, "label"),
        "gemini_confidence": _field(judge, "confidence"),
        "monte_carlo_labels": _field(monte_carlo, "label"),
        "expert_review": {
            "reviewed": expert is not None,
            "expert_label": _field(expert, "label"),
            "feedback": _field(expert, "reason"),
        },
    }
    if tree:  # no fields of the published format
        entry["tree_search_labels"] = _field(tree, "label")
        entry["tree_search_values"] = _field(tree, "value")
    return entry


def _field(steps: Sequence[StepLabel] | None, name: str) -> list[Any] | None:
    return None if steps is None else [getattr(step, name) for step in steps]


def _merged(labels: Sequence[Labels], source: str) -> Sequence[StepLabel] | None:
    """What the annotators of one source say of each step together; None where it did not label the solution."""
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
    # A mark counts only behind a tag: "Step 2:" in the words of a step is text.
    while mark:
        step, following, rest = rest.partition(f"{TAG} Step {len(steps) + 2}: ")
        steps.append(step if following else step.removesuffix(TAG))
        mark = following
    if not head or not steps:
        return steps
    marked = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    return [head + marked[0], *marked[1:]]


def _solved(row: _Entry) -> SolvedQuestion:
    images = []
    for reference in row.related_images or ():
        image = RetrievedImage(
            image_id=f"im{digest(reference.image_path)}",
            uri=reference.image_path,
            diagnosis=reference.diagnosis,
            similarity=reference.similarity,
        )
        images.append(image)
    return SolvedQuestion(
        solutions=[_read_solution(solution) for solution in row.solutions],
        tree_solutions=[_read_solution(solution) for solution in row.tree_solutions],
        documents=row.related_docs,
        images=images,
    )


def _read_solution(row: _SolutionEntry) -> SourceSolution:
    steps = processed_steps(row.prm_processed_solution)
    columns_by_source = {
        "judge": {"label": row.gemini_labels, "confidence": row.gemini_confidence},
        "monte_carlo": {"label": row.monte_carlo_labels},
        "expert": {"label": row.expert_review.expert_label, "reason": row.expert_review.feedback},
        "tree_search": {"label": row.tree_search_labels, "value": row.tree_search_values},
    }
    labels = []
    for source, columns in columns_by_source.items():
        if columns["label"] is not None:
            labels.append(
                _labels(
                    source,
                    columns,
                    len(steps),
                )
            )
    return SourceSolution(
        text=row.solution,
        steps=steps,
        answer=row.answer,
        correct=None if row.answer is None else row.score,  # the format's score is 0 without an answer too
        labels=labels,
    )


# Of each column of labels: what it holds, in words, and its type.
_COLUMN: Mapping[str, tuple[str, TypeAdapter[list[Any]]]] = {
    "label": ("1, 0 and null", TypeAdapter(list[Literal[1, 0] | None])),
    "confidence": ("high, medium, low and null", TypeAdapter(list[Literal["high", "medium", "low"] | None])),
    "value": ("numbers from 0 to 1 and null", TypeAdapter(list[Annotated[float, Field(ge=0, le=1)] | None])),
    "reason": ("texts and null", TypeAdapter(list[str | None])),
}


def _labels(source: str, columns: Mapping[str, Any], num_steps: int) -> SourceLabels:
    try:
        checked_columns = {name: _column(source, name, values, num_steps) for name, values in columns.items()}
    except RowError as error:
        # Labels at fault cost their own row: the solution and its other labels are read.
        return SourceLabels(source=source, annotator=ANNOTATOR, error=str(error))
    steps = []
    for index in range(num_steps):
        fields = {name: values[index] for name, values in checked_columns.items()}
        steps.append(StepLabel(**fields))
    return SourceLabels(source=source, annotator=ANNOTATOR, steps=steps)


def _column(source: str, name: str, values: Any, num_steps: int) -> list[Any]:
    if values is None:
        return [None] * num_steps
    expected, column = _COLUMN[name]
    try:
        entries = column.validate_python(values, strict=True)
    except ValidationError:
        raise RowError("label_value", f"each {name} of {source} must be one of {expected}: {values!r}") from None
    if len(entries) != num_steps:
        raise RowError("label_count", f"{source} has other than {num_steps} entries for {num_steps} steps: {values}")
    return entries
