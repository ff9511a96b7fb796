"""What every route works with: the model behind one function, what it can read, and the limits of a request."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from medmm_ray.data.tables import RowError
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.limits import check_size
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.rerank import ModelInput, ModelTraits, RerankRequest, StepLogOdds, to_model_input

Scorer = Callable[[ModelInput], Awaitable[Sequence[StepLogOdds]]]
"""From a request's model input to the log-odds of its solutions' steps, one entry a solution."""


@dataclass(frozen=True)
class Backend:
    """The served model as the routes see it."""

    score: Scorer
    config: ServeConfig
    traits: ModelTraits

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return str(self.config.model)

    async def score_case(self, case: RerankRequest) -> Sequence[StepLogOdds]:
        """The log-odds of a case's solutions, in order; what it must not hold is a `Problem` before any work."""
        # The cheapest checks come first: what they refuse has cost nothing yet.
        check_size(case, self.config)
        if case.image is not None and not self.traits.has_image_tower:
            raise Problem(Kind.INVALID, f"image: the model {self.model} has no image tower; leave the image out")
        try:
            # Decoding images takes a while: in a thread, so that other requests are read meanwhile.
            model_input = await asyncio.to_thread(to_model_input, case, self.config.max_image_pixels)
        except RowError as error:
            raise Problem.of_row(error) from error
        return await self.score(model_input)
