"""Answers a question: samples solutions from the policy, ranks them, and stops when the answer stands."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import StreamingResponse

from medmm_ray.data.tables import RowError
from medmm_ray.service import examples
from medmm_ray.service.backend import Backend
from medmm_ray.service.best_of_n import BestOfNAnswer, BestOfNRequest, PolicyUnavailableError, Round, best_of_n
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, Problem, problems
from medmm_ray.service.reading import ParsedRoute

logger = logging.getLogger("ray.serve")  # the one that a replica writes to its log file

EVENT_STREAM = "text/event-stream"


def router(models: Models) -> APIRouter:
    """`POST /v1/best_of_n`; without a policy it answers 404."""
    routes = APIRouter(tags=["answers"], route_class=ParsedRoute)

    @routes.post(
        "/v1/best_of_n",
        summary="Sample solutions from the policy until the answer stands, and rank them",
        response_model=BestOfNAnswer,
        responses={
            200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
            **problems(Kind.NOT_FOUND, Kind.TOO_LARGE, Kind.INVALID, Kind.UNAVAILABLE),
        },
    )
    async def answer_question(
        request: Annotated[BestOfNRequest, Body(openapi_examples=examples.BEST_OF_N)], http: Request
    ) -> BestOfNAnswer | StreamingResponse:
        """With `stream` the answer is a stream of server-sent events: `round` after each round, with its samples, their
        scores and the choice so far; then `answer`; or `problem`, where something fails behind the first round."""
        events = _events(request, await models.of(request.model, request.question))
        if not request.stream:
            async for event in events:
                if isinstance(event, BestOfNAnswer):
                    return event
            raise AssertionError("best_of_n ends with an answer")
        # The first is waited for here, so that what is wrong with the request is an HTTP error.
        first = await anext(events)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy must not collect the events
        return StreamingResponse(_stream(first, events, http), media_type=EVENT_STREAM, headers=headers)

    return routes


async def _events(request: BestOfNRequest, backend: Backend) -> AsyncIterator[Round | BestOfNAnswer]:
    """The rounds and the answer; every fault is a `Problem`."""
    if backend.policy is None:
        detail = "no policy is served; set policy.model, or sample elsewhere and send the solutions to /v1/rerank"
        raise Problem(Kind.NOT_FOUND, detail)
    started = time.perf_counter()
    warnings = backend.traits.warnings(request)
    try:
        # Closed here where the client goes away, and with it the policy's request.
        async with aclosing(best_of_n(request, backend.policy, backend.score_case, backend.model, warnings)) as events:
            async for event in events:
                if isinstance(event, BestOfNAnswer):
                    _log(event, time.perf_counter() - started)
                yield event
    except RowError as error:
        raise Problem(Kind.INVALID, str(error)) from error
    except PolicyUnavailableError as error:
        raise Problem(Kind.UNAVAILABLE, str(error), retry_after_s=5) from error


def _log(answer: BestOfNAnswer, seconds: float) -> None:
    logger.info(
        "best_of_n: %d of %d samples, %s, %d rejected, %d completion tokens, %.3f s",
        answer.num_drawn,
        answer.num_samples,
        answer.stopped,
        sum(answer.rejected.values()),
        answer.cost.policy.completion_tokens,
        seconds,
    )


async def _stream(
    first: Round | BestOfNAnswer, events: AsyncIterator[Round | BestOfNAnswer], http: Request
) -> AsyncIterator[str]:
    """Events as text; a fault behind the first is one too, for the status is sent."""
    yield _event(first)
    try:
        async for event in events:
            yield _event(event)
    except Problem as problem:
        body = bytes(problem.response(http.scope).body).decode()
        yield f"event: problem\ndata: {body}\n\n"


def _event(event: Round | BestOfNAnswer) -> str:
    name = "round" if isinstance(event, Round) else "answer"
    return f"event: {name}\ndata: {event.model_dump_json()}\n\n"
