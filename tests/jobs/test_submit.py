"""Submission is tried in a process of its own: a process has one token of Ray, and one with a session up shows that
session's, which its core must not lose meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def test_submission_where_no_session_is_up(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RAY_"))}
    words = ["-p", "no:cacheprovider", f"--basetemp={tmp_path / 'cases'}", "tests/jobs/submission.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout or "[100%]" in done.stdout
