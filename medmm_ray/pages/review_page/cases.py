"""What the page shows of each item: the question, its pictures, documents and steps; never a judge's word or score.

Enters: the run's tables. Leaves: `Shown`, one an item, in the order of the queue, and where its pictures lie. Of the
big tables only the rows of the queue's questions are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medmm_ray.config import digest
from medmm_ray.data.records import ReviewItem
from medmm_ray.data.tables import Table
from medmm_ray.pages.review_page.desk import Item

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
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
class Shown:
    """One item as a reader sees it.

    `steps` and `step_index` belong to a step; `answer` and `difficulty`, as they stand, to a question.
    """

    item: Item
    modality: str
    question: str
    options: list[str]
    pictures: list[Picture]
    documents: list[Passage]
    steps: list[str]
    step_index: int | None = None
    answer: str | None = None
    difficulty: str | None = None


@dataclass(frozen=True)
class Cases:
    """All that the page may show. `uris` has the place of every picture that a case names, and of no other."""

    shown: dict[str, Shown]
    uris: dict[str, str]
    after: dict[str, Shown]
    """By item the next one of the queue, if any."""


@dataclass(frozen=True)
class Background:
    """What surrounds questions: rows by id."""

    images: Mapping[str, Row]
    evidence: Mapping[str, Row]
    titles: Mapping[str, str]
    num_documents: int
    """As many as the judge read."""
    num_references: int
    """As many as the judge saw."""


def rows_of(table: Table, key: str, ids: Iterable[str], columns: Sequence[str] | None = None) -> dict[str, Row]:
    """The rows of a table with these ids, by id; the rest is not kept in memory."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    found: dict[str, Row] = {}
    for file in table.files():
        part = pq.read_table(file, filesystem=table.fs, columns=list(columns) if columns else None)
        for row in part.filter(pc.is_in(part[key], wanted)).to_pylist():
            found[row[key]] = row
    return found


def step_item_id(solution_id: str, step_index: int) -> str:
    return f"{solution_id}/{step_index}"


def seen_step(question: Row, steps: Sequence[str], step_index: int) -> str:
    """A hash of what a verdict on a step is about: the question, and the steps up to this one."""
    return digest(question["question"], question["options"], list(steps[: step_index + 1]))


def seen_question(question: Row) -> str:
    """A hash of what a verdict on a question is about."""
    return digest(question["question"], question["options"], question["answer"])


def step_cases(
    queue: Sequence[ReviewItem],
    questions: Mapping[str, Row],
    solutions: Mapping[str, Row],
    background: Background,
) -> Cases:
    """The queue's steps, in its order. `questions` and `solutions` are rows by question_id."""
    shown = []
    for entry in queue:
        question = questions[entry.question_id]
        steps = next(
            s["steps"] for s in solutions[entry.question_id]["solutions"] if s["solution_id"] == entry.solution_id
        )
        item = Item(
            step_item_id(entry.solution_id, entry.step_index),
            entry.question_id,
            seen_step(question, steps, entry.step_index),
        )
        shown.append(
            Shown(
                item,
                *_shared(question, background),
                steps=list(steps),
                step_index=entry.step_index,
            )
        )
    return _cases(shown, background)


def question_cases(questions: Sequence[Row], background: Background) -> Cases:
    """Questions themselves, with the answer and difficulty that they have; without what a judge would read."""
    bare = Background(background.images, {}, {}, 0, 0)
    shown = [
        Shown(
            Item(question["question_id"], question["question_id"], seen_question(question)),
            *_shared(question, bare),
            steps=[],
            answer=question["answer"],
            difficulty=question["difficulty"],
        )
        for question in questions
    ]
    return _cases(shown, background)


def _shared(question: Row, background: Background) -> tuple[str, str, list[str], list[Picture], list[Passage]]:
    """modality, question, options, pictures and documents."""
    evidence = background.evidence.get(question["question_id"], {"documents": [], "images": []})
    pictures = [Picture(image_id, "query", "") for image_id in question["image_ids"]]
    for reference in evidence["images"][: background.num_references]:
        pictures.append(Picture(reference["image_id"], "reference", reference["diagnosis"]))
    documents = [
        Passage(background.titles.get(document["document_id"], document["document_id"]), document["text"])
        for document in evidence["documents"][: background.num_documents]
    ]
    return question["modality"], question["question"], list(question["options"]), pictures, documents


def _cases(shown: Sequence[Shown], background: Background) -> Cases:
    named = {picture.image_id for case in shown for picture in case.pictures}
    return Cases(
        shown={case.item.item_id: case for case in shown},
        after={case.item.item_id: following for case, following in pairwise(shown)},
        uris={image_id: background.images[image_id]["uri"] for image_id in named if image_id in background.images},
    )
