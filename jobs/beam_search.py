"""Beam search on a finished run: ``python -m jobs.beam_search recipe.yaml run=… [name=value]``.

The run's policy writes solutions step by step, and its reward model, which reads documents and images as in `score`,
keeps the best beginnings. Beside it stand the run's own samples of the same questions under the same reward model: one
sample, the majority and best-of-N, of as many samples as take the tokens of the search, and of all. A question that
cannot be searched counts as wrong, and is counted. Leaves ``beam_search.json`` in the run's folder.
"""

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from jobs.graph import BY_NAME
from jobs.recipe import Recipe
from jobs.step import Job, Run, launch, parser, read_arguments
from medmm_ray.config import ConfigError, digest, identity
from medmm_ray.data.tables import RowError, error_kind, filesystem, write_file
from medmm_ray.engines.generator import Generator, TextGenerator
from medmm_ray.engines.grader import Grader, MakeGrader
from medmm_ray.engines.images import open_image
from medmm_ray.stats import decoders, metrics
from medmm_ray.steps.score import load, question_inputs, with_trained_inputs
from medmm_ray.steps.tree_search.beam import RewardModelScorer, beam_search
from medmm_ray.steps.tree_search.writer import StepWriter

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel

SEARCH = "beam search"
GAIN = "beam search over best of N at equal tokens"


@dataclass(frozen=True)
class Compared:
    """One question: whether each way answers it rightly (a chance in [0, 1]), the tokens it writes, and its samples."""

    right: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    error: str | None = None


def compared(
    beam_right: bool, beam_tokens: int, solutions: Sequence[Mapping[str, Any]], rewards: Sequence[float],
    sample_tokens: Sequence[int], num_subsets: int, seed: int, answer_type: str = "choice",
) -> Compared:  # fmt: skip
    """A question's search beside its samples; the reward of one that could not be scored is NaN.

    The samples at equal tokens are as many as take at most the tokens of the search, in the mean; one at least.
    """
    correct = np.array([solution["correct"] is True for solution in solutions], dtype=bool)
    codes = decoders.answer_codes([s["answer"] for s in solutions], correct if answer_type == "open" else None)
    known, number = np.array(rewards, dtype=np.float64), len(solutions)
    each = sum(sample_tokens) / number if number else 0.0
    equal = max(1, min(number, int(beam_tokens // each))) if each else number
    right = {SEARCH: float(beam_right), "one sample": float(correct.mean()) if number else 0.0}
    samples = {SEARCH: 0, "one sample": 1}
    for at, n in (("equal tokens", equal), ("all samples", number)):
        drawn = decoders.subsets(max(number, 1), max(n, 1), num_subsets, seed)
        right[f"majority, {at}"] = decoders.expected_vote(codes, correct, drawn)
        right[f"best of N, {at}"] = decoders.expected_best(known, correct, max(n, 1))
        samples |= {f"majority, {at}": n, f"best of N, {at}": n}
    tokens = {name: n * each for name, n in samples.items()} | {SEARCH: float(beam_tokens)}
    return Compared(right, tokens, samples)


def figures(found: Sequence[Compared], num_resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """Of each way its accuracy with a 95 % interval over questions, and its mean tokens and samples a question.

    The last is the gain of the search over best-of-N at equal tokens, its interval that of the paired differences.
    """
    names = list(found[0].right)
    values_QK = np.array([[one.right[name] for name in names] for one in found])
    gain_Q = values_QK[:, names.index(SEARCH)] - values_QK[:, names.index("best of N, equal tokens")]
    values_QK = np.column_stack([values_QK, gain_Q])
    low, high = metrics.bootstrap(values_QK, num_resamples, seed)
    table = {}
    for column, name in enumerate([*names, GAIN]):
        triple = zip(("value", "low", "high"), (values_QK[:, column].mean(), low[column], high[column]), strict=True)
        table[name] = {key: round(float(number), 6) for key, number in triple}
        if name != GAIN:
            table[name]["tokens"] = round(sum(one.tokens[name] for one in found) / len(found), 1)
            table[name]["samples"] = round(sum(one.samples[name] for one in found) / len(found), 2)
    return table


class Searching:
    """A run's policy and reward model at work on its questions."""

    def __init__(self, run: Run, generator: TextGenerator, model: "RewardModel", grader: Grader) -> None:
        self.run, self.generator, self.model, self.grader = run, generator, model, grader
        self.config, self.reading = run.recipe.beam_search, with_trained_inputs(run.recipe.score, model)
        models = (run.model_id("policy"), run.model_id(self.config.guide))
        self.config_hash = digest("beam_search", *models, identity(self.config))
        self.lock = asyncio.Lock()

    async def all(self, rows: Sequence[Mapping[str, Any]]) -> list[Compared]:
        """Many questions at a time, as in tree search."""
        places = asyncio.Semaphore(self.config.batch_size * self.config.max_concurrency)

        async def one(row: Mapping[str, Any]) -> Compared:
            async with places:
                return await self.one(row)

        return list(await asyncio.gather(*(one(row) for row in rows)))

    async def one(self, row: Mapping[str, Any]) -> Compared:
        """One question row of `asked`."""
        solutions, rewards, tokens = row["solutions"], [math.nan] * len(row["solutions"]), [0] * len(row["solutions"])
        beams, spent, error = [], 0, None
        try:
            if row["fault"]:
                raise RowError("upstream", row["fault"])
            scorer = self.scorer(row)
            writer = StepWriter(self.config, self.generator, row, self.config_hash, self.grader)
            scores = await scorer.scores(row, [solution["steps"] for solution in solutions]) if solutions else []
            rewards = [
                math.nan if s.error or not s.log_odds else decoders.aggregate(s.log_odds, self.config.aggregate)
                for s in scores
            ]
            plain = self.generator.count(writer.prompt)
            tokens = [self.generator.count(replace(writer.prompt, prefix=s["text"])) - plain for s in solutions]
            beams = await beam_search(self.config, writer, scorer)
            spent = writer.num_tokens
        except RowError as fault:
            error = str(fault)
        right = bool(beams) and beams[0].correct is True
        subsets = self.run.recipe.evaluate.num_subsets
        found = compared(right, spent, solutions, rewards, tokens, subsets, self.config.seed, row["answer_type"])
        return replace(found, error=error)

    def scorer(self, row: Mapping[str, Any]) -> RewardModelScorer:
        """The reward model on one question, with what it reads in `score`."""
        documents = [document["text"] for document in row["documents"][: self.reading.num_documents]]
        images, references = [], []
        if self.model.reads_images:
            if row["image_error"]:
                raise RowError.parse(row["image_error"])
            images = [open_image(uri, self.reading.max_pixels) for uri in row["image_uris"]]
            if images and not self.model.vision:
                uris = row["reference_uris"][: self.reading.num_references]
                references = [open_image(uri, self.reading.max_pixels) for uri in uris]
        return RewardModelScorer(self.model, documents, images, references, self.lock)


def asked(run: Run) -> list[dict[str, Any]]:
    """The questions to search, by id: each with its documents, its solutions, where its images lie, and its fault."""
    config, job = run.recipe.beam_search, Job(run, BY_NAME["score"])
    questions, images, evidence = (job.read(name) for name in ("questions", "images", "evidence"))
    solved = {row["question_id"]: row for row in job.read("solutions").to_pylist()}
    read = {row["question_id"]: row for row in evidence.to_pylist()}
    shown = {row["question_id"]: row for row in question_inputs(questions, images, evidence).to_pylist()}
    rows = []
    for question in sorted(questions.to_pylist(), key=lambda row: str(row["question_id"])):
        name = question["question_id"]
        if question["split"] == config.split and name in solved:
            found = read.get(name, {"documents": [], "error": None})
            case = {key: shown[name][key] for key in ("image_uris", "reference_uris", "image_error")}
            fault = question["error"] or found["error"] or solved[name]["error"]
            own = {"documents": found["documents"], "solutions": solved[name]["solutions"], "fault": fault}
            rows.append({**question, **case, **own})
    if not rows:
        raise ConfigError(
            f"beam_search.split is {config.split!r}, and no question of it has a row in {run.uri('solutions')}; name "
            "a split of the table questions"
        )
    return rows[: config.num_questions]


async def search(run: Run, rows: Sequence[Mapping[str, Any]], grader: Grader) -> list[Compared]:
    """All questions on one engine in this process, with the reward model beside it."""
    config, reading = run.recipe.beam_search, run.recipe.score
    model = load(run.model(config.guide), reading)
    engine = Generator(run.model("policy"), config)
    try:
        return await Searching(run, engine, model, grader).all(rows)
    finally:
        engine.shutdown()


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser("beam_search", "Beam search by the run's policy and reward model, beside the run's samples.")
    return launch(arguments, words, _main, Recipe, "beam_search")


def _main(arguments: argparse.Namespace) -> int:
    from medmm_ray.session import session

    run = Run(read_arguments(arguments, "beam_search"))
    rows, equivalence = asked(run), run.recipe.sample.equivalence
    with session() if equivalence.backend != "none" else nullcontext():  # the budget of an API is a Ray actor
        grader = MakeGrader(equivalence, f"{run.root}/api")()
        found = asyncio.run(search(run, rows, grader))
    config, resamples = run.recipe.beam_search, run.recipe.evaluate.bootstrap_samples
    report = {
        "policy": run.model_id("policy"),
        "guide": run.model_id(config.guide),
        "config": identity(config),
        "questions": len(found),
        "failed": dict(Counter(error_kind(one.error) for one in found if one.error)),
        "figures": figures(found, resamples, config.seed),
    }
    show(report, Console())
    fs, path = filesystem(f"{run.root}/beam_search.json")
    write_file(fs, path, json.dumps(report, indent=1, allow_nan=False).encode())
    return 0


def show(report: Mapping[str, Any], console: Console) -> None:
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column(f"{report['questions']:,} questions, guided by {report['config']['guide']}")
    for name in ("accuracy", "95 % interval", "tokens a question", "samples"):
        grid.add_column(name, justify="right")
    for name, row in report["figures"].items():
        counts = (f"{row['tokens']:,.0f}", f"{row['samples']:g}" if row["samples"] else "") if "tokens" in row else ()
        ends = f"{100 * row['low']:.1f} – {100 * row['high']:.1f}"
        grid.add_row(name, f"{100 * row['value']:.1f} %", ends, *counts, style="bold" if name == SEARCH else "")
    console.print(grid)
    if report["failed"]:
        told = ", ".join(f"{kind} {number}" for kind, number in report["failed"].items())
        console.print(f"not searched, and counted as wrong: {told}")


if __name__ == "__main__":
    sys.exit(main())
