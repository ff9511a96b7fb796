"""What the service lets in: who has the token, or who asks from this machine, with a body that is small enough."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.problems import Kind, Problem

WITHOUT_TOKEN = ("/health", "/docs", "/openapi.json")  # they hold no data

Headers = Mapping[bytes, bytes]


class Guard:
    """Middleware in front of the application.

    Before a body is read: 401 without the token, or 403 to what did not arrive at loopback where there is no token;
    while it is read: 413 where it is larger than `max_body_mb` MiB. `token_env` is the variable's name, for messages.
    """

    def __init__(self, app: ASGIApp, token_sha256: str | None, token_env: str, max_body_mb: int) -> None:
        self.app = app
        self.token_sha256 = token_sha256
        self.token_env = token_env
        self.max_body_mb = max_body_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        if self.token_sha256 is None:
            refusal = self._check_loopback(scope, headers)
        else:
            refusal = self._check_token(scope, headers, self.token_sha256)
        if refusal:
            await refusal.response(scope)(scope, receive, send)
        else:
            await self.app(
                scope,
                self._bounded(receive),
                send,
            )

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

    def _check_token(self, scope: Scope, headers: Headers, token_sha256: str) -> Problem | None:
        """A 401, or None where the token is right or the path needs none."""
        if scope["path"].removeprefix(scope.get("root_path", "")) in WITHOUT_TOKEN:
            return None
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        # Hashes, compared in constant time: how long a refusal takes says nothing about the token.
        if is_bearer and hmac.compare_digest(sha256(token), token_sha256):
            return None
        problem = "the bearer token is wrong" if is_bearer else "a bearer token is missing"
        detail = f"{problem}; send 'Authorization: Bearer <token>' with the server's {self.token_env}"
        return Problem(Kind.UNAUTHENTICATED, detail, headers={"WWW-Authenticate": "Bearer"})

    def _check_loopback(self, scope: Scope, headers: Headers) -> Problem | None:
        """A 403, or None where both the socket's own address and the name that the client used are loopback.

        The name counts, for a web page may rebind a name of its own to 127.0.0.1.
        """
        address, _ = scope.get("server") or ("", None)
        if is_loopback(address) and is_loopback(_host_name(headers)):
            return None
        detail = f"no token is set, so only loopback addresses are answered; set {self.token_env} to open the server"
        return Problem(Kind.FORBIDDEN, detail)


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


def sha256(token: str) -> str:
    """The token's hash, hexadecimal: what the replicas keep and compare."""
    return hashlib.sha256(token.encode()).hexdigest()
