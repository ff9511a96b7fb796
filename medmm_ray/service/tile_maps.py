"""`POST /v1/tile_maps`: where in the image each step's score comes from. Pure: the request and its answer."""

from collections.abc import Sequence

from medmm_ray.service.messages import Message
from medmm_ray.service.rerank import Case

MAX_SOLUTIONS = 8  # a map costs as many passes of the image tower as it has tiles


class TileMapsRequest(Case):
    """A question with its image, and the solutions whose steps are to be traced to the image."""


class SolutionMaps(Message):
    """The maps of one solution."""

    index: int
    """Position in the request, from 0."""
    maps: list[list[list[float]]]
    """A grid a step, rows from the top: log-odds that the step loses when the tile is hidden in the image's mean
    colour; positive where the tile speaks for the step. Empty where the solution could not be scored."""


class TileMapsAnswer(Message):
    """The maps of all solutions, in the request's order."""

    model: str
    solutions: list[SolutionMaps]


def tile_maps_answer(maps: Sequence[Sequence[list[list[float]]]], model: str) -> TileMapsAnswer:
    """The answer from the maps of each solution's steps."""
    solutions = [SolutionMaps(index=index, maps=list(of_steps)) for index, of_steps in enumerate(maps)]
    return TileMapsAnswer(model=model, solutions=solutions)
