"""What the splits share: pictures, questions, and pictures shown as reference cases. All of it must be nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.config import digest
from medmm_ray.text import normalise

Row = dict[str, Any]
EXAMPLES = 3


def leakage(questions: pa.Table, images: pa.Table, evidence: Iterable[pa.Table] = ()) -> list[Row]:
    """One entry a check: {name, count, checked, examples}, `count` what leaks of the `checked`, `examples` ids.

    Pictures are compared by id and by the hash of their bytes; near duplicates became one id when the data was curated.
    """
    rows = questions.filter(pc.is_null(questions["error"])).select(
        ["question_id", "split", "question", "options", "image_ids"]
    )
    asked = rows.to_pylist()
    shown = [(image_id, row["split"]) for row in asked for image_id in row["image_ids"]]
    columns = (images[name].to_pylist() for name in ("image_id", "sha256", "split"))
    files = [(sha or image_id, split) for image_id, sha, split in zip(*columns, strict=True)]
    texts = {row["question_id"]: (_text(row), row["split"]) for row in asked}
    checks = [
        _check("images_of_questions", _shared(shown), len({i for i, _ in shown})),
        _check("image_files", _shared(files), len({i for i, _ in files})),
        _check("questions", _questions_shared(texts), len(asked)),
    ]
    return checks + _references(asked, images, evidence)


def _text(row: Mapping[str, Any]) -> str:
    return digest(normalise(row["question"]), [normalise(o) for o in row["options"]], sorted(row["image_ids"]))


def _shared(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The keys that occur with more than one split."""
    splits: dict[str, set[str]] = {}
    for key, split in pairs:
        splits.setdefault(key, set()).add(split)
    return sorted(key for key, found in splits.items() if len(found) > 1)


def _questions_shared(texts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Questions outside training whose text, options and pictures another split has too."""
    shared = set(_shared(texts.values()))
    return sorted(i for i, (text, split) in texts.items() if text in shared and split != "train")


def _references(asked: Sequence[Mapping[str, Any]], images: pa.Table, evidence: Iterable[pa.Table]) -> list[Row]:
    """Reference cases must come from the training split, and never be the question's own picture."""
    split = dict(zip(images["image_id"].to_pylist(), images["split"].to_pylist(), strict=True))
    own = {row["question_id"]: set(row["image_ids"]) for row in asked}
    outside: set[str] = set()
    mirrored: set[str] = set()
    checked = 0
    for part in evidence:
        nested = part["images"].combine_chunks()
        parents = pc.list_parent_indices(nested)
        ids = part["question_id"].take(parents).to_pylist()
        for question_id, image_id in zip(ids, pc.list_flatten(nested).field("image_id").to_pylist(), strict=True):
            checked += 1
            if split.get(image_id, "train") != "train":
                outside.add(question_id)
            if image_id in own.get(question_id, ()):
                mirrored.add(question_id)
    if not checked:
        return []
    return [
        _check("references_outside_training", sorted(outside), checked),
        _check("own_image_as_reference", sorted(mirrored), checked),
    ]


def _check(name: str, found: Sequence[str], checked: int) -> Row:
    return {"name": name, "count": len(found), "checked": checked, "examples": list(found[:EXAMPLES])}
