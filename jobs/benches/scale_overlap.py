"""How long sampling and judging take together, against each of them alone.

The sampler and the judge's API sleep for each answer, so that neither waits for the machine's cores. *threads* are two
steps without Ray, a thread a place: tables, parts and shards are real, and nothing else takes time. *Ray* are the steps
themselves, on scripted engines: there starting actors and the last tasks count too, which is seconds on free cores.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.fault_injection import POLL_S, Driver
from jobs.benches.model_server import in_thread
from jobs.benches.resume import BASE, BenchConfig, ResumeExperiment
from jobs.benches.scripted_api import ScriptedApi
from medmm_ray.config import Config
from medmm_ray.data.handover import WAITING_TASKS, Handover, TakeShard
from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Provenance, Table

SAMPLING, JUDGING, CALLS = 4, 16, 4  # questions and calls at a time, calls a question


class OverlapConfig(Config):
    """What is sampled and judged."""

    questions: int = Field(128, ge=8)
    """Questions; four are sampled at a time, and 16 of their four calls each made."""
    pause_s: float = Field(2.0, gt=0)
    """Seconds that the sampler takes for a question, and the API for an answer."""
    with_ray: bool = True
    """Whether the steps themselves run too."""


def measure_overlap(config: OverlapConfig, console: Console) -> Iterator[Measured]:
    """The seconds of both steps together, beside the longer one's."""
    with tempfile.TemporaryDirectory() as folder:
        longer, both = in_threads(config, folder)
    yield Measured("judge while sampling, against the longer alone: threads", longer, both, both / longer, "≤ 1.1", "s")
    if config.with_ray:
        yield from _through_ray(config, console)


def in_threads(config: OverlapConfig, folder: str) -> tuple[float, float]:
    """The seconds of the longer of the two alone, and of both, the judge following the sampler."""
    table = Table(f"{folder}/solutions", Vector)
    table.prepare()
    handover = Handover("solutions")
    handover.begin(table, Vector, [], "item_id", config.questions)
    ids = [f"q{number}" for number in range(config.questions)]
    ends: dict[str, float] = {}
    start = time.monotonic()
    steps: dict[str, Callable[[], None]] = {
        "sample": lambda: _sample(table, handover, ids, config.pause_s),
        "judge": lambda: _judge(handover.taker(), handover.num_tasks, config.pause_s),
    }

    def run(name: str) -> None:
        steps[name]()
        ends[name] = time.monotonic() - start

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judging_s = config.questions * CALLS / JUDGING * config.pause_s
    return max(ends["sample"], judging_s), max(ends.values())


def _sample(table: Table, handover: Handover, ids: list[str], pause_s: float) -> None:
    def solve(row_id: str) -> pa.Table:
        time.sleep(pause_s)
        return to_arrow(Vector, [Vector(item_id=row_id, vector=[1.0])])

    with ThreadPoolExecutor(SAMPLING) as pool:
        for rows in pool.map(solve, ids):
            part = table.write_part(rows, "item_id")
            assert part is not None, "it has a row"
            handover.add(part)
    handover.flush()
    origin = Provenance(name="solutions", fingerprint="", config={}, upstream={})
    table.finish(origin, "item_id", ids, seconds=0, keeps_parts=True)
    handover.end()


def _judge(take: TakeShard, num_shards: int, pause_s: float) -> None:
    with ThreadPoolExecutor(JUDGING) as calls, ThreadPoolExecutor(WAITING_TASKS) as takers:
        for rows in takers.map(lambda number: take(pa.table({"number": [number]})), range(num_shards)):
            for _ in range(rows.num_rows * CALLS):
                calls.submit(time.sleep, pause_s)


def _through_ray(config: OverlapConfig, console: Console) -> Iterator[Measured]:
    settings = BenchConfig(steps=("sample", "judge"), questions=config.questions, pause_s=config.pause_s)
    with tempfile.TemporaryDirectory() as folder, in_thread(ScriptedApi(config.pause_s)) as api:
        experiment = ResumeExperiment(settings, Path(folder), api, console)
        apart = _finished(experiment.start(BASE))
        together = _finished(experiment.start("together"))
        [comparison] = experiment.compare("together", "judge")
    longer = max(apart.step_seconds[name] for name in settings.steps)
    yield Measured("sample, then judge, against the longer: Ray", longer, _span(apart), _span(apart) / longer, "", "s")
    label = "judge while sampling, against the longer alone: Ray"
    yield Measured(label, longer, _span(together), _span(together) / longer, "≤ 1.1", "s")
    equal = float(comparison.equal)
    yield Measured("labels equal to those of judging afterwards", 1, equal, equal, "≥ 1", "tables")


def _finished(driver: Driver) -> Driver:
    while driver.process.poll() is None:
        driver.steps()
        time.sleep(POLL_S)
    driver.steps()
    if driver.process.returncode != 0:
        raise RuntimeError(f"the driver ended with code {driver.process.returncode}:\n{driver.log.read_text()[-3000:]}")
    return driver


def _span(driver: Driver) -> float:
    """Seconds from the beginning of the sampling to the end of the judging."""
    return driver.step_starts["judge"] + driver.step_seconds["judge"] - driver.step_starts["sample"]
