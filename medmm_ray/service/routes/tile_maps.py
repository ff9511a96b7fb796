"""Shows where in the image the steps' scores come from."""

from typing import Annotated

from fastapi import APIRouter, Body

from medmm_ray.service import examples
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, Problem, problems
from medmm_ray.service.reading import ParsedRoute
from medmm_ray.service.tile_maps import MAX_SOLUTIONS, TileMapsAnswer, TileMapsRequest, tile_maps_answer


def router(models: Models) -> APIRouter:
    """`POST /v1/tile_maps`."""
    routes = APIRouter(tags=["scores"], route_class=ParsedRoute)

    @routes.post(
        "/v1/tile_maps",
        summary="What each part of the image adds to the score of each step",
        responses=problems(Kind.NOT_FOUND, Kind.TOO_LARGE, Kind.INVALID),
    )
    async def map_tiles(
        request: Annotated[TileMapsRequest, Body(openapi_examples=examples.TILE_MAPS)],
    ) -> TileMapsAnswer:
        """Each tile of the image is hidden in turn, and what the steps' log-odds lose is noted."""
        if len(request.solutions) > MAX_SOLUTIONS:
            detail = f"{len(request.solutions)} solutions; at most {MAX_SOLUTIONS} are mapped: send fewer"
            raise Problem(Kind.TOO_LARGE, detail)
        backend = await models.of(request.model, request.question)
        return tile_maps_answer(await backend.tile_maps(request), backend.model)

    return routes
