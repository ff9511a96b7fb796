"""MedXpertQA and the sets in its form: test questions with up to ten options (Zuo et al. 2025).

`path` is a JSONL file, or a folder of them. Options are the field ``options``, or stand in the question behind
``Answer Choices:``; pictures lie in the folder's images/.
"""

import re
from itertools import islice
from typing import Annotated

from pydantic import Field

from medmm_ray.sources import (
    Entry,
    Request,
    SourceData,
    SourceImage,
    SourceQuestion,
    Texts,
    files_at,
    read_documents,
    read_jsonl,
)
from medmm_ray.text import LETTERS

CHOICES = "\nAnswer Choices:"
_OPTION = re.compile(r"\s*\(([A-Z])\) ")


class _Option(Entry):
    content: str


class _Image(Entry):
    image_path: str


class _Row(Entry):
    question: str
    label: Annotated[Texts, Field(min_length=1)]
    options: list[_Option] | None = None
    images: list[_Image] | None = None


def read(request: Request) -> SourceData:
    """All questions of the files, in their order; `num_test` limits each file."""
    questions = []
    images: dict[str, SourceImage] = {}
    for uri in files_at(request.path, ".jsonl"):
        folder, _, file = uri.rpartition("/")
        for number, row in enumerate(islice(read_jsonl(_Row, uri), request.num_test), 1):
            uris = [f"{folder}/images/{image.image_path}" for image in row.images or ()]
            questions.append(_question(f"{file}-{number}", row, uris))
            for image in uris:
                images.setdefault(image, SourceImage(uri=image, split="test", modality="radiology"))
    return SourceData(
        images=list(images.values()), questions=questions, documents=read_documents(request.documents_path)
    )


def _question(name: str, row: _Row, images: list[str]) -> SourceQuestion:
    question, _, choices = row.question.partition(CHOICES)
    return SourceQuestion(
        name=name,
        split="test",
        modality="radiology" if images else "clinical",
        question=question.strip(),
        options=[option.content for option in row.options] if row.options else bracketed(choices),
        answer=row.label[0],
        answer_type="choice",
        images=images,
    )


def bracketed(choices: str) -> list[str]:
    """Options in one line; a bracketed letter out of turn belongs to an option's text.

    >>> bracketed("(A) one (B) group (A) two")
    ['one', 'group (A) two']
    """
    starts: list[re.Match[str]] = []
    for mark in _OPTION.finditer(choices):
        if mark[1] == LETTERS[len(starts) : len(starts) + 1]:
            starts.append(mark)
    ends = [mark.start() for mark in starts[1:]] + [len(choices)]
    return [choices[mark.end() : end].strip() for mark, end in zip(starts, ends, strict=False)]
