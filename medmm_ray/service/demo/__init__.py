"""The demo page: one case, its solutions' steps coloured by score, and where in the image each step's score comes from.

The page is static, and a client of the service's own routes: keys, limits and the audit hold for it as for everyone,
any replica answers it, and it loads nothing from elsewhere. Its examples are phantoms, drawn by code.
"""

import base64
import io
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from medmm_ray.data.sources.phantom import DOCUMENTS, blind_solution, generator, make_questions, render
from medmm_ray.service.backend import Backend

HERE = Path(__file__).parent
NUM_EXAMPLES = 6
NUM_BLIND = 3  # solutions of an example by somebody who has not seen its picture
IMAGE_SIZE = 256  # pixels a side
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {"page.css": "text/css", "page.js": "text/javascript"}


class Example(BaseModel):
    """A case to try the page on; `image` is a PNG as base64."""

    title: str
    question: str
    options: list[str]
    documents: list[str]
    image: str
    solutions: list[list[str]]


class Examples(BaseModel):
    """What the page starts with."""

    model: str
    has_policy: bool
    """Whether solutions can be sampled."""
    examples: list[Example]


def router(backend: Backend) -> APIRouter:
    """`GET /demo`, its style and script, and its examples: nothing that needs a key."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/demo")
    def page() -> Response:
        """The page."""
        content = (HERE / "page.html").read_bytes()
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @routes.get("/demo/examples")
    def start() -> Examples:
        """The examples; made at the first request."""
        return Examples(model=backend.model, has_policy=backend.policy is not None, examples=examples())

    @routes.get("/demo/{name}")
    def file(name: str) -> Response:
        """The page's style or script."""
        if name not in FILES:
            return Response(status_code=404)
        return Response((HERE / name).read_bytes(), media_type=FILES[name])

    return routes


@lru_cache(maxsize=1)
def examples() -> list[Example]:
    """Phantoms of the test split, each with one worked solution and some that were written without its picture."""
    made: list[Example] = []
    for number, item in enumerate(make_questions(7, "test", NUM_EXAMPLES, 1)):
        rng = generator("demo", number)
        blind = [blind_solution(item, rng, slip=0.5)[0] for _ in range(NUM_BLIND)]
        sink = io.BytesIO()
        render(item.case, IMAGE_SIZE).save(sink, "PNG")
        made.append(
            Example(
                title=f"Phantom {number + 1}, drawn with: {item.case.diagnosis}",
                question=item.question,
                options=list(item.options),
                documents=[document.text for document in DOCUMENTS[:2]],
                image=base64.b64encode(sink.getvalue()).decode(),
                solutions=[list(item.worked[0]), *blind],
            )
        )
    return made
