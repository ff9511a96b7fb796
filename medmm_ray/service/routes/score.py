"""The probabilities of the steps of solutions."""

import time
from typing import Annotated

from fastapi import APIRouter, Body, Request
from pydantic import Discriminator, Tag

from medmm_ray.service import examples
from medmm_ray.service.backend import Backend, together
from medmm_ray.service.bodies import tag, told_by
from medmm_ray.service.foreign import PAIRS_OF_NAMES, VllmScoreAnswer, VllmScoreRequest, vllm_answer
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, problems
from medmm_ray.service.reading import ParsedRoute
from medmm_ray.service.request_ids import request_id
from medmm_ray.service.scores import ScoreAnswer, ScoreRequest, score_answer

# `documents` is a name of ours too, and never stands without one of the others in vLLM's body.
VLLM_NAMES = {name for pair in PAIRS_OF_NAMES for name in pair} - {"documents"}
ScoreBody = Annotated[
    Annotated[ScoreRequest, Tag(tag(ScoreRequest))] | Annotated[VllmScoreRequest, Tag(tag(VllmScoreRequest))],
    Discriminator(told_by(VLLM_NAMES, VllmScoreRequest, ScoreRequest)),
]


def router(models: Models) -> APIRouter:
    """`POST /v1/score`."""
    routes = APIRouter(tags=["scores"], route_class=ParsedRoute)

    @routes.post(
        "/v1/score",
        summary="Score every step of one or many solutions",
        responses=problems(Kind.NOT_FOUND, Kind.TOO_LARGE, Kind.INVALID),
    )
    async def score_solutions(
        body: Annotated[ScoreBody, Body(openapi_examples=examples.SCORE)], request: Request
    ) -> ScoreAnswer | VllmScoreAnswer:
        """Each step of each solution gets a probability, and its parts of text and images.

        A body with `text_1`, `queries` or `data_1` is vLLM's, and so is the answer: one score a solution, the aggregate
        of its steps' probabilities.
        """
        if isinstance(body, VllmScoreRequest):
            return await score_pairs(await models.of(body.model), body, request_id(request.scope))
        backend = await models.of(body.model, body.question)
        scored = await backend.score_case(body)
        return score_answer(body, scored, backend.model, backend.traits.warnings(body))

    return routes


async def score_pairs(backend: Backend, body: VllmScoreRequest, id_: str) -> VllmScoreAnswer:
    """vLLM's answer: the questions are scored together, so that they may share passes."""
    cases = body.cases()
    answers = await together([backend.rerank(case.request) for case in cases])
    return vllm_answer(cases, answers, id_, int(time.time()))
