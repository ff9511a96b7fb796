"""A Ray session that cannot start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

PROGRAM = """
import subprocess, sys
import ray
from medmm_ray import session

def init(**settings):
    raylet = subprocess.Popen([sys.argv[1], "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
    print(raylet.pid, int(raylet.stdout.readline()))
    raise ConnectionError("timed out")

ray.init = init
session.GRACE_S = 0.2
with session.session():
    pass
"""


def test_what_a_failed_start_had_started_is_ended(tmp_path: Path) -> None:
    shutil.copy("/bin/bash", tmp_path / "raylet")
    unset = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "raylet")], capture_output=True, text=True,
                          timeout=120, check=False, env=unset)  # fmt: skip
    assert done.stderr.rstrip().endswith("ConnectionError: timed out")
    raylet, agent = map(int, done.stdout.split())
    assert not [pid for pid in (raylet, agent) if _lives(pid)]


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
