"""A finished run as a dataset for others: the published nested JSON, or a folder for the Hugging Face hub.

Enters: the tables questions and solutions, and what there is of images, evidence, labels and vectors. Leaves: files in
an empty folder. Questions go a chunk at a time, by id, so that memory holds one chunk however large the run. JSON has
the published fields and one label row a source (`sources.medmm`); the Parquet shards have every label row as it is.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import Field

from medmm_ray.config import Config, ConfigError
from medmm_ray.data.hub import upload
from medmm_ray.data.records import (
    Evidence,
    Image,
    Labels,
    Question,
    RetrievedImage,
    Scores,
    Solution,
    arrow_schema,
    from_dict,
)
from medmm_ray.data.sources.medmm import entry
from medmm_ray.data.tables import Artifact, RowError, Table, filesystem, write_file
from medmm_ray.engines.images import read_bytes
from medmm_ray.stats.metrics import probability
from medmm_ray.steps.export.card import CardText, card

Arm = Literal["multimodal", "text_only", "shuffled_image", "no_documents"]
DEFAULT_ARMS: tuple[Arm, ...] = ("multimodal", "text_only")
STEP_SCORES = ("PRM_min_score", "PRM_score", "PRM_score_list")
"""What Med-PRM's files call the smallest, the last and all of a solution's step probabilities."""
IMAGE_FIELDS = ("image_id", "uri", "sha256", "modality", "diagnosis")
"""What a shard says of an image, in the order of the record."""
log = logging.getLogger(__name__)


class ExportConfig(Config):
    """What is written, and where."""

    to: str = ""
    """Folder or URI to write to; it must be empty. Required."""
    format: Literal["json", "hf", "lm_eval"] = "json"
    """json: the published nested JSON, a file per split; hf: Parquet shards per split, a card, as `datasets` reads;
    lm_eval: an evaluated run as lm-evaluation-harness' results_*.json and samples_*.jsonl, and the hub's
    .eval_results/*.yaml."""
    images: Literal["uri", "copy"] = "uri"
    """uri: images are named where they lie; copy: their files go along, into images/."""
    embeddings: bool = False
    """JSON: write the vector of each question's first image into image_embedding (else null)."""
    score_arm: Arm | None = None
    """The arm whose step probabilities are written, as PRM_min_score, PRM_score (the last step's) and PRM_score_list;
    null: multimodal, and text_only where a solution has no score of that."""
    questions_per_shard: int = Field(256, ge=1)
    """Questions that are held in memory at a time, and rows of a Parquet shard."""
    license: str = "other"
    """Licence of the dataset, as the hub spells it; yours to choose, the sources' own terms hold too."""
    hub_ids: dict[str, str] = Field({})
    """lm_eval: ids of the run's data sets among the hub's, where they are others than python -m jobs.datasets has; each
    data set with one gets a file in .eval_results."""
    push: str = ""
    """hf: hub id (org/name) of the dataset repository to push the folder to; empty: none."""
    private: bool = True
    """Whether a repository that is made is private."""


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The run's tables; those that the run does not have are None."""

    questions: Table
    solutions: Table
    tree_solutions: Table | None = None
    images: Table | None = None
    evidence: Table | None = None
    image_vectors: Table | None = None
    scores: Table | None = None
    labels: Mapping[str, Table] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """What of a run stays behind: whole questions, texts of corpora, and pictures that other questions were shown."""

    question_ids: frozenset[str] = frozenset()
    corpora: frozenset[str] = frozenset()
    image_ids: frozenset[str] = frozenset()

    def without(self, bundle: "Bundle") -> "Bundle":
        """The bundle without the excluded part of its evidence."""
        if bundle.evidence is None:
            return bundle
        documents = [document for document in bundle.evidence.documents if document.corpus not in self.corpora]
        images = [image for image in bundle.evidence.images if image.image_id not in self.image_ids]
        return replace(bundle, evidence=replace(bundle.evidence, documents=documents, images=images))


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """All that the run has of one question."""

    question: Question
    solutions: Sequence[Solution]
    tree_solutions: Sequence[Solution]
    labels: Mapping[str, Sequence[Labels]]
    images: Sequence[Image]
    evidence: Evidence | None
    scores: Mapping[str, Sequence[Scores]] = field(default_factory=dict)
    embedding: Sequence[float] | None = None


def export(
    tables: Tables,
    config: ExportConfig,
    made_by: Mapping[str, Any],
    exclusion: Exclusion | None = None,
    card_text: CardText | None = None,
) -> dict[str, int]:
    """Write the dataset; gives counts. `made_by` (table -> its manifest's fingerprint and config) goes into the card.

    `card_text` is what the card says beside that, by default that a licence is still to be chosen.

    Raises ConfigError for a folder that is not empty or a name missing, TableError for one that cannot be written.
    """
    folder = empty_folder(config.to)
    counts: Counter[str] = Counter()
    exclusion = exclusion or Exclusion()
    split_ids = _split_ids(tables, exclusion)
    for split, ids in split_ids.items():
        bundles_ = _bundles_of_split(
            tables,
            ids,
            folder,
            config,
            counts,
            exclusion,
        )
        if config.format == "json":
            _write_json(
                folder,
                split,
                bundles_,
                config.score_arm,
                counts,
            )
        else:
            _write_shards(
                folder,
                split,
                bundles_,
                len(ids),
                config,
                counts,
            )
    if config.format == "hf":
        sizes = {split: counts[f"questions {split}"] for split in split_ids}
        text = card(
            shard_schema(),
            card_text or CardText(licences=(config.license,)),
            sizes,
            counts,
            made_by,
        )
        _put(folder, "README.md", text.encode())
    return dict(counts)


def _bundles_of_split(
    tables: Tables,
    ids: Sequence[str],
    folder: str,
    config: ExportConfig,
    counts: Counter[str],
    exclusion: Exclusion,
) -> Iterator[Bundle]:
    """The split's bundles, a chunk of questions in memory at a time."""
    size = config.questions_per_shard
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        for bundle in bundles(tables, chunk, config):
            yield _copied(
                exclusion.without(bundle),
                folder,
                config,
                counts,
            )


def empty_folder(to: str) -> str:
    """The folder to write to, made where it is not there; raises ConfigError where there is something in it."""
    if not to:
        raise ConfigError("'to' is required: the folder to write to, e.g. to=exports/mine")
    fs, path = filesystem(to)
    content = pafs.FileSelector(path, allow_not_found=True)
    # An empty folder that is there will do.
    if fs.get_file_info(path).is_file or fs.get_file_info(content):
        raise ConfigError(f"{to} is not empty; an export never mixes with other files. Name a new folder (to=...)")
    Artifact(to).prepare()
    return to.rstrip("/")


def _split_ids(tables: Tables, exclusion: Exclusion) -> dict[str, list[str]]:
    """The ids of each split's questions, sorted; excluded ones and those with an error stay behind."""
    rows = tables.questions.to_arrow(["question_id", "split", "error"])
    usable = rows.filter(pc.is_null(rows["error"]))
    usable = usable.sort_by([("split", "ascending"), ("question_id", "ascending")])
    question_ids = usable["question_id"].to_pylist()
    splits = usable["split"].to_pylist()
    ids: dict[str, list[str]] = {}
    for question_id, split in zip(question_ids, splits, strict=True):
        if question_id in exclusion.question_ids:
            continue
        ids.setdefault(split, []).append(question_id)
    return ids


# Reading a chunk


def bundles(tables: Tables, ids: Sequence[str], config: ExportConfig) -> Iterator[Bundle]:
    """What the run has of each of these questions, in their order."""
    questions: dict[str, Question] = {}
    for row in _rows(tables.questions, "question_id", ids):
        questions[row["question_id"]] = from_dict(Question, row)
    evidence: dict[str, Evidence] = {}
    for row in _rows(tables.evidence, "question_id", ids):
        evidence[row["question_id"]] = from_dict(Evidence, row)
    solutions = _solutions(tables.solutions, ids)
    tree_solutions = _solutions(tables.tree_solutions, ids)
    labels = _labels(tables, ids)
    scores = _scores(tables.scores, ids)
    # Questions share pictures: each is read once a chunk.
    distinct_ids: set[str] = set()
    for question in questions.values():
        distinct_ids.update(question.image_ids)
    image_ids = sorted(distinct_ids)
    images: dict[str, Image] = {}
    for row in _rows(tables.images, "image_id", image_ids):
        images[row["image_id"]] = from_dict(Image, row)
    embeddings: dict[str, Sequence[float]] = {}
    # Vectors are large: without a use for them none is read.
    if config.embeddings:
        for row in _rows(tables.image_vectors, "item_id", image_ids):
            embeddings[row["item_id"]] = row["vector"]
    for question_id in ids:
        question = questions[question_id]
        embedding = None
        if question.image_ids:
            embedding = embeddings.get(question.image_ids[0])
        yield Bundle(
            question=question,
            solutions=solutions.get(question_id, []),
            tree_solutions=tree_solutions.get(question_id, []),
            labels=labels.get(question_id, {}),
            images=[images[image_id] for image_id in question.image_ids if image_id in images],
            evidence=evidence.get(question_id),
            scores=scores.get(question_id, {}),
            embedding=embedding,
        )


def _solutions(table: Table | None, ids: Sequence[str]) -> dict[str, list[Solution]]:
    """Each question's solutions."""
    by_question = {}
    for row in _rows(table, "question_id", ids):
        solutions = []
        for solution in row["solutions"]:
            solutions.append(from_dict(Solution, solution))
        by_question[row["question_id"]] = solutions
    return by_question


def _labels(tables: Tables, ids: Sequence[str]) -> dict[str, dict[str, list[Labels]]]:
    """By question and solution: the label rows of all sources."""
    by_question: dict[str, dict[str, list[Labels]]] = {}
    for table in tables.labels.values():
        for row in _rows(table, "question_id", ids):
            by_solution = by_question.setdefault(row["question_id"], {})
            of_solution = by_solution.setdefault(row["solution_id"], [])
            of_solution.append(from_dict(Labels, row))
    return by_question


def _scores(table: Table | None, ids: Sequence[str]) -> dict[str, dict[str, list[Scores]]]:
    """By question and solution: the score rows of all arms, without failed ones."""
    by_question: dict[str, dict[str, list[Scores]]] = {}
    for row in _rows(table, "question_id", ids):
        if row["error"] is None:
            by_solution = by_question.setdefault(row["question_id"], {})
            by_solution.setdefault(row["solution_id"], []).append(from_dict(Scores, row))
    return by_question


def _rows(table: Table | None, key: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The table's rows of these ids, read from its files alone."""
    if table is None or not ids:
        return []
    files = table.files()
    if not files:
        return []
    # The filter is applied to each file's row groups as they are read: memory holds the matching rows.
    dataset = pads.dataset(
        files,
        schema=table.schema,
        format="parquet",
        filesystem=table.fs,
    )
    is_in_chunk = pc.field(key).isin(ids)
    rows: list[dict[str, Any]] = dataset.to_table(filter=is_in_chunk).to_pylist()
    return rows


def _copied(
    bundle: Bundle,
    folder: str,
    config: ExportConfig,
    counts: Counter[str],
) -> Bundle:
    """The bundle with its images' uris as the dataset names them; with images=copy their files lie there.

    So do the reference images of its evidence: a path of this machine is nobody else's.
    """
    if config.images == "uri":
        return bundle
    images = []
    for image in bundle.images:
        name = _copy_image(image, folder, counts)
        # A picture that cannot be read costs the dataset that picture, not the question.
        if name is not None:
            images.append(replace(image, uri=name))
    evidence = bundle.evidence
    if evidence is not None:
        references = []
        for reference in evidence.images:
            name = _copy_image(reference, folder, counts)
            if name is not None:
                references.append(replace(reference, uri=name))
        evidence = replace(evidence, images=references)
    return replace(bundle, images=images, evidence=evidence)


def _copy_image(image: Image | RetrievedImage, folder: str, counts: Counter[str]) -> str | None:
    """Put an image's file into the dataset, once; gives its name there, None where it cannot be read."""
    suffix = PurePosixPath(image.uri).suffix
    name = f"images/{image.image_id}{suffix}"
    try:
        fs, path = filesystem(f"{folder}/{name}")
        # Questions share pictures: one that an earlier question has brought lies there.
        if not fs.get_file_info(path).is_file:
            _put(folder, name, read_bytes(image.uri))
            counts["images copied"] += 1
    except RowError as error:
        log.warning("image %s is left out: %s", image.image_id, error.kind)
        counts[f"images {error.kind}"] += 1
        return None
    return name


def _put(folder: str, name: str, content: bytes) -> None:
    fs, path = filesystem(f"{folder}/{name}")
    parent, _, _ = path.rpartition("/")
    fs.create_dir(parent, recursive=True)
    write_file(fs, path, content)


def _count(bundle: Bundle, counts: Counter[str]) -> None:
    counts["questions"] += 1
    counts[f"questions {bundle.question.split}"] += 1
    counts["solutions"] += len(bundle.solutions)
    # A run without trees has no line for them in the card.
    if bundle.tree_solutions:
        counts["solutions of trees"] += len(bundle.tree_solutions)
    all_solutions = (*bundle.solutions, *bundle.tree_solutions)
    counts["steps"] += sum(len(solution.steps) for solution in all_solutions)
    for rows in bundle.labels.values():
        for row in rows:
            outcome = "failed" if row.error else "labelled"
            counts[f"{row.source} {outcome}"] += 1


# Writing


def _write_json(
    folder: str,
    split: str,
    bundles_: Iterator[Bundle],
    score_arm: Arm | None,
    counts: Counter[str],
) -> None:
    """``<split>.json``: one list, written entry by entry under another name, then put in its place."""
    fs, path = filesystem(f"{folder}/{split}.json")
    with fs.open_output_stream(f"{path}.part") as stream:
        separator = "[\n"
        for bundle in bundles_:
            try:
                nested = entry(
                    bundle.question,
                    bundle.solutions,
                    bundle.labels,
                    image_uris=[image.uri for image in bundle.images],
                    evidence=bundle.evidence,
                    embedding=bundle.embedding,
                    tree_solutions=bundle.tree_solutions,
                )
                _add_scores(nested["solutions"], bundle, score_arm)
                content = _json(nested)
            except RowError as error:
                log.warning("question %s is left out: %s", bundle.question.question_id, error)
                counts[f"left out {error.kind}"] += 1
                continue
            stream.write((separator + content).encode())
            separator = ",\n"
            _count(bundle, counts)
        stream.write(b"\n]\n" if separator == ",\n" else b"[]\n")
    # A reader never finds half a list under the name.
    fs.move(f"{path}.part", path)


def _add_scores(entries: Sequence[dict[str, Any]], bundle: Bundle, arm: Arm | None) -> None:
    """Put an arm's step probabilities into the entries of the solutions, where they have any."""
    for nested, solution in zip(entries, bundle.solutions, strict=True):
        nested.update(step_scores(bundle.scores.get(solution.solution_id, ()), arm))


def step_scores(scores: Sequence[Scores], arm: Arm | None) -> dict[str, Any]:
    """`STEP_SCORES` of a solution by an arm, or by the first of `DEFAULT_ARMS` that it has; empty without scores."""
    # Failed rows are none of them.
    by_arm = {row.arm: row for row in scores}
    arms = (arm,) if arm else DEFAULT_ARMS
    chosen = next((by_arm[name] for name in arms if name in by_arm), None)
    if chosen is None or not chosen.text_log_odds:
        return {}
    probabilities = probability(np.add(chosen.text_log_odds, chosen.image_log_odds))
    values = (float(probabilities.min()), float(probabilities[-1]), probabilities.tolist())
    return dict(zip(STEP_SCORES, values, strict=True))


def _json(row: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity; Python writes them all the same, unless told not to."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RowError("not_finite", f"a number of it is NaN or infinite ({error})") from None


def shard_schema() -> pa.Schema:
    """A shard's columns: the question's, then its images, evidence, and all solutions with every label row."""
    # Nested rows need no id of the row that they are in.
    label = pa.struct(_fields(Labels, without=("question_id", "solution_id")))
    score = pa.struct(_fields(Scores, without=("question_id", "solution_id", "error")))
    smallest, last, every = STEP_SCORES
    solution = pa.struct(
        [
            *arrow_schema(Solution),
            pa.field("labels", pa.list_(label)),
            pa.field("scores", pa.list_(score)),
            pa.field(smallest, pa.float64()),
            pa.field(last, pa.float64()),
            pa.field(every, pa.list_(pa.float64())),
        ]
    )
    image = pa.struct(list(map(arrow_schema(Image).field, IMAGE_FIELDS)))
    evidence = arrow_schema(Evidence)
    return pa.schema(
        [
            *_fields(Question, without=("error", "split", "image_ids")),
            pa.field("images", pa.list_(image)),
            pa.field("related_documents", evidence.field("documents").type),
            pa.field("related_images", evidence.field("images").type),
            pa.field("solutions", pa.list_(solution)),
            pa.field("tree_solutions", pa.list_(solution)),
        ]
    )


def _fields(record: type, without: Sequence[str]) -> list[pa.Field]:
    fields = []
    for field_ in arrow_schema(record):
        if field_.name not in without:
            fields.append(field_)
    return fields


def shard_row(bundle: Bundle, score_arm: Arm | None = None) -> dict[str, Any]:
    """One row of `shard_schema`; `score_arm` as in the config."""
    related_documents: list[dict[str, Any]] = []
    related_images: list[dict[str, Any]] = []
    if bundle.evidence:
        related_documents = list(map(asdict, bundle.evidence.documents))
        related_images = list(map(asdict, bundle.evidence.images))
    return {
        **asdict(bundle.question),
        "images": list(map(asdict, bundle.images)),
        "related_documents": related_documents,
        "related_images": related_images,
        "solutions": _with_labels(bundle.solutions, bundle, score_arm),
        "tree_solutions": _with_labels(bundle.tree_solutions, bundle, score_arm),
    }


def _with_labels(solutions: Sequence[Solution], bundle: Bundle, arm: Arm | None) -> list[dict[str, Any]]:
    """The solutions with all that was said of them."""
    rows = []
    for solution in solutions:
        labels = list(map(asdict, bundle.labels.get(solution.solution_id, ())))
        scores = bundle.scores.get(solution.solution_id, ())
        row = {**asdict(solution), "labels": labels, "scores": list(map(asdict, scores))}
        rows.append(row | step_scores(scores, arm))
    return rows


def _write_shards(
    folder: str,
    split: str,
    bundles_: Iterator[Bundle],
    num_questions: int,
    config: ExportConfig,
    counts: Counter[str],
) -> None:
    """``data/<split>-00000-of-00003.parquet``, `questions_per_shard` questions each."""
    # Names hold the number of shards, so it must be known before the first is written.
    shard_size = config.questions_per_shard
    num_shards = -(-num_questions // shard_size)
    for number in range(num_shards):
        rows: list[dict[str, Any]] = []
        for bundle in islice(bundles_, shard_size):
            rows.append(shard_row(bundle, config.score_arm))
            _count(bundle, counts)
        shard = pa.Table.from_pylist(rows, schema=shard_schema())
        # Through memory, as the folder may be on any filesystem.
        sink = pa.BufferOutputStream()
        pq.write_table(shard, sink)
        name = f"data/{split}-{number:05d}-of-{num_shards:05d}.parquet"
        _put(folder, name, sink.getvalue().to_pybytes())


def push(folder: str, repo_id: str, private: bool) -> str:
    """Put the folder into a dataset repository of the hub, made where it does not exist; gives the commit's address."""
    return upload(Path(folder), repo_id, "dataset", private, commit_message="Export of a medmm_ray run")
