"""The policy that `POST /v1/best_of_n` samples from: an engine of ours in a deployment, or a model behind an API.

Enters: a question with its documents and image. Leaves: `Completion`s of the prompt that the step `sample` sends. A
vLLM engine has a deployment of its own, so that policy and scorer grow apart; an API is asked from the replica.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from pydantic import Field

from medmm_ray.config import Config, execution
from medmm_ray.data.tables import RowError, follow
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.generator import Completion, Generator, Sampling, TextGenerator, policy_prompt
from medmm_ray.engines.images import MAX_PIXELS, decode_image
from medmm_ray.engines.llm.access import Access
from medmm_ray.engines.llm.client import ApiConfig
from medmm_ray.engines.llm.policy import ApiPolicy
from medmm_ray.engines.placement import actor_placement
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.service.handles import answer_of
from medmm_ray.steps.sample import PolicyApi

if TYPE_CHECKING:
    from ray import serve

Engine = Annotated[VllmEngine | PolicyApi, Field(discriminator="kind")]


class PolicyConfig(Config):
    """The policy beside the scorer; without a model there is none, and nothing is sampled."""

    model: str | None = execution(None)
    """Checkpoint of the policy, such as <run>/policy, or its name behind an API; null: none is served."""
    engine: Engine = execution(VllmEngine())
    """What runs it: kind vllm in a deployment of its own, or an API (openai, gemini)."""
    api: ApiConfig = execution(ApiConfig())
    """How a model behind an API is reached: `endpoint` names any server that speaks OpenAI's chat."""
    num_replicas: int = execution(1, ge=1)
    """Engines of kind vllm."""
    max_ongoing_requests: int = execution(32, ge=1)
    """Rounds that an engine samples at once."""
    num_documents: int = execution(0, ge=0)
    """Documents of a request that the policy reads too, those that fit."""


@dataclass(frozen=True)
class PolicyQuestion:
    """What the policy is asked; `image` is a file's bytes."""

    question: str
    options: tuple[str, ...] = ()
    answer_type: str = "choice"
    documents: tuple[str, ...] = ()
    image: bytes | None = field(default=None, repr=False)

    @property
    def row(self) -> dict[str, Any]:
        """As the step `sample` has a question."""
        return {
            "question": self.question,
            "options": list(self.options),
            "answer_type": self.answer_type,
            "documents": [{"text": text} for text in self.documents],
        }


class Policy(Protocol):
    """What writes solutions."""

    async def sample(self, question: PolicyQuestion, num: int, seed: int, sampling: Sampling) -> Sequence[Completion]:
        """`num` samples, the one at i with ``seed + i``. Raises `RowError` where the question cannot be asked."""


class GeneratorPolicy:
    """A policy on an engine in this process."""

    def __init__(self, generator: TextGenerator, config: PolicyConfig) -> None:
        self._generator = generator
        self._config = config

    async def sample(self, question: PolicyQuestion, num: int, seed: int, sampling: Sampling) -> Sequence[Completion]:
        """`num` samples; the prompt has the image where the engine reads any."""
        engine = self._config.engine
        images = []
        if question.image is not None and engine.num_images:
            images.append(await asyncio.to_thread(decode_image, question.image, "image", MAX_PIXELS))
        # An API's window is not known here; its setting is.
        if isinstance(engine, VllmEngine):
            room = engine.max_model_len - sampling.max_tokens
        else:
            room = engine.max_prompt_tokens
        prompt = policy_prompt(self._generator, question.row, self._config.num_documents, room, images)
        return await self._generator.generate(prompt, num, seed, sampling)


class PolicyReplica:
    """One replica of the policy: a vLLM engine."""

    def __init__(self, config: PolicyConfig) -> None:
        generator = Generator(str(config.model), cast(VllmEngine, config.engine))
        self._policy = GeneratorPolicy(generator, config)

    async def sample(
        self, question: PolicyQuestion, num: int, seed: int, sampling: Sampling
    ) -> Sequence[Completion] | RowError:
        """What `Policy.sample` gives; a fault of the question as a value, which Serve does not wrap."""
        try:
            return await self._policy.sample(question, num, seed, sampling)
        except RowError as error:
            return error


class DeployedPolicy:
    """A policy in a deployment of its own."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def sample(self, question: PolicyQuestion, num: int, seed: int, sampling: Sampling) -> Sequence[Completion]:
        """`num` samples; where the caller is cancelled, so is the engine's request."""
        samples = await answer_of(self._handle.sample.remote(question, num, seed, sampling))
        if isinstance(samples, RowError):
            raise samples
        return cast(Sequence[Completion], samples)


def policy_deployment(config: PolicyConfig) -> "serve.Application | None":
    """The deployment of a vLLM policy; None where there is no policy, or an API has it."""
    engine = config.engine
    if config.model is None or not isinstance(engine, VllmEngine):
        return None
    from ray import serve

    name = follow(config.model)
    # A replica may start in another folder, and later.
    named = config.model_copy(update={"model": name if "://" in name else resolve(name)})
    deployment = serve.deployment(
        name="Policy",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        ray_actor_options={
            "num_cpus": engine.num_cpus,
            "num_gpus": engine.num_gpus,
            **actor_placement(engine, engine.num_gpus),
        },
    )(PolicyReplica)
    return deployment.bind(named)


def connect_policy(config: PolicyConfig, handle: Any) -> Policy | None:
    """The policy as a replica of the scorer asks it; `handle` is that of `policy_deployment`."""
    if handle is not None:
        return DeployedPolicy(handle)
    if config.model is None:
        return None
    # No budget and no stored answers: those are a run's; limits of a key are the service's.
    assert not isinstance(config.engine, VllmEngine)
    client = Access(config.engine, config.model, config.api).connect()
    return GeneratorPolicy(ApiPolicy(client), config)
