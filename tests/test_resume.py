"""Interrupted and killed jobs, resumed: their tables equal those of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.step import Run, load_recipe
from medmm_ray.tables import Table

ROOT = Path(__file__).parent.parent
TINY = "jobs/recipes/tiny.yaml"
MADE = ("raw_questions", "raw_images", "questions", "images", "solutions")
pytestmark = pytest.mark.engine


def recipe(folder: Path) -> list[str]:
    return [TINY, f"run={folder}", "models.policy=scripted", "sample.batch_size=1", "sample.max_concurrency=1"]


def start(folder: Path, pause_s: float) -> "subprocess.Popen[str]":
    environment = os.environ | {"PAUSE_S": str(pause_s)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.interrupted", *recipe(folder)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(folder: Path) -> None:
    process = start(folder, 0)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output


def hashes(folder: Path) -> dict[str, str]:
    run = Run(load_recipe(recipe(folder)))
    return {name: run.table(name).manifest().content_hash for name in MADE}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder)
    return hashes(folder)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_second_run_completes_the_same_tables(
    blow: signal.Signals, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    process = start(tmp_path, 1.0)
    table = Run(load_recipe(recipe(tmp_path))).table("solutions")
    before = wait_for_rows(table, process, 3)
    process.send_signal(blow)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if blow == signal.SIGINT else -signal.SIGKILL), output
    assert not table.is_complete
    done = table.done_ids()
    assert before <= len(done) < 12
    finish(tmp_path)
    assert hashes(tmp_path) == undisturbed


def wait_for_rows(table: Table, process: "subprocess.Popen[str]", rows: int) -> int:
    for _ in range(600):
        if table.exists and len(done := table.done_ids()) >= rows:
            return len(done)
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()[0]}"
        time.sleep(0.1)
    raise AssertionError("no rows after a minute")
