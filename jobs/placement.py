"""Which machines a recipe's steps take, and how many: what its section `gpus` says once, for every step with GPUs."""

import sys
from typing import Any, TypeVar

from jobs.recipe import Recipe, judges
from medmm_ray.config import Config
from medmm_ray.engines.placement import ACCELERATOR, GpuPlacement

ConfigT = TypeVar("ConfigT", bound=Config)

# A pool's size, and the GPUs of one of its processes.
POOLS = (("num_actors", "num_gpus"), ("num_workers", "gpus_per_worker"))


def with_placement(recipe: Recipe) -> Recipe:
    """The recipe with what `gpus` sets in every section, and in its engine, that does not set it itself."""
    settings = {}
    for name in GpuPlacement.model_fields:
        if name in recipe.gpus.model_fields_set:
            settings[name] = getattr(recipe.gpus, name)
    placed = _placed(recipe, settings) if settings else recipe
    return placed if recipe.gpus.count is None else with_pool_sizes(placed, recipe.gpus.count)


def _placed(config: ConfigT, settings: dict[str, Any]) -> ConfigT:
    changes: dict[str, Any] = {}
    if isinstance(config, GpuPlacement):
        changes = {name: value for name, value in settings.items() if name not in config.model_fields_set}
    return config.model_copy(update=changes | {name: _placed(part, settings) for name, part in _parts(config)})


def with_pool_sizes(recipe: Recipe, num_gpus: float) -> Recipe:
    """The recipe with as many actors and workers as `num_gpus` have room for, where a pool with GPUs has no size."""
    sized = _sized(recipe, num_gpus)
    local_judges = {name: judge for name, judge in judges(recipe).items() if getattr(judge.engine, "num_gpus", 0)}
    if len(local_judges) > 1:  # both pools are there at a time
        shares = {name: _sized(judge, num_gpus / len(local_judges)) for name, judge in local_judges.items()}
        return sized.model_copy(update=shares)
    return sized


def _sized(config: ConfigT, num_gpus: float) -> ConfigT:
    changes: dict[str, Any] = {}
    for size, gpus_each in POOLS:
        if {size, gpus_each} <= type(config).model_fields.keys() and size not in config.model_fields_set:
            share = getattr(config, gpus_each)
            # A training never has fewer workers than it was told to.
            fewest = getattr(config, "min_workers", None) or 1
            if share:
                changes[size] = max(fewest, int(num_gpus // share))
    return config.model_copy(update=changes | {name: _sized(part, num_gpus) for name, part in _parts(config)})


def _parts(config: Config) -> list[tuple[str, Config]]:
    """The sections within a config."""
    parts = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Config):
            parts.append((name, section))
    return parts


def gpus_of_section(config: Config) -> float:
    """The GPUs that a section's pools take, those of its engine among them."""
    num_gpus = 0.0
    for size, gpus_each in POOLS:
        if {size, gpus_each} <= type(config).model_fields.keys():
            num_gpus += getattr(config, size) * getattr(config, gpus_each)
    return num_gpus + sum(gpus_of_section(part) for _, part in _parts(config))


def sized_by_cluster(recipe: Recipe) -> Recipe:
    """The recipe with pools as large as the cluster of the present Ray session, where it does not say `gpus.count`."""
    ray = sys.modules.get("ray")
    if recipe.gpus.count is not None or ray is None or not ray.is_initialized():
        return recipe
    num_gpus = gpus_of(ray.nodes(), recipe.gpus.accelerator_type)
    return with_pool_sizes(recipe, num_gpus) if num_gpus else recipe


def gpus_of(nodes: list[dict[str, Any]], accelerator_type: str | None) -> float:
    """The GPUs of machines that are there, of one kind where it is named; `nodes` as Ray lists them."""
    num_gpus = 0.0
    for node in nodes:
        kind = node.get("Labels", {}).get(ACCELERATOR)
        if node["Alive"] and accelerator_type in (None, kind):
            num_gpus += node["Resources"].get("GPU", 0)
    return num_gpus
