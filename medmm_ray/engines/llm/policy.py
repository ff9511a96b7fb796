"""A policy behind an API, used like an engine: each sample is a request of its own, stored and paid for once.

Enters: what enters `generator.Generator`. Leaves: `Completion`s. Sample i is the request with ``seed + i``, which is
part of what its answer is kept under, so that a rerun finds it whether or not the API looks at seeds. The first goes
ahead of the others, so that they find their prompt in the provider's cache. An API knows no `top_k`.
"""

import asyncio
from dataclasses import replace

from medmm_ray.config import digest
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling, Statistics
from medmm_ray.engines.llm.client import Client, estimated_prompt_tokens
from medmm_ray.engines.llm.endpoint import ChatImage, ChatRequest, Turn
from medmm_ray.text.quality import NOT_HAD

ROLES = {"user": "user", "assistant": "model"}


class ApiPolicy:
    """A `TextGenerator` over a client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.statistics = Statistics()

    def count(self, prompt: ChatPrompt) -> int:
        """Tokens of a prompt, as far as they can be estimated here."""
        return estimated_prompt_tokens(request_of(prompt, Sampling()), self.client.price)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """`n` samples. One that is refused, or could not be had, is a completion too: the others are paid for.

        Raises `RowError` where the prompt itself is at fault (prompt_too_long).
        """
        request = request_of(prompt, sampling)
        group = digest(request.key(self.client.endpoint.identity))
        first = await self._sample(request, seed, group)  # the others find their prompt in the provider's cache
        further = await asyncio.gather(*(self._sample(request, seed + i, group) for i in range(1, n)))
        completions = [first, *further]
        self.statistics.add(completions)
        return completions

    async def _sample(self, request: ChatRequest, seed: int, group: str) -> Completion:
        """One sample; a refusal is one too."""
        try:
            answer = await self.client.ask(replace(request, seed=seed), group)
        except RowError as fault:
            if fault.kind == "refused":
                return Completion("", "refused", seed, cost=fault.cost)
            if fault.kind in NOT_HAD:
                return Completion("", fault.kind, seed, cost=fault.cost, fault=fault)
            raise
        reply = answer.reply
        finish = "length" if reply.cut_off else "stop"
        return Completion(
            reply.text,
            finish,
            seed,
            reply.completion_tokens,
            reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            cost=answer.cost,
            model=reply.model,
        )


def request_of(prompt: ChatPrompt, sampling: Sampling) -> ChatRequest:
    """A chat as a request without a seed; the images stand after the text of the user's last turn."""
    system_texts: list[str] = []
    turns: list[Turn] = []
    for message in prompt.messages:
        if message["role"] == "system":
            system_texts.append(message["content"])
        else:
            turns.append(Turn(ROLES[message["role"]], (message["content"],)))
    images = map(ChatImage, prompt.images)
    turns[-1] = replace(turns[-1], parts=(*turns[-1].parts, *images))
    if prompt.prefix:
        turns.append(Turn("model", (prompt.prefix,)))
    return ChatRequest(
        system="\n".join(system_texts),
        turns=tuple(turns),
        schema=sampling.schema,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )
