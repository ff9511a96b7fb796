"""How steps scale over actors: rows a second of 1, 4, 16 and 64 of them, on a Ray cluster of several nodes.

The steps' own code runs, from table to table, each actor a process; only the engines sleep. They sleep long enough that
two cores, which all nodes share here, are not what is measured: 64 actors that sleep 5 s begin 13 calls a second.
Actors begin together when the last one is there, as the cores are busy with starting them. What limits their number on
one machine is memory: a size that there is no room for is left out, and said.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.sampling import Notes, bench_questions, noted, span
from jobs.benches.scripted_api import verdicts
from medmm_ray.config import Config
from medmm_ray.data.records import Evidence, Image, Labels, Query, Question, Scores, Solution, Solutions, arrow_schema
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling, Statistics
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.session import fresh_token, session
from medmm_ray.steps import embed, score
from medmm_ray.steps.judge import JudgeConfig, JudgeVllm, judge
from medmm_ray.steps.sample import SampleConfig, sample

if TYPE_CHECKING:
    from ray.data import Dataset

    from medmm_ray.reward_model import ScoreRequest, StepScores

StepName = Literal["sample", "judge", "score", "embed"]
STEPS = ["Look at the heart.", "It is wide.", "The answer is (A)."]
ORIGIN = Provenance(name="bench", fingerprint="", config={}, upstream={})
START_S = 1800.0  # for all actors of a pool: two cores start about one a second
MEMORY_MIB: dict[StepName, int] = {"sample": 110, "judge": 110, "score": 250, "embed": 110}
"""Of one actor that sleeps; score loads PyTorch."""


class ActorsConfig(Config):
    """Which steps on how many actors."""

    steps: tuple[StepName, ...] = get_args(StepName)
    """Steps that are measured."""
    actors: tuple[int, ...] = (4, 16, 64)
    """Numbers of actors, against one."""
    nodes: int = Field(4, ge=1)
    """Nodes of the cluster, beside a head that does no work."""
    pause_s: float = Field(5.0, gt=0)
    """Seconds that an engine takes for what it has at a time."""
    rounds: int = Field(24, ge=1)
    """How often each actor sleeps through all that it may have in flight, in the mean. Ray Data queues a few calls at
    each actor, so that some have two or three more than others in the end: few rounds would measure that."""


def measure_actors(config: ActorsConfig, console: Console) -> Iterator[Measured]:
    """Rows a second of each step on each number of actors, against as many times those of one."""
    # A task beside each actor: what writes its rows.
    num_cpus = 2 * (max(config.actors) // config.nodes + 1)
    with tempfile.TemporaryDirectory() as folder, virtual_cluster(config.nodes, num_cpus):
        for step in config.steps:
            alone = rate(step, Crew(Path(folder) / f"{step}-1", 1, config.pause_s), config.rounds)
            for actors in config.actors:
                needed, free = actors * MEMORY_MIB[step], psutil.virtual_memory().available >> 20
                if needed > free:
                    console.print(f"{step} on {actors} actors is left out: it needs {needed:,} MiB, {free:,} are free")
                    continue
                crew = Crew(Path(folder) / f"{step}-{actors}", actors, config.pause_s)
                rows_per_s = rate(step, crew, config.rounds)
                ideal, target = actors * alone, "≥ 0.9" if actors <= 16 else "≥ 0.8"
                label = f"{step}: 1 -> {actors} actors with an engine that sleeps"
                yield Measured(label, ideal, rows_per_s, rows_per_s / ideal, target, "rows/s")


@contextmanager
def virtual_cluster(nodes: int, num_cpus: int) -> Iterator[None]:
    """A Ray session on a cluster of `nodes` on this machine, each with CPUs that it says it has."""
    from ray.cluster_utils import Cluster

    with fresh_token():
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=num_cpus)
            os.environ["RAY_ADDRESS"] = cluster.address
            with session():
                yield
        finally:
            os.environ.pop("RAY_ADDRESS", None)
            cluster.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Crew:
    """The actors of one pool: they begin together and note in `folder` when they work."""

    folder: Path
    size: int
    pause_s: float

    def join(self) -> Notes:
        """Wait for the others."""
        (self.folder / f"{os.getpid()}.started").touch()
        until = time.monotonic() + START_S
        while len(list(self.folder.glob("*.started"))) < self.size:
            if time.monotonic() > until:
                raise TimeoutError(f"not all of {self.size} actors have started within {START_S:g} s")
            time.sleep(0.2)
        return Notes(self.folder)


def rate(step: StepName, crew: Crew, rounds: int) -> float:
    """Rows a second of a step on a crew, from its first call to its last answer."""
    crew.folder.mkdir()
    make, rows_in_flight = STEP_RUNS[step]
    questions = bench_questions(crew.size * rounds * rows_in_flight)
    make(crew, questions)
    return len(questions) / span(noted(crew.folder))


def _written(crew: Crew, name: str, record: type, rows: Sequence[Any]) -> Table:
    table = Table(f"{crew.folder}/{name}", record)
    write_rows(table, rows, ORIGIN, "question_id")
    return table


def _make(output: Table, ds: "Dataset", ids: Iterable[str], key: str, explode: str | None = None) -> None:
    output.prepare()
    output.write(ds, key, explode)
    output.finish(ORIGIN, key, ids, seconds=0, max_error_rate=0)


def _sample(crew: Crew, questions: Sequence[Question]) -> None:
    source = _written(crew, "questions", Question, questions)
    engine = VllmEngine(num_actors=crew.size, batch_size=2, max_concurrency=2)
    config = SampleConfig(num_samples_train=1, engine=engine)
    make_engine = partial(SleepingEngine, crew=crew)
    ds = sample(source.dataset(rows_per_block=2), config, model="", policy="p", config_hash="", generator=make_engine)
    _make(Table(f"{crew.folder}/solutions", Solutions), ds, [q.question_id for q in questions], "question_id")


def _judge(crew: Crew, questions: Sequence[Question]) -> None:
    source = _written(crew, "solutions", Solutions, solutions_of(questions))
    engine = JudgeVllm(model="sleeper", num_actors=crew.size, batch_size=2, max_concurrency=2)
    config = JudgeConfig(engine=engine, reply="lines", num_documents=0)
    tables = _arrow_tables(questions)
    make_engine = partial(SleepingEngine, crew=crew)
    ds = judge(source.dataset(rows_per_block=2), config, model="sleeper", generator=make_engine, **tables)
    output = Table(f"{crew.folder}/labels", Labels)
    _make(output, ds, [q.question_id for q in questions], "question_id", "labels")


def _score(crew: Crew, questions: Sequence[Question]) -> None:
    source = _written(crew, "solutions", Solutions, solutions_of(questions))
    config = score.ScoreConfig(arms=("text_only",), num_actors=crew.size, batch_size=1)
    tables = _arrow_tables(questions)
    files = score.input_files([tables["questions"]], [tables["images"]], [tables["evidence"]], str(crew.folder))
    ds = score.inputs(source.dataset(rows_per_block=1), files)
    scored = score._map(ds, SleepingScorer, config, crew, "bench")  # type: ignore[arg-type] # no path: it loads nothing
    output = Table(f"{crew.folder}/scores", Scores)
    _make(output, scored, [q.question_id for q in questions], "question_id", "scores")


def _embed(crew: Crew, questions: Sequence[Question]) -> None:
    source = _written(crew, "questions", Question, questions)
    config = embed.EmbedConfig(num_actors=crew.size)
    ds = embed._map(source.dataset(rows_per_block=4), config, SleepingEmbedder, 4, crew)
    _make(Table(f"{crew.folder}/queries", Query), ds, [q.question_id for q in questions], "question_id")


STEP_RUNS: dict[StepName, tuple[Callable[[Crew, Sequence[Question]], None], int]] = {
    "sample": (_sample, 4),
    "judge": (_judge, 4),
    "score": (_score, 1),
    "embed": (_embed, 4),
}
"""How a step is run, and the rows that one of its actors has at a time."""


def solutions_of(questions: Sequence[Question]) -> list[Solutions]:
    """A solution for each question."""
    rows = []
    for question in questions:
        solution = Solution(
            solution_id=f"s{question.question_id}",
            index=0,
            text="\n".join(STEPS),
            steps=STEPS,
            answer="A",
            correct=True,
            finish_reason="stop",
            seed=0,
            text_sha="",
        )
        rows.append(
            Solutions(
                question_id=question.question_id, policy="p", config_hash="", num_requested=1, solutions=[solution]
            )
        )
    return rows


def _arrow_tables(questions: Sequence[Question]) -> dict[str, pa.Table]:
    """The questions, and no images and no evidence."""
    from medmm_ray.data.records import to_arrow

    return {
        "questions": to_arrow(Question, list(questions)),
        "images": arrow_schema(Image).empty_table(),
        "evidence": arrow_schema(Evidence).empty_table(),
    }


class SleepingEngine:
    """A policy or a judge that takes a fixed time, however many questions it has in flight."""

    def __init__(self, model: str, config: VllmEngine, crew: Crew) -> None:  # noqa: ARG002
        self.statistics = Statistics()
        self.pause_s, self.notes = crew.pause_s, crew.join()

    def count(self, prompt: ChatPrompt) -> int:
        """A prompt's characters."""
        return sum(len(message["content"]) for message in prompt.messages)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """Verdicts where a form is asked for, else solutions."""
        self.notes.begin()
        await asyncio.sleep(self.pause_s)
        self.notes.end(self.statistics)
        text = "\n".join(f"Step {number}: {step}" for number, step in enumerate(STEPS, 1))
        if sampling.pattern is not None:
            text = verdicts(prompt.messages[-1]["content"])
        return [Completion(text, "stop", seed + number) for number in range(n)]


class SleepingModel:
    """A reward model that takes a fixed time for a question."""

    vision = False
    fusion = None

    def __init__(self, crew: Crew) -> None:
        from medmm_ray.reward_model import TrainedInputs

        self.trained_inputs = TrainedInputs()
        self.pause_s, self.notes = crew.pause_s, crew.join()

    def iter_states(
        self,
        requests: "Iterable[ScoreRequest]",
        **options: object,  # noqa: ARG002
    ) -> "Iterator[tuple[ScoreRequest, list[int]]]":
        """The steps of each solution of a request."""
        for request in requests:
            self.notes.begin()
            time.sleep(self.pause_s)
            self.notes.end(Statistics())
            yield request, [len(STEPS)] * len(request.solutions)

    def step_scores(self, states: list[int], image_features: None) -> "list[StepScores]":  # noqa: ARG002
        """Scores of solutions with so many steps."""
        from medmm_ray.reward_model import StepScores

        return [StepScores(text_log_odds=[1.0] * steps, image_log_odds=[0.0] * steps) for steps in states]


class SleepingScorer(score.Scorer):
    """The step's actor with that model."""

    def __init__(self, config: score.ScoreConfig, model: Crew, model_id: str) -> None:
        super().__init__(config, SleepingModel(model), model_id)  # type: ignore[arg-type]


class SleepingEncoder:
    """An encoder that takes a fixed time for a batch."""

    query_identity = None

    def __init__(self, crew: Crew) -> None:
        self.pause_s, self.notes = crew.pause_s, crew.join()

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector a text."""
        self.notes.begin()
        time.sleep(self.pause_s)
        self.notes.end(Statistics())
        return np.ones((len(texts), 4), np.float32)


class SleepingEmbedder(embed._QuestionActor):
    """The step's actor with that encoder."""

    def __init__(self, crew: Crew) -> None:
        self.encoder = SleepingEncoder(crew)  # type: ignore[assignment]
        self.config = embed.EmbedConfig()
