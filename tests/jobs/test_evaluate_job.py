"""What the evaluate job puts around the figures."""

from functools import partial
from pathlib import Path

import pytest

from jobs import evaluate
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
