"""Every command, recipe and line of code in the documents is one that the project takes.

A command of ours is given to its own entry point, whose parser, recipe and settings are the real ones, and is stopped
where its work would begin. What cannot be tried here stands in `UNCHECKED`, with the reason. The notebooks run in
`tests/jobs/test_pipeline.py`, the curl commands in `tests/service/test_client.py`.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import yaml

import jobs.entry
from jobs.graph import BY_NAME
from jobs.recipe import Recipe
from jobs.step import Run
from medmm_ray.config import build, load
from medmm_ray.service.config import ServeConfig
from tests.paths import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "cluster/README.md", "notebooks/README.md"]
DOCUMENTS = [name for name in DOCUMENTS if (ROOT / name).is_file()]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
UNCHECKED = {
    "curl": "tests/service/test_client.py sends them to the service",
    "export": "sets variables of the reader's shell",
    "git": "the repository's address is not this checkout's",
    "pip": "tests/cluster/test_locks.py resolves what is installed",
    "sha256sum": "tests/release/test_release.py runs it",
    "jupyter": "is the reader's own; the notebooks run in tests/jobs/test_pipeline.py",
    "tail": "reads a log of the reader's",
    "cluster": "builds an environment: tests/cluster/test_environments.py",
    "ray": "needs a cluster; cluster/lint checks the files that it is given",
    "nvidia-smi": "needs a GPU",
}
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
# What a reader fills in, and a value that could stand there.
FILLED_IN = {
    "recipe.yaml": "jobs/recipes/quickstart.yaml",
    "FOLDER": "folder",
    "FILE": "file.parquet",
    "NAME": "slake",
    "$PWD": "/shared",
}


class ReachedError(BaseException):
    """The command was understood: its work would begin now. No `Exception`, which entry points catch."""


def reached(*_: Any, **__: Any) -> NoReturn:
    raise ReachedError


def blocks(name: str, *languages: str) -> list[str]:
    """The fenced blocks of a document in these languages."""
    return [block[1] for block in BLOCK.findall((ROOT / name).read_text()) if block[0] in languages]


def shell_lines(name: str) -> Iterator[str]:
    """The lines of a document's shell blocks, continued ones as one."""
    for block in blocks(name, "bash", ""):
        joined = re.sub(r"\\\n\s*", " ", block)
        # A quoted text may go on over lines.
        for line in re.split(r"\n(?=(?:[^']*'[^']*')*[^']*$)", joined):
            if line.strip():
                yield line.strip()


def commands(name: str) -> list[list[str]]:
    """The commands of the project's own jobs in a document, blocks and running text, as their words."""
    text = BLOCK.sub("", (ROOT / name).read_text())
    indented = re.findall(r"^    (python -m .*)$", text, re.MULTILINE)
    lines = [*shell_lines(name), *indented, *(" ".join(span.split()) for span in INLINE.findall(text))]
    return [words_of(line) for line in lines if "python -m jobs." in line]


def words_of(line: str) -> list[str]:
    """The module and the arguments of a command, with what its reader fills in."""
    return shlex.split(filled_in(line.partition("python -m ")[2]), comments=True)


def filled_in(line: str) -> str:
    """A command with values in the place of what its reader fills in."""
    line = re.sub(r"jobs\.(<step>|…)", "jobs.sample", line)
    line = re.sub(r"<[^>]*>", "something", line)
    line = re.sub(r"=(…|\.\.\.)", "=something", line).replace("[…]", "")
    line = re.sub(r" …(?= |$)", " recipe.yaml run=/shared/run", line)
    for name, value in FILLED_IN.items():
        line = line.replace(name, value)
    return line


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ModuleType]:
    """Gives the module of a command whose work is not begun."""

    def module_of(name: str) -> ModuleType:
        module = importlib.import_module(name)
        read_arguments = jobs.entry.read_arguments

        def read(*arguments: Any, **named: Any) -> NoReturn:
            read_arguments(*arguments, **named)
            raise ReachedError

        for owner in (jobs.entry, module):
            if hasattr(owner, "read_arguments"):
                monkeypatch.setattr(owner, "read_arguments", read)
        # Where the work begins in jobs that read their words themselves.
        for work in ("read_run", "read_source", "download", "run_pipeline", "print_plan", "check"):
            if hasattr(module, work) and name in ("jobs.compare", "jobs.datasets", "jobs.evaluate_on", "jobs.ingest"):
                monkeypatch.setattr(module, work, reached)
        return module

    monkeypatch.setattr(Run, "__init__", reached)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    return module_of


def entry_of(module: ModuleType, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What ``python -m`` calls with these words."""
    if module.__name__ == "jobs.bench" and words and not words[0].startswith("-"):
        bench = importlib.import_module(
            f"jobs.benches.{words[0]}"
            if (ROOT / f"jobs/benches/{words[0]}.py").is_file()
            else f"jobs.studies.{words[0]}"
        )
        monkeypatch.setattr(bench, "measure", reached)
    name = module.__name__.removeprefix("jobs.")
    if hasattr(module, "_main") and module.__name__ == "jobs.ingest":
        return lambda: int(module._main(list(words)))
    if name in BY_NAME and "main" in vars(module) and module.main is jobs.entry.main:
        return lambda: jobs.entry.main(name, list(words))
    return lambda: int(module.main(list(words)))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_one_that_its_job_takes(
    name: str,
    stopped: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for job, *words in commands(name):
        module = stopped(job)
        if not words:  # named in running text
            assert callable(module.main)
            continue
        call = entry_of(module, words, monkeypatch)
        try:
            status = call()
        except ReachedError:
            continue
        assert status == 0, f"{name}: python -m {job} {' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "line",
    [
        "python -m jobs.pipeline recipe.yaml run=… sample.temprature=1",
        "python -m jobs.sample recipe.yaml run=… temprature=1",
        "python -m jobs.bench scoring repeat=2",
        "python -m jobs.release recipe.yaml run=… exclud=[x]",
        "python -m jobs.export recipe.yaml run=… to=x fromat=hf",
        "python -m jobs.evaluate_on medqa data=<folder> sample.temprature=1",
        "python -m jobs.datasets slaek",
        "python -m jobs.search nosuch.yaml run=… question",
    ],
)
def test_a_wrong_command_would_be_found(
    line: str, stopped: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, *words = words_of(line)
    assert entry_of(stopped(job), words, monkeypatch)() == 2


def test_the_documents_have_many_commands() -> None:
    assert sum(len(commands(name)) for name in DOCUMENTS) > 60


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_shell_line_is_checked_or_says_why_not(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(name):
        words = shlex.split(re.sub(r"\$\([^)]*\)", "value", line), comments=True)
        while words and "=" in words[0]:
            words = words[1:]  # variables of the command
        if not words or "python" in words[0]:
            continue
        program = Path(words[0]).name
        if program == "make":
            assert set(words[1:]) <= targets, line
        elif program == "serve":
            check_serve(words)
        else:
            assert program in UNCHECKED, f"{name}: {line}"


def check_serve(words: Sequence[str]) -> None:
    """``serve run module:builder name=value``: the builder is there, and takes the names."""
    _, run, target, *settings = words
    module, _, builder = target.partition(":")
    assert run == "run"
    assert callable(getattr(importlib.import_module(module), builder))
    load(ServeConfig, None, [re.sub(r"<[^>]*>", "something", word) for word in settings if "=" in word])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_recipe_is_one(name: str, tmp_path: Path) -> None:
    for block in blocks(name, "yaml"):
        values = yaml.safe_load(block)
        if isinstance(values, list):  # entries of a list of sources
            values = {"ingest": {"sources": values}}
        elif set(values) == {"columns"}:  # of one entry
            values = {"ingest": {"sources": [{"name": "own", "reader": "table", "path": "x", **values}]}}
        if set(values) <= set(Recipe.model_fields):
            file = tmp_path / "recipe.yaml"
            file.write_text(yaml.safe_dump({"extends": str(ROOT / "jobs/recipes/quickstart.yaml"), **values}))
            load(Recipe, file)
        else:
            build(ServeConfig, {"model": "x", **values}, name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_line_of_python_parses_and_what_it_imports_is_there(name: str) -> None:
    for block in blocks(name, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def anchor(heading: str) -> str:
    """What the hub of the code calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_in_the_list(name: str) -> None:
    listed = (ROOT / "docs/README.md").read_text()
    if name.startswith("docs/") and name != "docs/README.md":
        assert f"]({name.removeprefix('docs/')})" in listed


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_and_target_that_is_named_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text):
        assert (folder / link).exists(), f"{name} links {link}"
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for place in re.findall(r"\]\(#([^)]+)\)", text):
        assert place in headings, f"{name} links its part {place}"
    for file in re.findall(r"`((?:medmm_ray|jobs|tests|cluster|docs|notebooks)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), f"{name} names {file}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"{name} names make {target}"
