"""How answers are read: the MIRAGE leaderboard's figures of gpt-3.5 from its stored chains of thought.

Baseline is the published figure, ours the named grader that follows the leaderboard's rule; then the product's own
extractor on the same replies: its accuracy beside the grader's (an unread reply is wrong; the leaderboard answers A),
and the share of replies that it reads. It is not tuned to this table.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config, ConfigError
from medmm_ray.data.source_files import list_files, read_lines
from medmm_ray.data.sources import SourceRequest, mirage
from medmm_ray.text import extract_answer, mirage_answer

SETS = ("mmlu", "medqa", "medmcqa", "pubmedqa", "bioasq")
# The leaderboard's accuracies in %, and their mean over the sets.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "cot": {"mmlu": 72.91, "medqa": 65.04, "medmcqa": 55.25, "pubmedqa": 36.00, "bioasq": 74.27, "mean": 60.69},
    "rag_32": {"mmlu": 75.48, "medqa": 66.61, "medmcqa": 58.04, "pubmedqa": 67.40, "bioasq": 90.29, "mean": 71.57},
}
WITHIN = 0.6  # points in which the leaderboard's rule must give its figure


class BenchConfig(Config):
    """Where the leaderboard's data lie."""

    path: str = ""
    """MIRAGE's folder: rawdata/ and predictions*.jsonl, rows of {dataset, setting, id, output}. Required."""


@dataclass(frozen=True)
class GradedReply:
    """One reply: what is right of it, and whether our extractor gets no answer out of it."""

    by_grader: bool
    by_extractor: bool
    unread: bool


@dataclass(frozen=True)
class SetFigures:
    """One setting on one set: accuracies in %, and the share of replies without an answer in %."""

    published: float
    grader: float
    extractor: float
    unread: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:  # noqa: ARG001
    """Two rows a setting and set: the leaderboard's rule, and our extractor."""
    for (setting, set_name), figures in table(config.path).items():
        name = f"{setting} {set_name}: the leaderboard's rule, points from its figure"
        distance = abs(figures.grader - figures.published)
        yield Measured(name, figures.published, figures.grader, distance, f"≤ {WITHIN}", "accuracy, %")
        name = f"{setting} {set_name}: our extractor beside the rule"
        share = figures.extractor / max(figures.grader, 1e-9)
        unit = f"accuracy, %; {figures.unread:.2f} % unread"
        yield Measured(name, figures.grader, figures.extractor, share, "", unit)


def table(path: str) -> dict[tuple[str, str], SetFigures]:
    """The figures of each setting on each set, and their mean over the sets, from MIRAGE's folder."""
    if not path:
        raise ConfigError("'path' is required: MIRAGE's folder with rawdata/ and predictions*.jsonl")
    source = mirage.read(SourceRequest(path=path))
    questions = {question.name: question for question in source.questions}
    replies: dict[tuple[str, str], list[GradedReply]] = defaultdict(list)
    for uri in list_files(path, ".jsonl"):
        for line in read_lines(uri):
            row = json.loads(line)
            question = questions[f"{row['dataset']}/{row['id']}"]
            reply = row["output"] or ""  # it may be missing ([])
            graded = _graded(reply, list(question.options), question.answer)
            replies[row["setting"], row["dataset"]].append(graded)
    figures: dict[tuple[str, str], SetFigures] = {}
    for setting, published in PUBLISHED.items():
        for name in SETS:
            figures[setting, name] = _figures(published[name], replies[setting, name])
        # The leaderboard's mean gives each set the same weight, however many questions it has.
        of_sets = [figures[setting, name] for name in SETS]
        figures[setting, "mean"] = _mean(published["mean"], of_sets)
    return figures


def _graded(reply: str, options: list[str], gold: str) -> GradedReply:
    answer = extract_answer(reply, options)
    return GradedReply(mirage_answer(reply) == gold, answer == gold, answer is None)


def _figures(published: float, replies: Sequence[GradedReply]) -> SetFigures:
    grader = 100 * _mean_of(replies, "by_grader")
    extractor = 100 * _mean_of(replies, "by_extractor")
    unread = 100 * _mean_of(replies, "unread")
    return SetFigures(published, grader, extractor, unread)


def _mean(published: float, sets: Sequence[SetFigures]) -> SetFigures:
    grader = _mean_of(sets, "grader")
    extractor = _mean_of(sets, "extractor")
    unread = _mean_of(sets, "unread")
    return SetFigures(published, grader, extractor, unread)


def _mean_of(rows: Sequence[GradedReply | SetFigures], field: str) -> float:
    """The mean of a field over the rows."""
    return fmean(map(attrgetter(field), rows))
