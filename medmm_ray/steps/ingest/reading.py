"""Which sources a run reads, and what each yields."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from medmm_ray.config import Config, ConfigError, execution
from medmm_ray.data.columns import ColumnMap
from medmm_ray.data.datasets import data_sets, form_at
from medmm_ray.data.documents import DocumentsConfig
from medmm_ray.data.hub_files import ensure
from medmm_ray.data.rows import list_tables
from medmm_ray.data.sources import (
    WITHOUT_FILES,
    Hardness,
    SourceData,
    SourceImage,
    SourceRequest,
    load,
)

if TYPE_CHECKING:
    pass


class SourceConfig(Config):
    """One data set. Its settings name the input itself, so they count as part of the result."""

    name: str = "phantom"
    """The data set: one that python -m jobs.datasets lists, or, with a `reader`, a name for data of your own."""
    reader: str = ""
    """Who reads data of your own: table (questions by `columns`), dicom (a folder of pictures); empty: by the name."""
    path: str = ""
    """Folder, file or URI of the data set; empty for a source that makes its data (phantom)."""
    hub: str = ""
    """Data set of the Hugging Face hub (org/name) that is downloaded into `path` when it is not there."""
    revision: str = ""
    """Commit of `hub`, 40 digits."""
    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """table: patterns of the files of each split below `path`; `all` where rows say it. Empty: by the files' names."""
    columns: ColumnMap | None = None
    """table: which columns hold what."""
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


class IngestConfig(Config):
    """What to read: data sets, and documents to retrieve from."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """The data sets, each by its name; their tables are one."""
    documents: tuple[DocumentsConfig, ...] = ()
    """Corpora to retrieve from, besides the documents that the data sets bring."""
    seed: int = 0
    """phantom: seed of the cases that are drawn."""
    batch_size: int = execution(64, ge=1)
    """Images that a worker opens at a time."""
    num_cpus: float = execution(0.5, ge=0)
    """Logical CPU cores that an image worker asks for."""

    @model_validator(mode="after")
    def _names_each_once(self) -> "IngestConfig":
        if not self.sources:
            raise ValueError("sources is empty; name a data set: sources: [{name: ..., path: ...}]")
        counts = Counter(source.name for source in self.sources)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(
                f"sources has {repeated[0]!r} twice: ids are made of the name; give one its own name and `reader`"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The names of the sources, in their order."""
        return [source.name for source in self.sources]

    @property
    def num_extra_images(self) -> int:
        """Images without a question that all sources together make."""
        return sum(source.num_extra_images for source in self.sources)

    def num_questions(self, split: str) -> int | None:
        """Questions of a split that all sources together make or take; None where one takes all that it has."""
        limits = [source.num_train if split == "train" else source.num_test for source in self.sources]
        numbers = [limit for limit in limits if limit is not None]
        return sum(numbers) if len(numbers) == len(limits) else None


@dataclass(frozen=True)
class ReadSource:
    """A source of a run, and what it yields."""

    config: SourceConfig
    data: SourceData

    def uri(
        self,
        image: SourceImage,
        folder: str,
    ) -> str:
        """Where a picture of the source lies; those that are drawn lie below `folder`."""
        return f"{folder.rstrip('/')}/{self.config.name}/{image.uri}" if image.drawn else image.uri


def read_sources(config: IngestConfig) -> list[ReadSource]:
    """All that the configured sources yield; a `ConfigError` or `TableError` names the file and the field at fault."""
    return [ReadSource(source, read_source(source, config.seed)) for source in config.sources]


ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z")
"""Endings of what holds files and is none that is read."""


def read_source(source: SourceConfig, seed: int = 0) -> SourceData:
    """All that one source yields."""
    if source.name not in WITHOUT_FILES and not source.path:
        raise ConfigError(
            f"ingest.sources: {source.name!r} has no path, and needs the folder that holds its files; "
            f"python -m jobs.datasets {source.name} says how to get it"
        )
    if source.path.endswith(ARCHIVES):
        raise ConfigError(f"{source.path} is no folder: it is an archive; unpack it, and name the folder")
    if source.hub:
        ensure(source.hub, source.revision, source.path)
    request = request_of(source, seed)
    return load(reader_of(source)).read(request)


def reader_of(source: SourceConfig) -> str:
    """The module of medmm_ray.data.sources that reads a source."""
    if source.reader:
        return source.reader
    if data_set := data_sets().get(source.name):
        return data_set.reader
    return "table" if source.columns else source.name


def request_of(source: SourceConfig, seed: int = 0) -> SourceRequest:
    """What is asked of a source; what a published data set's declaration says of files and columns is filled in."""
    request = SourceRequest(
        path=source.path,
        name=source.name,
        files=source.files,
        columns=source.columns,
        num_train=source.num_train,
        num_test=source.num_test,
        num_extra_images=source.num_extra_images,
        num_worked=source.num_worked,
        hardness=source.hardness,
        seed=seed,
    )
    declared = data_sets().get(source.name)
    # A reader that is named reads by what the recipe says alone.
    if source.reader or declared is None or declared.reader != "table":
        return request
    form = form_at(declared, source.path, list_tables(source.path))
    return replace(request, files=source.files or form.files, columns=source.columns or form.columns)
