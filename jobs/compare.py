"""What changed between two evaluated runs, and whether by more than chance: ``python -m jobs.compare A B [to=FOLDER]``.

A and B are run folders or URIs (or the folders of their reports). Questions that both have are compared one by one:
each figure's difference with its interval and p-value, by group too, what was set otherwise, the questions that changed
most. Leaves ``comparison.json`` and ``comparison.html`` in FOLDER (without one: in B).
"""

import sys
from collections.abc import Sequence

import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console

from jobs.entry import guarded
from jobs.evaluate import OUTCOMES
from medmm_ray.config import Config, ConfigError, load
from medmm_ray.data.artifacts import read_file
from medmm_ray.data.json_documents import from_json, to_json
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.pages.comparison_page import render, summary
from medmm_ray.stats.resampling import Resampling
from medmm_ray.steps.evaluate import EvaluationReport
from medmm_ray.steps.evaluate.comparison import Comparison, Run, compare


class CompareConfig(Config):
    """How runs are compared."""

    to: str = ""
    """Folder or URI for comparison.json and comparison.html; empty: that of the second run."""
    bootstrap_samples: int = Field(2000, ge=1)
    """Resamples of the questions' clusters for the 95 % intervals."""
    seed: int = 0
    """Seed of resamples and random signs."""


def main(words: Sequence[str] | None = None) -> int:
    """``python -m jobs.compare``."""
    arguments = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(arguments))


def _main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    folders: list[str] = []
    settings: list[str] = []
    for word in words:
        (settings if "=" in word else folders).append(word)
    if len(folders) != 2:
        raise ConfigError(f"{len(folders)} runs are named; expected two: python -m jobs.compare runs/a runs/b")
    config = load(CompareConfig, None, settings)
    names = short_names(*folders)
    first, second = (read_run(folder, name) for folder, name in zip(folders, names, strict=True))
    comparison = compare(first, second, Resampling(config.bootstrap_samples, config.seed))
    to = config.to or folders[1]
    write(comparison, to)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(summary(comparison), f"\n{to.rstrip('/')}/comparison.html", highlight=False)
    return 0


def short_names(first: str, second: str) -> tuple[str, str]:
    """The last parts of two paths, as many as tell them apart."""
    first_parts, second_parts = first.rstrip("/").split("/"), second.rstrip("/").split("/")
    for length in range(1, max(len(first_parts), len(second_parts)) + 1):
        names = "/".join(first_parts[-length:]), "/".join(second_parts[-length:])
        if names[0] != names[1]:
            return names
    return f"{names[0]} (first)", f"{names[1]} (second)"


def read_run(folder: str, name: str) -> Run:
    """An evaluated run; raises `ConfigError` where its report or its outcomes are not there."""
    report_file, outcomes_file = f"{folder.rstrip('/')}/report.json", f"{folder.rstrip('/')}/{OUTCOMES}"
    content = read_file(*filesystem(report_file))
    fs, path = filesystem(outcomes_file)
    if content is None or not fs.get_file_info(path).is_file:
        missing = report_file if content is None else outcomes_file
        raise ConfigError(f"{missing} does not exist; evaluate the run first: python -m jobs.evaluate <its recipe>")
    return Run(name, from_json(EvaluationReport, content), pq.read_table(path, filesystem=fs))


def write(comparison: Comparison, to: str) -> None:
    """comparison.json and comparison.html in a folder, which is made."""
    files = {"comparison.json": to_json(comparison), "comparison.html": render(comparison).encode()}
    for name, content in files.items():
        fs, path = filesystem(f"{to.rstrip('/')}/{name}")
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        write_file(fs, path, content)


if __name__ == "__main__":
    sys.exit(main())
