"""Every rule of `cluster.lint` on a file that breaks it (broken_files.yaml); none of them on the files as they are."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster.lint.__main__ import RULES, findings, main
from cluster.lint.project import Project, sentence
from tests.paths import ROOT

BROKEN = yaml.safe_load(Path(__file__).with_name("broken_files.yaml").read_text())
Rule = Callable[..., Iterator[str]]


def rule_named(kind: str, name: str) -> Rule:
    (rule,) = [rule for rule in RULES[kind] if rule.__name__ == name]
    return rule


def cases() -> Iterator[object]:
    for kind, rules in BROKEN.items():
        for name, files in rules.items():
            for number, (file, *change) in enumerate(files):
                yield pytest.param(rule_named(kind, name), file, *change, id=f"{kind}-{name}-{number}")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout whose cluster files may be changed."""
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("medmm_ray", "jobs", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_files_as_they_are_break_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == f"cluster/: {sum(map(len, RULES.values()))} rules hold\n"


@pytest.mark.parametrize(("rule", "file", "old", "new", "words"), cases())
def test_a_file_that_breaks_a_rule_is_found(rule: Rule, file: str, old: str, new: str, words: str, copy: Path) -> None:
    path = copy / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    faults = findings(Project(copy), only=rule)
    assert words in "\n".join(fault.words for fault in faults)
    assert {fault.rule for fault in faults} == {rule.__name__}


def test_every_rule_has_a_sentence_and_a_file_that_breaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    names = {kind: [rule.__name__ for rule in rules] for kind, rules in RULES.items()}
    assert {kind: list(rules) for kind, rules in BROKEN.items()} == names
    document = (ROOT / "docs" / "cluster.md").read_text()
    assert re.findall(r"^\| `(\w+)`", document, re.MULTILINE) == [name for kind in names.values() for name in kind]
    assert main(["--rules"]) == 0
    listed = capsys.readouterr().out
    for rules in RULES.values():
        for rule in rules:
            assert sentence(rule).endswith(".")
            assert sentence(rule) in listed


def test_a_finding_is_a_line_and_an_exit_status(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "cluster" / "serve" / "config.yaml"
    path.write_text(path.read_text().replace("proxy_location", "proxy_locaton"))
    assert main([], copy) == 1
    printed = capsys.readouterr().err
    assert "cluster/serve/config.yaml: names_what_serve_knows: proxy_locaton is no key of Serve's\n" in printed
