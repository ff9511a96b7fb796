"""Questions, documents and worked solutions of sources, as rows of their tables."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from medmm_ray.config import digest, identity
from medmm_ray.data.documents import read_corpora
from medmm_ray.data.records import Document, Question, Solution, Solutions
from medmm_ray.data.sources import (
    SourceDocument,
    SourceQuestion,
)
from medmm_ray.data.tables import RowError, error_kind
from medmm_ray.text import LETTERS, answer_key, join_steps, normalise

if TYPE_CHECKING:
    pass

from medmm_ray.steps.ingest.reading import IngestConfig, ReadSource

WORKED = "worked"
"""The policy of worked solutions."""


def question_rows(
    sources: Sequence[ReadSource],
    images: pa.Table,
    folder: str,
) -> list[Question]:
    """One Question for each question of the sources, in their order; `images` is the finished raw_images.

    A question that occurs again (same text, options, images) gets an id of its own; `curate` decides which one stays.
    """
    inspected: dict[str, dict[str, Any]] = {}
    for row in images.select(["uri", "image_id", "sha256", "error"]).to_pylist():
        inspected[row["uri"]] = row
    rows: list[Question] = []
    for source in sources:
        rows += _rows_of(source, inspected, folder)
    return rows


def _rows_of(
    source: ReadSource,
    inspected: Mapping[str, dict[str, Any]],
    folder: str,
) -> list[Question]:
    """The questions of one source."""
    drawn_uris = {image.uri: source.uri(image, folder) for image in source.data.images}
    earlier_names: set[str] = set()
    occurrences: Counter[str] = Counter()
    rows = []
    for question in source.data.questions:
        of_question = []
        for name in question.images:
            uri = drawn_uris.get(name, name)
            of_question.append(inspected.get(uri) or _unknown_image(uri))
        source_name = question.source or source.config.name
        # By content, so that a file may move; what cannot be read is known by its uri.
        hashes = [image["sha256"] or image["image_id"] for image in of_question]
        content = (source_name, question.question, list(question.options), hashes)
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
            answer = question.answer if question.error else checked_answer(question)
            error = _image_fault(of_question, inspected) or question.error
        except RowError as fault:
            answer, error = question.answer, str(fault)
        if question.question_id and not is_repeated_name:
            question_id = question.question_id
        image_ids = [image["image_id"] for image in of_question]
        rows.append(
            _question_row(
                question,
                question_id,
                source_name,
                image_ids,
                answer,
                error,
            )
        )
    return rows


def _question_row(
    question: SourceQuestion,
    question_id: str,
    source: str,
    image_ids: list[str],
    answer: str,
    error: str | None,
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
    return _checked_letter(question, list(question.options), answer)


def _checked_letter(
    question: SourceQuestion,
    options: list[str],
    answer: str,
) -> str:
    """The letter of the option that `answer` names by its letter or its text."""
    name = question.name
    if not 2 <= len(options) <= len(LETTERS):
        raise RowError("options_missing", f"{name!r} has {len(options)} options; 2 to {len(LETTERS)} are due")
    if not all(map(str.strip, options)):
        raise RowError("options_missing", f"one of the {len(options)} options of {name!r} has no text")
    # Compared plain, as the source may spell answer and option differently.
    plain_options = list(map(_plain, options))
    is_letter = len(answer) == 1 and answer in LETTERS[: len(options)]
    # Published test sets have such questions (21 of MedMCQA's 4,183), and figures count them: the letter decides.
    is_usable = is_letter and question.split == "test"
    if len(set(plain_options)) < len(options) and not is_usable:
        raise RowError("options_repeated", f"two of the {len(options)} options of {name!r} are the same")
    if is_letter:
        return answer
    plain_answer = _plain(answer)
    if plain_answer in plain_options:
        return LETTERS[plain_options.index(plain_answer)]
    raise RowError("answer_not_in_options", f"the answer of {name!r} is none of its {len(options)} options")


def _plain(text: str) -> str:
    """For telling options apart: signs and Greek letters count (``> 5`` and ``< 5``), a plural does too."""
    return f"{normalise(text)} {answer_key(text)}".strip() or text


def document_rows(sources: Sequence[ReadSource], config: IngestConfig) -> list[Document]:
    """The documents of the sources and of the configured corpora, each content once."""
    documents: list[SourceDocument] = []
    for source in sources:
        documents += source.data.documents
    documents += read_corpora(config.documents)
    rows: dict[str, Document] = {}
    # By content: a text that its corpus has twice is one document, and is retrieved once.
    for document in documents:
        document_id = f"d{digest(document.corpus, document.title, document.text)}"
        rows[document_id] = Document(
            document_id=document_id,
            corpus=document.corpus,
            title=document.title,
            text=document.text,
            date=document.date,
            modality=document.modality,
        )
    return list(rows.values())


def demonstration_rows(
    sources: Sequence[ReadSource],
    questions: Sequence[Question],
    config: IngestConfig,
) -> list[Solutions]:
    """Worked solutions of the training questions, as the solutions of the policy "worked"; maybe none.

    `questions` are the rows that `question_rows` made of the same sources.
    """
    config_hash = digest(identity(config))
    source_questions: list[SourceQuestion] = []
    for source in sources:
        source_questions += source.data.questions
    rows = []
    # Of training questions alone: what the policy learns must not come from those that it is measured on.
    for source_question, question in zip(source_questions, questions, strict=True):
        if not source_question.worked or question.split != "train" or question.error:
            continue
        solutions = []
        for index, steps in enumerate(source_question.worked):
            solutions.append(
                _worked_solution(
                    question,
                    config_hash,
                    index,
                    list(steps),
                )
            )
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


def _worked_solution(
    question: Question,
    config_hash: str,
    index: int,
    steps: list[str],
) -> Solution:
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
