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
WITHIN = 0.6  # points


class BenchConfig(Config):
    """Where the leaderboard's data lie."""

    path: str = ""
    """MIRAGE's folder: rawdata/ and predictions*.jsonl, rows of {dataset, setting, id, output}. Required."""


@dataclass(frozen=True)
class GradedReplies:
    """One setting on one set: accuracies in %, and the share of replies without an answer in %."""

    published: float
    grader: float
    extractor: float
    unread: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:  # noqa: ARG001
    """Two rows a setting and set: the leaderboard's rule, and our extractor."""
    for (setting, set_name), cell in table(config.path).items():
        name = f"{setting} {set_name}: the leaderboard's rule, points from its figure"
        distance = abs(cell.grader - cell.published)
        yield Measured(name, cell.published, cell.grader, distance, f"≤ {WITHIN}", "accuracy, %")
        name = f"{setting} {set_name}: our extractor beside the rule"
        share, unit = cell.extractor / max(cell.grader, 1e-9), f"accuracy, %; {cell.unread:.2f} % unread"
        yield Measured(name, cell.grader, cell.extractor, share, "", unit)


def table(path: str) -> dict[tuple[str, str], GradedReplies]:
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
    ordered = {}
    for setting in PUBLISHED:
        for name in SETS:
            ordered[setting, name] = cells[setting, name]
        ordered[setting, "mean"] = _mean(cells, setting)
    return ordered


def _read(row: Mapping[str, Any], options: list[str], gold: str) -> tuple[bool, bool, bool]:
    """Whether the grader is right, whether the extractor is, whether it read nothing; a reply may be missing ([])."""
    reply = row["output"] or ""
    answer = extract_answer(reply, options)
    return mirage_answer(reply) == gold, answer == gold, answer is None


def _cell(key: tuple[str, str], graded: list[tuple[bool, bool, bool]]) -> GradedReplies:
    grader, extractor, unread = (100 * fmean(column) for column in zip(*graded, strict=True))
    return GradedReplies(PUBLISHED[key[0]][key[1]], grader, extractor, unread)


def _mean(cells: Mapping[tuple[str, str], GradedReplies], setting: str) -> GradedReplies:
    of_setting = [cells[setting, name] for name in SETS]
    return GradedReplies(
        PUBLISHED[setting]["mean"],
        fmean(cell.grader for cell in of_setting),
        fmean(cell.extractor for cell in of_setting),
        fmean(cell.unread for cell in of_setting),
    )
