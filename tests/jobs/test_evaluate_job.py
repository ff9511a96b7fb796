"""What the evaluate job puts around the figures."""

from functools import partial
from pathlib import Path

import pytest

from jobs import evaluate
from jobs.placement import gpus_of_section
from jobs.step import Run, load_recipe
from medmm_ray.data.artifacts import Manifest
from medmm_ray.steps.evaluate import StepEntry
from tests.jobs.test_resume import TINY


def test_the_report_has_what_each_step_cost_and_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = partial(Manifest, name="t", fingerprint="f", config={}, upstream={})
    of_judge = [
        manifest(rows=3, seconds=2.0, cost=0.5, errors={"refused": 2}),
        manifest(rows=1, seconds=1.0, cost=0.25, errors={"refused": 1, "cut": 1}),
    ]
    monkeypatch.setattr(Run, "manifests", lambda _, step: of_judge if step.name == "judge" else [manifest()])
    entries = {entry.name: entry for entry in evaluate.step_entries(Run(load_recipe([TINY, f"run={tmp_path}"])))}
    assert "evaluate" not in entries
    assert entries["sample"] == StepEntry(name="sample", rows=0, seconds=0.0)
    assert entries["judge"] == StepEntry(name="judge", rows=4, seconds=3.0, cost=0.75, errors={"refused": 3, "cut": 1})


def test_the_gpus_of_a_section_are_those_of_its_pools() -> None:
    words = [
        "run=r",
        "score.num_gpus=1",
        "score.num_actors=3",
        "sample.engine.num_gpus=2",
        "sample.engine.num_actors=2",
    ]
    recipe = load_recipe([TINY, *words])
    assert gpus_of_section(recipe.score) == 3
    assert gpus_of_section(recipe.sample) == 4
    assert gpus_of_section(recipe.evaluate) == 0


def test_gpu_hours_have_the_price_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(name="t", fingerprint="f", config={}, upstream={}, seconds=1800.0)
    monkeypatch.setattr(Run, "manifests", lambda *_: [manifest])
    words = [f"run={tmp_path}", "score.num_gpus=1", "score.num_actors=4", "plan.dollars_per_gpu_hour=3.0"]
    entries = {entry.name: entry for entry in evaluate.step_entries(Run(load_recipe([TINY, *words])))}
    assert (entries["score"].gpu_hours, entries["score"].gpu_dollars) == (2.0, 6.0)
    assert entries["curate"].gpu_hours == 0.0
