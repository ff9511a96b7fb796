"""With an application up, whoever reaches this machine's ports without the session's token runs nothing."""

import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.doubles import tiny_reward_model
from tests.doubles.listeners import attack, guard, is_reachable, listeners, outer_addresses
from tests.doubles.serving import serving

AGENTS = ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent")

pytestmark = pytest.mark.engine


def test_with_an_application_up_nobody_without_the_token_runs_code(tmp_path: Path) -> None:
    outer = outer_addresses()
    if not outer:
        pytest.skip("this machine has no address but loopback")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MEDMM_"))}
    model, marker = tiny_reward_model.save(tmp_path / "model"), tmp_path / "marker"
    with serving(model, env) as (url, driver):
        tree = listeners(driver, until=AGENTS)
        open_outside = [(host, heard) for heard in tree for host in outer if is_reachable(host, heard.port)]
        # Their titles also say what they answer just now.
        titles = {heard.process.partition(".")[0] for _, heard in open_outside}
        assert titles == {"ray::ServeReplica:medmm:Reranker"}
        token = token_of(driver)
        for host, heard in open_outside:
            assert not heard.is_loopback
            assert attack(host, heard.port, marker) == "UNAUTHENTICATED"
            assert attack(host, heard.port, marker, token=secrets.token_hex(32)) == "UNAUTHENTICATED"
            assert not marker.exists()
            # The call is the right one, and the token all that was missing (in disabled mode it runs without).
            attack(host, heard.port, marker, token=token)
            marker.rmdir()
        guards = {heard: guard("127.0.0.1", heard.port) for heard in tree if heard.port != urlsplit(url).port}
    assert set(guards.values()) == {"token over gRPC", "token over HTTP", "none: metrics"}, guards
    for heard, kind in guards.items():
        assert heard.is_loopback or kind == "token over gRPC", heard


def token_of(driver: psutil.Process) -> str:
    """The token of the session that `driver` started: its processes inherit it."""
    gcs_server = next(process for process in driver.children(recursive=True) if process.name() == "gcs_server")
    return gcs_server.environ()["RAY_AUTH_TOKEN"]


@pytest.mark.usefixtures("ray_session")
def test_the_token_is_on_no_command_line_and_in_no_file_of_ray() -> None:
    import ray

    token = os.environ["RAY_AUTH_TOKEN"]
    ray.get(ray.remote(lambda: None).remote())
    folder = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("raylet") for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert not [process for process in processes if token in command_line(process)]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended, or is a zombie, as an engine of an earlier test may be
        return ""
