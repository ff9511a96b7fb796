"""Two tries at an artifact, or one that is killed: the artifact is one try's, whole, and never changes."""

import itertools
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FSSpecHandler, PyFileSystem

from medmm_ray.data import tries
from medmm_ray.data.artifacts import Artifact, Provenance, TableError
from tests.data.test_tables import Fatal, KilledError
from tests.data.test_two_drivers import run_together

ORIGIN = Provenance(name="model", fingerprint="f", config={}, upstream={})
FILES = ("config.json", "weights/1.bin", "weights/2.bin")


def write(folder: str, content: str) -> dict[str, float]:
    artifact = Artifact(folder)
    artifact.fs.create_dir(f"{artifact.path}/weights", recursive=True)
    for name in FILES:
        with artifact.fs.open_output_stream(f"{artifact.path}/{name}") as stream:
            stream.write(content.encode())
    return {"loss": float(len(content))}


def contents(artifact: Artifact) -> dict[str, str]:
    """The files of a complete artifact beside its manifest, of which nothing else may be left."""
    files = {}
    for entry in artifact.fs.get_file_info(FileSelector(artifact.path, recursive=True)):
        name = entry.path.strip("/").removeprefix(artifact.path.strip("/")).strip("/")
        if entry.is_file and name not in ("manifest.json", ".probe"):
            with artifact.fs.open_input_stream(entry.path) as stream:
                files[name] = stream.read().decode()
    return files


@pytest.fixture(params=["local", "file", "memory"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    uris = {"local": f"{tmp_path}/a", "file": f"file://{tmp_path}/a", "memory": f"memory://{tmp_path.name}/a"}
    return Artifact(uris[request.param])


def test_a_try_alone(artifact: Artifact) -> None:
    manifest = tries.make(artifact, ORIGIN, lambda uri: write(uri, "mine"), lambda: 2.0)
    assert (manifest.figures, manifest.seconds) == ({"loss": 4.0}, 2.0)
    assert artifact.manifest() == manifest
    assert contents(artifact) == dict.fromkeys(FILES, "mine")


def test_of_two_tries_the_first_to_end_wins_and_the_other_takes_its_result(artifact: Artifact) -> None:
    def overtaken(uri: str) -> dict[str, float]:
        figures = write(uri, "slow")
        first = tries.make(Artifact(artifact.uri), ORIGIN, lambda uri: write(uri, "quick!"), lambda: 1.0)
        assert first.figures == {"loss": 6.0}
        assert contents(artifact) == dict.fromkeys(FILES, "quick!")
        return figures

    manifest = tries.make(artifact, ORIGIN, overtaken, lambda: 2.0)
    assert manifest.figures == {"loss": 6.0}
    assert contents(artifact) == dict.fromkeys(FILES, "quick!")


def test_a_resumed_try_has_the_files_of_a_killed_one(artifact: Artifact) -> None:
    killed = tries.begin(artifact, resumes=True)
    assert killed is not None
    write(killed.uri, "half")
    later = tries.begin(artifact, resumes=True)
    assert later is not None
    assert contents(Artifact(later.uri)) == dict.fromkeys(FILES, "half")
    assert (killed.number, later.number) == (1, 2)
    fresh = tries.begin(artifact)
    assert fresh is not None
    assert contents(Artifact(fresh.uri)) == {}


def test_who_is_taken_over_ends_and_the_later_one_goes_on(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path / "a"))

    def taken_over(uri: str) -> dict[str, float]:
        write(uri, "checkpoint")
        later = tries.begin(Artifact(artifact.uri), resumes=True)
        assert later is not None
        started.append(later)
        return write(uri, "on and on")  # as a training does that makes its folder again

    started: list[tries.Try] = []
    with pytest.raises(TableError, match=f"a later run has taken over {artifact.uri} and goes on"):
        tries.make(artifact, ORIGIN, taken_over, lambda: 1.0, resumes=True)
    assert not artifact.is_complete
    [later] = started
    assert contents(Artifact(later.uri)) == dict.fromkeys(FILES, "checkpoint")
    write(later.uri, "whole")
    later.commit(ORIGIN, 1.0, {})
    assert contents(artifact) == dict.fromkeys(FILES, "whole")


def test_an_own_fault_is_raised_as_it_is(artifact: Artifact) -> None:
    def fail(uri: str) -> dict[str, float]:
        raise ValueError("loss is not finite")

    with pytest.raises(ValueError, match="loss is not finite"):
        tries.make(artifact, ORIGIN, fail, lambda: 1.0, resumes=True)
    assert not artifact.is_complete


TRY = """
import sys
from medmm_ray.data import tries
from medmm_ray.data.artifacts import Artifact
from tests.data.test_tries import ORIGIN, write

def work(uri):
    print("ready", flush=True)
    input()
    return write(uri, sys.argv[2])

print(tries.make(Artifact(sys.argv[1]), ORIGIN, work, lambda: 1.0).figures["loss"])
"""


def check_processes(uri: str, attempts: int) -> None:
    for attempt in range(attempts):
        first, second = run_together(TRY, [f"{uri}/{attempt}", "a"], [f"{uri}/{attempt}", "bb"])
        assert first == second
        winner = {"1.0": "a", "2.0": "bb"}[first[0]]
        assert contents(Artifact(f"{uri}/{attempt}")) == dict.fromkeys(FILES, winner)


def test_two_processes_end_with_the_artifact_of_one(tmp_path: Path) -> None:
    check_processes(str(tmp_path), 4)


def test_two_processes_end_with_the_artifact_of_one_on_an_object_store(bucket: str) -> None:
    check_processes(f"{bucket}/tries", 2)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_kill_at_any_access_leaves_what_a_second_try_completes(resumes: bool, tmp_path: Path) -> None:
    """Through a filesystem that knows no hard links; the artifact is the first try's or the second's, never of both."""
    num_first = 0
    for calls in itertools.count():
        uri = f"{tmp_path}/{calls}"
        fatal = Artifact(uri, PyFileSystem(FSSpecHandler(Fatal(calls))))
        try:
            tries.make(fatal, ORIGIN, lambda uri: write(uri, "first"), lambda: 1.0, resumes)
            break
        except KilledError:
            pass
        artifact = Artifact(uri, PyFileSystem(FSSpecHandler(Fatal(1_000_000))))
        if not artifact.is_complete:
            tries.make(artifact, ORIGIN, lambda uri: write(uri, "second"), lambda: 1.0, resumes)
        files = contents(artifact)
        files = {name: content for name, content in files.items() if ".tries" not in name}  # killed after the commit
        assert files in (dict.fromkeys(FILES, "first"), dict.fromkeys(FILES, "second"))
        assert artifact.manifest().figures == {"loss": float(len(files["config.json"]))}
        num_first += files["config.json"] == "first"
    assert num_first > 5
    assert calls - num_first > 3
