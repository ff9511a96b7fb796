"""Ingest: what a source yields, as the tables raw_questions, raw_images, documents and demonstrations.

Images are drawn (where the source has no files), opened, hashed and measured in Ray workers; a question's id contains
the hashes of its images, so questions are made after them. A row that is not usable keeps its place, with an `error`:

- image_missing, image_empty, image_format, image_corrupt, image_too_large: the file cannot become a picture;
- answer_not_in_options, answer_not_yes_no, answer_empty, question_empty, options_missing, options_repeated,
  duplicate_id, image_unknown: the question cannot be used; ``upstream: …`` repeats the fault of its image.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import PIL.Image
import pyarrow as pa
from pydantic import Field

from medmm_ray.config import Config, ConfigError, digest, execution, identity
from medmm_ray.data.records import Document, Image, Question, Solution, Solutions, to_arrow
from medmm_ray.data.sources import WITHOUT_FILES, Hardness, SourceData, SourceQuestion, SourceRequest, load
from medmm_ray.data.tables import RowError, TableError, error_kind, filesystem, write_file
from medmm_ray.engines.images import decode_image, read_bytes
from medmm_ray.text import LETTERS, answer_key, join_steps, normalise

if TYPE_CHECKING:
    from ray.data import Dataset

VERSION = 5  # of what a step makes: raise it when the same config makes something else
Draw = Callable[[str, int], PIL.Image.Image]
WORKED = "worked"
"""The policy of worked solutions."""
SOURCE_COLUMNS = ("uri", "split", "modality", "diagnosis", "annotation")
"""What a source says of an image before its file is opened."""


class IngestConfig(Config):
    """What to read. `path` and `documents_path` name the input itself, so they count as part of the result."""

    source: str = "phantom"
    """The data set: a module of medmm_ray.data.sources (phantom, vqa_rad, ...)."""
    path: str = ""
    """Folder or URI of the data set's files; empty for a source that makes its data (phantom)."""
    documents_path: str = ""
    """A JSONL file of documents {"title", "text"} to retrieve from, besides those of the source."""
    num_train: int | None = Field(None, ge=0)
    """Training questions to make (phantom; default 800) or to take at most (others; default all)."""
    num_test: int | None = Field(None, ge=0)
    """Test questions to make (phantom; default 250) or to take at most (others; default all)."""
    num_extra_images: int = Field(0, ge=0)
    """phantom: training images without a question, for the image tower and as reference images."""
    num_worked: int = Field(1, ge=0)
    """phantom: worked solutions per training question, for supervised training of the policy."""
    image_size: int = Field(64, ge=1)
    """phantom: side of a drawn picture in pixels."""
    hardness: Hardness = Hardness()
    """phantom: how hard the pictures are to read."""
    seed: int = 0
    """phantom: seed of the cases that are drawn."""
    batch_size: int = execution(64, ge=1)
    """Images that a worker opens at a time."""
    num_cpus: float = execution(0.5, ge=0)
    """Logical CPU cores that an image worker asks for."""


def read_source(config: IngestConfig) -> SourceData:
    """All that the configured source yields; a `ConfigError` or `TableError` names the file and the field at fault."""
    if config.source not in WITHOUT_FILES and not config.path:
        raise ConfigError(f"ingest.path is empty: source {config.source!r} needs the folder that holds its files")
    return load(config.source).read(request_of(config))


def request_of(config: IngestConfig) -> SourceRequest:
    """What the config asks of its source."""
    return SourceRequest(
        path=config.path,
        documents_path=config.documents_path,
        num_train=config.num_train,
        num_test=config.num_test,
        num_extra_images=config.num_extra_images,
        num_worked=config.num_worked,
        hardness=config.hardness,
        seed=config.seed,
    )


# Images


def image_table(data: SourceData, folder: str) -> pa.Table:
    """The images to inspect, one row each, keyed by `uri`; drawn ones will lie below `folder`."""
    rows = []
    counts: Counter[str] = Counter()
    for image in data.images:
        uri = _uri(data, folder, image.uri)
        counts[uri] += 1
        rows.append({**asdict(image), "uri": uri})
    # Two rows of one file would give two images of one id.
    repeated = [uri for uri, count in counts.items() if count > 1]
    if repeated:
        raise TableError(f"the source lists the image {repeated[0]} more than once; each file may be listed once")
    schema = pa.schema([(name, pa.string()) for name in SOURCE_COLUMNS])
    return pa.Table.from_pylist(rows, schema=schema)


def inspect_images(ds: "Dataset", config: IngestConfig, draw: Draw | None = None) -> "Dataset":
    """Rows of `image_table` to rows of the record Image (`image_id`, hashes, size, or an `error`), keyed by `uri`.

    With `draw`, each picture is drawn from its annotation and written to its uri first.
    """
    return ds.map_batches(
        partial(inspect_batch, draw=draw, size=config.image_size),
        batch_format="pyarrow",
        batch_size=config.batch_size,
        num_cpus=config.num_cpus,
    )


def inspect_batch(batch: pa.Table, draw: Draw | None = None, size: int = 64) -> pa.Table:
    """A batch of `image_table` as Image rows; drawn pictures have `size` pixels a side."""
    inspected = []
    for row in batch.to_pylist():
        inspected.append(inspect_image(row, draw, size))
    return to_arrow(Image, inspected)


def inspect_image(row: dict[str, Any], draw: Draw | None = None, size: int = 64) -> Image:
    """One row of `image_table` as an Image; a file that cannot become a picture gives one with an `error`."""
    import imagehash

    uri = row["uri"]
    from_source = {name: row[name] for name in SOURCE_COLUMNS}
    # A file that is missing or broken is a row with an error, not the end of the step.
    try:
        content = _draw(draw, row, size) if draw else read_bytes(uri)
        picture = decode_image(content, uri)
    except RowError as error:
        return Image(
            image_id=f"im{digest(uri)}",
            sha256="",
            perceptual_hash="",
            width=0,
            height=0,
            **from_source,
            error=str(error),
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return Image(
        image_id=f"im{sha256[:16]}",
        sha256=sha256,
        perceptual_hash=str(imagehash.phash(picture)),
        width=picture.width,
        height=picture.height,
        **from_source,
    )


def _draw(draw: Draw, row: dict[str, Any], size: int) -> bytes:
    """The picture of a row, drawn and written to its uri, as PNG."""
    stream = io.BytesIO()
    draw(row["annotation"], size).save(stream, "PNG")
    content = stream.getvalue()
    fs, path = filesystem(row["uri"])
    # Every worker makes the folder: there is no order among them.
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    write_file(fs, path, content)
    return content


def _uri(data: SourceData, folder: str, uri: str) -> str:
    return f"{folder.rstrip('/')}/{uri}" if data.draw else uri


# Questions and what comes with them


def question_rows(data: SourceData, images: pa.Table, config: IngestConfig, folder: str) -> list[Question]:
    """One Question for each of `data.questions`, in their order; `images` is the finished raw_images.

    A question that occurs again (same text, options, images) gets an id of its own; `curate` decides which one stays.
    """
    inspected: dict[str, dict[str, Any]] = {}
    for row in images.select(["uri", "image_id", "sha256", "error"]).to_pylist():
        inspected[row["uri"]] = row
    earlier_names: set[str] = set()
    occurrences: Counter[str] = Counter()
    rows = []
    for question in data.questions:
        of_question = []
        for name in question.images:
            uri = _uri(data, folder, name)
            of_question.append(inspected.get(uri) or _unknown_image(uri))
        source = question.source or config.source
        # By content, so that a file may move; what cannot be read is known by its uri.
        hashes = [image["sha256"] or image["image_id"] for image in of_question]
        content = (source, question.question, list(question.options), hashes)
        content_hash = digest(*content)
        repeats = occurrences[content_hash]
        occurrences[content_hash] += 1
        question_id = f"q{digest(*content, repeats) if repeats else content_hash}"
        # A name that the source has twice names neither: the later question gets an id from its content.
        is_repeated_name = question.name in earlier_names
        earlier_names.add(question.name)
        try:
            if is_repeated_name:
                raise RowError("duplicate_id", f"the source has {question.name!r} more than once; each id names one")
            answer = checked_answer(question)
            error = _image_fault(of_question, inspected) or question.error
        except RowError as fault:
            answer, error = question.answer, str(fault)
        if question.question_id and not is_repeated_name:
            question_id = question.question_id
        image_ids = [image["image_id"] for image in of_question]
        rows.append(_question_row(question, question_id, source, image_ids, answer, error))
    return rows


def _question_row(
    question: SourceQuestion, question_id: str, source: str, image_ids: list[str], answer: str, error: str | None
) -> Question:
    dataset = question.dataset or source
    # The data set before the number: patients of two data sets are not the same.
    group = f"{dataset}/{question.group}" if question.group else next(iter(image_ids), question_id)
    return Question(
        question_id=question_id,
        source=source,
        dataset=dataset,
        published_type=question.published_type,
        topic=question.topic,
        group=group,
        split=question.split,
        modality=question.modality,
        difficulty=question.difficulty,
        question=question.question,
        options=list(question.options),
        answer=answer,
        answer_type=question.answer_type,
        image_ids=image_ids,
        error=error,
    )


def _unknown_image(uri: str) -> dict[str, Any]:
    """What stands for an image that the source does not list."""
    return {"uri": uri, "image_id": f"im{digest(uri)}", "sha256": "", "error": None}


def _image_fault(of_question: Sequence[dict[str, Any]], inspected: Container[str]) -> str | None:
    """The error of the last image that has one; raises `RowError` for an image that the source does not list."""
    fault = None
    for image in of_question:
        if image["uri"] not in inspected:
            raise RowError("image_unknown", f"{image['uri']} is none of the source's images")
        if image["error"]:
            fault = f"upstream: {error_kind(image['error'])} in {image['uri']}"
    return fault


def checked_answer(question: SourceQuestion) -> str:
    """The answer as `Question.answer` holds it; raises `RowError` where question, options and answer do not fit."""
    # Messages name the question by its id in the source: its text may be a patient's.
    answer = question.answer.strip()
    if not question.question.strip():
        raise RowError("question_empty", f"question {question.name!r} has no text")
    if question.answer_type == "open":
        if not answer:
            raise RowError("answer_empty", f"question {question.name!r} has no answer")
        return answer
    if question.answer_type == "yes_no":
        if answer.lower() not in ("yes", "no"):
            raise RowError("answer_not_yes_no", f"the answer of {question.name!r} is neither yes nor no")
        return answer.lower()
    return _checked_letter(question.name, list(question.options), answer)


def _checked_letter(name: str, options: list[str], answer: str) -> str:
    """The letter of the option that `answer` names by its letter or its text."""
    if not 2 <= len(options) <= len(LETTERS):
        raise RowError("options_missing", f"{name!r} has {len(options)} options; 2 to {len(LETTERS)} are due")
    if not all(map(str.strip, options)):
        raise RowError("options_missing", f"one of the {len(options)} options of {name!r} has no text")
    # Compared plain, as the source may spell answer and option differently.
    plain_options = list(map(_plain, options))
    if len(set(plain_options)) < len(options):
        raise RowError("options_repeated", f"two of the {len(options)} options of {name!r} are the same")
    if len(answer) == 1 and answer in LETTERS[: len(options)]:
        return answer
    plain_answer = _plain(answer)
    if plain_answer in plain_options:
        return LETTERS[plain_options.index(plain_answer)]
    raise RowError("answer_not_in_options", f"the answer of {name!r} is none of its {len(options)} options")


def _plain(text: str) -> str:
    """For telling options apart: signs and Greek letters count (``> 5`` and ``< 5``), a plural does too."""
    return f"{normalise(text)} {answer_key(text)}".strip() or text


def document_rows(data: SourceData) -> list[Document]:
    """The documents, each content once."""
    rows: dict[str, Document] = {}
    # By content: a text that its corpus has twice is one document, and is retrieved once.
    for document in data.documents:
        document_id = f"d{digest(document.corpus, document.title, document.text)}"
        rows[document_id] = Document(
            document_id=document_id, corpus=document.corpus, title=document.title, text=document.text
        )
    return list(rows.values())


def demonstration_rows(data: SourceData, questions: Sequence[Question], config: IngestConfig) -> list[Solutions]:
    """Worked solutions of the training questions, as the solutions of the policy "worked"; maybe none.

    `questions` are the rows that `question_rows` made of the same data.
    """
    config_hash = digest(identity(config))
    rows = []
    # Of training questions alone: what the policy learns must not come from those that it is measured on.
    for source, question in zip(data.questions, questions, strict=True):
        if not source.worked or question.split != "train" or question.error:
            continue
        solutions = []
        for index, steps in enumerate(source.worked):
            solutions.append(_worked_solution(question, config_hash, index, list(steps)))
        rows.append(
            Solutions(
                question_id=question.question_id,
                policy=WORKED,
                config_hash=config_hash,
                num_requested=len(solutions),
                solutions=solutions,
            )
        )
    return rows


def _worked_solution(question: Question, config_hash: str, index: int, steps: list[str]) -> Solution:
    text = join_steps(steps)
    return Solution(
        solution_id=f"s{digest(question.question_id, WORKED, config_hash, index)}",
        index=index,
        text=text,
        steps=steps,
        answer=question.answer,
        correct=True,
        finish_reason="stop",
        seed=0,
        text_sha=digest(text),
    )
