"""The local cluster of `cluster/local/`, started by its own scripts, and what is submitted to it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.doubles.serving import serving
from tests.paths import ROOT

LOCAL = ROOT / "cluster" / "local"


def environment(port: int) -> dict[str, str]:
    """This process's, without what it says of another Ray."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**variables, "MEDMM_PORT": str(port), "MEDMM_VENV": sys.prefix}


def state(port: int) -> Path:
    """The folder of a cluster."""
    return Path(f"/tmp/medmm-ray-{os.getuid()}-{port}")  # noqa: S108


def with_token(port: int) -> dict[str, str]:
    """What up.sh prints for the shells that submit jobs."""
    return environment(port) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state(port) / "token")}


def script(name: str, port: int, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of `cluster/local/`."""
    command, env = [str(LOCAL / name), *words], environment(port) | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=360)


def four_free_ports() -> int:
    """A port that is free together with the three after it, which up.sh takes too."""
    # Apart for each process of the tests: what is free now is taken in the next moment.
    for port in range(18265 + 400 * (os.getpid() % 20), 28000, 4):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", port + i)) for i in range(4)):
                return port
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that is up; `pid` is the head's."""

    port: int
    pid: int
    num_workers: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def printed(self) -> str:
        """The line for shells that submit jobs."""
        path = state(self.port) / "token"
        return f"a shell that submits jobs needs: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}\n"

    def submit(self, *entry: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit`."""
        ray = Path(sys.prefix) / "bin" / "ray"
        command = [str(ray), "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entry]
        env = with_token(self.port) if env is None else env
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)

    def pipeline(self, *words: str) -> "subprocess.Popen[str]":
        """`python -m jobs.submit`; its output is the log of the job."""
        command = [sys.executable, "-m", "jobs.submit", *words, "--address", self.address]
        output = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=with_token(self.port), stdout=output, stderr=output, text=True)

    def driver(self) -> psutil.Process:
        """The process of the pipeline that runs."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if process.cmdline()[1:3] == ["-m", "jobs.pipeline"]:
                    return process
        raise AssertionError("no pipeline runs")

    def processes(self) -> list[psutil.Process]:
        """Those of all nodes."""
        numbers = range(1, self.num_workers + 1)
        pids = [int((state(self.port) / f"worker-{number}.pid").read_text()) for number in numbers]
        processes = []
        for node in (psutil.Process(pid) for pid in [self.pid, *pids]):
            processes += [node, *node.children(recursive=True)]
        return processes

    @contextmanager
    def serving(self, model: Path) -> Iterator[str]:
        """The address of `model`, served in this cluster by a driver that joins it."""
        joining = {"RAY_ADDRESS": f"127.0.0.1:{self.port + 1}"}
        with serving(model, with_token(self.port) | joining) as (url, _):
            yield url


@contextmanager
def running(num_workers: int = 0, num_cpus: int = 8) -> Iterator[LocalCluster]:
    """A cluster, until the block ends; nothing of it stays. With workers its head runs no work."""
    port = four_free_ports()
    started = script("up.sh", port, MEDMM_WORKERS=str(num_workers), MEDMM_CPUS=str(num_cpus))
    assert started.returncode == 0, started.stderr
    cluster = LocalCluster(port, int((state(port) / "pid").read_text()), num_workers)
    assert started.stdout == f"up: http://127.0.0.1:{port}\n{cluster.printed}"
    processes = cluster.processes()
    try:
        yield cluster
    finally:
        stopped = script("down.sh", port)
    assert stopped.stdout == f"down: http://127.0.0.1:{port}\n"
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, f"{alive} outlived down.sh"
    assert not state(port).exists()
