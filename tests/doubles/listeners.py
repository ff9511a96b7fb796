"""Who listens in a process tree, on which addresses, and what a caller without Ray's token gets there."""

import importlib
import ipaddress
import os
import pickle
import pkgutil
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import grpc  # type: ignore[import-untyped]
import httpx
import psutil

# What a replica's gRPC server unpickles: field 1 of the request is the metadata.
REPLICA_METHOD = "/ray.serve.ASGIService/HandleRequest"
# Without a Python stub. `ray.rpc.syncer.RaySyncer` has none either and is left out: after an empty call to it the GCS
# and the raylet of one session answered no more.
OBJECT_MANAGER = ("/ray.rpc.ObjectManagerService/Push", "/ray.rpc.ObjectManagerService/Pull")

Guard = Literal["token over gRPC", "token over HTTP", "none: metrics", "none"]


@dataclass(frozen=True)
class Listener:
    process: str
    ip: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.ip)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


def listeners(root: psutil.Process, until: Collection[str] = ()) -> list[Listener]:
    """Listening TCP sockets of `root` and all below it; processes of the names in `until` are waited for."""
    deadline = time.monotonic() + 60
    while True:
        found = [
            Listener(process.name(), ip, port)
            for process in (root, *root.children(recursive=True))
            for ip, port in _listening(process)
        ]
        missing = set(until) - {listener.process for listener in found}
        if not missing:
            return found
        assert time.monotonic() < deadline, f"{missing} do not listen; {found} do"
        time.sleep(0.5)


def _listening(process: psutil.Process) -> list[tuple[str, int]]:
    try:
        found = process.net_connections("tcp")
    except psutil.NoSuchProcess:  # it ended since it was listed
        return []
    return [(socket.laddr.ip, socket.laddr.port) for socket in found if socket.status == psutil.CONN_LISTEN]


def outer_addresses() -> list[str]:
    """This machine's addresses that others can reach: neither loopback nor link-local."""
    names = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    found = [
        ipaddress.ip_address(name.address)
        for name in names
        if name.family in (socket.AF_INET, socket.AF_INET6) and "%" not in name.address
    ]
    return [str(address) for address in found if not address.is_loopback and not address.is_link_local]


def is_reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def call(host: str, port: int, method: str, request: bytes = b"", token: str = "") -> str:
    """The status of one gRPC call: OK, UNAUTHENTICATED, UNIMPLEMENTED (no such method), UNAVAILABLE (no gRPC), …"""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


class _MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def attack(host: str, port: int, marker: Path, token: str = "") -> str:
    """Send a replica a pickle that makes the folder `marker` where it is unpickled."""
    from ray.serve.generated import serve_pb2

    pickled = pickle.dumps(_MakesFolder(marker))
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickled)  # type: ignore[attr-defined]
    return call(host, port, REPLICA_METHOD, request.SerializeToString(), token)


@cache
def ray_methods() -> tuple[str, ...]:
    """Every method of Ray's own gRPC services, by its generated stubs."""
    import ray.core.generated as generated

    modules = [m.name for m in pkgutil.iter_modules(generated.__path__) if m.name.endswith("_pb2")]
    files = [importlib.import_module(f"{generated.__name__}.{name}").DESCRIPTOR for name in modules]
    services = [service for file in files for service in file.services_by_name.values()]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert len(methods) > 80, methods
    return (*sorted(methods), *OBJECT_MANAGER, REPLICA_METHOD)


def guard(host: str, port: int) -> Guard:
    """What keeps a caller without a token from using a port: every method is called, empty."""
    statuses = set()
    for method in ray_methods():
        status = call(host, port, method)
        statuses.add(status)
        if status == "UNAVAILABLE":
            return _http_guard(f"http://{host}:{port}")
    is_guarded = "UNAUTHENTICATED" in statuses and statuses <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}
    return "token over gRPC" if is_guarded else "none"


def _http_guard(address: str) -> Guard:
    with httpx.Client(trust_env=False, timeout=120) as client:
        replies = [client.get(f"{address}/api/jobs/"), client.post(f"{address}/get_or_create_runtime_env")]
    if all(reply.status_code == 401 for reply in replies):
        return "token over HTTP"
    return "none: metrics" if replies[0].text.startswith("# HELP") else "none"
