"""A driver in a process of its own that serves a model, in the cluster of ``RAY_ADDRESS`` or its own session."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from medmm_ray.service.config import ServeConfig
from medmm_ray.service.deployment import running
from medmm_ray.session import session
from tests.paths import ROOT


@contextmanager
def serving(model: Path, env: Mapping[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address of `model`, served by a driver with the environment `env`, and that driver."""
    command = [sys.executable, "-m", "tests.doubles.serving", str(model)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdin
        assert driver.stdout
        url = driver.stdout.readline().strip()
        assert url, f"the driver ended with {driver.wait()}"
        yield url, psutil.Process(driver.pid)
        driver.stdin.close()  # it waits for that
        assert driver.wait(timeout=60) == 0


if __name__ == "__main__":
    with session(), running(ServeConfig(model=sys.argv[1], port=0, num_cpus=0.5, access="loopback")) as url:
        print(url, flush=True)
        sys.stdin.read()
