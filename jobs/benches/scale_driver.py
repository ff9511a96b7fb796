"""Memory and time of the driver at two numbers of questions, for `jobs.bench scale`.

Each step's own entry runs in a process of its own on tables whose ids are of so many questions, with few solutions of
few steps: what a driver holds whole grows with them. Neither Ray nor an engine is started: of a training, what its
workers read is written, of other steps what their tasks look up. Ids of rows that are still to be made, of which a
driver keeps a set, are not in it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pydantic import Field

from jobs.benches import Measured
from jobs.benches.process_memory import highest_bytes, in_new_process
from jobs.benches.scale_tables import TableShape, make_tables
from jobs.graph import BY_NAME
from jobs.step import Job, Run, load_recipe
from medmm_ray.config import Config
from medmm_ray.data.sorted_rows import SortedRows

MIB = 1 << 20


class DriverConfig(Config):
    """What a driver is given to read."""

    questions: tuple[int, ...] = (10_000, 100_000)
    """Numbers of questions, tenfold each; none: no driver is measured. At (100_000, 1_000_000) it takes an hour."""
    steps: tuple[str, ...] = ("audit", "train_text_prm", "train_two_tower", "judge", "monte_carlo", "review", "score")
    """Steps whose drivers are measured."""
    bootstrap_samples: int = Field(100, ge=1)
    """Resamples of the dataset report: they take time by the question, as all else does."""
    shape: TableShape = TableShape()
    """What a question has."""


class Usage(NamedTuple):
    """What a step's driver took: its highest memory in MiB, and seconds of CPU time, so that other work beside it does
    not count."""

    mebibytes: float
    seconds: float


def measure_drivers(config: DriverConfig) -> Iterator[Measured]:
    """Each step's peak and seconds at each number of questions against the first."""
    usages: dict[tuple[str, int], Usage] = {}
    for number in config.questions:
        with TemporaryDirectory(prefix="driver-") as folder:
            in_new_process(make_tables, config.shape, number, recipe_words(config, folder))
            for step in config.steps:
                usages[step, number] = in_new_process(used, step, recipe_words(config, folder))
    for step in config.steps:
        for number in config.questions[1:]:
            yield from _rows(step, config.questions[0], number, usages)


def _rows(
    step: str,
    few: int,
    many: int,
    usages: Mapping[tuple[str, int], Usage],
) -> Iterator[Measured]:
    baseline, ours = usages[step, few], usages[step, many]
    of = f"{step}, {many:,} questions against {few:,}"
    growth = (ours.mebibytes - baseline.mebibytes) * MIB / (many - few)
    ratio = ours.mebibytes / baseline.mebibytes
    label = f"peak memory of the driver of {of} ({growth:.0f} bytes a question)"
    yield Measured(label, baseline.mebibytes, ours.mebibytes, ratio, "≤ 1.1", "MiB")
    target = f"≤ {1.05 * many / few:.4g}"
    yield Measured(f"time of {of}", baseline.seconds, ours.seconds, ours.seconds / baseline.seconds, target, "CPU s")


def recipe_words(config: DriverConfig, folder: str) -> list[str]:
    """The recipe of the run whose tables lie in `folder`."""
    recipe = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
    return [str(recipe), f"run={folder}", f"audit.bootstrap_samples={config.bootstrap_samples}"]


def used(step: str, words: Sequence[str]) -> Usage:
    """The work of a step's driver on a run's tables."""
    run = Run(load_recipe(words))
    work = _DRIVERS[step]
    start = time.process_time()
    work(run)
    return Usage(highest_bytes() / MIB, time.process_time() - start)


def _audit(run: Run) -> None:
    from jobs.audit import report_of

    report_of(run)


def _train_text_prm(run: Run) -> None:
    from medmm_ray.train.labelled_rows import LabelledRows, LabelRules
    from medmm_ray.train.launch import write_inputs

    job = Job(run, BY_NAME["train_text_prm"])
    rules = LabelRules("hybrid", "collapse", max_solutions=None, num_documents=0)
    rows = LabelledRows(
        rules,
        job.stream("questions"),
        job.stream("evidence"),
        job.stream("solutions"),
        job.stream_all(("judge_labels", "monte_carlo_labels")),
    )
    write_inputs({"questions": rows}, f"{run.root}/inputs")


def _train_two_tower(run: Run) -> None:
    from medmm_ray.train.labelled_rows import TwoTowerRows, TwoTowerRules
    from medmm_ray.train.launch import write_inputs
    from medmm_ray.train.two_tower_data import states_files

    job = Job(run, BY_NAME["train_two_tower"])
    files = states_files([job.table("states")])
    rows = TwoTowerRows(
        TwoTowerRules("hybrid", "collapse", num_references=1),
        files,
        job.stream_all(("judge_labels", "monte_carlo_labels")),
        job.stream("questions"),
        job.stream("images"),
        job.stream("evidence"),
        job.stream("solutions", ["question_id", "solutions"]),
    )
    write_inputs({"questions": rows, "files": files}, f"{run.root}/two-tower-inputs")


def _monte_carlo(run: Run) -> None:
    from jobs.monte_carlo import lookups

    job = Job(run, BY_NAME["monte_carlo"])
    with job.lookup_folder("monte_carlo_labels") as folder:
        tables = lookups(job, folder)
        _look_up(job, [tables.judged, tables.questions])


def _judge(run: Run) -> None:
    from jobs.judge import lookups

    job = Job(run, BY_NAME["judge"])
    with job.lookup_folder("judge_labels") as folder:
        tables = lookups(job, folder)
        _look_up(job, [tables.questions, tables.evidence])


def _score(run: Run) -> None:
    from jobs.score import looked_up

    job = Job(run, BY_NAME["score"])
    with job.lookup_folder("scores") as folder:
        _look_up(job, looked_up(job, folder))


def _look_up(job: Job, tables: Sequence[SortedRows]) -> None:
    """Read some rows of each table as tasks do, of batches of solutions in any order."""
    for part in job.stream("solutions", ["question_id"]):
        ids = part["question_id"].to_pylist()
        for rows in tables:
            rows.rows_of(ids[:4])


def _review(run: Run) -> None:
    from jobs.review import drawn_queue

    drawn_queue(Job(run, BY_NAME["review"]))


_DRIVERS: dict[str, Callable[[Run], None]] = {
    "audit": _audit,
    "train_text_prm": _train_text_prm,
    "train_two_tower": _train_two_tower,
    "judge": _judge,
    "monte_carlo": _monte_carlo,
    "review": _review,
    "score": _score,
}
