"""Every setting that a message, a help text or a document names is one that a recipe has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest
from pydantic import BaseModel

from jobs.recipe import Recipe
from medmm_ray.config_tree import inner_configs
from tests.paths import ROOT

# ``judge.num_documents`` in words, with or without the "=" and value that a reader would type after it.
NAMED = re.compile(r"(?<![\w./{<-])([a-z_]+(?:\.[a-z_]+)+)(=?)(?![\w(])")
# A benchmark has settings of its own: `tests/test_documents.py` gives its command to the benchmark.
BENCHMARK = re.compile(r"`python -m jobs\.bench [^`]*`")
FILE_ENDINGS = {
    "py",
    "md",
    "json",
    "jsonl",
    "html",
    "yaml",
    "yml",
    "safetensors",
    "bin",
    "csv",
    "zip",
    "png",
    "svg",
    "txt",
}
DOCUMENTS = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "cluster/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
SOURCES = [path.relative_to(ROOT) for folder in ("medmm_ray", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]


def texts_of(path: Path) -> Iterator[str]:
    """The words of a document; of a module its texts, each part of a formatted one apart."""
    if path.suffix != ".py":
        yield BENCHMARK.sub("", path.read_text())
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named_settings(path: Path) -> set[str]:
    """What looks like a setting: it is given a value, or it begins with a section's name."""
    names = set()
    for text in texts_of(path):
        for name, equals_sign in NAMED.findall(text):
            section, *_, last = name.split(".")
            if equals_sign or (section in Recipe.model_fields and last not in FILE_ENDINGS):
                names.add(name)
    return names


def exists(name: str) -> bool:
    configs: list[type[BaseModel]] = [Recipe]
    for part in name.split("."):
        fields = [config.model_fields[part] for config in configs if part in config.model_fields]
        if not fields:
            return False
        if all(get_origin(field.annotation) is dict and not inner_configs(field.annotation) for field in fields):
            return True  # its keys are free
        configs = [inner for field in fields for inner in inner_configs(field.annotation)]
    return True


@pytest.mark.parametrize("path", [*map(Path, DOCUMENTS), *SOURCES], ids=str)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    unknown = {name for name in named_settings(ROOT / path) if not exists(name)}
    assert not unknown, f"{path} names settings that no recipe has: {', '.join(sorted(unknown))}"
