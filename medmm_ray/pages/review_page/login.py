"""The login of the review page: its form, and the middleware that lets nobody else in."""

from collections.abc import Mapping
from html import escape
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.pages.review_page.sessions import Sessions, TooManyTriesError

COOKIE = "medmm_review"
LOGIN = "/login"
MAX_FORM = 4096  # bytes of a login
HERE = Path(__file__).parent
HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; "
        "base-uri 'self'; form-action 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class RequireSession:
    """Middleware that lets in who has a session, and puts the reader's name into the request's state.

    Sets headers on every answer.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        self.app = app
        self.sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it: the page itself leads to the login, all else is a 401."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "the page has no websockets"
        reader = self.sessions.reader_of(session_token(scope))
        scope.setdefault("state", {})["reader"] = reader
        # Gradio's own scripts may be cached: they hold nothing of a case.
        may_cache = scope["path"].startswith("/assets/")

        async def send_with_headers(message: Message) -> None:
            """`send`, with the headers in the answer's first message."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if not may_cache:
                    headers["cache-control"] = "no-store"
            await send(message)

        if reader is None and scope["path"] != LOGIN:
            await _refusal(scope)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def _refusal(scope: Scope) -> Response:
    if scope["method"] == "GET" and scope["path"] == "/":
        return RedirectResponse(LOGIN, 303)
    return Response("log in first", 401)


def session_token(scope: Scope) -> str | None:
    """The token in the request's cookie, if it has one."""
    cookies: SimpleCookie = SimpleCookie()
    for name, value in scope["headers"]:
        if name == b"cookie":
            cookies.load(value.decode("latin-1"))
    return cookies[COOKIE].value if COOKIE in cookies else None


def add_login(app: FastAPI, sessions: Sessions, encrypted: bool) -> None:
    """Add the paths /login and /logout; `encrypted`: the cookie travels by https alone."""
    template = (HERE / "login.html").read_text()

    def form(fault: str = "", code: int = 200) -> HTMLResponse:
        """The login page, with what was wrong."""
        return HTMLResponse(template.replace("{fault}", escape(fault)), code)

    @app.get(LOGIN)
    def login() -> HTMLResponse:
        """The form."""
        return form()

    @app.post(LOGIN)
    async def log_in(request: Request) -> Response:
        """Give a cookie for the right password and lead to the page, else show the form again and say why."""
        body = await _body(request)
        if body is None:
            return form("That is no login.", 413)
        fields = parse_qs(body.decode("utf-8", "replace"))
        name = fields.get("name", [""])[0].strip().lower()
        password = fields.get("password", [""])[0]
        address = request.client.host if request.client else ""
        try:
            # Hashing a password takes a while: in a thread, so that other readers do not wait.
            token = await run_in_threadpool(sessions.log_in, name, password, address)
        except TooManyTriesError as error:
            response = form(str(error), 429)
            response.headers["retry-after"] = str(round(error.seconds))
            return response
        if token is None:
            return form("Name or password is wrong.", 401)
        page = RedirectResponse("/", 303)
        page.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=encrypted)
        return page

    @app.post("/logout")
    def log_out(request: Request) -> Response:
        """End the session and lead to the login."""
        sessions.log_out(session_token(request.scope))
        login_page = RedirectResponse(LOGIN, 303)
        login_page.delete_cookie(COOKIE)
        return login_page


async def _body(request: Request) -> bytes | None:
    """The request's body; None where it is larger than a login can be."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM:
            return None
    return bytes(body)
