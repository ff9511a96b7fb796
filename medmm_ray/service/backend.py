"""What every route works with: the model behind one function, what it can read, and the limits of a request."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

from medmm_ray.data.tables import RowError
from medmm_ray.service.audit import tally
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.limits import check_size
from medmm_ray.service.metrics import ServiceMetrics
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.readiness import Readiness, Scorer
from medmm_ray.service.rerank import Case, ModelTraits, RerankAnswer, RerankRequest, Scored, rerank, to_model_input

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """The served model as the routes see it; `fingerprint` names its weights."""

    score: Scorer
    config: ServeConfig
    traits: ModelTraits
    readiness: Readiness
    fingerprint: str = ""
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return self.config.served_model_name or str(self.config.model)

    def check_model(self, name: str | None) -> None:
        """Refuse with 404 a request for another model than the one that is here."""
        # Clients of other servers must name one: the folder's last part is what people take.
        if name not in (None, "", self.model, PurePath(self.model).name):
            raise Problem(Kind.NOT_FOUND, f"model {name!r} is not served here; served: {self.model}")

    async def score_case(self, case: Case) -> Scored:
        """The log-odds of a case's solutions, in order; what it must not hold is a `Problem` before any work."""
        self.check_model(case.model)
        # The cheapest checks come first: what they refuse has cost nothing yet.
        check_size(case, self.config)
        if case.image is not None and not self.traits.has_image_tower:
            raise Problem(Kind.INVALID, f"image: the model {self.model} has no image tower; leave the image out")
        try:
            # Decoding images takes a while: in a thread, so that other requests are read meanwhile.
            model_input = await asyncio.to_thread(to_model_input, case, self.config.max_image_pixels)
        except RowError as error:
            kind = Kind.TOO_LARGE if error.kind.endswith("_too_large") else Kind.INVALID
            raise Problem(kind, str(error)) from error
        scored = await self.score(model_input)
        self.metrics.add_scores(scored)
        tally().add(model_input, scored)
        return scored

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """The answer to a rerank request."""
        scored = await self.score_case(request)
        # In a thread: finding the answers in long texts takes a while too.
        return await asyncio.to_thread(rerank, request, scored, self.model, self.traits.warnings(request))


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all parts, run at once; where one raises the others are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        # Of a finished task this does nothing; a task group would hide the problem in a group of them.
        for task in tasks:
            task.cancel()
