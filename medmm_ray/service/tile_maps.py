"""`POST /v1/tile_maps`: where in the image each step's score comes from. Pure: the request and its answer."""

from medmm_ray.service import backend
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


class StepAttention(Message):
    """Where one step's attention lies."""

    weights: list[list[float]]
    """Of the image's patches, rows from the top, the mean over the fusion's heads; they add up to 1."""
    share: float
    """What these patches have of the step's whole attention: the rest is on the image's pooled token, where the fusion
    reads that too, and on other images."""


class PatchAttention(Message):
    """Where the attention of all steps lies: what the fusion reads, which need not be what changes a score."""

    area: tuple[float, float, float, float]
    """Left, top, right and bottom of the grids, as shares of the image's width and height: the square that the image
    tower sees; outside 0 to 1 where it pads the image."""
    solutions: list[list[StepAttention]]
    """For each solution that of its steps, in the request's order."""


class TileMapsAnswer(Message):
    """The maps of all solutions, in the request's order."""

    model: str
    solutions: list[SolutionMaps]
    attention: PatchAttention | None
    """Null where the model reads each image as one pooled token: there is no attention over patches."""


def tile_maps_answer(maps: backend.TileMaps, model: str) -> TileMapsAnswer:
    """The answer from the maps of each solution's steps."""
    solutions = [SolutionMaps(index=index, maps=of_steps) for index, of_steps in enumerate(maps.solutions)]
    # A fusion of pooled tokens has none over patches.
    attention = None
    if maps.attention is not None:
        attention = PatchAttention(
            area=maps.attention.area,
            solutions=[list(map(_step_attention, of_steps)) for of_steps in maps.attention.solutions],
        )
    return TileMapsAnswer(model=model, solutions=solutions, attention=attention)


def _step_attention(step: backend.StepAttention) -> StepAttention:
    return StepAttention(weights=step.weights, share=step.share)
