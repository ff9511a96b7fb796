"""The review page: a Gradio page behind a login, in front of an `Assigner`.

Enters: the assigner, the views that it may show, the sessions. Leaves: a FastAPI application. Every path but the login
needs a session. The page is one `gr.HTML` component, page.html with page.css and two scripts: it asks the server
functions `show`, `submit` and `undo`, and each answers with all that the reader may see next. Nothing is loaded from
elsewhere, nothing of a case is cached, and logs hold no text.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import Response

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError
from medmm_ray.engines.images import open_image
from medmm_ray.pages.review_page.assigner import Assigner, QueueItem, RefusedError, Submission
from medmm_ray.pages.review_page.item_views import ItemViews
from medmm_ray.pages.review_page.login import RequireSession, add_login
from medmm_ray.pages.review_page.sessions import Sessions
from medmm_ray.pages.review_page.verdicts import Verdict

if TYPE_CHECKING:
    import gradio

MAX_FEEDBACK = 4000  # characters
CACHED_IMAGES = 32  # encoded ones, in memory
HERE = Path(__file__).parent


def build_app(assigner: Assigner, views: ItemViews, sessions: Sessions, encrypted: bool = False) -> FastAPI:
    """The application; `encrypted` says that it is reached by https."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ConfigError(f"the review page needs Gradio ({error}): pip install 'medmm-ray[review]'") from None

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_login(app, sessions, encrypted)
    _add_images(app, views)
    app.add_middleware(RequireSession, sessions=sessions)
    gradio.mount_gradio_app(
        app,
        _blocks(assigner, views),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=(HERE / "page.css").read_text(),
    )
    return app


def _add_images(app: FastAPI, views: ItemViews) -> None:
    @lru_cache(maxsize=CACHED_IMAGES)
    def encoded(image_id: str) -> bytes:
        """The image's PNG file; readers go back and forth, so the last ones stay in memory."""
        return png(views.image_uris[image_id])

    @app.get("/picture/{image_id}")
    def picture(image_id: str) -> Response:
        """An image that some item of the review shows, and no other."""
        if image_id not in views.image_uris:
            return Response("no such picture", 404)
        try:
            return Response(encoded(image_id), media_type="image/png")
        except RowError as error:
            return Response(error.kind, 422)


def png(uri: str) -> bytes:
    """The image as the browser gets it; grey ones a third of the size."""
    image = open_image(uri)
    red, green, blue = (channel.tobytes() for channel in image.split())
    if red == green == blue:
        image = image.convert("L")
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)  # the weakest compression: a reader waits for the encoder, not for bytes
    return sink.getvalue()


def _blocks(assigner: Assigner, views: ItemViews) -> "gradio.Blocks":
    """The page and the functions that its script calls."""
    import gradio

    def respond(request: gradio.Request, act: Callable[[str], QueueItem | None]) -> dict[str, Any]:
        """What the page shows next: the item that `act` gives, or why it cannot be had and the current one."""
        reader: str = request.state.reader
        refusal = None
        try:
            item = act(reader)
        except RefusedError as error:
            item = assigner.current(reader)
            refusal = str(error)
        return {"refused": refusal, **view(assigner, views, reader, item)}

    # The page's script calls these three by their names.

    def show(place: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        """The current item, or the one before or after the item in view."""

        def act(reader: str) -> QueueItem | None:
            if "item_id" not in place:
                return assigner.current(reader)
            return assigner.move(
                reader,
                str(place["item_id"]),
                int(place["by"]),
            )

        return respond(request, act)

    def submit(message: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        """Keep a verdict and show the next item."""

        def act(reader: str) -> QueueItem | None:
            assigner.submit(
                reader,
                str(message["item_id"]),
                submission_of(message),
            )
            return assigner.current(reader)

        return respond(request, act)

    def undo(_: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
        """Take the last verdict back and show its item."""
        return respond(request, lambda reader: assigner.undo(reader) or assigner.current(reader))

    blocks: gradio.Blocks
    with gradio.Blocks(title="Expert review", analytics_enabled=False) as blocks:
        gradio.HTML(
            html_template=(HERE / "page.html").read_text(),
            js_on_load=(HERE / "viewer.js").read_text() + (HERE / "page.js").read_text(),
            apply_default_css=False,
            server_functions=[show, submit, undo],
        )
    return blocks


def submission_of(message: Mapping[str, Any]) -> Submission:
    """A verdict as the page sends it."""
    answer_right = message.get("answer_right")
    difficulty = message.get("difficulty")
    return Submission(
        verdict=str(message["verdict"]),
        faults=[str(fault) for fault in message.get("faults", [])],
        answer_right=None if answer_right is None else bool(answer_right),
        difficulty=None if difficulty is None else str(difficulty),
        feedback=str(message.get("feedback", ""))[:MAX_FEEDBACK],
    )


def view(assigner: Assigner, views: ItemViews, reader: str, item: QueueItem | None) -> dict[str, Any]:
    """All that a reader may see of an item; others' verdicts only on an adjudicator's, without names."""
    adjudicates = assigner.roles[reader] == "adjudicator"
    answer: dict[str, Any] = {
        "reader": reader,
        "adjudicates": adjudicates,
        "what": assigner.config.what,
        "case": None,
        "own": None,
        "others": [],
        "prefetch": [],
        "progress": asdict(assigner.progress(reader)),
    }
    if item is None:
        return answer
    answer["case"] = asdict(views.by_id[item.item_id])
    verdict = assigner.verdict_of(reader, item.item_id)
    if verdict:
        answer["own"] = _anonymous(verdict)
    if adjudicates:
        answer["others"] = [_anonymous(reading) for reading in assigner.readings(item.item_id)]
    following = views.following.get(item.item_id)
    if following:
        answer["prefetch"] = [image.image_id for image in following.pictures]
    return answer


def _anonymous(verdict: Verdict) -> dict[str, Any]:
    """What a verdict says, without who said it and when."""
    return {
        "verdict": verdict.verdict,
        "faults": list(verdict.faults),
        "answer_right": verdict.answer_right,
        "difficulty": verdict.difficulty,
        "feedback": verdict.feedback,
    }
