"""What stands in Ray Serve's HTTP proxy, before a request reaches a replica: ids, and errors in the service's words.

Ray imports `middlewares` into each proxy where the environment of its nodes has

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=medmm_ray.service.proxy:middlewares

(sessions of this package, its images and its cluster files set it). Without it the proxy answers what it cannot pass on
in plain text: 404 before an application is there, 408 after `request_timeout_s`, 503 when queues are full, and 500 when
a replica died under a request.
"""

import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.allocator import Trimmer
from medmm_ray.service.problems import KIND_OF_STATUS, Kind, Problem
from medmm_ray.service.request_ids import RequestIds

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1.0  # other replicas answer at once; a new one takes a model's loading, which clients wait for in steps
PLAIN = b"text/plain"
MAX_DETAIL = 500  # characters of Ray's words


def middlewares() -> list[Middleware]:
    """What Ray wraps around its proxy, the innermost first."""
    return [Middleware(ProxyProblems), Middleware(RequestIds)]


class ProxyProblems:
    """Turns the proxy's own errors, in plain text, into problems; what replicas answer passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.trimmer = Trimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        is_gone = False

        async def receive_noting() -> Message:
            """`receive`, noting that the client went away."""
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "http.disconnect"
            return message

        await self.app(scope, receive_noting, answer.take)
        if scope["method"] == "POST":
            self.trimmer.note_request()
        # The proxy cancels a request whose client is gone: that too ends without an answer, and is no fault.
        problem = None if is_gone else answer.problem()
        if problem is not None:
            await problem.response(scope)(scope, receive, send)


class _Answer:
    """An answer on its way: passed on at once, but held back where it is an error in plain text."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._retry_after_s: float | None = None
        self._is_plain = False
        self._text = b""

    async def take(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = {name.lower(): value for name, value in message["headers"]}
            is_text = headers.get(b"content-type", b"").startswith(PLAIN)
            self._is_plain = is_text and message["status"] >= 400
            retry_after = headers.get(b"retry-after", b"")
            self._retry_after_s = float(retry_after) if retry_after.isdigit() else None
        elif self._is_plain:
            self._text += message.get("body", b"")
        if not self._is_plain:
            await self._send(message)

    def problem(self) -> Problem | None:
        """What to answer in place of what was held back; None where the answer has gone out."""
        if self._status is None:
            # Ray logs why and says nothing to the client: the replica died, or raised before it answered.
            logger.warning("a request had no answer: its replica died, or failed before it could answer")
            detail = "the replica that had the request is gone; send it again"
            return Problem(Kind.UNAVAILABLE, detail, retry_after_s=RETRY_AFTER_S)
        if not self._is_plain:
            return None
        kind = KIND_OF_STATUS.get(self._status, Kind.INTERNAL)  # the status that Ray chose stays, where it has a kind
        detail = self._text.decode(errors="replace")[:MAX_DETAIL] or kind.title
        retry_after_s = self._retry_after_s
        if retry_after_s is None and kind in (Kind.OVERLOADED, Kind.UNAVAILABLE):
            retry_after_s = RETRY_AFTER_S
        return Problem(kind, detail, retry_after_s=retry_after_s)
