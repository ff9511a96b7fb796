"""What the splits share: pictures, questions, and pictures shown as reference cases. All of it must be nothing."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.data.sorted_rows import SortedRows, sort_rows, windows
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
    questions: Iterable[pa.Table],
    images: Iterable[pa.Table],
    evidence: Iterable[pa.Table],
    folder: str,
) -> list[LeakageCheck]:
    """The checks of pictures, files and questions, and of references where any were retrieved.

    The tables come in parts, are read more than once, and are compared in files in `folder`. Pictures are compared by
    id and by the hash of their bytes; near duplicates became one id when the data was curated.
    """
    used = sort_rows(map(_used_images, questions), "key", SPLITS, f"{folder}/used")
    files = sort_rows(map(_files, images), "key", SPLITS, f"{folder}/files")
    texts = sort_rows(map(_texts, questions), "key", SPLITS, f"{folder}/texts")
    checks = [_of_splits("images_of_questions", used), _of_splits("image_files", files), _questions(texts)]
    return checks + _reference_checks(questions, images, evidence, folder)


# What is compared, the id that is named where it leaks, and where it is.
SPLITS = pa.schema({"key": pa.string(), "id": pa.string(), "split": pa.string()})
REFERENCES = pa.schema({"question_id": pa.string(), "image_id": pa.string()})


def _splits(keys: pa.Array, ids: pa.Array, splits: pa.Array) -> pa.Table:
    return pa.table({"key": keys, "id": ids, "split": splits}).cast(SPLITS)


def _usable(questions: pa.Table) -> pa.Table:
    return questions.filter(pc.is_null(questions["error"]))


def _used_images(questions: pa.Table) -> pa.Table:
    usable = _usable(questions)
    row, image_ids = _flat(usable["image_ids"])
    return _splits(image_ids, image_ids, usable["split"].take(row))


def _files(images: pa.Table) -> pa.Table:
    # The same bytes under two ids are one file; an image that could not be read has no hash, and is known by its id.
    has_hash = pc.greater(pc.binary_length(images["sha256"]), 0)
    files = pc.if_else(has_hash, images["sha256"], images["image_id"])
    return _splits(files, files, images["split"])


def _texts(questions: pa.Table) -> pa.Table:
    usable = _usable(questions)
    return _splits(_content_hashes(usable), usable["question_id"], usable["split"])


def _of_splits(name: str, rows: SortedRows) -> LeakageCheck:
    """What is in several splits, of all that is different."""
    leaking: set[str] = set()
    num_distinct = 0
    for window in windows({"rows": rows}):
        keys = window["rows"]["key"]
        num_distinct += int(pc.count_distinct(keys).as_py())
        leaking.update(_in_several_splits(keys, window["rows"]["split"]).to_pylist())
    return _check(name, leaking, num_distinct)


def _questions(texts: SortedRows) -> LeakageCheck:
    """Questions that are in several splits; named is what has to leave: the copy in training is no fault of its own."""
    leaking: set[str] = set()
    num_checked = 0
    for window in windows({"texts": texts}):
        rows = window["texts"]
        num_checked += rows.num_rows
        repeated = pc.is_in(rows["key"], _in_several_splits(rows["key"], rows["split"]))
        has_to_leave = pc.and_(repeated, pc.not_equal(rows["split"], "train"))
        leaking.update(rows["id"].filter(has_to_leave).to_pylist())
    return _check("questions", leaking, num_checked)


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


def _in_several_splits(keys: pa.Array, splits: pa.Array) -> pa.Array:
    """The keys that occur with more than one split."""
    by_key = pa.table({"key": keys, "split": splits}).group_by("key").aggregate([("split", "count_distinct")])
    is_shared = pc.greater(by_key["split_count_distinct"], 1)
    return by_key["key"].filter(is_shared).combine_chunks()


def _shown_images(evidence: pa.Table) -> pa.Table:
    row, entries = _flat(evidence["images"])
    shown = {"question_id": evidence["question_id"].take(row), "image_id": entries.field("image_id")}
    return pa.table(shown).cast(REFERENCES)


def _own_images(questions: pa.Table) -> pa.Table:
    usable = _usable(questions)
    row, image_ids = _flat(usable["image_ids"])
    return pa.table({"question_id": usable["question_id"].take(row), "image_id": image_ids}).cast(REFERENCES)


def _reference_checks(
    questions: Iterable[pa.Table],
    images: Iterable[pa.Table],
    evidence: Iterable[pa.Table],
    folder: str,
) -> list[LeakageCheck]:
    """Reference cases must come from the training split, and never be the question's own picture."""
    shown = sort_rows(map(_shown_images, evidence), "image_id", REFERENCES, f"{folder}/shown")
    splits = sort_rows(
        images, "image_id", pa.schema({"image_id": pa.string(), "split": pa.string()}), f"{folder}/splits"
    )
    outside_training: set[str] = set()
    num_shown = 0
    for window in windows({"shown": shown, "images": splits}):
        references, of_images = window["shown"], window["images"]
        num_shown += references.num_rows
        place = pc.index_in(references["image_id"], of_images["image_id"].combine_chunks())
        # An image that is not in the table (curate dropped it) is of no split.
        split = pc.fill_null(of_images["split"].take(place), "train")
        outside_training.update(references["question_id"].filter(pc.not_equal(split, "train")).to_pylist())
    if not num_shown:
        return []
    # By question now: a picture is its own only beside the question that shows it.
    by_question = sort_rows(map(_shown_images, evidence), "question_id", REFERENCES, f"{folder}/shown_by_question")
    own = sort_rows(map(_own_images, questions), "question_id", REFERENCES, f"{folder}/own")
    own_images: set[str] = set()
    for window in windows({"shown": by_question, "own": own}):
        references = window["shown"]
        is_own = pc.is_in(_pairs(references), _pairs(window["own"]).combine_chunks())
        own_images.update(references["question_id"].filter(is_own).to_pylist())
    return [
        _check("references_outside_training", outside_training, num_shown),
        _check("own_image_as_reference", own_images, num_shown),
    ]


def _pairs(references: pa.Table) -> pa.ChunkedArray:
    """A question and a picture as one text."""
    return pc.binary_join_element_wise(references["question_id"], references["image_id"], "\0")


def _check(name: str, leaking_ids: set[str], num_checked: int) -> LeakageCheck:
    return LeakageCheck(name, len(leaking_ids), num_checked, heapq.nsmallest(EXAMPLES, leaking_ids))
