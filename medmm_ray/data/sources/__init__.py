"""Sources: one module a data set, each with ``read(request: SourceRequest) -> SourceData``.

A source knows its own files and nothing of tables: it says which images exist (or how to draw them), which questions
refer to them, which documents and worked solutions come along. `medmm_ray.steps.ingest` turns that into tables.

A data set that brings solutions and labels of its own also has ``solved(request) -> Iterator[SolvedQuestion]``, one for
each of `SourceData.questions`, in their order, read as a stream; `medmm_ray.data.imported` turns those into tables.

A source that draws its pictures knows everything of them: ``drawn_picture(annotation) -> DrawnPicture`` says whether a
step is right about one, and what it shows, in words.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import PIL.Image

from medmm_ray.config import Config, ConfigError
from medmm_ray.data.columns import ColumnMap
from medmm_ray.data.records import RetrievedImage, StepLabel

SOLVED = ("med_prm", "medmm", "meds3", "table")
"""Readers that may bring solutions; a table does where its columns have steps."""
WITHOUT_FILES = ("phantom", "phantom_reports")
"""Sources that make their data: they read no folder."""
WITH_TRUTH = ("phantom",)
"""Sources whose questions come with `drawn_picture`, so that the truth of every step is known."""


Draw = Callable[[str, int], PIL.Image.Image | bytes]
"""Makes the picture that an annotation describes, of so many pixels a side where the source draws it; or its bytes."""


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

    `name` to `columns` are for the readers `table` and `dicom`: the data set's name, its files by split, its columns.
    `num_extra_images` to `seed` are for sources that make their data.
    """

    path: str = ""
    name: str = ""
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: ColumnMap | None = None
    num_train: int | None = None
    num_test: int | None = None
    num_extra_images: int = 0
    num_worked: int = 1
    hardness: Hardness | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image. `uri` is where its file lies; for a `drawn` one, its name below the folder that the job gives."""

    uri: str
    split: str
    modality: str
    diagnosis: str = ""
    annotation: str = ""
    drawn: bool = False


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
    """One document of a corpus; `date` and `modality` as of `records.Document`."""

    corpus: str
    title: str
    text: str
    date: str = ""
    modality: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceData:
    """All that a source yields. `draw` makes pictures that are no files of their own: drawn, inside a table, DICOM."""

    images: Sequence[SourceImage] = ()
    questions: Sequence[SourceQuestion] = ()
    documents: Sequence[SourceDocument] = field(default_factory=tuple)
    draw: Draw | None = None


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


def brings_solutions(request: SourceRequest, reader: str) -> bool:
    """Whether a source of this reader brings solutions: a table does where its columns have steps."""
    if reader == "table":
        return request.columns is not None and request.columns.steps is not None
    return reader in SOLVED


def load_with_truth(name: str) -> SourceWithTruth:
    """The source `name`, which must know the truth of its pictures."""
    if name not in WITH_TRUTH:
        raise ConfigError(f"source {name!r} does not know its pictures; those that do: {', '.join(WITH_TRUTH)}")
    return cast(SourceWithTruth, load(name))
