"""What the page shows of each item: the question, its images, documents and steps; never a judge's word or score.

Enters: the run's tables. Leaves: `ItemView`, one an item, in the order of the queue, and where its images lie. Of the
big tables only the rows of the queue's questions are kept.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medmm_ray.config import digest
from medmm_ray.data.records import Evidence, Question, ReviewItem, Solutions, from_dict
from medmm_ray.data.tables import Table
from medmm_ray.pages.review_page.assigner import QueueItem


@dataclass(frozen=True)
class ItemImage:
    """One image. `role` is query, or reference: a similar case of the training split, with its diagnosis."""

    image_id: str
    role: str
    caption: str


@dataclass(frozen=True)
class Passage:
    """One document as the judge read it."""

    title: str
    text: str


@dataclass(frozen=True)
class ItemView:
    """One item as a reader sees it.

    `steps` and `step_index` belong to a step; `answer` and `difficulty`, as they stand, to a question. The page's
    script reads these fields by name.
    """

    item: QueueItem
    modality: str
    question: str
    options: list[str]
    pictures: list[ItemImage]
    documents: list[Passage]
    steps: list[str]
    step_index: int | None = None
    answer: str | None = None
    difficulty: str | None = None


@dataclass(frozen=True)
class ItemViews:
    """All that the page may show."""

    by_id: dict[str, ItemView]
    """By item_id, in the order of the queue."""
    image_uris: dict[str, str]
    """By image_id the place of every image that a view names, and of no other."""
    following: dict[str, ItemView]
    """By item_id the next one of the queue, if any."""


@dataclass(frozen=True)
class Context:
    """What surrounds the questions, and how much of it the judge was shown."""

    image_uris: Mapping[str, str]
    """By image_id."""
    evidence: Mapping[str, Evidence]
    """By question_id."""
    titles: Mapping[str, str]
    """Titles of documents, by document_id."""
    num_documents: int
    """As many as the judge read."""
    num_references: int
    """As many as the judge saw."""


def records_of(table: Table, key: str, ids: Iterable[str]) -> dict[str, Any]:
    """The records of a table with these ids, by id; the rest is not kept in memory."""
    return {row[key]: from_dict(table.record, row) for row in _rows(table, key, ids)}


def values_of(table: Table, key: str, ids: Iterable[str], column: str) -> dict[str, str]:
    """The texts of one column of the rows with these ids, by id."""
    return {row[key]: row[column] for row in _rows(table, key, ids, [key, column])}


def _rows(table: Table, key: str, ids: Iterable[str], columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    wanted_ids = pa.array(sorted(set(ids)), pa.string())
    for file in table.files():  # one file at a time: a table may be larger than the memory
        part = pq.read_table(file, filesystem=table.fs, columns=columns)
        # Filtered in Arrow: only these rows become Python objects.
        yield from part.filter(pc.is_in(part[key], wanted_ids)).to_pylist()


def step_item_id(solution_id: str, step_index: int) -> str:
    """The id under which a step is reviewed."""
    return f"{solution_id}/{step_index}"


def step_content_hash(question: str, options: Sequence[str], steps: Sequence[str], step_index: int) -> str:
    """A hash of what a verdict on a step is about: the question's text and options, and the steps up to this one."""
    # Not the steps behind it: a change there leaves the verdict standing.
    return digest(question, options, list(steps[: step_index + 1]))


def question_content_hash(question: Question) -> str:
    """A hash of what a verdict on a question is about."""
    return digest(question.question, question.options, question.answer)


def step_views(
    queue: Sequence[ReviewItem],
    questions: Mapping[str, Question],
    solutions: Mapping[str, Solutions],
    context: Context,
) -> ItemViews:
    """The queue's steps, in its order. `questions` and `solutions` are by question_id."""
    views = []
    for entry in queue:
        question = questions[entry.question_id]
        steps = _steps_of(solutions[entry.question_id], entry.solution_id)
        views.append(
            ItemView(
                item=QueueItem(
                    item_id=step_item_id(entry.solution_id, entry.step_index),
                    question_id=entry.question_id,
                    content_hash=step_content_hash(question.question, question.options, steps, entry.step_index),
                ),
                modality=question.modality,
                question=question.question,
                options=list(question.options),
                pictures=_images(question, context),
                documents=_documents(question, context),
                steps=steps,
                step_index=entry.step_index,
            )
        )
    return _with_images(views, context)


def question_views(questions: Sequence[Question], context: Context) -> ItemViews:
    """Questions themselves, with the answer and difficulty that they have; without what a judge would read."""
    views = []
    for question in questions:
        question_id = question.question_id
        views.append(
            ItemView(
                item=QueueItem(question_id, question_id, question_content_hash(question)),
                modality=question.modality,
                question=question.question,
                options=list(question.options),
                pictures=_own_images(question),
                documents=[],
                steps=[],
                answer=question.answer,
                difficulty=question.difficulty,
            )
        )
    return _with_images(views, context)


def _steps_of(solutions: Solutions, solution_id: str) -> list[str]:
    """The steps of one of a question's solutions."""
    return next(solution.steps for solution in solutions.solutions if solution.solution_id == solution_id)


def _own_images(question: Question) -> list[ItemImage]:
    return [ItemImage(image_id, "query", "") for image_id in question.image_ids]


def _images(question: Question, context: Context) -> list[ItemImage]:
    """The question's own images, then the references that the judge saw."""
    images = _own_images(question)
    evidence = context.evidence.get(question.question_id)
    if evidence:
        for reference in evidence.images[: context.num_references]:
            images.append(ItemImage(reference.image_id, "reference", reference.diagnosis))
    return images


def _documents(question: Question, context: Context) -> list[Passage]:
    """The documents that the judge read; one without a title is called by its id."""
    passages = []
    evidence = context.evidence.get(question.question_id)
    if evidence:
        for document in evidence.documents[: context.num_documents]:
            title = context.titles.get(document.document_id, document.document_id)
            passages.append(Passage(title, document.text))
    return passages


def _with_images(views: Sequence[ItemView], context: Context) -> ItemViews:
    """The views, and the places of the images that they name; an image that has no row is shown as missing."""
    uris = {}
    for view in views:
        for image in view.pictures:
            if image.image_id in context.image_uris:
                uris[image.image_id] = context.image_uris[image.image_id]
    return ItemViews(
        by_id={view.item.item_id: view for view in views},
        image_uris=uris,
        following={view.item.item_id: following for view, following in pairwise(views)},
    )
