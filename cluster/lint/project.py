"""The files that are checked, and what of the project they have to agree with."""

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

OPTION = "#+ "  # begins a line that a reader may take


@dataclass(frozen=True)
class Finding:
    """What is wrong in a file, and the rule that says so."""

    path: Path
    rule: str
    words: str


class Project:
    """A checkout: its cluster files, and what pyproject.toml says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cluster = root / "cluster"

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        """The content of pyproject.toml."""
        return tomllib.loads((self.root / "pyproject.toml").read_text())

    @property
    def version(self) -> str:
        """The project's version, which is that of its images."""
        return str(self.pyproject["project"]["version"])

    @property
    def extras(self) -> set[str]:
        """The extras that pyproject.toml has."""
        return set(self.pyproject["project"]["optional-dependencies"])

    @cached_property
    def launchers(self) -> "list[YamlFile]":
        """The files of Ray's cluster launcher."""
        files = [YamlFile(path, path.read_text()) for path in sorted((self.cluster / "launcher").glob("*.yaml"))]
        return [file for file in files if "available_node_types" in file.documents[0]]

    @cached_property
    def manifests(self) -> "list[YamlFile]":
        """The files for Kubernetes; one with options twice, without and with them."""
        files = []
        for path in sorted((self.cluster / "kuberay").glob("*.yaml")):
            files += with_options(path)
        return files

    @cached_property
    def accelerators(self) -> set[str]:
        """The kinds of GPUs that the shipped recipes ask for."""
        kinds: set[str] = set()
        for path in (self.root / "jobs" / "recipes").glob("*.yaml"):
            kinds.update(re.findall(r"\baccelerator_type: (\w+)", path.read_text()))
        return kinds

    @cached_property
    def dockerfiles(self) -> list[Path]:
        """The images' files."""
        return sorted(self.cluster.glob("Dockerfile.*"))

    @cached_property
    def texts(self) -> dict[Path, str]:
        """All files of cluster/ that name things of the project."""
        paths = [path for path in self.cluster.rglob("*") if path.suffix in (".yaml", ".sh", ".md")]
        return {path: path.read_text() for path in sorted([*paths, *self.dockerfiles])}


@dataclass(frozen=True)
class YamlFile:
    """A YAML file and what it holds."""

    path: Path
    text: str
    has_options: bool = False

    @cached_property
    def documents(self) -> list[Any]:
        """Its documents, in order."""
        return list(yaml.safe_load_all(self.text))


def with_options(path: Path) -> list[YamlFile]:
    """A file as it is and, where it has options, once more with all of them taken."""
    text = path.read_text()
    files = [YamlFile(path, text)]
    if OPTION in text.replace(f"`{OPTION}`", ""):
        files.append(YamlFile(path, text.replace(OPTION, ""), has_options=True))
    return files


FileT = TypeVar("FileT")
Rule = Callable[[FileT, Project], Iterator[str]]


def apply(rules: Iterable[Rule[FileT]], file: FileT, path: Path, project: Project) -> Iterator[Finding]:
    """What each rule finds in a file."""
    for rule in rules:
        for words in rule(file, project):
            yield Finding(path, rule.__name__, words)


def sentence(rule: Callable[..., Any]) -> str:
    """What a rule holds."""
    return (rule.__doc__ or "").strip().splitlines()[0]
