"""The local cluster: started, used by `ray job submit`, stopped; nothing of it listens beyond loopback."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "cluster" / "local"
pytestmark = pytest.mark.engine


def environment(port: int) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "MEDMM_PORT": str(port), "MEDMM_VENV": sys.prefix, "RAY_AUTH_MODE": "disabled"}


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

    def submit(self, *entry: str) -> subprocess.CompletedProcess[str]:
        ray = Path(sys.prefix) / "bin" / "ray"
        command = [str(ray), "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entry]
        return subprocess.run(
            command, cwd=ROOT, env=environment(self.port), capture_output=True, text=True, check=False, timeout=240
        )

    def processes(self) -> list[psutil.Process]:
        head = psutil.Process(self.pid)
        return [head, *head.children(recursive=True)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    port = four_free_ports()
    started = script("up.sh", port)
    assert started.returncode == 0, started.stderr
    assert started.stdout == f"up: http://127.0.0.1:{port}\n"
    pid = int(Path(f"/tmp/medmm-ray-{os.getuid()}-{port}/pid").read_text())  # noqa: S108
    running = LocalCluster(port, pid)
    processes = running.processes()
    yield running
    assert script("down.sh", port).stdout == f"down: http://127.0.0.1:{port}\n"
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"{alive} outlived down.sh"
    assert not Path(f"/tmp/medmm-ray-{os.getuid()}-{port}").exists()  # noqa: S108


def test_a_second_up_finds_the_first(cluster: LocalCluster) -> None:
    again = script("up.sh", cluster.port)
    assert (again.returncode, again.stdout) == (0, f"already up: {cluster.address} (process {cluster.pid})\n")


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


def test_nothing_listens_beyond_loopback(cluster: LocalCluster) -> None:
    listening = [
        c.laddr
        for process in cluster.processes()
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    ]
    assert cluster.port in {address.port for address in listening}
    for address in listening:
        host = ipaddress.ip_address(address.ip)
        mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
        assert (mapped or host).is_loopback, f"{address} is open to other machines"


def test_the_port_of_another_program_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = script("up.sh", port)
        assert refused.returncode == 1
        assert f"port {port} is taken" in refused.stderr
        assert script("down.sh", port).stdout == f"not up: http://127.0.0.1:{port}\n"
