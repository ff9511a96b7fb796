"""The local cluster: started, used by `ray job submit`, stopped; nobody runs anything there without its token."""

import json
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.doubles import tiny_reward_model
from tests.doubles.listeners import attack, guard, is_reachable, listeners, outer_addresses
from tests.doubles.local_cluster import LocalCluster, environment, four_free_ports, running, script, state

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with running() as running_cluster:
        yield running_cluster


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
    assert answer["uploaded_bytes"] < 10_000_000
    assert {"medmm_ray", "jobs", "pyproject.toml"} <= set(answer["uploaded"])
    assert not {".venv", ".git", "runs", "docs", ".mypy_cache"} & set(answer["uploaded"])


def test_a_failing_job_fails_the_command(cluster: LocalCluster) -> None:
    assert cluster.submit("python", "-m", "tests.cluster.no_such_module").returncode == 1


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
        # Its title also says what it answers just now.
        assert replica.process.partition(".")[0] == "ray::ServeReplica:medmm:Reranker"
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
