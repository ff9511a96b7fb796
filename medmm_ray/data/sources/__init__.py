"""Sources: one module a data set, each with ``read(request: SourceRequest) -> SourceData``.

A source knows its own files and nothing of tables: it says which images exist (or how to draw them), which questions
refer to them, which documents and worked solutions come along. `medmm_ray.steps.ingest` turns that into tables.

A data set that brings solutions and labels of its own also has ``solved(request) -> Iterator[SolvedQuestion]``, one for
each of `SourceData.questions`, in their order, read as a stream; `medmm_ray.data.imported` turns those into tables.

A source that draws its pictures knows everything of them: ``drawn_picture(annotation) -> DrawnPicture`` says whether a
step is right about one, and what it shows, in words.
"""

import codecs
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar, cast

import PIL.Image
from pyarrow import fs as pafs
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from medmm_ray.config import Config, ConfigError
from medmm_ray.data.records import RetrievedImage, StepLabel
from medmm_ray.data.tables import TableError, filesystem
from medmm_ray.text import LETTERS

SOLVED = ("med_prm", "medmm", "meds3")
"""Sources that bring solutions."""
WITHOUT_FILES = ("phantom", "phantom_reports")
"""Sources that make their data: they read no folder."""
WITH_TRUTH = ("phantom",)
"""Sources whose questions come with `drawn_picture`, so that the truth of every step is known."""


class Hardness(Config):
    """How hard drawn pictures are to read; with the defaults pooled image tokens are enough."""

    max_findings: int = 1
    """Findings of a picture: one to so many (a normal chest stays normal), at most one a lung, and the heart."""
    size: float = 1.0
    """Factor on the size of findings: at 0.6 a nodule is some 7 % of the picture wide."""
    contrast: float = 1.0
    """Factor on the density of findings."""
    noise: float = 1.0
    """Factor on the detector's noise."""


@dataclass(frozen=True, kw_only=True)
class SourceRequest:
    """What is asked of a source. `num_train` and `num_test` count questions; None is "all that there are".

    `num_extra_images` to `seed` are for sources that make their data.
    """

    path: str = ""
    documents_path: str = ""
    num_train: int | None = None
    num_test: int | None = None
    num_extra_images: int = 0
    num_worked: int = 1
    hardness: Hardness | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image. `uri` is where its file lies; for a drawn one, its name below the folder that the job gives."""

    uri: str
    split: str
    modality: str
    diagnosis: str = ""
    annotation: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceQuestion:
    """One question as the source has it.

    `name` is the source's own id, for messages and to find repeats; `images` are uris of the source's images;
    `worked` holds worked solutions, each a list of steps. `question_id` and `source` are kept where the data set is an
    export of ours; else both are made here. `dataset` is the data set's name where that is not the reader's;
    `published_type`, `topic` and `group` as in `Question`, the group in the data set's own words (the number of a
    patient or study): empty where questions share no more than pictures. `error` is ``kind: message`` for a row that is
    not usable.
    """

    name: str
    split: str
    modality: str
    question: str
    answer: str
    answer_type: str
    difficulty: str = ""
    options: Sequence[str] = ()
    images: Sequence[str] = ()
    worked: Sequence[Sequence[str]] = ()
    question_id: str = ""
    source: str = ""
    dataset: str = ""
    published_type: str = ""
    topic: str = ""
    group: str = ""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceDocument:
    """One passage of a corpus."""

    corpus: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class SourceData:
    """All that a source yields. `draw(annotation, size)` makes the pictures of a source that has no files."""

    images: Sequence[SourceImage] = ()
    questions: Sequence[SourceQuestion] = ()
    documents: Sequence[SourceDocument] = field(default_factory=tuple)
    draw: Callable[[str, int], PIL.Image.Image] | None = None


@dataclass(frozen=True, kw_only=True)
class SourceLabels:
    """One source's labels of one solution; with an `error` where they cannot be used, and then without steps.

    `saw_answer`: whoever labelled was shown the gold answer.
    """

    source: str
    annotator: str
    steps: Sequence[StepLabel] = ()
    saw_answer: bool = False
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceSolution:
    """A solution that a data set brings: its text, its steps, the answer it states and whether that is right."""

    text: str
    steps: Sequence[str]
    answer: str | None
    correct: bool | None
    labels: Sequence[SourceLabels] = ()


@dataclass(frozen=True, kw_only=True)
class SolvedQuestion:
    """What a data set brings of one question, besides the question.

    `tree_solutions` are those that lay in a table of their own, beside the samples.
    """

    solutions: Sequence[SourceSolution] = ()
    tree_solutions: Sequence[SourceSolution] = ()
    documents: Sequence[str] = ()
    images: Sequence[RetrievedImage] = ()


class Source(Protocol):
    """What a module of this package offers."""

    def read(self, request: SourceRequest) -> SourceData:
        """Read or make the data; a fault of the files is a `ConfigError` or `TableError` naming file and field."""


class SolvedSource(Source, Protocol):
    """A source that brings solutions."""

    def solved(self, request: SourceRequest) -> Iterator[SolvedQuestion]:
        """One for each of ``read(request).questions``, in their order, as a stream."""


class AnsweredQuestion(Protocol):
    """What a statement of the answer is compared with: the options, and the right one's letter."""

    @property
    def options(self) -> Sequence[str]:
        """The texts of the options, in their order."""

    @property
    def answer(self) -> str:
        """The letter of the right option."""


class DrawnPicture(Protocol):
    """A picture of which everything is known."""

    def truth(self, step: str, question: AnsweredQuestion | None = None) -> bool | None:
        """Whether a step is right about the picture and the question's answer; None: nothing in it can be checked."""

    def captions(self) -> Sequence[str]:
        """Ways to say what the picture shows."""


class SourceWithTruth(Source, Protocol):
    """A source that draws its pictures."""

    def drawn_picture(self, annotation: str) -> DrawnPicture:
        """The picture that `annotation` describes; raises `ValueError` where that is of something else."""


def names() -> list[str]:
    """The names of all sources, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Source:
    """The source module `name`; a `ConfigError` names the known ones."""
    if name not in names():
        raise ConfigError(f"source {name!r} is unknown; known sources: {', '.join(names())}")
    return cast(Source, importlib.import_module(f"{__name__}.{name}"))


def load_solved(name: str) -> SolvedSource:
    """The source `name`, which must bring solutions."""
    if name not in SOLVED:
        raise ConfigError(f"source {name!r} brings no solutions; those that do: {', '.join(SOLVED)}")
    return cast(SolvedSource, load(name))


def load_with_truth(name: str) -> SourceWithTruth:
    """The source `name`, which must know the truth of its pictures."""
    if name not in WITH_TRUTH:
        raise ConfigError(f"source {name!r} does not know its pictures; those that do: {', '.join(WITH_TRUTH)}")
    return cast(SourceWithTruth, load(name))


def stream_json(uri: str) -> Iterator[Any]:
    """The entries of a file with one JSON list, one by one; a `ConfigError` names the file and the fault.

    A byte order mark is passed over. A list of nothing is a fault too. No text of the file enters a message.
    """
    import ijson

    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check `path` of the ingest section")
    count = 0
    with fs.open_input_stream(path) as stream:
        start = stream.read(_HEAD_BYTES)
    mark_length = _check_start(uri, start)
    with fs.open_input_stream(path) as stream:
        stream.read(mark_length)
        try:
            # One entry at a time: published files have gigabytes. Floats, as of json.loads, and no Decimals.
            for entry in ijson.items(stream, "item", use_float=True):
                count += 1
                yield entry
        except ijson.JSONError as error:
            raise ConfigError(f"{uri} is not a valid JSON list: {_json_fault(error)} (after {count} entries)") from None
    if not count:
        raise ConfigError(f"{uri} has no entry: expected one JSON list of objects, [{{...}}, {{...}}]")


def _check_start(uri: str, start: bytes) -> int:
    """The length of the byte order mark; a `ConfigError` where the first bytes are not those of a list in UTF-8."""
    if start.startswith(_UTF16_MARKS):
        raise ConfigError(f"{uri} is UTF-16 text; save it as UTF-8")
    mark_length = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    # The parser would read an object to its end and find no list in it.
    if start[mark_length:].lstrip().startswith(b"{"):
        raise ConfigError(
            f"{uri} has no entry: expected one JSON list of objects, [{{...}}, {{...}}], and it begins with an object. "
            "If it has an object a line (JSON lines), make it a list: jq -s . lines.jsonl > list.json. If an object "
            "stands around the list, take the list out of it"
        )
    return mark_length


_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_HEAD_BYTES = 64  # white space before the first bracket and more


def _json_fault(error: Exception) -> str:
    """What is wrong with JSON in one line, without the text that stands there."""
    words, _, excerpt = str(error).strip().partition("\n")
    constant = re.search(r"-?\b(?:NaN|Infinity)\b", excerpt)
    if constant:
        return (
            f"{constant[0]} stands where JSON has numbers and null alone; write null for a value that is missing "
            "(json.dump(..., allow_nan=False) finds such values when the file is made)"
        )
    return words.rstrip(".")


def files_at(uri: str, ending: str = ".json") -> list[str]:
    """The file itself, or the files of a folder with this ending."""
    fs, path = filesystem(uri)
    return [uri] if fs.get_file_info(path).is_file else list_files(uri, ending)


def read_json(uri: str) -> Any:
    """The JSON value in a file on any filesystem; a `ConfigError` names the file and the fault."""
    try:
        return json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{uri} is not valid JSON: {error}") from None


def read_text(uri: str) -> str:
    """A file's text, without a byte order mark; a `ConfigError` where there is no such file, or it is no UTF-8."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise ConfigError(f"{uri} does not exist; check `path` and `documents_path` of the ingest section")
    with fs.open_input_stream(path) as stream:
        content: bytes = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri} is not UTF-8 text: {error}; save it as UTF-8") from None


def read_lines(uri: str) -> list[str]:
    """The lines of a text file that are not empty."""
    lines = read_text(uri).split("\n")
    return list(filter(str.strip, lines))


def list_files(uri: str, ending: str) -> list[str]:
    """The files of a folder whose names have this ending, sorted; a `ConfigError` where there is none."""
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    names = []
    for info in infos:
        if info.is_file and info.base_name.endswith(ending):
            names.append(info.base_name)
    if not names:
        raise ConfigError(f"{uri} has no *{ending} file; check `path` of the ingest section")
    # Sorted: the order of a listing differs between filesystems, and questions keep the order of the files.
    return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]


def read_documents(uri: str) -> list[SourceDocument]:
    """Documents from a JSONL file of ``{"title": …, "text": …}`` (and optionally ``"corpus"``); "" gives none."""
    if not uri:
        return []
    corpus = uri.rstrip("/").rsplit("/", 1)[-1].partition(".")[0]
    documents = []
    for row in read_jsonl(_Document, uri):
        name = corpus if row.corpus is None else row.corpus
        documents.append(
            SourceDocument(
                corpus=name,
                title=row.title or "",
                text=row.text,
            )
        )
    return documents


# Entries, checked


class Entry(BaseModel):
    """What a source reads of a record in its files, with types; fields without a name here are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)  # strict: a number is no text, and no text a number


EntryT = TypeVar("EntryT", bound=Entry)
# What pydantic calls a wrong type, in the words of a JSON file.
_EXPECTED = {
    "string_type": "text",
    "list_type": "a list",
    "too_short": "a list with something in it",
    "model_type": "an object",
    "float_type": "a number",
}


def checked(entry: type[EntryT], row: Any, where: str) -> EntryT:
    """`row` as an `entry`; a `TableError` names `where`, the first field at fault, and what was expected in it."""
    try:
        return entry.model_validate(row)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        # "solutions[2].answer": where a reader of the file looks.
        parts = []
        for part in fault["loc"]:
            parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        field = "".join(parts).lstrip(".")
        if fault["type"] == "missing":
            raise TableError(f"{where}: the field {field!r} is missing; it has {sorted(fault['input'])}") from None
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = _EXPECTED.get(fault["type"]) or message
        raise TableError(f"{where}: {field or 'it'} must be {expected}, not {_describe(fault['input'])}") from None


def read_jsonl(entry: type[EntryT], uri: str) -> Iterator[EntryT]:
    """The lines of a JSONL file that are not empty, each as an `entry`; a `TableError` names the line at fault."""
    for number, line in enumerate(read_text(uri).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TableError(f"{uri} line {number} is not valid JSON: {error}") from None
        yield checked(entry, row, f"{uri} line {number}")


class _Document(Entry):
    title: str | None
    text: str
    corpus: str | None = None


def _describe(value: Any) -> str:
    """A wrong value in a message, without what a patient's text could be in."""
    if value is None:
        return "null"
    if isinstance(value, str) and len(value) > 20:
        return f"a text of {len(value)} characters"
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)


def _truth(value: Any) -> bool:
    if value not in (0, 1, "0", "1"):
        raise ValueError("0 or 1, true or false")
    return value in (1, "1")


def _texts(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    # A missing letter would shift the answers behind it.
    if sorted(value) != list(LETTERS[: len(value)]):
        raise ValueError(f"a list, or texts by their letters from A on; it has {sorted(value)}")
    return [value[letter] for letter in sorted(value)]


def _text(value: Any) -> Any:
    return "" if value is None else value


Words = Annotated[str, BeforeValidator(_text)]
"""A text; null is an empty one."""
Truth = Annotated[bool, BeforeValidator(_truth)]
"""True or false, 1 or 0, as numbers or texts."""
Texts = Annotated[list[str], BeforeValidator(_texts)]
"""A list of texts; one text is a list of one, null an empty one."""
Options = Annotated[list[str], BeforeValidator(_options)]
"""A list of texts, or an object {"A": text, "B": text, …}."""
