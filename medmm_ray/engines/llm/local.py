"""A model in this process (vLLM) as an endpoint: the same requests and replies as of one behind an API."""

from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Sampling, TextGenerator
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply, ChatRequest
from medmm_ray.engines.llm.store import PricedAnswer

ROLES = {"user": "user", "model": "assistant"}


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
        """As `Client.ask`: there is nothing to pay, and nothing to store."""
        return PricedAnswer(await self.send(request), 0.0)


def prompt_of(request: ChatRequest) -> ChatPrompt:
    """A request as a chat; its images apart, in their order."""
    messages = [{"role": "system", "content": request.system}] if request.system else []
    messages += [{"role": ROLES[turn.role], "content": "\n".join(turn.texts)} for turn in request.turns]
    return ChatPrompt(messages, [image.image for image in request.images])
