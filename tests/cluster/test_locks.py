"""`cluster/local/locks.py` with the real uv, on a small project and an index of small wheels: no network."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

LOCKS = ROOT / "cluster" / "local" / "locks.py"

# The knots of the real ones: a CPU build that only a local version names, CUDA libraries and a pin on triton that only
# the other build has, an engine that needs a newer protobuf than the SDK, two releases of what nothing pins.
WHEELS = {
    "torch 2": ["cuda-toolkit==13.0", "triton==3.7"],
    "engine-cpu 1": ["torch==2+cpu", "protobuf>=5", "grammar"],
    "engine 1": ["torch==2", "protobuf>=6", "grammar"],
    "grammar 1": ["triton"],
    "sdk 1": ["protobuf<6"],
    "protobuf 5": [],
    "protobuf 6": [],
    "page 1": [],
    "page 2": [],
    "triton 3.7": [],
    "triton 3.9": [],
    "cuda-toolkit 13.0": [],
}
LOCKED = {
    "cpu": ["engine-cpu==1", "grammar==1", "page==1", "protobuf==5", "sdk==1", "torch==2", "triton==3.9"],
    "gpu": ["cuda-toolkit==13.0", "engine==1", "grammar==1", "page==1", "protobuf==6", "torch==2", "triton==3.7"],
}
PYPROJECT = """
[project]
name = "small"
version = "1"
requires-python = ">=3.11"
dependencies = ["torch==2"]

[project.optional-dependencies]
cpu = ["engine-cpu"]
gpu = ["engine"]
sdk = ["sdk"]
page = ["page"]

[tool.uv]
conflicts = [[{ extra = "gpu" }, { extra = "sdk" }]]
"""


def publish(index: Path, name: str, version: str, requirements: list[str]) -> None:
    """Puts a wheel without contents into a folder that uv reads as a package index."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    links = [f'<a href="{path.name}">{path.name}</a>' for path in sorted(folder.glob("*.whl"))]
    (folder / "index.html").write_text("\n".join(links))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose locks are right; they were written before page 2 was released."""
    for release, requirements in WHEELS.items():
        name, version = release.split()
        publish(tmp_path / "index", name, version, requirements)
    folder = tmp_path / "project"
    (folder / "cluster" / "local").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for kind, pins in LOCKED.items():
        (folder / "cluster" / "local" / f"constraints-{kind}.txt").write_text("\n".join(pins) + "\n")
    return folder


def locks(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    machine = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    machine |= {"UV_NO_CONFIG": "1", "UV_HTTP_RETRIES": "0"}
    index = {"UV_DEFAULT_INDEX": (project.parent / "index").as_uri()}
    return subprocess.run(
        [sys.executable, str(LOCKS), "--project", str(project), *words],
        env=machine | (environment or index),
        capture_output=True,
        text=True,
        check=False,
    )


def edit(project: Path, old: str, new: str) -> None:
    path = project / "pyproject.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def lines_of(project: Path, kind: str) -> list[str]:
    return (project / "cluster" / "local" / f"constraints-{kind}.txt").read_text().splitlines()


def test_right_locks_pass(project: Path) -> None:
    checked = locks(project)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == "2 kinds with 2 extras resolve; the locks are what pyproject.toml asks for\n"


def test_an_update_keeps_what_fits_and_gives_both_kinds_one_version_where_it_can(project: Path) -> None:
    (project / "cluster" / "local" / "constraints-cpu.txt").write_text("Page==1\n")
    (project / "cluster" / "local" / "constraints-gpu.txt").unlink()
    updated = locks(project, "--update")
    assert (updated.returncode, updated.stderr) == (0, "")
    for kind, pins in LOCKED.items():
        lines = (project / "cluster" / "local" / f"constraints-{kind}.txt").read_text().splitlines()
        assert [line for line in lines if line[0] != "#"] == pins
        assert ("#   cuda-toolkit 13.0" in lines) == (kind == "gpu")
        assert str(project.parent) not in "\n".join(lines)


def test_a_pin_for_one_extra_that_another_kind_cannot_have_fails(project: Path) -> None:
    edit(project, '["torch==2"]', '["torch==2", "protobuf==5"]')
    checked = locks(project)
    assert checked.returncode == 1
    assert "error: gpu + page does not resolve:" in checked.stderr
    assert "error: constraints-gpu.txt does not satisfy pyproject.toml" in checked.stderr
    assert "protobuf>=6" in checked.stderr
    assert "cpu" not in checked.stderr


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('page = ["page"]', 'page = ["page>=2"]', "constraints-cpu.txt does not satisfy pyproject.toml"),
        ('page = ["page"]', "", "constraints-cpu.txt lacks nothing and holds page that nothing asks for"),
        ('sdk = ["sdk"]', "sdk = []", "constraints-cpu.txt lacks nothing and holds sdk that nothing asks for"),
        ('"torch==2"', '"torch==2", "sdk"', "constraints-gpu.txt does not satisfy pyproject.toml"),
        ('gpu = ["engine"]', 'gpu = ["engine>=2"]', "gpu + page does not resolve"),
    ],
)
def test_a_lock_that_pyproject_left_behind_fails(project: Path, old: str, new: str, fault: str) -> None:
    edit(project, old, new)
    checked = locks(project)
    assert checked.returncode == 1
    assert fault in checked.stderr


def test_a_package_that_the_lock_lacks_fails(project: Path) -> None:
    publish(project.parent / "index", "other", "1", [])
    edit(project, '"torch==2"', '"torch==2", "other"')
    checked = locks(project)
    assert checked.returncode == 1
    for kind in ("cpu", "gpu"):
        assert f"error: constraints-{kind}.txt lacks other and holds nothing that nothing asks for" in checked.stderr


def test_a_missing_lock_fails(project: Path) -> None:
    (project / "cluster" / "local" / "constraints-gpu.txt").unlink()
    checked = locks(project)
    assert checked.returncode == 1
    assert "error: constraints-gpu.txt is missing: run cluster/local/locks.py --update" in checked.stderr


def test_extras_are_kept_apart_only_as_long_as_they_must_be(project: Path) -> None:
    edit(project, 'sdk = ["sdk"]', "sdk = []")
    checked = locks(project)
    assert checked.returncode == 1
    assert "error: gpu + sdk resolves, and tool.uv.conflicts of pyproject.toml keeps them apart" in checked.stderr


def test_an_index_that_cannot_be_reached_is_no_conflict(project: Path) -> None:
    checked = locks(project, UV_DEFAULT_INDEX="http://127.0.0.1:9/simple")
    assert checked.returncode == 1
    assert "error: uv could not look (is the package index reachable?)" in checked.stderr
    assert "does not resolve" not in checked.stderr


def test_uv_asks_the_index_that_pip_is_set_to(project: Path) -> None:
    checked = locks(project, PIP_INDEX_URL="http://127.0.0.1:9/of-pip")
    assert checked.returncode == 1
    assert "http://127.0.0.1:9/of-pip/" in checked.stderr
