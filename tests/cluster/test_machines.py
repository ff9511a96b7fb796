"""What the files in cluster/ have machines run, run here in the same shells, on programs that stand in for theirs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive

from cluster.lint.dockerfile import Dockerfile
from tests.paths import ROOT

LAUNCHERS = [ROOT / "cluster" / "launcher" / name for name in ("aws.yaml", "gcp.yaml")]
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def bash(command: str, path: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": str(home)}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)


def has_namespaces() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


# Ray's launcher


@pytest.mark.skipif(not has_namespaces(), reason="needs a mount namespace")
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_login_shell_of_the_launchers_finds_ray_in_the_image(kind: str, tmp_path: Path) -> None:
    (line,) = [run for run in Dockerfile(ROOT / f"cluster/Dockerfile.{kind}").words("RUN") if "/etc/profile.d" in run]
    profile = tmp_path / "profile.d"
    profile.mkdir()
    bash(line.replace("/opt/medmm_ray", str(tmp_path)).replace("/etc/profile.d", str(profile)), SYSTEM, tmp_path)
    bin_folder = tmp_path / ".venv" / "bin"
    program(bin_folder, "ray", "echo this is ray")
    (tmp_path / ".bashrc").touch()
    # The image's own PATH has the folder, as ENV says; /etc/profile, which a login shell reads, sets another.
    words: list[str] = _with_interactive("ray start")  # type: ignore[no-untyped-call]
    command, path = " ".join(words), f"{bin_folder}:{SYSTEM}"
    without_line = bash(command, path, tmp_path)
    assert "ray: command not found" in without_line.stderr
    with_line = bash(
        f"unshare -rm bash -c 'mount --bind {profile} /etc/profile.d; exec \"$@\"' - {command}", path, tmp_path
    )
    assert with_line.stdout == "this is ray\n", with_line.stderr


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("has_gpu", "driver", "code", "words"),
    [
        (False, "exit 1", 0, ""),
        (True, "echo 580.95.05; echo 580.95.05", 0, "NVIDIA driver 580.95.05, 580 or newer is needed\n"),
        (True, "echo 570.86.10", 1, "NVIDIA driver 570.86.10, 580 or newer is needed\n"),
        (True, "exit 9", 1, "NVIDIA driver missing, 580 or newer is needed\n"),
        # It answers at the third try: the installation takes minutes.
        (True, "echo >> $HOME/tries; [ $(wc -l < $HOME/tries) -ge 3 ] && echo 590.1", 0, "NVIDIA driver 590.1, "),
    ],
    ids=["no-gpu", "present", "old", "missing", "late"],
)  # fmt: skip
def test_a_machine_with_gpus_waits_for_a_driver_that_is_new_enough(
    path: Path, has_gpu: bool, driver: str, code: int, words: str, tmp_path: Path
) -> None:
    (command,) = [line for line in yaml.safe_load(path.read_text())["initialization_commands"] if "nvidia-smi" in line]
    programs = tmp_path / "bin"
    program(programs, "grep", f"exit {int(not has_gpu)}")  # which looks for a device of NVIDIA's
    program(programs, "nvidia-smi", driver)
    program(programs, "sleep", "")
    done = bash(command, f"{programs}:{SYSTEM}", tmp_path)
    assert (done.returncode > 0, done.stdout[: len(words) or None]) == (code > 0, words)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("setting", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_rays_processes_inherit_the_keys(path: Path, setting: str, tmp_path: Path) -> None:
    (tmp_path / ".medmm_keys").write_text("GEMINI_API_KEY=one\nHF_TOKEN='two words'\n")
    program(tmp_path / "bin", "ray", 'echo "$1 with $GEMINI_API_KEY, $HF_TOKEN"')
    command = yaml.safe_load(path.read_text())[setting][-1]
    done = bash(command, f"{tmp_path}/bin:{SYSTEM}", tmp_path)
    assert done.stdout == "start with one, two words\n"


# The images


EXTRAS = {
    "cpu": ["cpu", "gemini", "review", "smollm2", "launcher"],
    "gpu": ["gpu", "review", "smollm2", "launcher"],
}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_image_leaves_out_what_tests_need(kind: str) -> None:
    """The extras that setup.sh would install: it is run up to where it begins to work."""
    (line,) = [run for run in Dockerfile(ROOT / f"cluster/Dockerfile.{kind}").words("RUN") if "setup.sh" in run]
    (arguments,) = re.findall(r"setup\.sh ([\w -]+?) &&", line)
    script = (ROOT / "cluster" / "local" / "setup.sh").read_text().partition("ready=")[0]
    choice = shlex.quote(script.replace('cd "$(dirname "$0")/../.."', "true"))
    printed = bash(f"set -- {arguments}; eval {choice}; echo $extras", SYSTEM, ROOT).stdout
    assert printed.strip().split(",") == EXTRAS[kind]
