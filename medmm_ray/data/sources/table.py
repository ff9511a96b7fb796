"""Any table of questions or pictures, by a column map: data of your own, and most published sets.

`path` is a file or a folder: JSON, JSONL, CSV, Parquet or Arrow (as the datasets library saves them), or pictures in
folders. `files` names the files of each split by patterns; without it a file's name says its split (train…, val…, dev…,
test…), else `columns.split`, else it is training. Pictures are files in `columns.image_folders`, DICOM among them, or
lie in the table itself.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
from pyarrow import fs as pafs

from medmm_ray.config import ConfigError
from medmm_ray.data import dicom
from medmm_ray.data.columns import (
    ColumnMap,
    answer_of,
    answer_type_of,
    field_of,
    options_of,
    pictures_of,
    question_text,
    text_at,
)
from medmm_ray.data.rows import Embedded, embedded_bytes, list_tables, pointer, read_rows
from medmm_ray.data.solution_rows import solution_of
from medmm_ray.data.sources import (
    SolvedQuestion,
    SourceData,
    SourceImage,
    SourceQuestion,
    SourceRequest,
    SourceSolution,
)
from medmm_ray.data.tables import RowError, TableError, filesystem
from medmm_ray.text import lettered_options

SPLITS = ("train", "validation", "test")
_SPLIT_OF_NAME = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}


def read(request: SourceRequest) -> SourceData:
    """The questions of all files in their order, and their pictures; `num_train` and `num_test` limit the splits."""
    columns = request.columns
    if columns is None:
        raise ConfigError(f"source {request.name!r} has no columns: say which hold what, as columns: {{question: ...}}")
    pictures = _Pictures(request.path, columns)
    questions: list[SourceQuestion] = []
    # A question with many solutions has a row for each.
    identities: set[tuple[str, ...]] = set()
    for row in limited(request, columns):
        uris = pictures.add(row)
        identity = _identity(columns, row) if columns.steps else ()
        if columns.question and (not columns.steps or identity not in identities):
            identities.add(identity)
            questions.append(_question(columns, row, uris))
    return SourceData(images=list(pictures.images.values()), questions=questions, draw=draw)


def solved(request: SourceRequest) -> Iterator[SolvedQuestion]:
    """The labelled solutions of each question of `read`, in the order of the questions."""
    columns = request.columns
    assert columns is not None
    assert columns.steps is not None, "asked only of tables with steps"
    solutions: dict[tuple[str, ...], list[SourceSolution]] = {}
    # All at once: a question's solutions need not lie together.
    for row in limited(request, columns):
        key = _identity(columns, row)
        solutions.setdefault(key, []).append(solution_of(columns.steps, row.values, row.where))
    for of_question in solutions.values():
        yield SolvedQuestion(solutions=of_question)


def _identity(columns: ColumnMap, row: "TableRow") -> tuple[str, ...]:
    """What tells the questions of a table with solutions apart: its rows repeat a question for each solution."""
    pictures = [str(picture) for picture in pictures_of(columns, row.values, row.where)]
    return (row.split, question_text(columns, row.values, row.where), *pictures)


@dataclass(frozen=True)
class TableRow:
    """A row with its split; `where` names its file and place, for messages."""

    values: Mapping[str, Any]
    split: str
    where: str
    name: str


def limited(request: SourceRequest, columns: ColumnMap) -> Iterator[TableRow]:
    """The rows that `columns.where` takes, as many of each split as are asked for."""
    limits = {"train": request.num_train, "test": request.num_test}
    num_read = dict.fromkeys(SPLITS, 0)
    for uri, split_of_file in files_of(request):
        for row in rows_of(
            request,
            columns,
            uri,
            split_of_file,
        ):
            limit = limits.get(row.split)
            if limit is None or num_read[row.split] < limit:
                num_read[row.split] += 1
                yield row
            elif split_of_file:
                # All other rows of the file are beyond the limit too.
                break


def rows_of(
    request: SourceRequest,
    columns: ColumnMap,
    uri: str,
    split_of_file: str,
) -> Iterator[TableRow]:
    """The rows of a file that `columns.where` takes, in its order."""
    file = uri.removeprefix(request.path.rstrip("/")).lstrip("/") or uri.rpartition("/")[2]
    for number, values in enumerate(read_rows(uri, columns.header, columns.records)):
        where = f"{uri} row {number}"
        if not _is_taken(columns, values, where):
            continue
        split = _split(
            columns,
            values,
            split_of_file,
            where,
        )
        name = text_at(values, columns.id, where) if columns.id else f"{file}-{number}"
        yield TableRow(
            values,
            split,
            where,
            name,
        )


def files_of(request: SourceRequest) -> list[tuple[str, str]]:
    """The files of a data set, each with the split that it is of; "" where its rows say so, or nobody does."""
    uris = list_tables(request.path)
    # Without patterns a file's own name says its split.
    if not request.files:
        return [(uri, _split_by_name(uri)) for uri in uris]
    files = []
    for split, patterns in request.files.items():
        for pattern in patterns:
            matching = [uri for uri in uris if fnmatch.fnmatch(uri, f"*/{pattern}")]
            if not matching:
                raise ConfigError(f"{request.path} has no file {pattern!r} for the split {split} of {request.name!r}")
            files += [(uri, "" if split == "all" else split) for uri in matching]
    return files


def _split_by_name(uri: str) -> str:
    file = uri.rpartition("/")[2].lower()
    folder = uri.rpartition("/")[0].rpartition("/")[2].lower()
    # The datasets library saves a folder a split, most others a file.
    for name in (file, folder):
        for start, split in _SPLIT_OF_NAME.items():
            if name.startswith(start):
                return split
    return ""


def _is_taken(
    columns: ColumnMap,
    row: Mapping[str, Any],
    where: str,
) -> bool:
    return all(text_at(row, column, where) in values for column, values in columns.where.items())


def _split(
    columns: ColumnMap,
    row: Mapping[str, Any],
    split_of_file: str,
    where: str,
) -> str:
    split = (
        field_of(
            columns,
            "split",
            row,
            where,
        )
        or split_of_file
        or "train"
    )
    if split not in SPLITS:
        raise TableError(
            f"{where}: the split is {split!r}; it is one of {', '.join(SPLITS)}, or columns.words.split says which: "
            f"{{{split}: test}}"
        )
    return split


def _question(
    columns: ColumnMap,
    row: TableRow,
    uris: list[str],
) -> SourceQuestion:
    question = question_text(columns, row.values, row.where)
    options = options_of(columns, row.values, row.where)
    if columns.lettered:
        question, options = lettered_options(question)
    answer, error = "", None
    # A row whose answer fits no option is counted, and the others are read.
    try:
        answer = answer_of(
            columns,
            row.values,
            options,
            row.where,
        )
    except RowError as fault:
        error = str(fault)
    return SourceQuestion(
        name=row.name,
        split=row.split,
        modality=field_of(
            columns,
            "modality",
            row.values,
            row.where,
        ),
        difficulty=field_of(
            columns,
            "difficulty",
            row.values,
            row.where,
        ),
        dataset=field_of(
            columns,
            "dataset",
            row.values,
            row.where,
        ),
        published_type=field_of(
            columns,
            "published_type",
            row.values,
            row.where,
        ).lower(),
        topic=field_of(
            columns,
            "topic",
            row.values,
            row.where,
        ),
        group=field_of(
            columns,
            "group",
            row.values,
            row.where,
        ),
        question=question,
        options=options,
        answer=answer,
        answer_type=answer_type_of(options, answer),
        images=uris,
        error=error,
    )


# Pictures


@dataclass
class _Pictures:
    """The pictures of a data set, by URI, as its rows name them."""

    path: str
    columns: ColumnMap
    images: dict[str, SourceImage] = field(default_factory=dict)
    files: dict[str, str] | None = None

    def add(self, row: TableRow) -> list[str]:
        """Take in the pictures of a row; gives their URIs."""
        uris = []
        for picture in pictures_of(self.columns, row.values, row.where):
            for uri, annotation in self._places(picture):
                uris.append(uri)
                if uri not in self.images:
                    self.images[uri] = self._image(uri, annotation, row)
        return uris

    def _image(
        self,
        uri: str,
        annotation: str,
        row: TableRow,
    ) -> SourceImage:
        return SourceImage(
            uri=uri,
            split=row.split,
            modality=field_of(
                self.columns,
                "modality",
                row.values,
                row.where,
            ),
            diagnosis=field_of(
                self.columns,
                "diagnosis",
                row.values,
                row.where,
            ),
            annotation=annotation,
            drawn=bool(annotation),
        )

    def _places(self, picture: str | Embedded) -> list[tuple[str, str]]:
        """The URI and the annotation of a picture; of a DICOM file with several frames those of each."""
        if isinstance(picture, Embedded):
            # Tables of two folders may have one name.
            table = picture.table.removeprefix(self.path.rstrip("/")).strip("/").replace("/", "-")
            name = f"{table}-{picture.column}-{picture.row}{_ending_of(picture.name)}"
            return [(name, pointer(picture))]
        uri = self._uri(picture)
        if not uri.lower().endswith(dicom.ENDINGS):
            return [(uri, "")]
        return dicom.frames(uri, self.path)

    def _uri(self, name: str) -> str:
        # A table may name pictures that lie elsewhere.
        if name.startswith("/") or "://" in name:
            return name
        if self.files is None:
            self.files = _files_below(self.path, self.columns.image_folders)
        # A name that is none of the files is a row with an error: ingest looks for it there, and counts it.
        first_folder = self.columns.image_folders[0] if self.columns.image_folders else ""
        expected = "/".join(filter(None, (_folder(self.path), first_folder, name)))
        return self.files.get(name) or self.files.get(name.rpartition("/")[2]) or expected


def _ending_of(name: str) -> str:
    ending = name.rpartition(".")[2].lower()
    return f".{ending}" if ending in ("jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp", "gif") else ".png"


def _folder(path: str) -> str:
    """The folder of a data set whose path may be a file."""
    fs, plain_path = filesystem(path)
    return path.rpartition("/")[0] if fs.get_file_info(plain_path).is_file else path.rstrip("/")


def _files_below(path: str, folders: tuple[str, ...]) -> dict[str, str]:
    """The URIs of the files in the folders below a data set's, by their paths there and by their names."""
    uris: dict[str, str] = {}
    for folder in folders:
        root = "/".join(filter(None, (_folder(path), folder)))
        fs, plain_root = filesystem(root)
        for info in fs.get_file_info(pafs.FileSelector(plain_root, recursive=True, allow_not_found=True)):
            if info.is_file:
                name = info.path.removeprefix(plain_root).lstrip("/")
                uris.setdefault(name, f"{root}/{name}")
                # Many tables name a picture without its folders.
                uris.setdefault(info.base_name, f"{root}/{name}")
    return uris


def draw(annotation: str, size: int) -> PIL.Image.Image | bytes:  # noqa: ARG001 - of `Draw`
    """The picture that an annotation points to: bytes inside a table, or a frame of a DICOM file, in its own size."""
    place = json.loads(annotation)
    if "embedded" in place:
        return embedded_bytes(place["embedded"])
    return dicom.picture(place["dicom"], place["frame"])
