"""An S3-compatible server (moto) on this machine, which every process that inherits `environment` takes for S3."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

START_S = 300.0  # moto imports for minutes on a machine that is busy with much else
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def environment() -> dict[str, str]:
    """Variables by which S3 clients find the server, at a port that is free now, whether it runs yet or not."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def port() -> int:
    """The port that the environment names."""
    return int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])


@contextmanager
def serving(bucket: str = "bucket") -> Iterator[str]:
    """The URI of an empty bucket while the block runs; at the address that the environment names."""
    address = os.environ["AWS_ENDPOINT_URL"]
    command = [sys.executable, "-m", __name__, str(port())]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await(server, address)
            httpx.put(f"{address}/{bucket}", trust_env=False, timeout=START_S).raise_for_status()
            yield f"s3://{bucket}"
        finally:
            server.terminate()


def _await(server: subprocess.Popen[bytes], address: str) -> None:
    """Wait until the server answers: it listens before it has loaded what answers the first request."""
    deadline = time.monotonic() + START_S
    while (remaining := deadline - time.monotonic()) > 0:
        assert server.poll() is None, f"moto ended with {server.returncode}; is the dev extra installed?"
        with suppress(httpx.TransportError):
            httpx.get(address, trust_env=False, timeout=remaining).raise_for_status()
            return
        time.sleep(0.1)
    raise AssertionError(f"moto did not answer at {address} within {START_S:g} s")


def one_by_one(application: Application) -> Application:
    """The application, of which one request is answered at a time.

    A store's conditional put is atomic. Moto's is not: it looks whether there is such an object and writes it later,
    so that two threads of its server may both be told that they were first.
    """
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with lock:
            return application(environ, start_response)

    return answer


def serve(port: int) -> None:
    """Serve moto at a port of this machine until the process ends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    # So that moto finds its own address, as its command line does.
    os.environ["MOTO_PORT"] = str(port)
    application = one_by_one(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
