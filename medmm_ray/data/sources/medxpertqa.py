"""MedXpertQA and the sets in its form: test questions with up to ten options (Zuo et al. 2025).

`path` is a JSONL file, or a folder of them. Both published forms are read: that of the hub (options by their letters,
pictures by their names) and that of the authors' repository (options and pictures as objects); options may also stand
in the question alone, behind ``Answer Choices:``. Pictures lie in images/ beside the file, or beside its folder, as
the hub's archive unpacks.
"""

import re
from itertools import islice
from typing import Annotated, Any

from pyarrow import fs as pafs
from pydantic import BeforeValidator, Field

from medmm_ray.data.source_files import Entry, Options, Texts, Words, files_at, read_jsonl
from medmm_ray.data.sources import SourceData, SourceImage, SourceQuestion, SourceRequest
from medmm_ray.data.tables import filesystem
from medmm_ray.text import LETTERS

CHOICES = "\nAnswer Choices:"
_OPTION = re.compile(r"\s*\(([A-Z])\) ")


class _Option(Entry):
    content: str


class _Image(Entry):
    image_path: str


def _contents(value: Any) -> Any:
    """Options as objects with a letter and a content, as plain texts; any other form as it is."""
    if not isinstance(value, list) or not all(isinstance(option, dict) for option in value):
        return value
    return [_Option.model_validate(option).content for option in value]


def _paths(value: Any) -> Any:
    """Pictures as objects with a path, as plain names; any other form as it is."""
    if not isinstance(value, list) or not all(isinstance(image, dict) for image in value):
        return value
    return [_Image.model_validate(image).image_path for image in value]


class _Row(Entry):
    question: str
    label: Annotated[Texts, Field(min_length=1)]
    options: Annotated[Options, BeforeValidator(_contents)] | None = None
    images: Annotated[list[str], BeforeValidator(_paths)] | None = None
    id: Words = ""
    question_type: Words = ""
    body_system: Words = ""
    subject_name: Words = ""
    subject: Words = ""


def read(request: SourceRequest) -> SourceData:
    """All questions of the files, in their order; `num_test` limits each file."""
    questions = []
    images: dict[str, SourceImage] = {}
    for uri in files_at(request.path, ".jsonl"):
        folder, _, file = uri.rpartition("/")
        images_folder = _images_beside(folder)
        rows = islice(read_jsonl(_Row, uri), request.num_test)
        for number, row in enumerate(rows, 1):
            uris = [f"{images_folder}/{name}" for name in row.images or ()]
            questions.append(
                _question(
                    f"{file}-{number}",
                    row,
                    uris,
                )
            )
            for image in uris:
                images.setdefault(image, SourceImage(uri=image, split="test", modality="radiology"))
    return SourceData(images=list(images.values()), questions=questions)


def _images_beside(folder: str) -> str:
    """The folder of the pictures of a file in `folder`."""
    parent = folder.rpartition("/")[0]
    beside, above = f"{folder}/images", f"{parent}/images"
    fs, path = filesystem(beside)
    _, path_above = filesystem(above)
    info, info_above = fs.get_file_info([path, path_above])
    is_above = info.type != pafs.FileType.Directory and info_above.type == pafs.FileType.Directory
    return above if is_above else beside


def _question(name: str, row: _Row, images: list[str]) -> SourceQuestion:
    question, _, choices = row.question.partition(CHOICES)
    return SourceQuestion(
        name=name,
        dataset=_dataset(name, row.id),
        published_type=row.question_type.lower(),
        topic=row.body_system or row.subject_name or row.subject,
        split="test",
        modality="radiology" if images else "clinical",
        question=question.strip(),
        options=row.options or bracketed(choices),
        answer=row.label[0],
        answer_type="choice",
        images=images,
    )


def _dataset(name: str, row_id: str) -> str:
    """The data set of a question: by its id (MM-1, Text-2), else by the name of the file, which `name` begins with.

    >>> _dataset("test.jsonl-1", "Text-0"), _dataset("mmlu_medical_input.jsonl-9", "")
    ('medxpertqa_text', 'mmlu')
    """
    kind, _, number = row_id.partition("-")
    if kind in ("MM", "Text") and number:
        return f"medxpertqa_{kind.lower()}"
    file = name.partition(".jsonl")[0].removesuffix("_input")
    return "mmlu" if file == "mmlu_medical" else file


def bracketed(choices: str) -> list[str]:
    """Options in one line; a bracketed letter out of turn belongs to an option's text.

    >>> bracketed("(A) one (B) group (A) two")
    ['one', 'group (A) two']
    """
    starts: list[re.Match[str]] = []
    for mark in _OPTION.finditer(choices):
        if mark[1] == LETTERS[len(starts) : len(starts) + 1]:
            starts.append(mark)
    # Each option ends where the next one's letter stands.
    ends = [mark.start() for mark in starts[1:]] + [len(choices)]
    options = []
    for mark, end in zip(starts, ends, strict=False):
        options.append(choices[mark.end() : end].strip())
    return options
