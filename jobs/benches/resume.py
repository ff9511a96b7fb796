"""Resuming: blows at random points of each step, and the tables they leave, against an undisturbed run.

The steps run on scripted engines (`jobs.benches.scripted`); Ray, its workers, tables and files are real. A worker, an
actor of the step, or the machine they run on is killed under a driver that goes on; a driver that is killed,
interrupted or loses its Ray is started again with the same command. Then no row may be missing, none be there
twice, and each table be the undisturbed run's by its content hash; and no answer of the API that judges and writes
questions that had arrived may be paid again.
"""

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table as Grid

import jobs
from jobs.benches import Measured
from jobs.benches.blows import KINDS, Blow, Driver, Endured, Kind, Spot, endure, left_behind
from jobs.benches.scripted_api import ScriptedApi, kept_answers, scripted_api
from jobs.graph import BY_NAME, STEPS
from jobs.step import Run, load_recipe
from medmm_ray.config import Config
from medmm_ray.data.tables import Table

TINY = Path(jobs.__file__).parent / "recipes" / "tiny.yaml"
IMPOSSIBLE = (("actor", "ingest"), ("actor", "curate"))  # they have none
ASKING = ("judge", "write_questions")  # steps that ask the API
ACTORS, IN_FLIGHT = 2, 8  # of each of these
KEY = "SCRIPTED_API_KEY"
ATTEMPTS = 3  # rounds in which a blow that came too late is dealt again


class BenchConfig(Config):
    """How many blows, at what."""

    blows: int = Field(20, ge=1)
    """Blows, dealt to steps and kinds in turn."""
    seed: int = 0
    """Start of all random numbers: the same seed draws the same blows."""
    kinds: tuple[Kind, ...] = KINDS
    """What is killed. worker, actor: a process of Ray's (the others of a step, those of its actors); driver: the
    program; raylet: Ray under it; node: a machine of a cluster. ctrl-c is an interrupt."""
    steps: tuple[str, ...] = (
        "ingest", "write_questions", "curate", "embed", "retrieve", "sample", "judge", "monte_carlo", "tree_search",
        "review", "states", "score",
    )  # fmt: skip
    """Steps that are struck; those before the last of them run too, write_questions and tree_search only by name."""
    questions: int = 96
    """Questions; a quarter of them is of the test split."""
    pause_s: float = 0.25
    """Seconds that a scripted engine takes for an answer."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    console.print(f"seed {config.seed}: {config.blows} blows at {', '.join(config.steps)}")
    with tempfile.TemporaryDirectory() as folder, scripted_api(config.pause_s) as api:
        trial = Trial(config, Path(folder), api, console)
        results = trial.run()
        console.print(board(trial, results))
        yield from rows(trial, results)
        left = left_behind(trial.drivers)
        for name in left:
            console.print(f"left behind: {name}")
        yield Measured("processes left behind", len(trial.drivers), len(left), len(left), "≤ 0", "processes")


@dataclass(frozen=True)
class Result:
    """One table's fate in one round."""

    round: str
    step: str
    expected: int
    lost: int
    doubled: int
    equal: bool


@dataclass
class Money:
    """What became of the API's calls, in calls."""

    kept: int = 0
    paid_twice: int = 0
    """Answers that are kept twice: the first was whole, and its request was sent again."""
    lost: int = 0
    """Answers that the server gave and nobody kept."""


class Trial:
    """The undisturbed run and the rounds, each in a folder of its own."""

    def __init__(self, config: BenchConfig, folder: Path, api: ScriptedApi, console: Console) -> None:
        self.config, self.folder, self.api, self.console = config, folder, api, console
        self.rng = random.Random(config.seed)
        self.calm = Endured()
        self.rounds: dict[str, Endured] = {}
        self.drivers: list[Driver] = []
        self.money = Money()
        self.models = folder / "models"
        os.environ.setdefault(KEY, "any")  # for drivers and for the machines of a cluster
        self.last = max(config.steps, key=lambda name: STEPS.index(BY_NAME[name]))

    def run(self) -> list[Result]:
        """All rounds; a blow that came too late is dealt again, earlier."""
        self.undisturbed()
        due = plan(self.config, self.rng)
        results = []
        for kind in self.config.kinds:
            blows = [blow for blow in due if blow.kind == kind]
            for attempt in range(ATTEMPTS):
                if blows:
                    found, late = self.round(f"{kind}-{attempt}", blows)
                    results += found
                    blows = [replace(blow, share=blow.share / 2) for blow in late]
        return results

    def undisturbed(self) -> None:
        """The run that the others are compared with."""
        if STEPS.index(BY_NAME[self.last]) >= STEPS.index(BY_NAME["states"]):
            _save_reward_model(self.models)
        self.calm = endure(lambda n, spot: self.start("calm", n, spot), [], {}, self.rng, self.told)
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.calm.lasted.items())
        self.told(f"undisturbed: {self.calm.seconds:.1f} s ({steps})")

    def round(self, name: str, blows: list[Blow]) -> tuple[list[Result], list[Blow]]:
        """Results of one run under blows, and the blows that did not land."""
        before = self.api.paid
        found = endure(lambda n, spot: self.start(name, n, spot), blows, self.calm.lasted, self.rng, self.told)
        self.told(f"{name}: {len(found.landed)} of {len(blows)} blows, {found.starts} starts, {found.seconds:.1f} s")
        self.rounds[name] = found
        kept = kept_answers(self.folder / name)
        self.money.kept += len(kept)
        self.money.paid_twice += kept.total() - len(kept)
        self.money.lost += self.api.paid - before - kept.total()
        late = [blow for blow in blows if blow not in found.landed]
        return [r for step in self.config.steps for r in self.compare(name, step)], late

    def start(self, name: str, number: int, spot: Spot | None) -> Driver:
        (self.folder / name).mkdir(exist_ok=True)
        environment = {"PAUSE_S": str(self.config.pause_s), "UNTIL": self.last}
        if spot:
            environment["RAY_ADDRESS"] = spot.address
        command = [sys.executable, "-m", "jobs.benches.scripted", *self.recipe(name)]
        driver = Driver(command, environment, self.folder / name / f"driver-{number}.log")
        self.drivers.append(driver)
        return driver

    def recipe(self, name: str) -> list[str]:
        """Words of the tiny recipe, with more questions and scripted models."""
        test = self.config.questions // 4
        api = {
            "backend": "openai", "model": "scripted", "endpoint": self.api.address, "key_variable": KEY,
            "price_read": 1, "price_cached": 1, "price_written": 1,
            "num_actors": ACTORS, "batch_size": 2, "in_flight": IN_FLIGHT,
        }  # fmt: skip
        return [
            str(TINY), f"run={self.folder / name}", "models.policy=scripted", "models.image_tower=scripted",
            f"models.text_prm={self.models}", f"models.two_tower={self.models}",
            f"ingest.num_train={self.config.questions - test}", f"ingest.num_test={test}", "ingest.batch_size=16",
            "embed.text_model=null", "embed.image_batch_size=16", "embed.num_cpus=0.5",
            "sample.num_actors=2", "sample.num_cpus=0.5",
            *(f"{step}.{name}={value}" for step in ASKING for name, value in api.items()),
            "judge.reply=lines", "judge.max_images=0",
            f"write_questions.per_image={2 if 'write_questions' in self.config.steps else 0}",
            f"without={[] if 'tree_search' in self.config.steps else ['tree_search']}",
            "tree_search.num_actors=2", "tree_search.num_cpus=0.5",
            "monte_carlo.num_actors=2", "monte_carlo.num_cpus=0.5", "review.review_steps=100",
            "states.num_cpus=0.5", "states.num_actors=1", "score.num_cpus=0.5", "score.num_actors=1",
            "score.arms=[text_only]", "max_error_rate=0",
        ]  # fmt: skip

    def compare(self, name: str, step: str) -> list[Result]:
        """Each table of a step in a round beside the undisturbed one."""
        calm, rough = (Run(load_recipe(self.recipe(run))) for run in ("calm", name))
        results = []
        for table, record in BY_NAME[step].makes.items():
            if record is not None:
                ours, theirs = keys(rough.table(table)), keys(calm.table(table))
                results.append(
                    Result(
                        name, step, theirs.total(), (theirs - ours).total(), (ours - theirs).total(),
                        rough.table(table).manifest().content_hash == calm.table(table).manifest().content_hash,
                    )
                )  # fmt: skip
        return results

    def told(self, words: str) -> None:
        self.console.print(f"[dim]{words}[/dim]")


def plan(config: BenchConfig, rng: random.Random) -> list[Blow]:
    """The blows: every pair of a kind and a step in a drawn order, those struck least first, again and again."""
    pairs = [(kind, step) for kind in config.kinds for step in config.steps if (kind, step) not in IMPOSSIBLE]
    drawn: list[tuple[Kind, str]] = []
    struck: Counter[str] = Counter()
    while len(drawn) < config.blows:
        left = rng.sample(pairs, len(pairs))
        while left:
            pair = min(left, key=lambda pair: (struck[pair[1]], struck[pair[0]]))
            left.remove(pair)
            drawn.append(pair)
            struck.update(pair)
    return [Blow(kind, step, rng.uniform(0.05, 0.95)) for kind, step in drawn[: config.blows]]


def keys(table: Table) -> Counter[tuple[str, ...]]:
    """How often each key of the record is there."""
    columns = table.to_arrow(list(table.record.key))  # type: ignore[attr-defined]
    return Counter(zip(*(column.to_pylist() for column in columns.columns), strict=True))


def _save_reward_model(folder: Path) -> None:
    from jobs.benches.models import Shape, reward_model

    shape = Shape(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, intermediate_size=48,
                  vocab_size=600)  # fmt: skip
    reward_model(shape, "float32", "cpu", 2048).save_pretrained(folder)


def board(trial: Trial, results: Sequence[Result]) -> Grid:
    """Step x kind: blows that fell, and whether the step's tables equal the undisturbed run's in their rounds."""
    grid = Grid("step", *trial.config.kinds, box=None, header_style="bold")
    for step in trial.config.steps:
        cells = []
        for kind in trial.config.kinds:
            struck = [n for n, f in trial.rounds.items() for b in f.landed if (b.kind, b.step) == (kind, step)]
            equal = all(r.equal for r in results if r.round in struck and r.step == step)
            cells.append(f"{len(struck)} {'equal' if equal else '[bold red]not equal[/]'}" if struck else "")
        grid.add_row(step, *cells)
    return grid


def rows(trial: Trial, results: Sequence[Result]) -> Iterator[Measured]:
    rounds = trial.rounds
    landed = sum(len(found.landed) for found in rounds.values())
    expected, lost, doubled = (sum(getattr(r, name) for r in results) for name in ("expected", "lost", "doubled"))
    equal = sum(r.equal for r in results)
    yield Measured("blows that fell", trial.config.blows, landed, landed / trial.config.blows, "", "blows")
    yield Measured("rows lost", expected, lost, lost, "≤ 0", "rows")
    yield Measured("rows doubled", expected, doubled, doubled, "≤ 0", "rows")
    if trial.money.kept:
        cut = sum(blow.step in ASKING for found in rounds.values() for blow in found.landed)
        most = cut * ACTORS * IN_FLIGHT
        money = trial.money
        yield Measured("whole answers paid twice", money.kept, money.paid_twice, money.paid_twice, "≤ 0", "calls")
        yield Measured("calls lost on the way, most in flight", most, money.lost, money.lost / max(most, 1), "≤ 1",
                       "calls")  # fmt: skip
    yield Measured("tables equal to the undisturbed run's", len(results), equal, equal / len(results), "≥ 1", "tables")
    for round_, found in rounds.items():
        name = f"{round_}: a run under {len(found.landed)} blows, undisturbed"
        yield Measured(name, trial.calm.seconds, found.seconds, found.seconds / trial.calm.seconds, "", "s")
