"""What a question is scored with: its text, documents, images, and the images of another question.

Enters: the tables solutions, questions, images and evidence. Leaves: one row a question, which `score` and `states`
take. The control arm ``shuffled_image`` swaps whole questions' images, which separates the effect of the
right image from that of any image.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from medmm_ray.config import digest
from medmm_ray.data.tables import attach
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from ray.data import Dataset

INPUT_SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "question_error": pa.string(),
        "image_uris": pa.list_(pa.string()),
        "reference_uris": pa.list_(pa.string()),
        "image_error": pa.string(),
        "shuffled_image_uris": pa.list_(pa.string()),
        "shuffled_reference_uris": pa.list_(pa.string()),
        "shuffled_image_error": pa.string(),
    }
)


def inputs(solutions: "Dataset", questions: pa.Table, images: pa.Table, evidence: pa.Table, seed: int = 0) -> "Dataset":
    """`Solutions` rows with all that scoring needs of their question; `score` and `states` take such rows.

    `questions`, `images` and `evidence` are whole tables; `seed` is `ScoreConfig.seed`.
    """
    of_questions = question_inputs(questions, images, evidence, seed)
    documents = evidence.select(["question_id", "documents", "error"])
    # Under a name of its own: the solutions have a column `error` too.
    documents = documents.rename_columns(["question_id", "documents", "evidence_error"])
    ds = attach(solutions, of_questions, "question_id", INPUT_SCHEMA.names[1:])
    return attach(ds, documents, "question_id", ["documents", "evidence_error"])


def question_inputs(questions: pa.Table, images: pa.Table, evidence: pa.Table, seed: int = 0) -> pa.Table:
    """One row a question (`INPUT_SCHEMA`): its text with options, its images and references, and another question's.

    The other question is of the same split and has other images; its references come along, or they would give the
    first question's diagnosis away.
    """
    files: dict[str, Mapping[str, Any]] = {}
    for image in images.select(["image_id", "uri", "error"]).to_pylist():
        files[image["image_id"]] = image
    references: dict[str, list[str]] = {}
    for row in evidence.select(["question_id", "images"]).to_pylist():
        similar_images = row["images"] or []
        references[row["question_id"]] = [image["uri"] for image in similar_images]
    columns = [
        "question_id",
        "split",
        "question",
        "options",
        "image_ids",
        "error",
    ]
    rows = questions.select(columns).to_pylist()
    images_of: dict[str, _ImageFiles] = {}
    for row in rows:
        question_id = row["question_id"]
        question_references = references.get(question_id, [])
        images_of[question_id] = _image_files(row["image_ids"], files, question_references)
    swaps = shuffled(rows, seed)
    # A lone question keeps its place in the arm, with an error.
    nothing = _ImageFiles([], [], "no_other_image: no other question of this split has another image to swap in")
    table: list[dict[str, Any]] = []
    for row in rows:
        files_of_row = images_of[row["question_id"]]
        if not row["image_ids"]:
            swapped = files_of_row  # a question without an image stays without
        elif row["question_id"] in swaps:
            swapped = images_of[swaps[row["question_id"]]]
        else:
            swapped = nothing
        table.append(
            {
                "question_id": row["question_id"],
                "question": question_with_options(row["question"], row["options"]),
                "question_error": row["error"],
                "image_uris": files_of_row.uris,
                "reference_uris": files_of_row.references,
                "image_error": files_of_row.error,
                "shuffled_image_uris": swapped.uris,
                "shuffled_reference_uris": swapped.references,
                "shuffled_image_error": swapped.error,
            }
        )
    return pa.Table.from_pylist(table, schema=INPUT_SCHEMA)


class _ImageFiles(NamedTuple):
    """The images of one question, and its references, as files; or why there are none."""

    uris: list[str]
    references: list[str]
    error: str | None


def _image_files(
    image_ids: Sequence[str], files: Mapping[str, Mapping[str, Any]], references: list[str]
) -> _ImageFiles:
    # All or none: a question read with some of its images would get another score than it is meant to.
    uris: list[str] = []
    for image_id in image_ids:
        if image_id not in files:
            return _ImageFiles([], [], f"image_missing: {image_id} is not in the table images")
        file = files[image_id]
        if file["error"]:
            return _ImageFiles([], [], f"upstream: {file['error']}")
        uris.append(file["uri"])
    return _ImageFiles(uris, references, None)


def shuffled(questions: Iterable[Mapping[str, Any]], seed: int) -> dict[str, str]:
    """For each question with images, another one of its split whose images are swapped in.

    Questions about the same images move together, so that none gets its own again.
    """
    by_split: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for row in questions:
        if row["image_ids"]:
            # The same images in another order are the same images.
            images = tuple(sorted(row["image_ids"]))
            by_images = by_split.setdefault(row["split"], {})
            by_images.setdefault(images, []).append(row["question_id"])
    swaps: dict[str, str] = {}
    for by_images in by_split.values():
        # A group by its smallest id: the same whatever the order of the rows.
        groups = {min(members): members for members in by_images.values()}
        if len(groups) > 1:
            for group, donor in derange(list(groups), seed).items():
                swaps |= dict.fromkeys(groups[group], donor)
    return swaps


def derange(ids: Sequence[str], seed: int) -> dict[str, str]:
    """A shuffle in which no id stays in place: each id to another one, the same for the same ids and seed in any order.

    One cycle through all ids in an order drawn from the seed. Raises `ValueError` for fewer than two ids.
    """
    # One cycle through all of them: no id can come to stand in its own place.
    cycle = sorted(set(ids), key=lambda i: digest(seed, i))
    if len(cycle) < 2:
        raise ValueError(f"cannot swap {len(cycle)} ids among themselves; at least 2 different ones are needed")
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
