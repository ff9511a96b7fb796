"""What the service lets in: who has a key that may ask, or who asks from this machine; with a body not too large."""

import asyncio
import ipaddress
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.audit import KEY
from medmm_ray.service.keys import Key, Keyring, KeyScope
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.quotas import Guesses, Quotas

DEMO_PATHS = ("/demo", "/demo/page.css", "/demo/page.js", "/demo/examples")
OPEN_PATHS = ("/health", "/ready", "/docs", "/openapi.json", *DEMO_PATHS)  # they hold no data
# The first prefix that fits counts; what no prefix names needs a key of any scope, and is not found then.
SCOPES: Mapping[str, KeyScope] = {
    "/v1/best_of_n": "best_of_n",
    "/v1/": "score",
    "/metrics": "metrics",
}

Headers = Mapping[bytes, bytes]


class Guard:
    """Middleware in front of the application.

    Before a body is read: 401 without a key or with a wrong one, 403 to one that may not ask for this, 429 to one that
    asks too often and to a peer that guesses; where nobody needs a key (`keyring` is None) 403 to what did not arrive
    at loopback. While it is read: 413 where it is larger than `max_body_mb` MiB.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring | None, quotas: Quotas, max_body_mb: int) -> None:
        self.app = app
        self.keyring = keyring
        self.quotas = quotas
        self.guesses = Guesses()
        self.max_body_mb = max_body_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        try:
            if self.keyring is None:
                check_loopback(scope, headers)
            elif path_of(scope) not in OPEN_PATHS:
                scope[KEY] = await self._key(self.keyring, scope, headers)
        except Problem as problem:
            await problem.response(scope)(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, counting: a chunked body has no length to look at beforehand."""
        num_bytes = 0

        async def receive_bounded() -> Message:
            """The next part of the body; a 413 once the parts are too large together."""
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_mb << 20:
                raise Problem(Kind.TOO_LARGE, f"the body is larger than {self.max_body_mb} MiB")
            return message

        return receive_bounded

    async def _key(self, keyring: Keyring, scope: Scope, headers: Headers) -> Key:
        """The request's key; a `Problem` where it has none that may ask for this now."""
        if keyring.is_due:
            await asyncio.to_thread(keyring.reload)
        peer = str((scope.get("client") or ("", 0))[0])
        if wait_s := self.guesses.wait_s(peer):
            raise Problem(Kind.RATE_LIMITED, "too many wrong keys from this address; wait", retry_after_s=wait_s)
        scheme, _, shown = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        key = keyring.find(shown) if is_bearer else None
        if key is None:
            # Who sends none does not guess.
            if is_bearer:
                self.guesses.add(peer)
            raise _unauthenticated("the key is wrong, revoked or expired" if is_bearer else "a key is missing")
        needed = needed_scope(path_of(scope))
        if needed is not None and not key.allows(needed):
            scopes = ", ".join(key.scopes)
            raise Problem(Kind.FORBIDDEN, f"the key {key.name} has the scopes {scopes}; this needs {needed}")
        # Last, for it counts the request: what was refused above has cost the key nothing.
        if wait_s := self.quotas.wait_s(key):
            raise Problem(Kind.RATE_LIMITED, f"the key {key.name} is over its limit; wait", retry_after_s=wait_s)
        return key


def _unauthenticated(fault: str) -> Problem:
    detail = f"{fault}; send 'Authorization: Bearer <key>'"
    return Problem(Kind.UNAUTHENTICATED, detail, headers={"WWW-Authenticate": "Bearer"})


def path_of(scope: Scope) -> str:
    """A request's path below the application's own prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def needed_scope(path: str) -> KeyScope | None:
    """What a key must be allowed for this path; None: anything."""
    for prefix, scope in SCOPES.items():
        if path.startswith(prefix):
            return scope
    return None


def check_loopback(scope: Scope, headers: Headers) -> None:
    """Raise a 403 `Problem` unless both the socket's own address and the name that the client used are loopback.

    The name counts, for a web page may rebind a name of its own to 127.0.0.1.
    """
    address, _ = scope.get("server") or ("", None)
    if not (is_loopback(address) and is_loopback(_host_name(headers))):
        raise Problem(
            Kind.FORBIDDEN,
            "the server has no keys (access=loopback), so only loopback addresses are answered; serve it with keys to "
            "open it",
        )


def _host_name(headers: Headers) -> str:
    """The host that the client named, without the port and the brackets of an IPv6 address."""
    host = headers.get(b"host", b"localhost").decode("latin-1")
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).strip("[]")


def is_loopback(host: str) -> bool:
    """Whether the name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
