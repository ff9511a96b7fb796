"""The local cluster: started, used by `ray job submit`, stopped; nobody runs anything there without its token."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.doubles import tiny_reward_model
from tests.doubles.listeners import attack, guard, is_reachable, listeners, outer_addresses
from tests.doubles.serving import serving
from tests.paths import ROOT

LOCAL = ROOT / "cluster" / "local"
pytestmark = pytest.mark.engine


def environment(port: int) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "MEDMM_PORT": str(port), "MEDMM_VENV": sys.prefix}


def state(port: int) -> Path:
    return Path(f"/tmp/medmm-ray-{os.getuid()}-{port}")  # noqa: S108


def with_token(port: int) -> dict[str, str]:
    """What up.sh prints for the shells that submit jobs."""
    return environment(port) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state(port) / "token")}


def script(name: str, port: int, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, env = [str(LOCAL / name), *words], environment(port) | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)


def four_free_ports() -> int:
    """A port that is free together with the three after it, which up.sh takes too."""
    for port in range(18265, 19000, 4):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", port + i)) for i in range(4)):
                return port
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class LocalCluster:
    port: int
    pid: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def printed(self) -> str:
        """The line for shells that submit jobs."""
        path = state(self.port) / "token"
        return f"a shell that submits jobs needs: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}\n"

    def submit(self, *entry: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        ray = Path(sys.prefix) / "bin" / "ray"
        command = [str(ray), "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entry]
        env = with_token(self.port) if env is None else env
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)

    def processes(self) -> list[psutil.Process]:
        head = psutil.Process(self.pid)
        return [head, *head.children(recursive=True)]

    @contextmanager
    def serving(self, model: Path) -> Iterator[str]:
        """The address of `model`, served in this cluster by a driver that joins it."""
        joining = {"RAY_ADDRESS": f"127.0.0.1:{self.port + 1}"}
        with serving(model, with_token(self.port) | joining) as (url, _):
            yield url


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    port = four_free_ports()
    started = script("up.sh", port)
    assert started.returncode == 0, started.stderr
    running = LocalCluster(port, int((state(port) / "pid").read_text()))
    assert started.stdout == f"up: http://127.0.0.1:{port}\n{running.printed}"
    processes = running.processes()
    yield running
    assert script("down.sh", port).stdout == f"down: http://127.0.0.1:{port}\n"
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"{alive} outlived down.sh"
    assert not state(port).exists()


def test_a_second_up_finds_the_first(cluster: LocalCluster) -> None:
    again = script("up.sh", cluster.port)
    assert again.returncode == 0
    assert again.stdout == f"already up: {cluster.address} (process {cluster.pid})\n{cluster.printed}"


def test_a_submitted_job_runs_the_uploaded_code_with_our_python(cluster: LocalCluster, tmp_path: Path) -> None:
    answer_file = tmp_path / "answer.json"  # outside the upload, which is deleted with the job
    done = cluster.submit("python", "-m", "tests.cluster.probe", str(answer_file))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "probe: " in done.stdout  # the log was followed
    answer = json.loads(answer_file.read_text())
    for where in (answer["driver"], answer["worker"]):
        assert Path(where["python"]).parent == Path(sys.prefix) / "bin"
        assert "/working_dir_files/" in where["package"]
        assert Path(where["package"]).is_relative_to(where["folder"])
    assert answer["cpus"] == 8
    assert answer["uploaded_bytes"] < 5_000_000
    assert {"medmm_ray", "jobs", "pyproject.toml"} <= set(answer["uploaded"])
    assert not {".venv", ".git", "runs", "docs", ".mypy_cache"} & set(answer["uploaded"])


def test_a_failing_job_fails_the_command(cluster: LocalCluster) -> None:
    assert cluster.submit("python", "-m", "tests.cluster.no_such_module").returncode == 1


def test_the_pipeline_is_submitted_followed_and_read(cluster: LocalCluster, tmp_path: Path) -> None:
    words = ("jobs/recipes/tiny.yaml", "--until", "curate")
    done = script("try_submit.sh", cluster.port, *words, MEDMM_RUN=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr + done.stdout
    tables = done.stdout.partition("the tables of the run:\n")[2]
    rows = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in tables.splitlines()}
    assert set(rows) >= {"raw_questions", "questions", "images"}
    assert rows["questions"] == rows["raw_questions"] > 0


def test_a_job_without_the_token_is_refused_in_rays_words(cluster: LocalCluster) -> None:
    for env in (environment(cluster.port), environment(cluster.port) | {"RAY_AUTH_MODE": "token"}):
        refused = cluster.submit("python", "-c", "print(1)", env=env | {"HOME": "/nonexistent"})
        assert refused.returncode == 1
        assert "AuthenticationError" in refused.stderr
        assert "RAY_AUTH_TOKEN_PATH" in refused.stderr


def test_the_token_is_the_owners_alone(cluster: LocalCluster) -> None:
    path = state(cluster.port) / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert not [process for process in cluster.processes() if token in " ".join(process.cmdline())]
    files = [other for other in path.parent.rglob("*") if other.is_file() and other != path]
    assert files
    assert not [other for other in files if token.encode() in other.read_bytes()]


def test_with_an_application_up_nobody_without_the_token_runs_code(cluster: LocalCluster, tmp_path: Path) -> None:
    model, marker = tiny_reward_model.save(tmp_path / "model"), tmp_path / "marker"
    with cluster.serving(model) as url:
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        agents = ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        tree = listeners(psutil.Process(cluster.pid), until=agents)
        (replica,) = [heard for heard in tree if not heard.is_loopback]
        assert replica.process == "ray::ServeReplica:medmm:Reranker"
        for host in ("127.0.0.1", *outer_addresses()):
            reachable = [heard for heard in tree if is_reachable(host, heard.port)]
            assert replica in reachable
            assert host == "127.0.0.1" or reachable == [replica]
            assert attack(host, replica.port, marker) == "UNAUTHENTICATED"
            assert not marker.exists()
            # The call is the right one, and the token all that was missing.
            attack(host, replica.port, marker, token=(state(cluster.port) / "token").read_text())
            marker.rmdir()
        guards = {heard: guard("127.0.0.1", heard.port) for heard in tree if heard.port != httpx.URL(url).port}
    assert guards[replica] == "token over gRPC"
    (dashboard,) = [heard for heard in tree if heard.port == cluster.port]
    assert guards[dashboard] == "token over HTTP"
    assert set(guards.values()) == {"token over gRPC", "token over HTTP", "none: metrics"}, guards


def test_a_folder_that_somebody_else_laid_there_is_refused(tmp_path: Path) -> None:
    port = four_free_ports()
    state(port).symlink_to(tmp_path)
    try:
        refused = script("up.sh", port)
    finally:
        state(port).unlink()
    assert refused.returncode == 1
    assert f"{state(port)} is not a folder of yours" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_the_port_of_another_program_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = script("up.sh", port)
        assert refused.returncode == 1
        assert f"port {port} is taken" in refused.stderr
        assert script("down.sh", port).stdout == f"not up: http://127.0.0.1:{port}\n"
