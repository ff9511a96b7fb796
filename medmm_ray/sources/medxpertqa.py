"""MedXpertQA and the sets in its form: test questions with up to ten options (Zuo et al. 2025).

`path` is a JSONL file, or a folder of them. Options are the field ``options``, or stand in the question behind
``Answer Choices:``; pictures lie in the folder's images/.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from medmm_ray.sources import (
    Request,
    SourceData,
    SourceImage,
    SourceQuestion,
    files_at,
    read_documents,
    read_lines,
    require,
)
from medmm_ray.text import LETTERS

CHOICES = "\nAnswer Choices:"
_OPTION = re.compile(r"\s*\(([A-Z])\) ")


def read(request: Request) -> SourceData:
    """All questions of the files, in their order; `num_test` limits each file."""
    questions = []
    images: dict[str, SourceImage] = {}
    for uri in files_at(request.path, ".jsonl"):
        folder, _, file = uri.rpartition("/")
        for number, line in enumerate(read_lines(uri)[: request.num_test], 1):
            row = json.loads(line)
            require(row, ("question", "label"), f"{uri} line {number}")
            uris = [f"{folder}/images/{image['image_path']}" for image in row.get("images", ())]
            questions.append(_question(f"{file}-{number}", row, uris))
            for image in uris:
                images.setdefault(image, SourceImage(uri=image, split="test", modality="radiology"))
    return SourceData(
        images=list(images.values()), questions=questions, documents=read_documents(request.documents_path)
    )


def _question(name: str, row: Mapping[str, Any], images: list[str]) -> SourceQuestion:
    question, _, choices = str(row["question"]).partition(CHOICES)
    given = row.get("options")
    return SourceQuestion(
        name=name,
        split="test",
        modality="radiology" if images else "clinical",
        question=question.strip(),
        options=[str(option["content"]) for option in given] if given else bracketed(choices),
        answer=str(row["label"][0]),
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
