"""The web application around the scorer: middlewares, errors and routes.

Leaves: `POST /v1/rerank`, `/v1/score` and `/v1/rewards`; `GET /v1/models`, `/health`, `/ready` and `/metrics`; the
OpenAPI page at `/docs`. Logs hold counts and seconds, never text.
"""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from opentelemetry.trace import Tracer

from medmm_ray import __version__
from medmm_ray.service import demo
from medmm_ray.service.admission import Admission, Budget, Patience
from medmm_ray.service.audit import Audit
from medmm_ray.service.guard import Guard
from medmm_ray.service.keys import Keyring
from medmm_ray.service.metrics import MeasureRequests
from medmm_ray.service.models import Models
from medmm_ray.service.problems import CatchAll, Kind, add_problem_handlers, problem_schemas, problems
from medmm_ray.service.quotas import Quotas
from medmm_ray.service.reading import few_threads
from medmm_ray.service.request_ids import RequestIds
from medmm_ray.service.routes import best_of_n, cards, health, rerank, rewards, score, tile_maps
from medmm_ray.service.secure_headers import SecureHeaders
from medmm_ray.service.tracing import NO_TRACER, TraceRequests


class Api(FastAPI):
    """FastAPI whose OpenAPI page knows what a problem is."""

    def openapi(self) -> dict[str, Any]:
        """The page, with the schemas that `problems` refers to."""
        page = super().openapi()
        page["components"]["schemas"].update(problem_schemas())
        return page


def api(models: Models, keyring: Keyring | None, quotas: Quotas | None = None, tracer: Tracer = NO_TRACER) -> FastAPI:
    """The web application around the models; without a `keyring` it answers loopback alone. `tracer` gets a span of
    each request."""
    backend, config = models.first, models.config
    quotas = quotas or Quotas()
    for name in (backend.model, *models.further):
        backend.metrics.know(name)
    app = Api(
        title="medmm_ray",
        version=__version__,
        summary="Scores each step of candidate solutions of a medical question, and puts the solutions in order.",
        responses=problems(Kind.UNAUTHENTICATED, Kind.FORBIDDEN, Kind.RATE_LIMITED),
        lifespan=few_threads,
    )
    add_problem_handlers(app)
    # The last that is added sees a request first.
    bytes_held = Budget("bytes of bodies", config.max_body_mb_in_flight << 20)
    patience = Patience(config.body_timeout_s, config.request_timeout_s)
    app.add_middleware(Admission, check=backend.check, bytes_held=bytes_held, patience=patience)
    app.add_middleware(Guard, keyring=keyring, quotas=quotas, max_body_mb=config.max_body_mb)
    app.add_middleware(Audit, quotas=quotas, fingerprint=backend.fingerprint)
    app.add_middleware(CatchAll)
    app.add_middleware(TraceRequests, tracer=tracer)
    app.add_middleware(MeasureRequests, metrics=backend.metrics)
    app.add_middleware(SecureHeaders)
    app.add_middleware(RequestIds)
    # The guard checks the key; this writes it into the OpenAPI page.
    bearer = Depends(HTTPBearer(auto_error=False, description="A key; none is needed where access=loopback."))
    app.include_router(health.router(backend))
    app.include_router(health.metrics_router(backend), dependencies=[bearer])
    # A further family of routes goes here, and what keys it needs into `guard.SCOPES`.
    for family in (cards, rerank, score, rewards, best_of_n, tile_maps):
        app.include_router(family.router(models), dependencies=[bearer])
    if config.demo:
        app.include_router(demo.router(backend))
    return app
