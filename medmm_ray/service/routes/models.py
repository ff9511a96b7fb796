"""What is served."""

import time
from dataclasses import asdict

from fastapi import APIRouter

from medmm_ray import __version__
from medmm_ray.service.backend import Backend
from medmm_ray.service.cards import ModelCard, ModelList
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.problems import Kind, problems


def router(backend: Backend) -> APIRouter:
    """`GET /v1/models` and `GET /v1/models/{name}`."""
    routes = APIRouter(tags=["models"])
    card = _model_card(backend)  # it does not change while the replica lives

    @routes.get("/v1/models", summary="The served models and the limits of a request")
    async def models() -> ModelList:
        """One card a model."""
        return ModelList(data=[card])

    # Names of checkpoints have slashes.
    @routes.get("/v1/models/{name:path}", summary="A served model", responses=problems(Kind.NOT_FOUND))
    async def model(name: str) -> ModelCard:
        """The card of the model of this name."""
        backend.check_model(name)
        return card

    return routes


def _model_card(backend: Backend) -> ModelCard:
    shared_fields = set(ModelCard.model_fields) & set(ServeConfig.model_fields)
    return ModelCard(
        id=backend.model,
        created=int(time.time()),
        checkpoint=str(backend.config.model),
        fingerprint=backend.fingerprint,
        version=__version__,
        **asdict(backend.traits),
        **backend.config.model_dump(include=shared_fields),
    )
