"""The review page: a Gradio page behind a login, in front of a `Desk`.

Enters: the desk, the cases that it may show, the readers. Leaves: a FastAPI application. Every path but the login needs
a session. The page is one `gr.HTML` component, page.html with page.css and two scripts: it asks the server functions
`show`, `submit` and `undo`, and each answers with all that the reader may see next. Nothing is loaded from elsewhere,
nothing of a case is cached, and logs hold no text.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from html import escape
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.pages.review_page.cases import Cases
from medmm_ray.pages.review_page.desk import Answer, Desk, Item, RefusedError
from medmm_ray.pages.review_page.readers import Door, TooManyTriesError

if TYPE_CHECKING:
    import gradio

COOKIE = "medmm_review"
LOGIN = "/login"
MAX_FORM = 4096  # bytes of a login
MAX_FEEDBACK = 4000  # characters
KEPT_PICTURES = 32  # encoded ones, in memory
HERE = Path(__file__).parent
HEADERS = {
    "content-security-policy": (
        "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; "
        "base-uri 'self'; form-action 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def build_app(desk: Desk, cases: Cases, door: Door, encrypted: bool = False) -> FastAPI:
    """The application; `encrypted` says that it is reached by https."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ConfigError(f"the review page needs Gradio ({error}): pip install 'medmm-ray[review]'") from None

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_login(app, door, encrypted)

    @lru_cache(maxsize=KEPT_PICTURES)
    def encoded(image_id: str) -> bytes:
        return png(cases.uris[image_id])

    @app.get("/picture/{image_id}")
    def picture(image_id: str) -> Response:
        if image_id not in cases.uris:
            return Response("no such picture", 404)
        try:
            return Response(encoded(image_id), media_type="image/png")
        except RowError as error:
            return Response(error.kind, 422)

    app.add_middleware(Gate, door=door)
    gradio.mount_gradio_app(
        app,
        _blocks(desk, cases),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=(HERE / "page.css").read_text(),
    )
    return app


def png(uri: str) -> bytes:
    """A picture as the browser gets it; grey ones a third of the size."""
    image = open_image(uri)
    red, green, blue = (channel.tobytes() for channel in image.split())
    sink = io.BytesIO()
    (image.convert("L") if red == green == blue else image).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


class Gate:
    """Lets in who has a session, and puts the reader's name into the request's state; sets headers on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "the page has no websockets"
        reader = self.door.reader(session_token(scope))
        scope.setdefault("state", {})["reader"] = reader
        keep = scope["path"].startswith("/assets/")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not keep:
                    headers["cache-control"] = "no-store"
            await send(message)

        if reader is None and scope["path"] != LOGIN:
            wants_page = scope["method"] == "GET" and scope["path"] == "/"
            refusal = RedirectResponse(LOGIN, 303) if wants_page else Response("log in first", 401)
            await refusal(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def session_token(scope: Scope) -> str | None:
    cookies: SimpleCookie = SimpleCookie()
    for name, value in scope["headers"]:
        if name == b"cookie":
            cookies.load(value.decode("latin-1"))
    return cookies[COOKIE].value if COOKIE in cookies else None


def _add_login(app: FastAPI, door: Door, encrypted: bool) -> None:
    template = (HERE / "login.html").read_text()

    def form(fault: str = "", code: int = 200) -> HTMLResponse:
        return HTMLResponse(template.replace("{fault}", escape(fault)), code)

    @app.get(LOGIN)
    def login() -> HTMLResponse:
        return form()

    @app.post(LOGIN)
    async def enter(request: Request) -> Response:
        from anyio.to_thread import run_sync

        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM:
                return form("That is no login.", 413)
        values = parse_qs(body.decode("utf-8", "replace"))
        name, password = (values.get(key, [""])[0] for key in ("name", "password"))
        address = request.client.host if request.client else ""
        try:
            token = await run_sync(door.enter, name.strip().lower(), password, address)
        except TooManyTriesError as error:
            answer = form(str(error), 429)
            answer.headers["retry-after"] = str(round(error.seconds))
            return answer
        if token is None:
            return form("Name or password is wrong.", 401)
        inside = RedirectResponse("/", 303)
        inside.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=encrypted)
        return inside

    @app.post("/logout")
    def leave(request: Request) -> Response:
        door.leave(session_token(request.scope))
        outside = RedirectResponse(LOGIN, 303)
        outside.delete_cookie(COOKIE)
        return outside


def _blocks(desk: Desk, cases: Cases) -> "gradio.Blocks":
    import gradio

    def answered(request: gradio.Request, act: Callable[[str], Item | None]) -> dict[str, Any]:
        reader: str = request.state.reader
        try:
            item, refused = act(reader), None
        except RefusedError as error:
            item, refused = desk.current(reader), str(error)
        return {"refused": refused, **view(desk, cases, reader, item)}

    def show(where: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        if "item_id" in where:
            return answered(request, lambda reader: desk.move(reader, str(where["item_id"]), int(where["by"])))
        return answered(request, desk.current)

    def submit(said: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        def act(reader: str) -> Item | None:
            desk.submit(reader, str(said["item_id"]), answer_of(said))
            return desk.current(reader)

        return answered(request, act)

    def undo(_: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        return answered(request, lambda reader: desk.undo(reader) or desk.current(reader))

    with gradio.Blocks(title="Expert review", analytics_enabled=False) as blocks:
        gradio.HTML(
            html_template=(HERE / "page.html").read_text(),
            js_on_load=(HERE / "viewer.js").read_text() + (HERE / "page.js").read_text(),
            apply_default_css=False,
            server_functions=[show, submit, undo],
        )
    made: gradio.Blocks = blocks
    return made


def answer_of(said: Mapping[str, Any]) -> Answer:
    """What the page sends of a verdict."""
    right, difficulty = said.get("answer_right"), said.get("difficulty")
    return Answer(
        verdict=str(said["verdict"]),
        faults=[str(fault) for fault in said.get("faults", [])],
        answer_right=None if right is None else bool(right),
        difficulty=None if difficulty is None else str(difficulty),
        feedback=str(said.get("feedback", ""))[:MAX_FEEDBACK],
    )


def view(desk: Desk, cases: Cases, reader: str, item: Item | None) -> dict[str, Any]:
    """All that a reader may see of an item; others' verdicts only on an adjudicator's, without names."""
    adjudicates = desk.roles[reader] == "adjudicator"
    own = desk.own(reader, item.item_id) if item else None
    others = desk.readings(item.item_id) if item and adjudicates else []
    following = cases.after.get(item.item_id) if item else None
    said = ("verdict", "faults", "answer_right", "difficulty", "feedback")
    return {
        "reader": reader,
        "adjudicates": adjudicates,
        "what": desk.config.what,
        "case": asdict(cases.shown[item.item_id]) if item else None,
        "own": {key: asdict(own)[key] for key in said} if own else None,
        "others": [{key: asdict(other)[key] for key in said} for other in others],
        "prefetch": [picture.image_id for picture in following.pictures] if following else [],
        "progress": asdict(desk.progress(reader)),
    }
