"""Which machines the steps of a recipe take: what it says once, in its section `gpus`, for every step with GPUs."""

from typing import Any, TypeVar

from jobs.recipe import Recipe
from medmm_ray.config import Config
from medmm_ray.engines.placement import GpuPlacement

ConfigT = TypeVar("ConfigT", bound=Config)


def with_placement(recipe: Recipe) -> Recipe:
    """The recipe with what `gpus` sets in every section, and in its engine, that does not set it itself."""
    settings = {name: getattr(recipe.gpus, name) for name in recipe.gpus.model_fields_set}
    return _placed(recipe, settings) if settings else recipe


def _placed(config: ConfigT, settings: dict[str, Any]) -> ConfigT:
    changes: dict[str, Any] = {}
    if isinstance(config, GpuPlacement):
        changes = {name: value for name, value in settings.items() if name not in config.model_fields_set}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Config):
            changes[name] = _placed(section, settings)
    return config.model_copy(update=changes)
