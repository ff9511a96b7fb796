"""A model in this process (vLLM) as an endpoint: the same requests and replies as of one behind an API."""

from typing import Any

from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Sampling, TextGenerator
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatImage, ChatReply, ChatRequest, Turn
from medmm_ray.engines.llm.store import PricedAnswer


class LocalEndpoint:
    """`identity` names the checkpoint."""

    def __init__(self, generator: TextGenerator, identity: str) -> None:
        self.generator, self.identity = generator, identity

    async def send(self, request: ChatRequest) -> ChatReply:
        """Raises `RowError` prompt_too_long; a dead engine ends the process (`Generator.generate`)."""
        prompt = prompt_of(request)
        sampling = Sampling(
            temperature=0.0 if request.temperature is None else request.temperature,
            top_k=0,
            top_p=1.0 if request.top_p is None else request.top_p,
            max_tokens=request.max_tokens,
            pattern=request.pattern,
            schema=request.schema,
        )
        samples = await self.generator.generate(prompt, request.n, request.seed or 0, sampling)
        return ChatReply(
            choices=tuple(ChatChoice(sample.text, sample.finish_reason) for sample in samples),
            prompt_tokens=self.generator.count(prompt),
            cached_tokens=0,
            completion_tokens=sum(sample.num_tokens for sample in samples),
        )

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:  # noqa: ARG002
        """As a `Client` does: there is nothing to pay, and nothing to keep."""
        return PricedAnswer(await self.send(request), 0.0)


def prompt_of(request: ChatRequest) -> ChatPrompt:
    """A request as a chat; its pictures apart, in their order."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    messages = [{"role": _role(turn), "content": _text(turn.parts)} for turn in request.turns]
    return ChatPrompt([*system, *messages], [picture.image for picture in request.images])


def _role(turn: Turn) -> str:
    return "assistant" if turn.role == "model" else "user"


def _text(parts: tuple[Any, ...]) -> str:
    return "\n".join(part for part in parts if not isinstance(part, ChatImage))
