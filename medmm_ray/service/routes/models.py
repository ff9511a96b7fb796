"""What is served."""

from dataclasses import asdict

from fastapi import APIRouter
from pydantic import BaseModel

from medmm_ray import __version__
from medmm_ray.service.backend import Backend
from medmm_ray.service.config import ServeConfig


class ModelCard(BaseModel):
    """What is served, and what one request may hold."""

    model: str
    version: str
    dtype: str
    device: str
    has_image_tower: bool
    """Whether a request may have an image: an image tower looks at it, or the language model itself."""
    num_documents: int | None
    """Documents that the model was trained on, best first; null: it is not known."""
    num_references: int | None
    """Reference images that it was trained on."""
    max_solutions: int
    max_steps: int
    max_documents: int
    max_reference_images: int
    max_image_pixels: int
    max_body_mb: int


def router(backend: Backend) -> APIRouter:
    """`GET /v1/model`."""
    routes = APIRouter(tags=["models"])
    card = _model_card(backend)  # it does not change while the replica lives

    @routes.get("/v1/model", summary="The served model and the limits of a request")
    async def model() -> ModelCard:
        """The model's card."""
        return card

    return routes


def _model_card(backend: Backend) -> ModelCard:
    shared_fields = set(ModelCard.model_fields) & set(ServeConfig.model_fields)
    limits = backend.config.model_dump(include=shared_fields)
    return ModelCard(version=__version__, **asdict(backend.traits), **limits)
