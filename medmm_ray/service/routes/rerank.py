"""Ranks the candidate solutions of a question."""

from typing import Annotated

from fastapi import APIRouter, Body, Request
from pydantic import Discriminator, Tag

from medmm_ray.service import examples
from medmm_ray.service.bodies import tag, told_by
from medmm_ray.service.foreign import CohereAnswer, CohereRequest, cohere_answer
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, problems
from medmm_ray.service.reading import ParsedRoute
from medmm_ray.service.request_ids import request_id
from medmm_ray.service.rerank import RerankAnswer, RerankRequest

RerankBody = Annotated[
    Annotated[RerankRequest, Tag(tag(RerankRequest))] | Annotated[CohereRequest, Tag(tag(CohereRequest))],
    Discriminator(told_by({"query"}, CohereRequest, RerankRequest)),
]


def router(models: Models) -> APIRouter:
    """`POST /v1/rerank`."""
    routes = APIRouter(tags=["scores"], route_class=ParsedRoute)

    @routes.post(
        "/v1/rerank",
        summary="Score every step of every solution and rank the solutions",
        responses=problems(Kind.NOT_FOUND, Kind.TOO_LARGE, Kind.INVALID),
    )
    async def rerank_solutions(
        body: Annotated[RerankBody, Body(openapi_examples=examples.RERANK)], request: Request
    ) -> RerankAnswer | CohereAnswer:
        """Each step of each solution gets a probability, each solution a rank, each decoding rule its answer.

        A body with `query` is Cohere's and Jina's, and so is the answer: `documents` are the candidate solutions, and
        the relevance score is the aggregate of the steps' probabilities.
        """
        # One function scores both shapes: they cannot differ in more than their words.
        case = body.case() if isinstance(body, CohereRequest) else body
        backend = await models.of(case.model, case.question)
        answer = await backend.rerank(case)
        if isinstance(body, CohereRequest):
            return cohere_answer(body, answer, request_id(request.scope))
        return answer

    return routes
