"""A source of the hub is downloaded at its commit by huggingface_hub itself, from a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.hub_files import ensure
from tests.doubles.local_hub import Hub, running

# huggingface_hub reads its environment when it is imported, hence a process of its own.
SCRIPT = """
import json, sys
from medmm_ray.config import ConfigError, build
from medmm_ray.steps.ingest import SourceConfig, read_source

folder, commit = sys.argv[1:]
columns = {"options": ["A", "B"], "constants": {"modality": "clinical"}}

def read(**changes):
    values = {"name": "mine", "reader": "table", "path": folder, "columns": columns, "hub": "org/set", **changes}
    try:
        return [question.question for question in read_source(build(SourceConfig, values, "source")).questions]
    except ConfigError as error:
        return str(error)

print(json.dumps({
    "first": read(revision=commit),
    "again": read(revision=commit),
    "other": read(revision="b" * 40),
    "missing": read(revision="c" * 40, path=folder + "-none"),
    "gated": read(revision=commit, path=folder + "-gated", hub="org/gated"),
}))
"""


def test_a_source_is_downloaded_once_at_its_commit(tmp_path: Path) -> None:
    with running() as hub:
        commit = _with_questions(hub, "org/set", "Is it old?")
        _with_questions(hub, "org/set", "Is it new?")
        hub.gated.add("org/gated")
        _with_questions(hub, "org/gated", "Is it secret?")
        folder = tmp_path / "set"
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        words = [sys.executable, "-c", SCRIPT, str(folder), commit]
        said = json.loads(subprocess.run(words, env=environment, check=True, capture_output=True).stdout)
    assert said["first"] == said["again"] == ["Is it old?"]
    assert said["other"] == (
        f"{folder} has org/set at {commit}, and the source asks for org/set at {'b' * 40}; name another folder"
    )
    assert said["missing"].startswith(f"org/set at {'c' * 40} could not be downloaded: ")
    assert said["gated"].startswith(f"org/gated at {commit} could not be downloaded: ")
    assert said["gated"].endswith("Accept its terms on the hub and set HF_TOKEN where it asks for that")


def _with_questions(hub: Hub, repo: str, question: str) -> str:
    """A commit with a table of one question."""
    if f"{repo}@main" not in hub.branches:
        hub.create(repo)
    return hub.commit(repo, "main", {"train.csv": f"question,answer,A,B\n{question},A,x,y\n".encode()})


@pytest.mark.parametrize("revision", ["main", "v1.0", "", "abc123"])
def test_a_revision_is_a_commit(revision: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"the revision of org/set is {revision!r}; expected the 40 digits of a commit"
    ):
        ensure("org/set", revision, str(tmp_path))


def test_a_store_is_no_folder() -> None:
    with pytest.raises(ConfigError, match=r"is downloaded into a folder, and path is s3://x/set; name one on a disk"):
        ensure("org/set", "a" * 40, "s3://x/set")
