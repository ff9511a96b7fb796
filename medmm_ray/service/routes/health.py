"""Is the server up?"""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel


class Health(BaseModel):
    """The answer of a server that is up."""

    status: Literal["ok"] = "ok"


def router() -> APIRouter:
    """`GET /health`."""
    routes = APIRouter(tags=["state"])

    @routes.get("/health", summary="Is the server up? Needs no token.")
    async def health() -> Health:
        """The process answers; it says nothing of the model."""
        return Health()

    return routes
