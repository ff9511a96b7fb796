"""What the splits share: pictures, questions, and pictures shown as reference cases. All of it must be nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.text import normalise

EXAMPLES = 3
BATCH = 10_000  # questions that are Python objects at a time


@dataclass(frozen=True)
class LeakageCheck:
    """How much leaks of what was `checked`, with the ids of some `examples`."""

    name: str
    count: int
    checked: int
    examples: list[str]


def leakage(
    questions: pa.Table,
    images: pa.Table,
    evidence: Iterable[pa.Table] = (),
) -> list[LeakageCheck]:
    """The checks of pictures, files and questions, and of references where any were retrieved.

    Pictures are compared by id and by the hash of their bytes; near duplicates became one id when the data was curated.
    """
    usable = questions.filter(pc.is_null(questions["error"]))
    row, image_ids = _flat(usable["image_ids"])
    # The same bytes under two ids are one file; an image that could not be read has no hash, and is known by its id.
    has_hash = pc.greater(pc.binary_length(images["sha256"]), 0)
    files = pc.if_else(has_hash, images["sha256"], images["image_id"])
    texts = _content_hashes(usable)
    repeated = pc.is_in(texts, _in_several_splits(texts, usable["split"]))
    # Named is what has to leave: the copy in training is no fault of its own.
    has_to_leave = pc.and_(repeated, pc.not_equal(usable["split"], "train"))
    shared_images = _in_several_splits(image_ids, usable["split"].take(row))
    checks = [
        _check("images_of_questions", shared_images, _num_distinct(image_ids)),
        _check("image_files", _in_several_splits(files, images["split"]), _num_distinct(files)),
        _check("questions", usable["question_id"].filter(has_to_leave), usable.num_rows),
    ]
    own_images = _pairs(usable["question_id"].take(row), image_ids)
    return checks + _reference_checks(own_images, images, evidence)


def _flat(lists: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The entries of a list column, and the row that each belongs to."""
    whole = lists.combine_chunks()
    return pc.list_parent_indices(whole), pc.list_flatten(whole)


def _content_hashes(questions: pa.Table) -> pa.ChunkedArray:
    """A hash of text, options and pictures that spelling and the order of the pictures do not change."""
    hashes = []
    # In batches: a million questions as Python objects would be a gigabyte.
    for batch in questions.select(["question", "options", "image_ids"]).to_batches(max_chunksize=BATCH):
        of_batch = []
        for row in batch.to_pylist():
            text = normalise(row["question"])
            options = list(map(normalise, row["options"]))
            of_batch.append(digest(text, options, sorted(row["image_ids"])))
        hashes.append(pa.array(of_batch, pa.string()))
    return pa.chunked_array(hashes, pa.string())


def _num_distinct(keys: pa.Array) -> int:
    return int(pc.count_distinct(keys).as_py())


def _in_several_splits(keys: pa.Array, splits: pa.Array) -> pa.Array:
    """The keys that occur with more than one split."""
    by_key = pa.table({"key": keys, "split": splits}).group_by("key").aggregate([("split", "count_distinct")])
    is_shared = pc.greater(by_key["split_count_distinct"], 1)
    return by_key["key"].filter(is_shared).combine_chunks()


def _pairs(question_ids: pa.Array, image_ids: pa.Array) -> pa.Array:
    """A question and a picture as one text."""
    return pc.binary_join_element_wise(question_ids, image_ids, "\0")


def _reference_checks(
    own_images: pa.Array,
    images: pa.Table,
    evidence: Iterable[pa.Table],
) -> list[LeakageCheck]:
    """Reference cases must come from the training split, and never be the question's own picture.

    `own_images` are the `_pairs` of all questions.
    """
    references = [pa.table({"question_id": pa.array([], pa.string()), "image_id": pa.array([], pa.string())})]
    for part in evidence:
        row, entries = _flat(part["images"])
        of_part = {"question_id": part["question_id"].take(row), "image_id": entries.field("image_id")}
        references.append(pa.table(of_part))
    shown = pa.concat_tables(references).combine_chunks()
    if not shown.num_rows:
        return []
    question_ids, image_ids = shown["question_id"], shown["image_id"]
    place = pc.index_in(image_ids, images["image_id"].combine_chunks())
    # An image that is not in the table (curate dropped it) is of no split.
    split = pc.fill_null(images["split"].take(place), "train")
    outside_training = question_ids.filter(pc.not_equal(split, "train"))
    is_own = pc.is_in(_pairs(question_ids, image_ids), own_images)
    return [
        _check("references_outside_training", outside_training, shown.num_rows),
        _check("own_image_as_reference", question_ids.filter(is_own), shown.num_rows),
    ]


def _check(name: str, leaking_ids: pa.Array, num_checked: int) -> LeakageCheck:
    distinct = pc.unique(leaking_ids)
    examples = distinct.sort()[:EXAMPLES].to_pylist()
    return LeakageCheck(name, len(distinct), num_checked, examples)
