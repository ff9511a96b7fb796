"""Is the server up, and able to score; what has it done?"""

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from medmm_ray.service.backend import Backend
from medmm_ray.service.problems import Kind, Problem, problems

RETRY_AFTER_S = 5.0  # as often as readiness is tried


class Health(BaseModel):
    """The answer of a server that is up."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The answer of a server that can score."""

    status: Literal["ready"] = "ready"
    model: str


def router(backend: Backend) -> APIRouter:
    """`GET /health` and `GET /ready`."""
    routes = APIRouter(tags=["state"])

    @routes.get("/health", summary="Is the server up? Needs no key.")
    async def health() -> Health:
        """The process answers; it says nothing of the model."""
        return Health()

    @routes.get("/ready", summary="Can the server score? Needs no key.", responses=problems(Kind.UNAVAILABLE))
    async def ready() -> Ready:
        """The model is loaded, nothing hangs, and a tiny case has the score that it had when the model was loaded."""
        fault = await backend.readiness.fault(backend.score)
        if fault is not None:
            raise Problem(Kind.UNAVAILABLE, fault, retry_after_s=RETRY_AFTER_S)
        return Ready(model=backend.model)

    return routes


def metrics_router(backend: Backend) -> APIRouter:
    """`GET /metrics`."""
    routes = APIRouter(tags=["state"])

    @routes.get("/metrics", summary="Requests, solutions, steps, tokens and seconds, for Prometheus")
    async def metrics() -> Response:
        """This replica's counters, in Prometheus' text format; Ray exports its own beside them."""
        return Response(backend.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
