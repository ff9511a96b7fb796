"""What `GET /v1/models` says of a served model."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """A served model as OpenAI's list has it (the first four fields), and what one request may hold."""

    id: str
    """Name by which requests ask for it."""
    aliases: list[str] = []
    """Its other names."""
    object: Literal["model"] = "model"
    created: int
    """When it was loaded, in seconds since 1970."""
    # OpenAI's clients refuse a card without it.
    owned_by: str = "medmm_ray"
    checkpoint: str
    fingerprint: str
    """Hash of what it was made from, or of its files' names and sizes."""
    version: str
    """Version of medmm_ray."""
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


class ModelList(BaseModel):
    """The served models, in OpenAI's shape."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
