"""Rewards for reinforcement learning."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body
from pydantic import Discriminator, Tag

from medmm_ray.service import examples
from medmm_ray.service.backend import Backend, together
from medmm_ray.service.bodies import tag, told_by
from medmm_ray.service.foreign import total_usage
from medmm_ray.service.models import Models
from medmm_ray.service.openrlhf import OpenRlhfAnswer, OpenRlhfRequest, openrlhf_answer
from medmm_ray.service.problems import Kind, Problem, problems
from medmm_ray.service.reading import ParsedRoute
from medmm_ray.service.rerank import Scored
from medmm_ray.service.rewards import PromptCompletions, Reward, RewardsAnswer, RewardsRequest, rewards_of

RewardsBody = Annotated[
    Annotated[RewardsRequest, Tag(tag(RewardsRequest))] | Annotated[OpenRlhfRequest, Tag(tag(OpenRlhfRequest))],
    Discriminator(told_by({"query"}, OpenRlhfRequest, RewardsRequest)),
]


def router(models: Models) -> APIRouter:
    """`POST /v1/rewards`."""
    routes = APIRouter(tags=["scores"], route_class=ParsedRoute)

    @routes.post(
        "/v1/rewards",
        summary="Reward the completions of prompts, for reinforcement learning",
        responses=problems(Kind.NOT_FOUND, Kind.TOO_LARGE, Kind.INVALID),
    )
    async def reward_completions(
        body: Annotated[RewardsBody, Body(openapi_examples=examples.REWARDS)],
    ) -> RewardsAnswer | OpenRlhfAnswer:
        """One number a completion, and each step's part of it: PURE's min-form of the steps' probabilities, whether the
        answer is right, and a punishment of length.

        A body with `query` is OpenRLHF's, and so is the answer.
        """
        if isinstance(body, OpenRlhfRequest):
            answer = await reward(models, body.rewards_request())
            return openrlhf_answer(answer.rewards)
        return await reward(models, body)

    return routes


async def reward(models: Models, request: RewardsRequest) -> RewardsAnswer:
    """The rewards of all prompts' completions; the prompts are scored together, so that they may share passes.

    One model gives them all, and no canary: a training has one reward.
    """
    names = {prompt.model for prompt in request.prompts}
    if len(names) > 1:
        raise Problem(Kind.INVALID, f"prompts ask for {len(names)} models; expected one for a batch: split it")
    backend = await models.of(names.pop())
    all_scored = await together([_score(backend, prompt) for prompt in request.prompts])
    rewards: list[Reward] = []
    warnings: set[str] = set()
    usages = []
    for number, (prompt, scored) in enumerate(zip(request.prompts, all_scored, strict=True)):
        rewards += await asyncio.to_thread(rewards_of, number, prompt, scored, request.terms)
        # A set: a batch has one data set's prompts, which are warned of in the same words.
        warnings.update(backend.traits.warnings(prompt))
        if scored is not None:
            usages.append(scored.usage)
    return RewardsAnswer(
        model=backend.model,
        rewards=rewards,
        warnings=sorted(warnings),
        usage=total_usage(usages),
    )


async def _score(backend: Backend, prompt: PromptCompletions) -> Scored | None:
    """The scores of the completions that have a text; None where none has."""
    case = prompt.case()
    return None if case is None else await backend.score_case(case)
