"""Headers that keep browsers from doing more with an answer than showing it. No answer allows another origin (CORS)."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),  # answers repeat what was asked
)
# Pages load scripts of their own; what is no page loads nothing.
NO_PAGE = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")


class SecureHeaders:
    """Middleware that adds them, where the answer has not its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back with the headers."""

        async def send_with_headers(message: Message) -> None:
            """`send`; the head of the answer gets what it lacks."""
            if message["type"] == "http.response.start":
                headers = [(name.lower(), value) for name, value in message["headers"]]
                present = dict(headers)
                is_page = present.get(b"content-type", b"").startswith(b"text/html")
                for name, value in HEADERS if is_page else (*HEADERS, NO_PAGE):
                    if name not in present:
                        headers.append((name, value))
                message["headers"] = headers
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
