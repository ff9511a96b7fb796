"""Published data sets, declared: one YAML file each in this folder, with licence, access, counts, and how it is read.

Enters: a name. Leaves: its `DataSet`. What is declared here is what a recipe may say of data of its own: files by split
and columns (`medmm_ray.data.columns`). A set that is published in several forms has one `Form` for each.
"""

import fnmatch
import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Literal

import yaml
from pydantic import Field

from medmm_ray.config import Config, ConfigError, build
from medmm_ray.data.columns import ColumnMap


class Form(Config):
    """How one published form of a data set is read."""

    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Patterns of the files of each split, below the data set's folder."""
    columns: ColumnMap | None = None
    """Which columns hold what."""


class DataSet(Config):
    """A published data set."""

    title: str
    """Its name as its authors write it."""
    about: str
    """What it holds, in a line."""
    licence: str
    """Its licence, as its publishers state it."""
    licence_id: str = ""
    """The licence as the hub spells it (mit, cc-by-nc-4.0); empty: it is none of the hub's, or one for each row."""
    access: Literal["open", "agreement", "credentialed"] = "open"
    """Whether anyone may download it, must accept terms first, or needs an account that is checked."""
    get: str
    """How it is got, and what has to lie in the folder."""
    hub: str = ""
    """Its repository among the hub's data sets; empty: it is not there."""
    revision: str = "main"
    """The hub's revision."""
    reader: str = "table"
    """Module of medmm_ray.data.sources that reads it."""
    forms: tuple[Form, ...] = ()
    """table: the forms in which it is published; the one whose files are there is read."""
    brings: Literal["questions", "pictures", "steps"] = "questions"
    """Questions; pictures without questions (write_questions writes them); or questions with labelled solutions."""
    modality: str = "clinical"
    """The modality of most of it."""
    counts: dict[str, int] = Field(default_factory=dict)
    """Questions of each split, or pictures where it brings none, as published."""
    benchmark: bool = False
    """Whether papers report figures of its test split: then that stays as published."""


@functools.cache
def data_sets() -> Mapping[str, DataSet]:
    """All declared data sets by their names."""
    declared = {}
    folder = importlib.resources.files(__name__)
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        # Hashes lie beside, in a folder.
        name, dot, ending = file.name.rpartition(".")
        if dot and ending == "yaml":
            declared[name] = build(DataSet, yaml.safe_load(file.read_text()), file.name)
    return declared


def form_at(data_set: DataSet, path: str, uris: Sequence[str]) -> Form:
    """The form of a data set of which most splits are among the files at `path`, with the patterns that some match."""
    # Whoever has the test set alone has a form all the same.
    best = Form(columns=data_set.forms[0].columns if data_set.forms else None)
    for form in data_set.forms:
        files = {}
        for split, patterns in form.files.items():
            matching = [pattern for pattern in patterns if any(fnmatch.fnmatch(uri, f"*/{pattern}") for uri in uris)]
            if matching:
                files[split] = tuple(matching)
        if len(files) > len(best.files):
            best = form.model_copy(update={"files": files})
    if data_set.forms and not best.files:
        expected = sorted(
            {pattern for form in data_set.forms for of_split in form.files.values() for pattern in of_split}
        )
        raise ConfigError(
            f"{path} has {len(uris)} tables, and none is of {data_set.title}; expected {', '.join(expected)}. "
            f"{data_set.get}"
        )
    return best


def benchmarks() -> frozenset[str]:
    """The names of the data sets whose test split papers report figures of."""
    return frozenset(name for name, data_set in data_sets().items() if data_set.benchmark)
