"""How a Ray session starts: its token, and what is left of one that cannot start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

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


SESSIONS = """
import json, logging, os, sys
import ray
from medmm_ray import session

logging.basicConfig(format="%(message)s")
names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
now = lambda: [session.has_token_mode(), *map(os.environ.get, names)]
seen = []
ray.init = lambda **settings: seen.append(now())
try:
    for _ in range(2):
        with session.session():
            pass
        seen.append(now())
except ValueError as error:
    seen.append(str(error))
print(json.dumps(seen))
"""


def sessions(home: Path, **variables: str) -> tuple[list[Any], str]:
    """What Ray would start with in two sessions, and what is there after each; and the log."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run([sys.executable, "-c", SESSIONS], capture_output=True, text=True, timeout=120, check=True,
                          env=unset | {"HOME": str(home)} | variables)  # fmt: skip
    assert not list(home.iterdir())  # nothing is written to ~/.ray
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("theirs", [{}, {"RAY_AUTH_TOKEN": "theirs"}, {"RAY_AUTH_TOKEN_PATH": "/no/such/file"}])
def test_every_local_session_has_a_token_of_its_own(tmp_path: Path, theirs: dict[str, str]) -> None:
    (first, after_first, second, after_second), _ = sessions(tmp_path, **theirs)
    tokens = {first[2], second[2]}
    assert len(tokens - {"theirs"}) == 2
    assert all(len(bytes.fromhex(token)) == 32 for token in tokens)
    assert first[:2] == second[:2] == [True, "token"]
    left = [False, None, theirs.get("RAY_AUTH_TOKEN"), theirs.get("RAY_AUTH_TOKEN_PATH")]
    assert after_first == after_second == left


def test_a_session_whose_mode_is_disabled_says_what_that_means(tmp_path: Path) -> None:
    (first, *_), log = sessions(tmp_path, RAY_AUTH_MODE="disabled")
    assert first == [False, "disabled", None, None]
    assert "every user of this machine can run code in this session" in log
    assert "unset RAY_AUTH_MODE" in log


def test_a_session_that_joins_shows_the_clusters_token(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "token").write_text("theirs")
    cluster = {"RAY_ADDRESS": "127.0.0.1:1"}
    (first, after, *_), _ = sessions(tmp_path / "home", **cluster, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert first == [True, "token", None, str(tmp_path / "token")]
    assert after[:2] == [False, None]
    (first, *_), _ = sessions(tmp_path / "home", **cluster, RAY_AUTH_TOKEN="theirs")  # noqa: S106
    assert first == [True, "token", "theirs", None]
    (first, *_), _ = sessions(tmp_path / "home", **cluster)  # a cluster may ask for none
    assert first == [False, None, None, None]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token, and no token for the cluster at RAY_ADDRESS=10.0.0.1:6379"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/file"}, "RAY_AUTH_TOKEN_PATH=/no/file is no file with a token"),
    ],
)
def test_a_session_that_joins_without_the_token_says_what_to_do(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    ((refusal,), _) = sessions(tmp_path, RAY_ADDRESS="10.0.0.1:6379", **variables)
    assert words in refusal
    assert "export RAY_AUTH_TOKEN_PATH=<file with the cluster's token>" in refusal


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
