"""Faults injected again and again, on real engines and on scripted ones: the tables equal an undisturbed run's."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import bench
from jobs.graph import STEPS
from jobs.step import Run, load_recipe
from tests.jobs.test_resume import TINY
from tests.paths import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
# A cluster's faults, and its steps: the real trainings too, on two workers of which one may go.
OF_NODES = "worker,driver,node,drain"
STEPS_ON_NODES = "ingest,train_image_tower,train_policy,embed,sample,judge,monte_carlo,train_text_prm,states,score"
SIGNALS = (signal.SIGINT, signal.SIGKILL)


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """The pipeline in a process group of its own: Ctrl-C in a terminal reaches every process of it."""
    words = [sys.executable, "-m", "jobs.pipeline", TINY, f"run={folder}"]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, preexec_fn=_as_in_a_terminal)


def _as_in_a_terminal() -> None:
    """A shell script's background jobs ignore Ctrl-C, and so does what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def hashes(folder: Path) -> dict[str, str]:
    run = Run(load_recipe([TINY, f"run={folder}"]))
    return {
        name: run.table(name).manifest().content_hash
        for step in STEPS
        if not run.skipped(step)
        for name, kind in step.makes.items()
        if kind
    }


@pytest.mark.parametrize(
    ("words", "fewest"),
    [
        ([], 18),  # a step of a fifth of a second may be over before its fault
        (["nodes=3", "faults=24", f"kinds=[{OF_NODES}]", f"steps=[{STEPS_ON_NODES}]"], 21),
    ],
    ids=["one-machine", "three-nodes"],
)
def test_faults_injected_into_all_steps_on_scripted_engines(words: list[str], fewest: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert bench.main(["resume", f"json={path}", *words]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows["faults injected"]["ours"] >= fewest
    for name in ("rows lost", "rows doubled", "whole answers paid twice", "processes left behind"):
        assert rows[name]["ours"] == 0
    assert rows["tables equal to the undisturbed run's"]["ratio"] == 1


def test_whatever_is_killed_the_tables_are_the_same(tmp_path: Path) -> None:
    started = time.monotonic()
    assert start(tmp_path / "calm").wait() == 0
    # In shares of what a run takes here: on a busy machine Ray alone needs more than the seconds of a quiet one.
    run_s = time.monotonic() - started
    rng = random.Random(0)
    for attempt in itertools.count():
        assert attempt < 60, "no progress between faults"
        process = start(tmp_path / "rough")
        try:
            code = process.wait(timeout=run_s * rng.uniform(0.05, 0.5))
        except subprocess.TimeoutExpired:
            number = SIGNALS[attempt % 2]
            print(f"attempt {attempt}: {number.name}", flush=True)
            os.killpg(process.pid, number)
            process.wait(timeout=max(60, run_s / 3))
            continue
        assert code == 0
        break
    assert hashes(tmp_path / "rough") == hashes(tmp_path / "calm")
