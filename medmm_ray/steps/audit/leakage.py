"""What the splits share: pictures, questions, and pictures shown as reference cases. All of it must be nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.text import normalise

EXAMPLES = 3
COLUMNS = ["question_id", "split", "question", "options", "image_ids"]


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
    rows = usable.select(COLUMNS).to_pylist()
    split_of_text: dict[str, tuple[str, str]] = {}
    pictures: list[tuple[str, str]] = []
    for row in rows:
        split = row["split"]
        split_of_text[row["question_id"]] = (_content_hash(row), split)
        for image_id in row["image_ids"]:
            pictures.append((image_id, split))
    # The same bytes under two ids are one file; an image that could not be read has no hash, and is known by its id.
    files: list[tuple[str, str]] = []
    for image in images.select(["image_id", "sha256", "split"]).to_pylist():
        file = image["sha256"] or image["image_id"]
        files.append((file, image["split"]))
    checks = [
        _check("images_of_questions", _in_several_splits(pictures), len(dict(pictures))),
        _check("image_files", _in_several_splits(files), len(dict(files))),
        _check("questions", _repeated_questions(split_of_text), len(rows)),
    ]
    return checks + _reference_checks(rows, images, evidence)


def _content_hash(row: Mapping[str, Any]) -> str:
    """A hash of text, options and pictures that spelling and the order of the pictures do not change."""
    text = normalise(row["question"])
    options = list(map(normalise, row["options"]))
    return digest(text, options, sorted(row["image_ids"]))


def _in_several_splits(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The keys that occur with more than one split."""
    splits: dict[str, set[str]] = {}
    for key, split in pairs:
        splits.setdefault(key, set()).add(split)
    shared = []
    for key, of_key in splits.items():
        if len(of_key) > 1:
            shared.append(key)
    return sorted(shared)


def _repeated_questions(split_of_text: Mapping[str, tuple[str, str]]) -> list[str]:
    """Questions outside training whose text, options and pictures another split has too."""
    shared = set(_in_several_splits(split_of_text.values()))
    repeated = []
    for question_id, (text, split) in split_of_text.items():
        # Named is what has to leave: the copy in training is no fault of its own.
        if text in shared and split != "train":
            repeated.append(question_id)
    return sorted(repeated)


def _reference_checks(
    questions: Sequence[Mapping[str, Any]],
    images: pa.Table,
    evidence: Iterable[pa.Table],
) -> list[LeakageCheck]:
    """Reference cases must come from the training split, and never be the question's own picture."""
    known_ids = images["image_id"].to_pylist()
    split = dict(zip(known_ids, images["split"].to_pylist(), strict=True))
    pictures = {row["question_id"]: row["image_ids"] for row in questions}
    outside_training: set[str] = set()
    with_own_image: set[str] = set()
    num_references = 0
    for part in evidence:
        references = part["images"].combine_chunks()
        # Flat lists, one entry a reference.
        row_of_reference = pc.list_parent_indices(references)
        question_ids = part["question_id"].take(row_of_reference).to_pylist()
        flat = pc.list_flatten(references)
        image_ids = flat.field("image_id").to_pylist()
        num_references += len(image_ids)
        for question_id, image_id in zip(question_ids, image_ids, strict=True):
            if split.get(image_id, "train") != "train":
                outside_training.add(question_id)
            if image_id in pictures.get(question_id, ()):
                with_own_image.add(question_id)
    if not num_references:
        return []
    return [
        _check("references_outside_training", sorted(outside_training), num_references),
        _check("own_image_as_reference", sorted(with_own_image), num_references),
    ]


def _check(
    name: str,
    leaking_ids: Sequence[str],
    checked: int,
) -> LeakageCheck:
    return LeakageCheck(name, len(leaking_ids), checked, list(leaking_ids[:EXAMPLES]))
