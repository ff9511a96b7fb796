"""Ranks the candidate solutions of a question."""

import logging
import time

from fastapi import APIRouter

from medmm_ray.service.backend import Backend
from medmm_ray.service.problems import Kind, problems
from medmm_ray.service.rerank import RerankAnswer, RerankRequest, rerank

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file


def router(backend: Backend) -> APIRouter:
    """`POST /v1/rerank`."""
    routes = APIRouter(tags=["scores"])

    @routes.post(
        "/v1/rerank",
        summary="Score every step of every solution and rank the solutions",
        responses=problems(Kind.TOO_LARGE, Kind.INVALID),
    )
    async def rerank_solutions(request: RerankRequest) -> RerankAnswer:
        """Each step of each solution gets a probability, each solution a rank, each decoding rule its answer."""
        started = time.perf_counter()
        scores = await backend.score_case(request)
        answer = rerank(request, scores, backend.model, backend.traits.warnings(request))
        num_failed = len(answer.solutions) - len(answer.ranking)
        seconds = time.perf_counter() - started
        logger.info(
            "rerank: %d solutions, %d failed, %s, %d warnings, %.3f s",
            len(scores),
            num_failed,
            answer.arm,
            len(answer.warnings),
            seconds,
        )
        return answer

    return routes
