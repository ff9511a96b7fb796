"""Evaluation from stored tables, no model: Med-PRM's test set in size, 350,016 scored solutions, 1,000 bootstraps.

Questions of seven data sets, four options each, with 64 solutions of 3 to 9 steps; a policy that is right more or less
often by question, and a scorer that knows something of it. The report is made in a fresh process, whose peak is that
work's alone. The second row is what it may take, the third checks it: best-of-N as the report has it against plain
counting over drawn subsets.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.process_memory import highest_bytes, in_new_process
from jobs.benches.timing import timed
from medmm_ray.config import Config
from medmm_ray.data.records import Image, Question, Scores, Solutions, arrow_schema, to_arrow
from medmm_ray.stats.metrics import Floats, Ints
from medmm_ray.steps.evaluate import EvaluateConfig, EvaluationReport, evaluate

SECONDS, GIB = 60.0, 4.0
DATA_SETS = ("medqa", "medqa_5", "medmcqa", "mmlu", "ddxplus", "agentclinic_nejm", "agentclinic_osce")
QUESTIONS_A_PART = 256
NUM_DRAWS = 2000
ARM = "text_only"


class BenchConfig(Config):
    """How much is evaluated."""

    questions: int = Field(5469, ge=2)
    """Questions; Med-PRM's seven test sets have 5,469."""
    samples: int = Field(64, ge=1)
    """Solutions a question."""
    bootstrap_samples: int = Field(1000, ge=1)
    """Resamples for the intervals."""
    seed: int = 0
    """Start of all random numbers."""


@dataclass(frozen=True)
class Run:
    """What an evaluation took, and what it gave."""

    seconds: float
    peak_gib: float
    best_of_8: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Seconds and memory of the whole report, of what they may be; and one of its figures against counting."""
    with tempfile.TemporaryDirectory() as folder:
        counted = write_tables(config, Path(folder))
        run = in_new_process(report_of, config, folder)
    size = f"{config.questions * config.samples:,} solutions x {config.bootstrap_samples:,} bootstraps"
    console.print(f"[dim]{size}: {run.seconds:.1f} s, {run.peak_gib:.2f} GiB[/dim]")
    yield Measured(f"{size}: time", SECONDS, run.seconds, run.seconds / SECONDS, "≤ 1", "s")
    yield Measured(f"{size}: memory", GIB, run.peak_gib, run.peak_gib / GIB, "≤ 1", "GiB")
    difference = abs(run.best_of_8 - counted)
    # A half per cent is far above what so many draws leave open, and far below what another rule would give.
    name = "best of 8: share right, counted and as reported"
    yield Measured(name, counted, run.best_of_8, difference / 0.005, "≤ 1", "share")


def report_of(config: BenchConfig, folder: str) -> Run:
    """Evaluate the tables in a folder."""
    report: EvaluationReport | None = None

    def work() -> None:
        nonlocal report
        tables = {name: pq.read_table(f"{folder}/{name}.parquet") for name in ("questions", "solutions", "scores")}
        settings = EvaluateConfig(bootstrap_samples=config.bootstrap_samples)
        report = evaluate(settings, **tables, images=to_arrow(Image, []), labels=[]).report

    seconds, _ = timed(work, 1, "cpu")
    assert report is not None
    best_of_8 = report.accuracy.best_of_n[ARM][str(min(8, config.samples))].value
    return Run(seconds, highest_bytes() / 2**30, best_of_8)


def write_tables(config: BenchConfig, folder: Path) -> float:
    """Write questions, solutions and scores; gives the share that best-of-8 answers rightly, by counting draws."""
    rng = np.random.default_rng(config.seed)
    skills = rng.beta(2.0, 1.0, config.questions)
    shares = []
    questions: list[Question] = []
    with (
        pq.ParquetWriter(folder / "solutions.parquet", arrow_schema(Solutions)) as solutions_file,
        pq.ParquetWriter(folder / "scores.parquet", arrow_schema(Scores)) as scores_file,
    ):
        for start in range(0, config.questions, QUESTIONS_A_PART):
            solutions: list[dict[str, object]] = []
            scores: list[dict[str, object]] = []
            for number in range(start, min(start + QUESTIONS_A_PART, config.questions)):
                drawn = draw(rng, skills[number], config.samples)
                questions.append(question(number))
                solutions.append(drawn.solutions_row(number))
                scores += drawn.score_rows(number)
                shares.append(drawn.share_right(rng, min(8, config.samples)))
            solutions_file.write_table(to_arrow(Solutions, solutions))
            scores_file.write_table(to_arrow(Scores, scores))
    pq.write_table(to_arrow(Question, questions), folder / "questions.parquet")
    return float(np.mean(shares))


def question(number: int) -> Question:
    """A question whose right answer is A."""
    return Question(
        question_id=f"q{number:06d}",
        source="bench",
        split="test",
        modality="clinical",
        difficulty=("easy", "medium", "hard")[number % 3],
        question=f"question {number}",
        options=["first", "second", "third", "fourth"],
        answer="A",
        answer_type="choice",
        image_ids=[],
        dataset=DATA_SETS[number % len(DATA_SETS)],
        topic=f"topic {number % 10}",
        group=f"patient {number // 2}",
    )


@dataclass(frozen=True)
class DrawnSamples:
    """The samples of a question: which letter each states (0: A), its steps' log-odds, and how many steps it has."""

    letters: Ints
    log_odds: list[Floats]

    def solutions_row(self, number: int) -> dict[str, object]:
        """A row of `Solutions`."""
        entries = []
        for index, letter in enumerate(self.letters.tolist()):
            entry = {
                "solution_id": f"s{number:06d}-{index:02d}",
                "index": index,
                "text": "",
                "steps": ["a step"] * len(self.log_odds[index]),
                "answer": "ABCD"[letter],
                "correct": letter == 0,
                "finish_reason": "stop",
                "seed": index,
                "text_sha": "",
            }
            entries.append(entry)
        row: dict[str, object] = {"question_id": f"q{number:06d}", "policy": "bench", "config_hash": "bench"}
        counts = {"num_requested": len(entries), "num_missing": 0, "num_drawn": len(entries), "rejected": []}
        return {**row, **counts, "cost": 0.0, "solutions": entries}

    def score_rows(self, number: int) -> list[dict[str, object]]:
        """Rows of `Scores`."""
        rows: list[dict[str, object]] = []
        for index, log_odds in enumerate(self.log_odds):
            row = {
                "question_id": f"q{number:06d}",
                "solution_id": f"s{number:06d}-{index:02d}",
                "model": "bench",
                "arm": ARM,
                "text_log_odds": log_odds.tolist(),
                "image_log_odds": [0.0] * len(log_odds),
            }
            rows.append(row)
        return rows

    def share_right(self, rng: np.random.Generator, n: int) -> float:
        """How often the best of `n` drawn samples is right, counted over drawn subsets."""
        rewards = np.array([scores.astype(np.float32).min() for scores in self.log_odds])
        order = rng.random((NUM_DRAWS, len(rewards))).argsort(axis=1)[:, :n]
        best = np.take_along_axis(order, rewards[order].argmax(axis=1)[:, None], axis=1)
        return float((self.letters[best] == 0).mean())


def draw(rng: np.random.Generator, skill: float, num_samples: int) -> DrawnSamples:
    """Samples that are right with a chance of `skill`; right ones score higher, by a step's spread."""
    is_right = rng.random(num_samples) < skill
    letters = np.where(is_right, 0, rng.integers(1, 4, num_samples))
    log_odds = []
    for right in is_right.tolist():
        num_steps = int(rng.integers(3, 10))
        log_odds.append(rng.normal(1.0 if right else 0.0, 2.0, num_steps))
    return DrawnSamples(letters, log_odds)
