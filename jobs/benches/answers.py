"""How answers are read: the MIRAGE leaderboard's figures of gpt-3.5 from its stored chains of thought.

Baseline is the published figure, ours the named grader that follows the leaderboard's rule; then the product's own
extractor on the same replies: its accuracy beside the grader's (an unread reply is wrong; the leaderboard answers A),
and the share of replies that it reads. It is not tuned to this table.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config, ConfigError
from medmm_ray.data.sources import SourceRequest, list_files, mirage, read_lines
from medmm_ray.text import extract_answer, mirage_answer

SETS = ("mmlu", "medqa", "medmcqa", "pubmedqa", "bioasq")
PUBLISHED = {
    "cot": dict(zip((*SETS, "mean"), (72.91, 65.04, 55.25, 36.00, 74.27, 60.69), strict=True)),
    "rag_32": dict(zip((*SETS, "mean"), (75.48, 66.61, 58.04, 67.40, 90.29, 71.57), strict=True)),
}
WITHIN = 0.6


class BenchConfig(Config):
    """Where the leaderboard's data lie."""

    path: str = ""
    """MIRAGE's folder: rawdata/ and predictions*.jsonl, rows of {dataset, setting, id, output}. Required."""


@dataclass(frozen=True)
class Cell:
    """One setting on one set: accuracies in %, and the share of replies without an answer in %."""

    published: float
    grader: float
    extractor: float
    unread: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:  # noqa: ARG001
    for (setting, name), cell in table(config.path).items():
        yield Measured(f"{setting} {name}: the leaderboard's rule, points from its figure", cell.published, cell.grader,
                       abs(cell.grader - cell.published), f"≤ {WITHIN}", "accuracy, %")  # fmt: skip
        share = cell.extractor / max(cell.grader, 1e-9)
        yield Measured(f"{setting} {name}: our extractor beside the rule", cell.grader, cell.extractor, share, "",
                       f"accuracy, %; {cell.unread:.2f} % unread")  # fmt: skip


def table(path: str) -> dict[tuple[str, str], Cell]:
    """All cells, and the mean of each setting over the sets, from MIRAGE's folder."""
    if not path:
        raise ConfigError("'path' is required: MIRAGE's folder with rawdata/ and predictions*.jsonl")
    questions = {question.name: question for question in mirage.read(SourceRequest(path=path)).questions}
    replies: dict[tuple[str, str], list[tuple[bool, bool, bool]]] = defaultdict(list)
    for uri in list_files(path, ".jsonl"):
        for row in map(json.loads, read_lines(uri)):
            question = questions[f"{row['dataset']}/{row['id']}"]
            replies[row["setting"], row["dataset"]].append(_read(row, list(question.options), question.answer))
    cells = {key: _cell(key, graded) for key, graded in replies.items()}
    return {
        (setting, name): cells[setting, name] if name != "mean" else _mean(cells, setting)
        for setting in PUBLISHED
        for name in (*SETS, "mean")
    }


def _read(row: Mapping[str, Any], options: list[str], gold: str) -> tuple[bool, bool, bool]:
    """Whether the grader is right, whether the extractor is, whether it read nothing; a reply may be missing ([])."""
    reply = row["output"] or ""
    ours = extract_answer(reply, options)
    return mirage_answer(reply) == gold, ours == gold, ours is None


def _cell(key: tuple[str, str], graded: list[tuple[bool, bool, bool]]) -> Cell:
    grader, extractor, unread = (100 * fmean(column) for column in zip(*graded, strict=True))
    return Cell(PUBLISHED[key[0]][key[1]], grader, extractor, unread)


def _mean(cells: Mapping[tuple[str, str], Cell], setting: str) -> Cell:
    mine = [cells[setting, name] for name in SETS]
    return Cell(
        PUBLISHED[setting]["mean"],
        fmean(cell.grader for cell in mine),
        fmean(cell.extractor for cell in mine),
        fmean(cell.unread for cell in mine),
    )
