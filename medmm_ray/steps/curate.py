"""Curate: raw questions and images become clean ones, each once, with splits that share no picture.

In order: rows with errors leave; images with the same bytes become one; near duplicates are *proposed* by perceptual
hash and *confirmed* by pixels, then become one too; a question that occurs twice stays once; pictures that training and
test share are dealt with (`leakage`); limits are applied. Everything that leaves is counted by its reason.

Why confirm: phantoms look alike. Of 499,500 pairs of 1,000 cases, 2,214 are within hash distance 4; the correlation of
their detail is at most 0.953. Copies after JPEG (quality 60), scaling to 60 % or a change of brightness: 0.993 or more.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
from numpy.typing import NDArray
from PIL import ImageFilter
from pydantic import model_validator

from medmm_ray.config import Config, digest, execution
from medmm_ray.data.records import Image, Question, from_dict
from medmm_ray.data.tables import RowError, TableError, error_kind
from medmm_ray.engines.images import open_image
from medmm_ray.stats.targets import ADJUDICATOR
from medmm_ray.text import normalise

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 1  # of what a step makes: raise it when the same config makes something else
THUMBNAIL = 32  # pixels a side
_BLUR = 2  # pixels: what is smoother than this is not detail
_BLOCK = 2048  # hashes compared at a time: 2048 x 2048 distances are 4 MB


class CurateConfig(Config):
    """How duplicates are found, and how questions are split."""

    near_duplicates: bool = True
    """Merge images that are the same picture in other bytes (recompressed, scaled); false: only equal bytes."""
    hash_distance: int = 4
    """Largest Hamming distance of two 64-bit perceptual hashes that proposes a pair as duplicates."""
    pixel_correlation: float = 0.98
    """Smallest correlation of the detail of two 32 x 32 thumbnails that confirms a proposed pair."""
    written: Literal["none", "checked", "reviewed"] = "none"
    """Questions that a model wrote: none, all that passed their checks, or those that readers keep (`reviews`)."""
    reviews: str = ""
    """What readers said of questions: an export, as python -m jobs.review_page what=questions --export names it."""
    leakage: Literal["drop_train", "resplit"] = "drop_train"
    """Pictures in both splits: drop their training questions, or split all questions anew by picture."""
    test_fraction: float = 0.2
    """Share of the pictures that `leakage: resplit` gives to the test split."""
    max_train: int | None = None
    """Training questions kept at most, chosen by a hash of their ids; none: all."""
    max_test: int | None = None
    """Test questions kept at most, chosen by a hash of their ids; none: all."""
    seed: int = 0
    """Seed of the new split (`leakage: resplit`) and of the choice under `max_train` and `max_test`."""
    batch_size: int = execution(64, ge=1)
    """Images a worker opens at a time."""
    num_cpus: float = execution(0.5)
    """Logical CPU cores an image worker asks for."""

    @model_validator(mode="after")
    def _reviewed_by_somebody(self) -> "CurateConfig":
        if self.written == "reviewed" and not self.reviews:
            raise ValueError(
                "written is 'reviewed' and reviews is empty: read them with python -m jobs.review_page recipe.yaml "
                "what=questions, then name what its --export prints"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Curated:
    """The final rows, and `figures`: what was kept, and what left by reason."""

    questions: list[Question]
    images: list[Image]
    figures: dict[str, float]


# Written questions, and what readers said


def reviewed(
    questions: pa.Table,
    written: pa.Table,
    reviews: pa.Table | None,
    config: CurateConfig,
) -> pa.Table:
    """Raw questions with the written ones that `config` takes; what readers reject gets an error.

    Of several readers the adjudicator counts, else the majority; where they are even, a written question is rejected
    and the source's own stays. The difficulty becomes the readers'.
    """
    verdicts = _verdicts(reviews)
    rows = questions.to_pylist()
    if config.written != "none":
        for row in written.to_pylist():
            verdict = verdicts.get(row["question_id"])
            is_unread = verdict is None or verdict.keep is None
            if is_unread and config.written == "reviewed":
                row["error"] = "question_review: no reader has kept it"
            rows.append(row)
    with_reviews = []
    for row in rows:
        verdict = verdicts.get(row["question_id"])
        with_reviews.append(_with_review(row, verdict))
    return pa.Table.from_pylist(with_reviews, questions.schema)


@dataclass(frozen=True)
class _Verdict:
    """What the readers of a question say together; None where they say nothing."""

    keep: bool | None
    difficulty: str | None


def _with_review(row: dict[str, Any], verdict: _Verdict | None) -> dict[str, Any]:
    # A row that failed before keeps its own error.
    if verdict is None or row["error"]:
        return row
    error = None
    if verdict.keep is False:
        error = "question_review: readers reject it"
    difficulty = verdict.difficulty or row["difficulty"]
    return row | {"error": error, "difficulty": difficulty}


def _verdicts(reviews: pa.Table | None) -> dict[str, _Verdict]:
    """The readers' verdict on each question that they read."""
    if reviews is None:
        return {}
    by_question: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reviews.to_pylist():
        by_question[row["question_id"]].append(row)
    verdicts = {}
    for question_id, rows in by_question.items():
        verdicts[question_id] = _verdict(rows)
    return verdicts


def _verdict(rows: Sequence[dict[str, Any]]) -> _Verdict:
    """The adjudicator's word, or the majority of all; of an even vote none."""
    # The adjudicator has the last word: beside his, other reviews do not count.
    counting = [row for row in rows if row["annotator"] == ADJUDICATOR] or rows
    balance = 0
    difficulties: Counter[str] = Counter()
    for row in counting:
        if row["difficulty"]:
            difficulties[row["difficulty"]] += 1
        if row["keep"] is None:
            continue
        # Whoever keeps a question but calls its answer wrong does not keep it as it is.
        keeps = row["keep"] and row["answer_right"] is not False
        balance += 1 if keeps else -1
    most_common = difficulties.most_common(1)
    return _Verdict(
        keep=balance > 0 if balance else None,
        difficulty=most_common[0][0] if most_common else None,
    )


# Near duplicates


def propose(images: pa.Table, config: CurateConfig) -> tuple[pa.Table, NDArray[np.int64]]:
    """Which images may be the same picture: the rows in question (`image_id`, `uri`) and pairs of their indices [P, 2].

    `images` are raw_images rows; those with an error, and repeats of the same bytes, take no part.
    """
    by_id: dict[str, dict[str, Any]] = {}
    for row in _by_uri(images):
        if not row["error"]:
            by_id[row["image_id"]] = row
    rows = list(by_id.values())
    pairs = np.empty((0, 2), np.int64)
    if config.near_duplicates:
        hashes = [row["perceptual_hash"] for row in rows]
        pairs = near_pairs(hashes, config.hash_distance)
    # Most images resemble no other: only those of a pair are opened.
    in_question, place_in_table = np.unique(pairs, return_inverse=True)
    proposed_rows = [rows[index] for index in in_question]
    schema = pa.schema([("image_id", pa.string()), ("uri", pa.string())])
    table = pa.Table.from_pylist(proposed_rows, schema=schema)
    places = place_in_table.reshape(pairs.shape)
    return table, places.astype(np.int64)


def near_pairs(hashes: Sequence[str], distance: int) -> NDArray[np.int64]:
    """All pairs i < j [P, 2] of 64-bit hashes (hexadecimal) that differ in at most `distance` bits.

    Compared in blocks with packed bits: 10,000 hashes take about a second, 100,000 about a minute.
    """
    packed = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    blocks = [np.empty((0, 2), np.int64)]
    for top in range(0, len(packed), _BLOCK):
        rows = packed[top : top + _BLOCK, None]
        # Blocks left of the diagonal hold the same pairs the other way round.
        for start in range(top, len(packed), _BLOCK):
            columns = packed[None, start : start + _BLOCK]
            distances = np.bitwise_count(rows ^ columns)
            i, j = np.nonzero(distances <= distance)
            pairs = np.stack([i + top, j + start], axis=1)
            # On the diagonal each pair comes twice, and each hash with itself.
            is_above = pairs[:, 0] < pairs[:, 1]
            blocks.append(pairs[is_above])
    return np.concatenate(blocks)


def thumbnails(ds: "Dataset", config: CurateConfig) -> "Dataset":
    """Rows with `image_id` and `uri` to rows with `image_id`, `detail` (float32 bytes) and `error`; one in, one out."""
    return ds.map_batches(
        thumbnail_batch,
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def thumbnail_batch(batch: pa.Table) -> pa.Table:
    """A batch of rows with `image_id` and `uri` as rows of `thumbnails`."""
    rows: list[dict[str, Any]] = []
    for row in batch.to_pylist():
        image_id = row["image_id"]
        try:
            picture = open_image(row["uri"])
            content = detail(picture).tobytes()
        except RowError as error:
            rows.append({"image_id": image_id, "error": str(error)})
        else:
            rows.append({"image_id": image_id, "detail": content})
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("detail", pa.binary()),
            ("error", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def detail(picture: PIL.Image.Image) -> NDArray[np.float32]:
    """The fine structure of a picture: a 32 x 32 greyscale less its blurred self, mean 0, length 1 (or all 0), flat.

    Anatomy that all pictures of a kind share is smooth; what tells two of them apart is not.
    """
    # Greyscale and small: recompression and scaling leave it as it is.
    grey = picture.convert("L")
    small = grey.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BILINEAR)
    blurred = small.filter(ImageFilter.BoxBlur(_BLUR))
    sharp_HW = np.asarray(small, dtype=np.float32)
    smooth_HW = np.asarray(blurred, dtype=np.float32)
    fine_HW = sharp_HW - smooth_HW
    fine = np.asarray(fine_HW - fine_HW.mean(), dtype=np.float32).ravel()
    length = float(np.linalg.norm(fine))
    # A picture of one colour has no detail: it stays 0, and resembles none.
    if length > 0:
        fine = fine / length
    return np.asarray(fine, dtype=np.float32)


def confirm(
    proposed: pa.Table,
    pairs: NDArray[np.int64],
    details: pa.Table,
    config: CurateConfig,
) -> list[tuple[str, str]]:
    """The proposed pairs of image ids whose thumbnails (rows of `thumbnails`, in any order) agree."""
    # Ray returns rows in any order.
    thumbnail_ids = details["image_id"].to_pylist()
    detail_of = dict(zip(thumbnail_ids, details["detail"].to_pylist(), strict=True))
    ids = proposed["image_id"].to_pylist()
    missing_ids = [image_id for image_id in ids if image_id not in detail_of]
    if missing_ids:
        raise TableError(
            f"{len(missing_ids)} of {len(ids)} thumbnails are missing, e.g. {missing_ids[0]}; run curate again"
        )
    # A picture that could not be opened agrees with none: its detail is all 0.
    blank = np.zeros(THUMBNAIL * THUMBNAIL, np.float32).tobytes()
    content = b"".join(detail_of[image_id] or blank for image_id in ids)
    details_ND = np.frombuffer(content, np.float32).reshape(len(ids), THUMBNAIL**2)
    confirmed: list[tuple[str, str]] = []
    # In chunks: the details of all pairs at once may be more than memory holds.
    num_chunks = max(1, len(pairs) // _BLOCK)
    for chunk in np.array_split(pairs, num_chunks):
        first_PD = details_ND[chunk[:, 0]]
        second_PD = details_ND[chunk[:, 1]]
        correlation = np.einsum("pd,pd->p", first_PD, second_PD)
        alike = chunk[correlation >= config.pixel_correlation]
        for i, j in alike.tolist():
            confirmed.append((ids[i], ids[j]))
    return confirmed


# Cleaning


def curate(
    questions: pa.Table,
    images: pa.Table,
    duplicates: Sequence[tuple[str, str]],
    config: CurateConfig,
) -> Curated:
    """Raw questions and images to final ones; `duplicates` are confirmed pairs of image ids."""
    figures: Counter[str] = Counter()
    unique_images, merged_id = _merge_images(images, duplicates, figures)
    usable = _usable(questions, figures)
    unique = _merge_questions(usable, merged_id, figures)
    groups = picture_groups(unique)
    if config.leakage == "resplit":
        without_leaks = _resplit(unique, groups, config)
    else:
        without_leaks = _drop_leaks(unique, groups, figures)
    final_questions = _limit(without_leaks, config, figures)
    final_images = _split_images(final_questions, unique_images, figures)
    split_sizes = Counter(question.split for question in final_questions)
    image_split_sizes = Counter(image.split for image in final_images)
    for split in ("train", "test"):
        figures[f"{split}_questions"] = split_sizes[split]
        figures[f"{split}_images"] = image_split_sizes[split]
    # An empty table would only fail in a later step, where nothing says why.
    if not final_questions:
        raise TableError(
            f"curate leaves none of {questions.num_rows} questions ({_reasons(figures)}); see raw_questions.error"
        )
    sorted_figures = {}
    for name in sorted(figures):
        sorted_figures[name] = float(figures[name])
    return Curated(
        questions=final_questions,
        images=final_images,
        figures=sorted_figures,
    )


def _reasons(figures: Mapping[str, int]) -> str:
    """Why rows left, in one line: what is 0 explains nothing."""
    reasons = []
    for name in sorted(figures):
        if figures[name]:
            reasons.append(f"{name} {figures[name]}")
    return ", ".join(reasons)


def _usable(questions: pa.Table, figures: Counter[str]) -> list[Question]:
    """The questions without an error; the others are counted."""
    usable = []
    for row in questions.to_pylist():
        if row["error"]:
            kind = error_kind(row["error"])
            figures[f"questions_error_{kind}"] += 1
        else:
            usable.append(from_dict(Question, row))
    return usable


def _by_uri(images: pa.Table) -> list[dict[str, Any]]:
    """The rows in an order that the table's own does not change."""
    return sorted(images.to_pylist(), key=lambda row: str(row["uri"]))


def _merge_images(
    images: pa.Table,
    duplicates: Sequence[tuple[str, str]],
    figures: Counter[str],
) -> tuple[dict[str, Image], dict[str, str]]:
    """Images by id, each picture once; and for every raw image id the id that stands for it.

    Of near duplicates the one with most pixels stays.
    """
    unique: dict[str, Image] = {}
    for row in _by_uri(images):
        image_id = row["image_id"]
        if row["error"]:
            kind = error_kind(row["error"])
            figures[f"images_error_{kind}"] += 1
        elif image_id in unique:
            figures["images_same_bytes"] += 1
        else:
            unique[image_id] = from_dict(Image, row)

    def by_size(image_id: str) -> tuple[int, str]:
        """The largest first; of equal ones the lower id, in any order of rows."""
        image = unique[image_id]
        return -image.width * image.height, image_id

    merged_id: dict[str, str] = {}
    # Copies of copies: A like B and B like C make one picture of all three.
    for group in components(unique, duplicates):
        largest = min(group, key=by_size)
        merged_id |= dict.fromkeys(group, largest)
    final_ids = sorted(set(merged_id.values()))
    figures["images_near_duplicate"] = len(unique) - len(final_ids)
    final_images = {image_id: unique[image_id] for image_id in final_ids}
    return final_images, merged_id


def _merge_questions(
    questions: Sequence[Question],
    merged_id: Mapping[str, str],
    figures: Counter[str],
) -> list[Question]:
    """Questions about merged images, each once: of repeats a test question, else the lowest id, stays."""
    unique: dict[str, Question] = {}
    # Test questions come first, so that of a repeat the one in training leaves.
    for question in sorted(questions, key=lambda q: (q.split != "test", q.question_id)):
        image_ids = [merged_id[image_id] for image_id in question.image_ids]
        question = replace(question, image_ids=image_ids)
        # Spelling alone does not make two questions of one.
        text = normalise(question.question)
        options = list(map(normalise, question.options))
        first = unique.setdefault(digest(text, options, image_ids), question)
        if first is question:
            continue
        if normalise(first.answer) == normalise(question.answer):
            figures["questions_repeated"] += 1
        else:
            figures["questions_repeated_other_answer"] += 1
    return sorted(unique.values(), key=lambda q: q.question_id)


# Splits


def picture_groups(questions: Sequence[Question]) -> dict[str, str]:
    """For each question the name of its group: questions that share a picture, directly or through others, share it.

    The name is the group's lowest image id; a question without a picture is a group of its own.
    """
    image_ids: set[str] = set()
    edges: list[tuple[str, str]] = []
    for question in questions:
        image_ids.update(question.image_ids)
        # Edges from its first image to each further one join the images of a question.
        for further_id in question.image_ids[1:]:
            edges.append((question.image_ids[0], further_id))
    group_of_image: dict[str, str] = {}
    for component in components(image_ids, edges):
        group_of_image |= dict.fromkeys(component, component[0])
    groups = {}
    for question in questions:
        group = question.question_id
        if question.image_ids:
            group = group_of_image[question.image_ids[0]]
        groups[question.question_id] = group
    return groups


def _resplit(
    questions: Sequence[Question],
    groups: Mapping[str, str],
    config: CurateConfig,
) -> list[Question]:
    """The questions with new splits; all of a group get the one that a hash of its name decides."""

    def split(group: str) -> str:
        # A hash instead of a draw: a group keeps its split when others come or leave.
        name_hash = digest("split", config.seed, group)
        share = int(name_hash, 16) / 16**16
        return "test" if share < config.test_fraction else "train"

    split_anew = []
    for question in questions:
        group = groups[question.question_id]
        split_anew.append(replace(question, split=split(group)))
    return split_anew


def _drop_leaks(
    questions: Sequence[Question],
    groups: Mapping[str, str],
    figures: Counter[str],
) -> list[Question]:
    """The questions less those of training whose group has a test question."""
    test_groups = {groups[q.question_id] for q in questions if q.split == "test"}
    clean = []
    for question in questions:
        group = groups[question.question_id]
        if question.split == "test" or group not in test_groups:
            clean.append(question)
    # The test split stays as its source made it: figures of it can be compared with others' of the same data set.
    figures["questions_leaked"] = len(questions) - len(clean)
    return clean


def _limit(
    questions: Sequence[Question],
    config: CurateConfig,
    figures: Counter[str],
) -> list[Question]:
    """At most `max_train` and `max_test` questions, chosen by a hash of their ids."""
    by_split: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_split[question.split].append(question)
    limits = {"train": config.max_train, "test": config.max_test}

    def by_hash(question: Question) -> str:
        """A place in the choice that stays when other questions come or leave."""
        return digest("limit", config.seed, question.question_id)

    within: list[Question] = []
    for split, members in by_split.items():
        limit = limits.get(split)
        chosen = sorted(members, key=by_hash)[:limit]
        figures[f"questions_over_limit_{split}"] = len(members) - len(chosen)
        within += chosen
    return sorted(within, key=lambda q: q.question_id)


def _split_images(
    questions: Sequence[Question],
    images: Mapping[str, Image],
    figures: Counter[str],
) -> list[Image]:
    """The images in the split of their questions; one without a question stays if its source calls it training's."""
    # Pictures without a question serve the image tower and as references: in training alone.
    split_of: dict[str, str] = {}
    for question in questions:
        split_of |= dict.fromkeys(question.image_ids, question.split)
    useful = []
    for image_id, image in images.items():
        split = split_of.get(image_id, image.split)
        in_split = replace(image, split=split)
        if image_id in split_of or split == "train":
            useful.append(in_split)
    figures["images_without_question"] = len(images) - len(useful)
    return useful


def components(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The connected components of an undirected graph, each sorted, in the order of their first members."""
    parent = {node: node for node in nodes}

    def root(node: str) -> str:
        while parent[node] != node:
            # Each look halves the path, so that the next one is short.
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in edges:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    # The root of a component is its lowest node, so that its members come in the order of the nodes.
    members: defaultdict[str, list[str]] = defaultdict(list)
    for node in sorted(parent):
        members[root(node)].append(node)
    return [members[first] for first in sorted(members)]
