"""Jobs that are killed and interrupted, resumed: their tables equal those of an undisturbed run."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from jobs.benches.blows import Blow
from jobs.benches.resume import BenchConfig, Trial, plan
from jobs.benches.scripted_api import scripted_api

ROOT = Path(__file__).parent.parent
TINY = "jobs/recipes/tiny.yaml"


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    config = BenchConfig(blows=3, steps=("sample", "judge", "monte_carlo"), questions=16)
    with scripted_api(config.pause_s) as api:
        yield Trial(config, tmp_path, api, Console())


@pytest.mark.engine
def test_an_actor_killed_a_run_interrupted_and_killed_leave_the_tables_of_an_undisturbed_one(trial: Trial) -> None:
    trial.undisturbed()
    blows = [Blow("actor", "sample", 0.3), Blow("ctrl-c", "judge", 0.5), Blow("driver", "monte_carlo", 0.5)]
    results, late = trial.round("rough", blows)
    assert late == []
    assert [driver.process.returncode for driver in trial.drivers] == [0, 130, -9, 0]
    assert [(r.step, r.expected, r.lost, r.doubled, r.equal) for r in results] == [
        ("sample", 16, 0, 0, True),
        ("judge", 64, 0, 0, True),
        ("monte_carlo", results[2].expected, 0, 0, True),
    ]
    assert results[2].expected > 0
    assert trial.money.paid_twice == 0
    assert 0 <= trial.money.lost <= 2 * 8  # of the judge's two actors, eight calls each


def test_blows_are_drawn_from_the_seed_and_dealt_to_all_steps_and_kinds_in_turn() -> None:
    config = BenchConfig(blows=8, kinds=("actor", "driver"), steps=("ingest", "sample"))
    blows = plan(config, Random(7))
    assert blows == plan(config, Random(7))
    assert blows != plan(config, Random(8))
    pairs = {("actor", "sample"), ("driver", "sample"), ("driver", "ingest")}  # ingest has no actors
    assert {(blow.kind, blow.step) for blow in blows[:3]} == {(blow.kind, blow.step) for blow in blows[3:6]} == pairs
    assert all(0 < blow.share < 1 for blow in blows)
