"""Resuming: faults injected at random moments of each step, and the tables they leave, against an undisturbed run.

The steps run on scripted engines (`jobs.benches.scripted`); Ray, its workers, tables and files are real. In the runs
with faults labels are judged while solutions are sampled, in the undisturbed one after them. A worker, an actor of the
step, or the machine they run on is killed under a driver that goes on; a driver that is killed, interrupted or loses
its Ray is started again with the same command. Then no row may be missing, none be there twice, and each table be the
undisturbed run's by its content hash; and no answer of the API that judges and writes questions that had arrived may be
paid again.
"""

import itertools
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table as Grid

import jobs
from jobs.benches import Measured
from jobs.benches.fault_injection import (
    KINDS,
    Driver,
    Fault,
    FaultInjector,
    Kind,
    Outcome,
    PreemptibleCluster,
    kill_survivors,
)
from jobs.benches.model_server import in_thread
from jobs.benches.scripted_api import ScriptedApi, stored_answers
from jobs.graph import BY_NAME, STEPS
from jobs.step import Run, load_recipe
from medmm_ray.config import Config
from medmm_ray.data.tables import Table, read_json
from medmm_ray.train.progress import HISTORY

TINY = Path(jobs.__file__).parent / "recipes" / "tiny.yaml"
BASE = "undisturbed"  # the run that the others are compared with
# What each training makes, and a checkpoint in its place where it does not run.
TRAININGS = {
    "train_image_tower": "image_tower",
    "train_policy": "policy",
    "train_text_prm": "text_prm",
    "train_two_tower": "two_tower",
}
WITHOUT_ACTORS = ("ingest", "curate", *TRAININGS)
MOST_DIFFERENCE = 1e-4  # between the losses of two trainings that are the same but for their number of workers
# Short, and with checkpoints often enough that a fault in the middle finds some.
TRAINED_WITH = {"epochs": 1, "checkpoint_every": 4, "max_failures": 5}
API_STEPS = ("judge", "write_questions")  # steps that ask the API
API_MODEL = "scripted"
ACTORS, IN_FLIGHT = 2, 8  # of each of these
KEY = "SCRIPTED_API_KEY"
ATTEMPTS = 3  # rounds in which a fault that came too late is injected again


class BenchConfig(Config):
    """How many faults, of which kinds, in which steps."""

    faults: int = Field(20, ge=1)
    """Faults, spread over steps and kinds in turn."""
    seed: int = 0
    """Start of all random numbers: the same seed draws the same faults."""
    kinds: tuple[Kind, ...] = KINDS
    """What is killed. worker, actor: a process of Ray's (the others of a step, those of its actors); driver: the
    program; raylet: Ray under it; node: a machine of a cluster; drain: the same, some seconds after a notice. ctrl-c is
    an interrupt."""
    nodes: int = Field(1, ge=1)
    """Nodes of the cluster on which the rounds with faults run, the head and those that do the work; 1: each round runs
    on this machine alone, but for faults that take a machine away."""
    steps: tuple[str, ...] = (
        "ingest",
        "write_questions",
        "curate",
        "embed",
        "retrieve",
        "sample",
        "judge",
        "monte_carlo",
        "tree_search",
        "review",
        "states",
        "score",
    )
    """Steps with faults; those before the last of them run too, write_questions, tree_search and trainings only by
    name. A training runs as two workers, of which one may go."""
    questions: int = 96
    """Questions; a quarter of them is of the test split."""
    pause_s: float = 0.25
    """Seconds that a scripted engine takes for an answer."""

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values as given; on a cluster of several nodes, by themselves all kinds of faults that it has."""
        completed = dict(super().completed(values))
        if completed.get("nodes", 1) != 1:
            completed.setdefault("kinds", [kind for kind in KINDS if kind != "raylet"])
        return completed

    @model_validator(mode="after")
    def _has_what_it_kills(self) -> "BenchConfig":
        if self.nodes > 1 and "raylet" in self.kinds:
            raise ValueError("kinds: with nodes > 1 the loss of a raylet is that of its machine: say node")
        return self


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """The undisturbed run, the rounds with faults, and what became of their tables."""
    console.print(f"seed {config.seed}: {config.faults} faults in {', '.join(config.steps)}")
    with tempfile.TemporaryDirectory() as folder, in_thread(ScriptedApi(config.pause_s)) as api:
        experiment = ResumeExperiment(config, Path(folder), api, console)
        comparisons = experiment.run()
        console.print(grid_of(experiment, comparisons))
        yield from rows(experiment, comparisons)
        survivors = kill_survivors(experiment.drivers)
        for name in survivors:
            console.print(f"left behind: {name}")
        num_left = len(survivors)
        yield Measured("processes left behind", len(experiment.drivers), num_left, num_left, "≤ 0", "processes")


@dataclass(frozen=True)
class TableComparison:
    """One table of a round beside the undisturbed run's: rows by their keys, and whether the contents are equal."""

    round: str
    step: str
    expected: int
    lost: int
    doubled: int
    equal: bool


@dataclass
class AnswerCounts:
    """What became of the API's answers."""

    stored: int = 0
    paid_twice: int = 0
    """Answers that are stored twice: the first was whole, and its request was sent again."""
    lost: int = 0
    """Answers that the server gave and nobody stored."""


class ResumeExperiment:
    """The undisturbed run and the rounds with faults, each in a folder of its own."""

    def __init__(self, config: BenchConfig, folder: Path, api: ScriptedApi, console: Console) -> None:
        self.config, self.folder, self.api, self.console = config, folder, api, console
        self.rng = random.Random(config.seed)
        self.base = Outcome()
        self.rounds: dict[str, Outcome] = {}
        self.drivers: list[Driver] = []
        self.answers = AnswerCounts()
        self.models = folder / "models"
        self.last_step = max(config.steps, key=lambda name: STEPS.index(BY_NAME[name]))
        os.environ.setdefault(KEY, "any")  # for drivers and for the machines of a cluster

    def run(self) -> list[TableComparison]:
        """All rounds, one a kind; a fault that came too late is injected again, earlier."""
        self.run_undisturbed()
        planned = plan(self.config, self.rng)
        comparisons = []
        for kind in self.config.kinds:
            faults = [fault for fault in planned if fault.kind == kind]
            for attempt in range(ATTEMPTS):
                if faults:
                    round_comparisons, late = self.run_round(f"{kind}-{attempt}", faults)
                    comparisons += round_comparisons
                    # The step was faster than undisturbed: half of the wait.
                    faults = [replace(fault, share=fault.share / 2) for fault in late]
        return comparisons

    def run_undisturbed(self) -> None:
        """The run that the others are compared with."""
        if STEPS.index(BY_NAME[self.last_step]) >= STEPS.index(BY_NAME["states"]):
            _save_reward_model(self.models)
        self.base = self._outcome(BASE, [])
        times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.base.step_seconds.items())
        self.log(f"undisturbed: {self.base.seconds:.1f} s ({times})")

    def run_round(self, name: str, faults: Sequence[Fault]) -> tuple[list[TableComparison], list[Fault]]:
        """A run with faults beside the undisturbed one, and the faults that came too late."""
        paid_before = self.api.num_paid
        outcome = self._outcome(name, faults)
        num_injected = len(outcome.injected)
        self.log(f"{name}: {num_injected} of {len(faults)} faults, {outcome.starts} starts, {outcome.seconds:.1f} s")
        self.rounds[name] = outcome
        answers = stored_answers(self.folder / name)
        self.answers.stored += len(answers)
        self.answers.paid_twice += answers.total() - len(answers)
        self.answers.lost += self.api.num_paid - paid_before - answers.total()
        comparisons = []
        for step in self.config.steps:
            comparisons += self.compare(name, step)
        return comparisons, [fault for fault in faults if fault not in outcome.injected]

    def _outcome(self, name: str, faults: Sequence[Fault]) -> Outcome:
        num_machines = self.config.nodes - 1 if faults else 0
        injector = FaultInjector(faults, self.base.step_seconds, self.rng, self.log, num_machines)
        return injector.run(lambda number, cluster: self.start(name, number, cluster))

    def start(self, name: str, number: int = 0, cluster: PreemptibleCluster | None = None) -> Driver:
        """Start the driver of a run, for the `number`-th time."""
        (self.folder / name).mkdir(exist_ok=True)
        environment = {"PAUSE_S": str(self.config.pause_s), "UNTIL": self.last_step}
        if cluster:
            environment["RAY_ADDRESS"] = cluster.address
        command = [sys.executable, "-m", "jobs.benches.scripted", *self.recipe(name)]
        driver = Driver(command, environment, self.folder / name / f"driver-{number}.log")
        self.drivers.append(driver)
        return driver

    def recipe(self, name: str) -> list[str]:
        """Words of the tiny recipe, with more questions and scripted models."""
        return [str(TINY), *(f"{key}={value}" for key, value in self._settings(name).items())]

    def _settings(self, name: str) -> dict[str, object]:
        steps, num_test = self.config.steps, self.config.questions // 4
        settings: dict[str, object] = {
            "run": self.folder / name,
            "overlap": name != BASE,
            "max_error_rate": 0,
            "without": [] if "tree_search" in steps else ["tree_search"],
            "ingest.sources.0.num_train": self.config.questions - num_test,
            "ingest.sources.0.num_test": num_test,
            "ingest.batch_size": 16,
            "write_questions.per_image": 2 if "write_questions" in steps else 0,
            "embed.text_model": "null",
            "embed.image_batch_size": 16,
            "judge.reply": "lines",
            "judge.engine.max_images": 0,
            "review.review_steps": 100,
            "score.arms": "[text_only]",
        }
        for step, model in TRAININGS.items():
            settings |= self._training_settings(step, model)
        for step in ("embed", "states", "score"):
            settings[f"{step}.num_cpus"] = 0.5
        for step in ("sample", "monte_carlo", "tree_search"):
            settings[f"{step}.engine.num_cpus"] = 0.5
            settings[f"{step}.engine.num_actors"] = 2
        # Few questions at a time, so that the first are judged long before the last are sampled.
        settings |= {"sample.engine.batch_size": 1, "sample.engine.max_concurrency": 2}
        for step in ("states", "score"):
            settings[f"{step}.num_actors"] = 1
        for step in API_STEPS:
            settings |= {
                f"{step}.engine.kind": "openai",
                f"{step}.engine.model": API_MODEL,
                f"{step}.engine.num_actors": ACTORS,
                f"{step}.engine.batch_size": 2,
            }
        for key, value in self._api_settings().items():
            settings[f"apis.{API_MODEL}.{key}"] = value
        return settings

    def _training_settings(self, step: str, model: str) -> Mapping[str, object]:
        if step not in self.config.steps:
            return {f"models.{model}": "scripted" if model in ("policy", "image_tower") else self.models}
        elastic = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1.0, "threads": 1}
        return {f"{step}.{name}": value for name, value in (elastic | TRAINED_WITH).items()}

    def _api_settings(self) -> Mapping[str, object]:
        return {
            "endpoint": self.api.endpoint,
            "key_variable": KEY,
            "input_price": 1,
            "cached_input_price": 1,
            "output_price": 1,
            "in_flight": IN_FLIGHT,
        }

    def compare(self, name: str, step: str) -> list[TableComparison]:
        """Each table of a step in a round beside the undisturbed one."""
        base_run, fault_run = (Run(load_recipe(self.recipe(run))) for run in (BASE, name))
        comparisons = []
        for table_name, record in BY_NAME[step].makes.items():
            if table_name in TRAININGS.values():
                comparisons.append(curves(name, step, base_run.uri(table_name), fault_run.uri(table_name)))
            if record is None:  # an artifact, which has no rows
                continue
            base_table, table = base_run.table(table_name), fault_run.table(table_name)
            base_keys, table_keys = key_counts(base_table), key_counts(table)
            comparisons.append(
                TableComparison(
                    round=name,
                    step=step,
                    expected=base_keys.total(),
                    lost=(base_keys - table_keys).total(),
                    doubled=(table_keys - base_keys).total(),
                    equal=table.manifest().content_hash == base_table.manifest().content_hash,
                )
            )
        return comparisons

    def log(self, line: str) -> None:
        """Print a line about the experiment's course."""
        self.console.print(f"[dim]{line}[/dim]")


def curves(round_: str, step: str, base: str, fault: str) -> TableComparison:
    """A training of a round beside the undisturbed one: a row is an update, equal where all losses are."""
    base_losses, losses = losses_of(base), losses_of(fault)
    differences = [abs(loss - base_loss) for loss, base_loss in zip(losses, base_losses, strict=False)]
    missing = len(base_losses) - len(losses)
    return TableComparison(
        round=round_,
        step=step,
        expected=len(base_losses),
        lost=max(0, missing),
        doubled=max(0, -missing),
        equal=missing == 0 and max(differences) <= MOST_DIFFERENCE,
    )


def losses_of(model: str) -> list[float]:
    """The loss of each update of the training that made a model."""
    history = read_json(f"{model}/{HISTORY}")
    assert history is not None, model
    return [update["loss"] for update in history["updates"]]


def plan(config: BenchConfig, rng: random.Random) -> list[Fault]:
    """The faults: every pair of a kind and a step in a drawn order, those that came least often first."""
    all_pairs = [
        pair
        for pair in itertools.product(config.kinds, config.steps)
        if pair[0] != "actor" or pair[1] not in WITHOUT_ACTORS
    ]
    planned: list[tuple[Kind, str]] = []
    counts: Counter[str] = Counter()  # of kinds and of steps
    while len(planned) < config.faults:
        pairs = rng.sample(all_pairs, len(all_pairs))
        while pairs:
            pair = min(pairs, key=lambda pair: (counts[pair[1]], counts[pair[0]]))
            pairs.remove(pair)
            planned.append(pair)
            counts.update(pair)
    return [Fault(kind, step, rng.uniform(0.05, 0.95)) for kind, step in planned[: config.faults]]


def key_counts(table: Table) -> Counter[tuple[str, ...]]:
    """How often each key of the record is there."""
    keys = table.to_arrow(list(table.record.key))  # type: ignore[attr-defined]
    columns = [column.to_pylist() for column in keys.columns]
    return Counter(zip(*columns, strict=True))


def _save_reward_model(folder: Path) -> None:
    from jobs.benches.models import Shape, reward_model

    shape = Shape(
        hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=600
    )
    reward_model(shape, "float32", "cpu", 2048).save_pretrained(folder)


def grid_of(experiment: ResumeExperiment, comparisons: Sequence[TableComparison]) -> Grid:
    """Step x kind: faults injected, and whether the step's tables equal the undisturbed run's in their rounds."""
    kinds = experiment.config.kinds
    grid = Grid("step", *kinds, box=None, header_style="bold")
    for step in experiment.config.steps:
        cells = [_cell(experiment, comparisons, step, kind) for kind in kinds]
        grid.add_row(step, *cells)
    return grid


def _cell(experiment: ResumeExperiment, comparisons: Sequence[TableComparison], step: str, kind: Kind) -> str:
    rounds = []  # one entry a fault
    for name, outcome in experiment.rounds.items():
        for fault in outcome.injected:
            if (fault.kind, fault.step) == (kind, step):
                rounds.append(name)
    if not rounds:
        return ""
    is_equal = True
    for table in comparisons:
        if table.round in rounds and table.step == step:
            is_equal &= table.equal
    return f"{len(rounds)} {'equal' if is_equal else '[bold red]not equal[/]'}"


def rows(experiment: ResumeExperiment, comparisons: Sequence[TableComparison]) -> Iterator[Measured]:
    """The bench's figures."""
    num_planned = experiment.config.faults
    num_injected = num_api_faults = 0
    for outcome in experiment.rounds.values():
        num_injected += len(outcome.injected)
        for fault in outcome.injected:
            num_api_faults += fault.step in API_STEPS
    expected = lost = doubled = equal = 0
    for table in comparisons:
        expected += table.expected
        lost += table.lost
        doubled += table.doubled
        equal += table.equal
    yield Measured("faults injected", num_planned, num_injected, num_injected / num_planned, "", "faults")
    yield Measured("rows lost", expected, lost, lost, "≤ 0", "rows")
    yield Measured("rows doubled", expected, doubled, doubled, "≤ 0", "rows")
    answers = experiment.answers
    if answers.stored:
        yield Measured(
            "whole answers paid twice", answers.stored, answers.paid_twice, answers.paid_twice, "≤ 0", "calls"
        )
        # Each fault can lose what was in flight at its moment, and no more.
        most = num_api_faults * ACTORS * IN_FLIGHT
        name = "calls lost on the way, most in flight"
        yield Measured(name, most, answers.lost, answers.lost / max(most, 1), "≤ 1", "calls")
    num_tables = len(comparisons)
    yield Measured("tables equal to the undisturbed run's", num_tables, equal, equal / num_tables, "≥ 1", "tables")
    base_seconds = experiment.base.seconds
    for round_, outcome in experiment.rounds.items():
        name = f"{round_}: a run with {len(outcome.injected)} faults, undisturbed"
        yield Measured(name, base_seconds, outcome.seconds, outcome.seconds / base_seconds, "", "s")
