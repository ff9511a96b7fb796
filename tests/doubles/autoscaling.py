"""A Ray cluster on this machine whose groups of nodes start at zero and come and go by Ray's own autoscaler.

Ray's fake provider starts a raylet where a cloud's would rent a machine; the autoscaler, its scheduler and
the nodes' labels and (made-up) resources are the real ones. Not `ray.cluster_utils.AutoscalingCluster`: Ray's wheel
lacks a file that it reads, and it begins with `ray stop`, which ends every other Ray of the machine.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs.benches.fault_injection import session_processes
from medmm_ray.session import fresh_token

HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as the provider calls it
IDLE_S = 6.0
START_S = 240.0
SPOT, ON_DEMAND = {"ray.io/market-type": "spot"}, {"ray.io/market-type": "on-demand"}
# What starts a machine of a cloud: the autoscaler wants to see it all the same.
NOT_USED = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)

GROUPS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"resources": {"CPU": 4}, "labels": ON_DEMAND, "max_workers": 2},
    "infer_spot": {
        "resources": {"CPU": 2, "GPU": 1},
        "labels": {"ray.io/accelerator-type": "L4", **SPOT},
        "max_workers": 2,
        "priority": 1,
    },
    "infer_on_demand": {
        "resources": {"CPU": 2, "GPU": 1},
        "labels": {"ray.io/accelerator-type": "L4", **ON_DEMAND},
        "max_workers": 2,
    },
    "train": {
        "resources": {"CPU": 4, "GPU": 2},
        "labels": {"ray.io/accelerator-type": "A100", **ON_DEMAND},
        "max_workers": 2,
    },
}


@dataclass(frozen=True)
class AutoscalingCluster:
    """A running cluster: its address, and the process that leads the session of all of its own."""

    address: str
    leader: int

    def nodes(self) -> dict[str, psutil.Process]:
        """The raylets of the nodes beside the head, by their ids."""
        raylets = {}
        for process in session_processes(self.leader):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.name() == "raylet":
                    raylets[process.environ().get("RAY_CLOUD_INSTANCE_ID", "")] = process
        return {node: process for node, process in raylets.items() if node != HEAD}

    def take_away(self, node: str) -> None:
        """Let a node vanish from one moment to the next, as a spot machine does."""
        raylet = self.nodes()[node]
        processes = [raylet, *raylet.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def autoscaling_cluster(groups: Mapping[str, Mapping[str, Any]] = GROUPS) -> Iterator[AutoscalingCluster]:
    """A cluster of a head that runs no work and of empty groups; it asks for a token, which drivers inherit."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: paths of sockets are limited
    address = f"127.0.0.1:{_free_port()}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(_config(groups, address)))
    with fresh_token(), (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            _command(address, config, folder),
            env=os.environ | _environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await(head, address, folder / "head.log")
            yield AutoscalingCluster(address, head.pid)
        finally:
            _end(head)
            shutil.rmtree(folder, ignore_errors=True)


def _config(groups: Mapping[str, Mapping[str, Any]], address: str) -> dict[str, Any]:
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    node_types = {name: {"node_config": {}, "min_workers": 0, **group} for name, group in groups.items()}
    return {
        "cluster_name": "autoscaling",
        "max_workers": 8,
        "provider": {
            "type": "external",  # `fake_multinode` reads a file that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": address,
        },
        "available_node_types": {"ray.head.default": head, **node_types},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        **{name: [] for name in NOT_USED},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
    }


def _command(address: str, config: Path, folder: Path) -> list[str]:
    host, _, port = address.partition(":")
    options = {
        "--node-ip-address": host,
        "--port": port,
        "--num-cpus": "0",
        "--num-gpus": "0",
        "--object-store-memory": str(100 << 20),
        "--autoscaling-config": str(config),
        "--temp-dir": str(folder / "ray"),
        "--include-dashboard": "false",
        "--dashboard-agent-listen-port": str(_free_port()),
        "--ray-client-server-port": str(_free_port()),
        "--min-worker-port": "0",
        "--max-worker-port": "0",
    }
    words = [f"{name}={value}" for name, value in options.items()]
    return [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats", *words]


def _environment() -> dict[str, str]:
    return {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # the first one passes over labels
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps to loopback
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _await(head: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and head.poll() is None:
        if re.search(r"Ray runtime started", log.read_text(errors="replace")):
            return
        time.sleep(0.2)
    raise AssertionError(f"no cluster at {address} within {START_S:g} s:\n{log.read_text(errors='replace')[-3000:]}")


def _end(head: subprocess.Popen[bytes]) -> None:
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(20)
    for process in session_processes(head.pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.kill()
    head.wait()
