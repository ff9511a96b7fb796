"""The web application around the scorer: middlewares, errors and routes.

Leaves: `POST /v1/rerank`, `GET /v1/model`, `GET /health`, and the OpenAPI page at `/docs`. Logs hold counts and
seconds, never text.
"""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from medmm_ray import __version__
from medmm_ray.service.backend import Backend
from medmm_ray.service.guard import Guard
from medmm_ray.service.problems import CatchAll, Kind, add_problem_handlers, problem_schemas, problems
from medmm_ray.service.request_ids import RequestIds
from medmm_ray.service.routes import health, models, rerank


class Api(FastAPI):
    """FastAPI whose OpenAPI page knows what a problem is."""

    def openapi(self) -> dict[str, Any]:
        """The page, with the schemas that `problems` refers to."""
        page = super().openapi()
        page["components"]["schemas"].update(problem_schemas())
        return page


def api(backend: Backend, token_sha256: str | None) -> FastAPI:
    """The web application around `backend`."""
    config = backend.config
    app = Api(
        title="medmm_ray",
        version=__version__,
        summary="Scores each step of candidate solutions of a medical question, and puts the solutions in order.",
        responses=problems(Kind.UNAUTHENTICATED, Kind.FORBIDDEN),
    )
    add_problem_handlers(app)
    # The last that is added sees a request first.
    app.add_middleware(Guard, token_sha256=token_sha256, token_env=config.token_env, max_body_mb=config.max_body_mb)
    app.add_middleware(CatchAll)
    app.add_middleware(RequestIds)
    # The guard checks the token; this writes it into the OpenAPI page.
    bearer = Depends(HTTPBearer(auto_error=False, description=f"Demanded where {config.token_env} is set."))
    app.include_router(health.router())
    for routes in (models.router(backend), rerank.router(backend)):
        app.include_router(routes, dependencies=[bearer])
    return app
