"""Each request's id: the client's own (`X-Request-Id`) where it is usable, else a new one; sent back in the answer."""

import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
# What goes to logs and back to the client is neither long nor able to break a line.
USABLE = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_KEY = "medmm_request_id"


class RequestIds:
    """The outermost middleware: gives each request its id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id, and its answer back with the same."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Of two headers the last counts, as for the proxy in front.
        headers = [(name, text) for name, text in scope["headers"] if name != HEADER]
        from_client = dict(scope["headers"]).get(HEADER, b"")
        value = from_client if USABLE.fullmatch(from_client) else uuid.uuid4().hex.encode()
        scope[_KEY] = value.decode()
        scope["headers"] = [*headers, (HEADER, value)]  # for what is behind, as Ray's proxy: there it is the same

        async def send_with_id(message: Message) -> None:
            """`send`; the head of the answer gets the id, in place of one that is there."""
            if message["type"] == "http.response.start":
                headers = [(name, text) for name, text in message["headers"] if name.lower() != HEADER]
                message["headers"] = [*headers, (HEADER, value)]
            await send(message)

        await self.app(scope, receive, send_with_id)


def request_id(scope: Scope) -> str:
    """The id of the request of `scope`; empty where none was given."""
    return str(scope.get(_KEY, ""))
