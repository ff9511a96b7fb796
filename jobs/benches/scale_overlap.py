"""How long sampling and judging take together, against each of them alone.

The sampler and the judge's API sleep for each answer, so that neither waits for the machine's cores; tables, Ray and
the API's client are real.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.fault_injection import POLL_S, Driver
from jobs.benches.model_server import in_thread
from jobs.benches.resume import BASE, BenchConfig, ResumeExperiment
from jobs.benches.scripted_api import ScriptedApi
from medmm_ray.config import Config


class OverlapConfig(Config):
    """What is sampled and judged."""

    questions: int = Field(96, ge=8)
    """Questions; four are sampled at a time."""
    pause_s: float = Field(2.0, gt=0)
    """Seconds that the sampler takes for a question, and the API for an answer."""


def measure_overlap(config: OverlapConfig, console: Console) -> Iterator[Measured]:
    """The seconds of both steps, one after the other and together, beside the longer one's."""
    settings = BenchConfig(steps=("sample", "judge"), questions=config.questions, pause_s=config.pause_s)
    with tempfile.TemporaryDirectory() as folder, in_thread(ScriptedApi(config.pause_s)) as api:
        experiment = ResumeExperiment(settings, Path(folder), api, console)
        apart = _finished(experiment.start(BASE))
        together = _finished(experiment.start("together"))
        [comparison] = experiment.compare("together", "judge")
    longer = max(apart.step_seconds[name] for name in settings.steps)
    names = f"sample {apart.step_seconds['sample']:.0f} s, judge {apart.step_seconds['judge']:.0f} s"
    console.print(f"alone: {names}")
    yield Measured("sample, then judge, against the longer", longer, _span(apart), _span(apart) / longer, "", "s")
    label = "judge while sampling, against the longer alone"
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
