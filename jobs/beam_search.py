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
import pyarrow as pa
from rich.console import Console
from rich.table import Table as Grid

from jobs.entry import launch, parser, read_arguments
from jobs.event_loop import run_coroutine
from jobs.graph import BY_NAME
from jobs.recipe import Recipe
from jobs.step import Job, Run
from medmm_ray.config import ConfigError, digest, identity
from medmm_ray.data.sorted_rows import scratch_folder
from medmm_ray.data.tables import RowError, error_kind, filesystem, write_file
from medmm_ray.engines.generator import Generator, TextGenerator
from medmm_ray.engines.grader import Grader, MakeGrader
from medmm_ray.engines.images import open_image
from medmm_ray.stats import decoders, metrics
from medmm_ray.stats.clusters import clusters_of, question_keys
from medmm_ray.steps.score import input_files, load, with_trained_inputs
from medmm_ray.steps.tree_search.beam import RewardModelScorer, beam_search
from medmm_ray.steps.tree_search.writer import StepWriter

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel

SEARCH = "beam search"
GAIN = "beam search over best of N at equal tokens"


@dataclass(frozen=True)
class Comparison:
    """One question: whether each way answers it rightly (a chance in [0, 1]), its tokens, and its samples."""

    right: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Beams:
    """What the search of a question came to: whether its best solution is right, and the tokens that it generated."""

    is_right: bool
    num_tokens: int


@dataclass(frozen=True)
class Samples:
    """A question's solutions in the run, their rewards (NaN where one could not be scored) and their tokens."""

    solutions: Sequence[Mapping[str, Any]]
    rewards: Sequence[float]
    num_tokens: Sequence[int]
    answer_type: str = "choice"


def compare(beams: Beams, samples: Samples, num_subsets: int, seed: int) -> Comparison:
    """A question's search beside its samples.

    The samples at equal tokens are as many as take at most the tokens of the search, in the mean; one at least.
    """
    number = len(samples.solutions)
    correct = np.array([solution["correct"] is True for solution in samples.solutions], dtype=bool)
    answers = [solution["answer"] for solution in samples.solutions]
    codes = decoders.answer_codes(answers, correct if samples.answer_type == "open" else None)
    rewards = np.array(samples.rewards, dtype=np.float64)
    mean_tokens = sum(samples.num_tokens) / number if number else 0.0
    # Without a token count all samples are compared.
    at_equal_tokens = number
    if mean_tokens:
        at_equal_tokens = max(1, min(number, int(beams.num_tokens // mean_tokens)))
    right = {SEARCH: float(beams.is_right), "one sample": float(correct.mean()) if number else 0.0}
    num_samples = {SEARCH: 0, "one sample": 1}
    for budget, n in (("equal tokens", at_equal_tokens), ("all samples", number)):
        subsets = decoders.subsets(max(number, 1), max(n, 1), num_subsets, seed)
        right[f"majority, {budget}"] = decoders.expected_vote(codes, correct, subsets)
        right[f"best of N, {budget}"] = decoders.expected_best(rewards, correct, max(n, 1))
        num_samples |= {f"majority, {budget}": n, f"best of N, {budget}": n}
    tokens = {name: n * mean_tokens for name, n in num_samples.items()}
    tokens[SEARCH] = float(beams.num_tokens)
    return Comparison(right, tokens, num_samples)


def figures(
    comparisons: Sequence[Comparison], num_resamples: int, seed: int, keys: Sequence[Sequence[str]] | None = None
) -> dict[str, dict[str, float]]:
    """The accuracy of each way with a 95 % interval over questions, and its mean tokens and samples a question.

    `keys` are the images and the group of each question: those that share one are drawn together. The last figure is
    the gain of the search over best-of-N at equal tokens, its interval that of the paired differences.
    """
    names = list(comparisons[0].right)
    values: list[list[float]] = []
    for comparison in comparisons:
        values.append([comparison.right[name] for name in names])
    values_QK = np.array(values)
    gain_Q = values_QK[:, names.index(SEARCH)] - values_QK[:, names.index("best of N, equal tokens")]
    values_QK = np.column_stack([values_QK, gain_Q])
    low, high = metrics.bootstrap(values_QK, num_resamples, seed, clusters_of(keys) if keys else None)
    table: dict[str, dict[str, float]] = {}
    for column, name in enumerate([*names, GAIN]):
        row = {"value": values_QK[:, column].mean(), "low": low[column], "high": high[column]}
        table[name] = {key: round(float(number), 6) for key, number in row.items()}
        if name != GAIN:
            tokens = sum(comparison.tokens[name] for comparison in comparisons)
            num_samples = sum(comparison.samples[name] for comparison in comparisons)
            table[name]["tokens"] = round(tokens / len(comparisons), 1)
            table[name]["samples"] = round(num_samples / len(comparisons), 2)
    return table


class GuidedSearch:
    """A run's policy and reward model at work on its questions."""

    def __init__(self, run: Run, generator: TextGenerator, model: "RewardModel", grader: Grader) -> None:
        self.run, self.generator, self.model, self.grader = run, generator, model, grader
        self.config, self.scoring = run.recipe.beam_search, with_trained_inputs(run.recipe.score, model)
        models = (run.model_id("policy"), run.model_id(self.config.guide))
        self.config_hash = digest("beam_search", *models, identity(self.config))
        self.lock = asyncio.Lock()

    async def all(self, rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
        """The comparisons of all question rows, many of them at a time, as in tree search."""
        # As many searches at a time as an actor has in tree search.
        places = asyncio.Semaphore(self.config.engine.batch_size * self.config.engine.max_concurrency)

        async def in_turn(row: Mapping[str, Any]) -> Comparison:
            async with places:
                return await self.compare(row)

        return list(await asyncio.gather(*map(in_turn, rows)))

    async def compare(self, row: Mapping[str, Any]) -> Comparison:
        """The comparison of one row of `question_rows`; a fault is its error, and its search counts as wrong."""
        solutions, error = row["solutions"], None
        beams = Beams(is_right=False, num_tokens=0)
        samples = Samples(solutions, [math.nan] * len(solutions), [0] * len(solutions), row["answer_type"])
        try:
            if row["fault"]:
                raise RowError("upstream", row["fault"])
            scorer = self.scorer(row)
            writer = StepWriter(self.config, self.generator, row, self.config_hash, self.grader)
            rewards = await self.rewards(row, scorer)
            prompt_tokens = self.generator.count(writer.prompt)
            num_tokens: list[int] = []
            for solution in solutions:
                whole = replace(writer.prompt, prefix=solution["text"])
                num_tokens.append(self.generator.count(whole) - prompt_tokens)
            samples = replace(samples, rewards=rewards, num_tokens=num_tokens)
            found_beams = await beam_search(self.config, writer, scorer)
            is_right = bool(found_beams) and found_beams[0].correct is True
            beams = Beams(is_right, writer.num_tokens)
        except RowError as fault:
            error = str(fault)
        comparison = compare(beams, samples, self.run.recipe.evaluate.num_subsets, self.config.seed)
        return replace(comparison, error=error)

    async def rewards(self, row: Mapping[str, Any], scorer: RewardModelScorer) -> list[float]:
        """The reward of each of the row's solutions; NaN for one that could not be scored."""
        if not row["solutions"]:
            return []
        rewards: list[float] = []
        for scores in await scorer.scores(row, [solution["steps"] for solution in row["solutions"]]):
            if scores.error or not scores.log_odds:
                rewards.append(math.nan)
            else:
                rewards.append(decoders.aggregate(scores.log_odds, self.config.aggregate))
        return rewards

    def scorer(self, row: Mapping[str, Any]) -> RewardModelScorer:
        """The reward model on one question, with what its prompt holds in `score`."""
        documents = [document["text"] for document in row["documents"][: self.scoring.num_documents]]
        images, references = [], []
        if self.model.reads_images:
            if row["image_error"]:
                raise RowError.parse(row["image_error"])
            images = [open_image(uri, self.scoring.max_pixels) for uri in row["image_uris"]]
            if images and not self.model.vision:
                uris = row["reference_uris"][: self.scoring.num_references]
                references = [open_image(uri, self.scoring.max_pixels) for uri in uris]
        return RewardModelScorer(self.model, documents, images, references, self.lock)


def question_rows(run: Run) -> list[dict[str, Any]]:
    """The questions to search, by id: each with its documents, its solutions, its images' uris, and its fault."""
    config, job = run.recipe.beam_search, Job(run, BY_NAME["score"])
    questions, images, evidence = (job.read(name) for name in ("questions", "images", "evidence"))
    solutions_of = by_question(job.read("solutions"))
    evidence_of = by_question(evidence)
    with scratch_folder() as folder:
        cases = input_files([questions], [images], [evidence], folder).cases
        cases_of = by_question(cases.between(None, None))
    rows: list[dict[str, Any]] = []
    for question in sorted(questions.to_pylist(), key=lambda row: str(row["question_id"])):
        question_id = question["question_id"]
        if question["split"] != config.split or question_id not in solutions_of:
            continue
        sampled, case = solutions_of[question_id], cases_of[question_id]
        retrieved = evidence_of.get(question_id, {"documents": [], "error": None})
        rows.append(
            {
                **question,
                "image_uris": case["image_uris"],
                "reference_uris": case["reference_uris"],
                "image_error": case["image_error"],
                "documents": retrieved["documents"],
                "solutions": sampled["solutions"],
                "fault": question["error"] or retrieved["error"] or sampled["error"],
            }
        )
    if not rows:
        raise ConfigError(
            f"beam_search.split is {config.split!r}, and no question of it has a row in {run.uri('solutions')}; name "
            "a split of the table questions"
        )
    return rows[: config.num_questions]


def by_question(table: pa.Table) -> dict[str, dict[str, Any]]:
    """The rows of a table by their question_id."""
    return {row["question_id"]: row for row in table.to_pylist()}


async def search(run: Run, rows: Sequence[Mapping[str, Any]], grader: Grader) -> list[Comparison]:
    """All questions on one engine in this process, with the reward model beside it."""
    config, scoring = run.recipe.beam_search, run.recipe.score
    model = load(run.model(config.guide), scoring)
    engine = Generator(run.model("policy"), config.engine)
    try:
        return await GuidedSearch(run, engine, model, grader).all(rows)
    finally:
        engine.shutdown()


def main(words: Sequence[str] | None = None) -> int:
    """The exit status of the command with the arguments `words`."""
    arguments = parser("beam_search", "Beam search by the run's policy and reward model, beside the run's samples.")
    return launch(arguments, words, _main, Recipe, "beam_search")


def _main(arguments: argparse.Namespace) -> int:
    from medmm_ray.session import session

    run = Run(read_arguments(arguments, "beam_search"))
    rows, equivalence = question_rows(run), run.recipe.sample.equivalence
    # The budget of an API is an actor of Ray's; without an API no Ray is needed.
    with session() if equivalence.engine else nullcontext():
        grader = MakeGrader(equivalence, run.apis)()
        comparisons = run_coroutine(search(run, rows, grader))
    config, num_resamples = run.recipe.beam_search, run.recipe.evaluate.bootstrap_samples
    failed = Counter(error_kind(comparison.error) for comparison in comparisons if comparison.error)
    report = {
        "policy": run.model_id("policy"),
        "guide": run.model_id(config.guide),
        "config": identity(config),
        "questions": len(comparisons),
        "failed": dict(failed),
        "figures": figures(
            comparisons, num_resamples, config.seed, [question_keys(row["image_ids"], row["group"]) for row in rows]
        ),
    }
    show(report, Console())
    fs, path = filesystem(f"{run.root}/beam_search.json")
    write_file(fs, path, json.dumps(report, indent=1, allow_nan=False).encode())
    return 0


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a report as a table, a line a way to answer."""
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column(f"{report['questions']:,} questions, guided by {report['config']['guide']}")
    for name in ("accuracy", "95 % interval", "tokens a question", "samples"):
        grid.add_column(name, justify="right")
    for name, row in report["figures"].items():
        cells = [f"{100 * row['value']:.1f} %", f"{100 * row['low']:.1f} – {100 * row['high']:.1f}"]
        if "tokens" in row:
            cells += [f"{row['tokens']:,.0f}", f"{row['samples']:g}" if row["samples"] else ""]
        grid.add_row(name, *cells, style="bold" if name == SEARCH else "")
    console.print(grid)
    if report["failed"]:
        faults = ", ".join(f"{kind} {number}" for kind, number in report["failed"].items())
        console.print(f"not searched, and counted as wrong: {faults}")


if __name__ == "__main__":
    sys.exit(main())
