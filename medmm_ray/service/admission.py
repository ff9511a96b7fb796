"""What happens to a request before its route sees it: it waits outside until its body is here, and may be turned away.

Enters: an HTTP request as it comes. Leaves: the same with its whole body, or a problem: 429 where the replica has too
much to do or holds too many bytes, 408 where the body comes too slowly. A body is awaited before anything is held for
it, so that a slow sender costs a connection and no more. A client that goes away, at any time, cancels its request.
"""

import asyncio
import contextvars
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.service.allocator import Trimmer
from medmm_ray.service.problems import Kind, Problem

TIMEOUT_HEADER = b"x-request-timeout"
_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("medmm_deadline", default=math.inf)

Check = Callable[[], None]
"""Raises a `Problem` where the replica has too much to do."""


def seconds_left() -> float | None:
    """Seconds until the running request's deadline; None without one."""
    left = _deadline.get() - time.monotonic()
    return None if math.isinf(left) else max(left, 0.0)


@contextmanager
def time_left(seconds: float | None) -> Iterator[None]:
    """Let `seconds_left` count from so many seconds while the block runs; None: there is no deadline."""
    token = _deadline.set(math.inf if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


class Budget:
    """Something of which requests hold a part while they are answered; over `limit` they are told to come again."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.used = 0

    def take(self, amount: int) -> None:
        """Hold `amount` more; a 429 where that is too much. A request alone is always let in."""
        # The first is let in whatever it holds: refused for good it would come again for ever.
        if self.used and self.used + amount > self.limit:
            detail = f"{self.used} {self.name} are held; with {amount} more it would be over {self.limit}: come again"
            raise Problem(Kind.OVERLOADED, detail, retry_after_s=1)
        self.used += amount

    def give_back(self, amount: int) -> None:
        """Hold `amount` less."""
        self.used -= amount

    @contextmanager
    def held(self, amount: int) -> Iterator[None]:
        """Hold `amount` while the block runs."""
        self.take(amount)
        try:
            yield
        finally:
            self.give_back(amount)


class Parts:
    """A body as it comes, of which `bytes_held` holds the bytes."""

    def __init__(self, bytes_held: Budget) -> None:
        self.num_bytes = 0
        self._bytes_held = bytes_held
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        """Hold one more part; a 429 where that is too much."""
        self._bytes_held.take(len(part))
        self.num_bytes += len(part)
        if part:
            self._parts.append(part)

    async def joined(self) -> bytes:
        """The whole body; its parts are let go."""
        parts, self._parts = self._parts, []
        if len(parts) < 2:
            return b"".join(parts)
        # Not on the event loop: new pages for some MB take 20 ms. Python joins large parts without its lock.
        return await asyncio.to_thread(b"".join, parts)

    def give_back(self) -> None:
        """Hold nothing more."""
        self._bytes_held.give_back(self.num_bytes)


@dataclass(frozen=True)
class Patience:
    """How long the service waits for a body, and a client for its answer (seconds)."""

    body_timeout_s: float
    request_timeout_s: float


class Admission:
    """Middleware around the routes; requests without a body pass at once.

    `check` is asked before a body is read; `bytes_held` bounds the bodies of all requests.
    """

    def __init__(self, app: ASGIApp, check: Check, bytes_held: Budget, patience: Patience) -> None:
        self.app = app
        self.check = check
        self.bytes_held = bytes_held
        self.patience = patience
        self.trimmer = Trimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body, or answer it with a problem."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        parts = Parts(self.bytes_held)
        try:
            # Before a byte is read: a refusal must cost less than an answer.
            timeout_s = self._timeout(scope)
            self.check()
            await self._read(receive, parts)
        except Problem as problem:
            parts.give_back()
            self.trimmer.note_request()
            await problem.response(scope)(scope, receive, send)
            return
        # Nobody is there to be told.
        except ClientGoneError:
            parts.give_back()
            return
        # From here on the time is ours: how long the sender took does not count.
        _deadline.set(time.monotonic() + timeout_s)
        try:
            await self._answer(scope, receive, send, await parts.joined())
        finally:
            parts.give_back()
            self.trimmer.note_request()

    def _timeout(self, scope: Scope) -> float:
        """Seconds that the client waits, at most the service's own."""
        value = dict(scope["headers"]).get(TIMEOUT_HEADER)
        if value is None:
            return self.patience.request_timeout_s
        # "inf" and "nan" are numbers to Python.
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            detail = f"X-Request-Timeout is {value[:20]!r}; expected a number of seconds above 0"
            raise Problem(Kind.INVALID, detail)
        return min(seconds, self.patience.request_timeout_s)

    async def _read(self, receive: Receive, parts: "Parts") -> None:
        """Collect the body, holding its bytes as they come."""
        try:
            async with asyncio.timeout(self.patience.body_timeout_s):
                has_more = True
                while has_more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.add(message.get("body", b""))
                    has_more = message.get("more_body", False)
        except TimeoutError:
            seconds = self.patience.body_timeout_s
            detail = f"only {parts.num_bytes} bytes of the body came within {seconds:g} s; send it faster"
            # What still comes of the body is of no use: the connection ends with the answer.
            raise Problem(Kind.TIMEOUT, detail, headers={"Connection": "close"}) from None

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the application; cancel it where the client goes away."""
        # Whoever is first: the answer, or the end of the connection.
        gone = asyncio.ensure_future(_until_gone(receive))
        answering = asyncio.ensure_future(self.app(scope, _receive_of(body, gone), send))
        try:
            await asyncio.wait((gone, answering), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                answering.cancel()
            await _result_of(answering)
        finally:
            gone.cancel()
            answering.cancel()


class ClientGoneError(Exception):
    """The client went away before its request was whole."""


async def _result_of(answering: "asyncio.Future[None]") -> None:
    """Wait for the application; that it was cancelled because its client is gone is no fault."""
    try:
        await answering
    except asyncio.CancelledError:
        # The server that ends, on the other hand, ends this too.
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise


async def _until_gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _receive_of(body: bytes, gone: Awaitable[None]) -> Receive:
    """`receive` of a request whose body is here."""
    # One message, whole: what reads it need not wait between its parts.
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        """The body, then the disconnect when it comes."""
        if messages:
            return messages.pop()
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    return receive
