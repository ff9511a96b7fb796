"""VQA-RAD: real radiology questions (Lau et al. 2018) from a folder with trainset.json, testset.json and images/.

Closed questions answered yes or no become yes_no questions, all others open ones. Every image of the published test
file also occurs in its train file: curate with ``leakage: resplit`` or ``drop_train``.
"""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator

from medmm_ray.data.source_files import Entry, checked, read_json
from medmm_ray.data.sources import SourceData, SourceImage, SourceQuestion, SourceRequest
from medmm_ray.data.tables import TableError

FILES = {"train": "trainset.json", "test": "testset.json"}
BODY_PARTS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}


def _number_in_words(answer: Any) -> Any:
    return str(answer) if isinstance(answer, int) else answer


class _Row(Entry):
    qid: Any
    image_name: str
    image_organ: str
    answer: Annotated[str, BeforeValidator(_number_in_words)]  # ten of the published ones are numbers
    answer_type: str
    question: str


def read(request: SourceRequest) -> SourceData:
    """Questions of both files in their order, and their images; `request.path` is the folder."""
    folder = request.path.rstrip("/")
    limits = {"train": request.num_train, "test": request.num_test}
    images: dict[str, SourceImage] = {}
    questions: list[SourceQuestion] = []
    for split, name in FILES.items():
        for row in _rows(f"{folder}/{name}")[: limits[split]]:
            uri = f"{folder}/images/{row.image_name}"
            questions.append(_question(row, split, uri))
            images.setdefault(uri, _image(row, split, uri))
    return SourceData(images=list(images.values()), questions=questions)


def _rows(uri: str) -> list[_Row]:
    rows = read_json(uri)
    if not isinstance(rows, list):
        raise TableError(f"{uri} must hold a list of questions, got {type(rows).__name__}")
    return [checked(_Row, row, f"{uri} entry {number}") for number, row in enumerate(rows)]


def _image(row: _Row, split: str, uri: str) -> SourceImage:
    organ = row.image_organ.strip().upper()
    return SourceImage(
        uri=uri,
        split=split,
        modality="radiology",
        diagnosis=_organ(row),
        annotation=json.dumps({"image_name": row.image_name, "image_organ": organ}),
    )


def _organ(row: _Row) -> str:
    organ = row.image_organ.strip().upper()
    return BODY_PARTS.get(organ, organ.lower())


def _question(row: _Row, split: str, uri: str) -> SourceQuestion:
    answer = row.answer.strip()
    closed = row.answer_type.strip().upper() == "CLOSED" and answer.lower() in ("yes", "no")
    return SourceQuestion(
        name=f"{split}-{row.qid}",
        published_type=row.answer_type.strip().lower(),
        topic=_organ(row),
        split=split,
        modality="radiology",
        question=row.question.strip(),
        answer=answer.lower() if closed else answer,
        answer_type="yes_no" if closed else "open",
        images=(uri,),
    )
