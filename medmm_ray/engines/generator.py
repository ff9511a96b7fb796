"""Text generation by vLLM: one engine in the actor that asks, its prefix cache shared by all samples of a question.

Enters: a chat with its images, how many samples, a seed. Leaves: `Completion`s. The engine (and torch, transformers) is
imported in the constructor. Sample i of a request has the seed ``seed + i`` and, on a CPU, is the same whatever else is
in the batch; a GPU gives that promise with `batch_invariant` alone.
"""

import asyncio
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from medmm_ray.config import digest
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import Chat, ChatPrompt
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.vllm_engine import (
    VllmEngine,
    check_free_memory,
    check_model,
    check_weights,
    engine_arguments,
    engine_died,
    environment,
)
from medmm_ray.prompts import policy_messages
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image

SEED_BITS = 12  # of a request's seed, lowest: cleared for its samples
MAX_SAMPLES = 1 << SEED_BITS  # of a question: sample i has the request's seed + i


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy, `top_k` 0 takes all tokens; an API's model may have its own (None).

    `stop` are texts that end a sample (the text keeps them); `pattern` is a regular expression, or `schema` a JSON
    schema, that the engine must obey.
    """

    temperature: float | None = 0.7
    top_k: int = 50
    top_p: float | None = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    pattern: str | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """One sample. `finish_reason` is stop (the model ended it, or a text of `Sampling.stop`), length (cut) or refused.

    One that could not be had has its `fault`, whose kind is its `finish_reason`. `cost` is in US dollars. Of its
    prompt, `shareable_tokens` lie in whole cache blocks, so that a further sample finds them in the prefix cache;
    `cached_tokens` were there: which of a request's samples they belong to is not known, their sum is right. `model` is
    the one that answered, as its API names it.
    """

    text: str
    finish_reason: str
    seed: int
    num_tokens: int = 0
    prompt_tokens: int = 0
    shareable_tokens: int = 0
    cached_tokens: int = field(default=0, compare=False)
    cost: float = 0.0
    model: str | None = None
    fault: RowError | None = field(default=None, compare=False)


@dataclass
class Statistics:
    """Tokens so far: of prompts, of these in the prefix cache, and generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were in the prefix cache; 0 without any."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, samples: Sequence[Completion]) -> None:
        """Count the tokens of a request's samples."""
        for sample in samples:
            self.prompt_tokens += sample.prompt_tokens
            self.cached_tokens += sample.cached_tokens
            self.output_tokens += sample.num_tokens


class TextGenerator(Protocol):
    """What a step needs of an engine; a fake of it makes a step's unit test whole."""

    statistics: Statistics

    def count(self, prompt: ChatPrompt) -> int:
        """Tokens of a prompt."""
        ...

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """`n` samples of one prompt, sample i with ``seed + i``."""
        ...


class MakeGenerator(Protocol):
    """The constructor of a `TextGenerator`: model path or name, engine settings."""

    def __call__(self, model: str, config: VllmEngine, /) -> TextGenerator: ...


class Generator:
    """A vLLM engine over one model (any name that `checkpoints.resolve` takes, with weights in Hugging Face's form)."""

    def __init__(self, model: str, config: VllmEngine) -> None:
        model = resolve(model)
        check_model(model)
        check_free_memory(model, config)
        lora = None if config.lora is None else resolve(config.lora)
        check_weights(model, config.vllm, lora)
        # Before the import, which already sets up logging by them.
        os.environ.update(environment(config))
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self.statistics = Statistics()
        self._max_model_len = config.max_model_len
        self._chat = Chat(model)
        self._cache_hits = CacheHits()
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_arguments(model, config, lora)), stat_loggers=[_listener(self._cache_hits)]
        )
        self._block_tokens: int = self._engine.vllm_config.cache_config.block_size
        self._lora = None if lora is None else LoRARequest("policy", 1, lora)
        self._request_ids = itertools.count()

    def count(self, prompt: ChatPrompt) -> int:
        """Tokens of a prompt, those of its images among them."""
        return self._chat.count(prompt)

    def token_ids(self, prompt: ChatPrompt) -> list[int]:
        """Token ids of the chat with the assistant's turn opened, and of the prompt's prefix in it."""
        return self._chat.token_ids(prompt)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """`n` samples of one prompt, sample i generated with ``seed + i``; they continue its prefix.

        Raises `RowError` prompt_too_long where prompt and `max_tokens` exceed the model's length. A dead engine ends an
        actor's process, so that Ray starts a new one and gives it the work again; elsewhere it is a `GeneratorError`.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        ids = self.token_ids(prompt)
        length = len(ids) + self._chat.image_tokens(prompt.images)
        if length + sampling.max_tokens > self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"{length} prompt tokens + max_tokens {sampling.max_tokens} exceed max_model_len "
                f"{self._max_model_len}; raise it, or put fewer documents in the prompt",
            )
        parameters = SamplingParams(
            n=n,
            seed=seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else the last output lacks most of the n samples
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            structured_outputs=_structured_outputs(sampling),
        )
        # Token ids, not text: vLLM must not add another BOS.
        tokens_prompt = TokensPrompt(prompt_token_ids=ids)
        if prompt.images:
            tokens_prompt["multi_modal_data"] = {"image": list(prompt.images)}
        request_id = f"request-{next(self._request_ids)}"
        outputs: list[Any] = []
        with self._cache_hits.of_request(request_id, n) as cached_tokens:
            try:
                generated = self._engine.generate(tokens_prompt, parameters, request_id, lora_request=self._lora)
                async for output in generated:
                    outputs += output.outputs
            except EngineDeadError as error:
                engine_died(error)
            cached = await cached_tokens
        shareable = (length - 1) // self._block_tokens * self._block_tokens  # the last token is always computed
        # In the order of the seeds.
        outputs.sort(key=lambda output: output.index)
        completions: list[Completion] = []
        for output, num_cached in zip(outputs, cached, strict=True):
            completions.append(
                Completion(
                    text=output.text,
                    finish_reason=output.finish_reason,
                    seed=seed + output.index,
                    num_tokens=len(output.token_ids),
                    prompt_tokens=length,
                    shareable_tokens=shareable,
                    cached_tokens=num_cached,
                )
            )
        self.statistics.add(completions)
        return completions

    def shutdown(self) -> None:
        """Stop the engine's processes (an actor's end does it too)."""
        self._engine.shutdown()


def request_seed(*parts: object) -> int:
    """40 bits of a hash of `parts`, the lowest cleared for the samples of the request (`MAX_SAMPLES`)."""
    return int(digest(*parts)[:10], 16) >> SEED_BITS << SEED_BITS


def policy_prompt(
    generator: TextGenerator,
    question: Mapping[str, Any],
    num_documents: int,
    max_tokens: int,
    images: Sequence["Image"] = (),
) -> ChatPrompt:
    """The policy's prompt for a question row: at most `max_tokens` long, with the first documents that fit.

    A document that is too long is skipped, and not those after it.
    """

    def prompt_with(documents: Sequence[str]) -> ChatPrompt:
        text = question_with_options(question["question"], question["options"])
        messages = policy_messages(text, documents, question["answer_type"])
        return ChatPrompt(messages, images, num_documents=len(documents))

    documents = [document["text"] for document in candidate_documents(question, num_documents)]
    if not documents or generator.count(prompt_with(documents)) <= max_tokens:  # mostly all fit, and one count says so
        return prompt_with(documents)
    fitting: list[str] = []
    for document in documents:
        if generator.count(prompt_with([*fitting, document])) <= max_tokens:
            fitting.append(document)
    return prompt_with(fitting)


def candidate_documents(question: Mapping[str, Any], num_documents: int) -> Sequence[Mapping[str, Any]]:
    """The retrieved documents of a question row that its prompt should hold, best first."""
    return (question.get("documents") or [])[:num_documents]


def _structured_outputs(sampling: Sampling) -> Any:
    """vLLM's form of `pattern` or `schema`; None without either."""
    from vllm.sampling_params import StructuredOutputsParams

    if sampling.pattern is None and sampling.schema is None:
        return None
    schema = None if sampling.schema is None else dict(sampling.schema)
    return StructuredOutputsParams(regex=sampling.pattern, json=schema)


@dataclass
class _RequestHits:
    """Cached tokens of the samples of one request that ended so far; `complete` has them once all `num_samples` did."""

    num_samples: int
    complete: asyncio.Future[list[int]]
    cached_tokens: list[int] = field(default_factory=list)


class CacheHits:
    """Prompt tokens of a request's samples that were in the prefix cache, which vLLM reports when each sample ends."""

    def __init__(self) -> None:
        self._requests: dict[str, _RequestHits] = {}

    @contextmanager
    def of_request(self, request_id: str, num_samples: int) -> Iterator[asyncio.Future[list[int]]]:
        """What will have been cached for a request, one number a sample, in the order in which they ended."""
        request = _RequestHits(num_samples, asyncio.get_running_loop().create_future())
        self._requests[request_id] = request
        try:
            yield request.complete
        finally:
            del self._requests[request_id]

    def note_finished(self, request_id: str, cached_tokens: int) -> None:
        """Take the report of a sample that ended."""
        request = self._requests.get(request_id)
        if request is None:  # it failed meanwhile
            return
        request.cached_tokens.append(cached_tokens)
        if len(request.cached_tokens) == request.num_samples:
            request.complete.set_result(request.cached_tokens)


def _listener(cache_hits: CacheHits) -> Any:
    """A factory of a vLLM statistics listener that reports each sample that ended to `cache_hits`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Listener(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, _: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if iteration_stats is not None:
                for request in iteration_stats.finished_requests:
                    cache_hits.note_finished(request.request_id, request.num_cached_tokens)

        def log_engine_initialized(self) -> None:
            pass

    return Listener
