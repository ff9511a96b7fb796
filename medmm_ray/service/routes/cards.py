"""What is served."""

import time
from dataclasses import asdict

from fastapi import APIRouter

from medmm_ray import __version__
from medmm_ray.service.backend import Backend
from medmm_ray.service.cards import ModelCard, ModelList
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, problems


def router(models: Models) -> APIRouter:
    """`GET /v1/models` and `GET /v1/models/{name}`."""
    routes = APIRouter(tags=["models"])
    created = int(time.time())

    @routes.get("/v1/models", summary="The served models and the limits of a request")
    async def cards() -> ModelList:
        """One card a model."""
        return ModelList(data=[_model_card(models, backend, created) for backend in await models.all()])

    # Names of checkpoints have slashes.
    @routes.get("/v1/models/{name:path}", summary="A served model", responses=problems(Kind.NOT_FOUND))
    async def card(name: str) -> ModelCard:
        """The card of the model of this name."""
        return _model_card(models, await models.of(name), created)

    return routes


def _model_card(models: Models, backend: Backend, created: int) -> ModelCard:
    shared_fields = set(ModelCard.model_fields) & set(ServeConfig.model_fields) - {"aliases"}
    return ModelCard(
        id=backend.model,
        aliases=models.aliases_of(backend.model),
        created=created,
        checkpoint=str(backend.config.model),
        fingerprint=backend.fingerprint,
        version=__version__,
        **asdict(backend.traits),
        **backend.config.model_dump(include=shared_fields),
    )
