"""The checkpoints that a recipe names, and what they stand for on the day of a run."""

from collections.abc import Iterable
from typing import Any, TypeVar

from jobs.recipe import Recipe
from medmm_ray.config import Config
from medmm_ray.data.tables import follow
from medmm_ray.engines.vllm_engine import VllmEngine

ConfigT = TypeVar("ConfigT", bound=Config)

SECTION_SETTINGS = ("base", "lora", "model", "text_model", "query_model", "traces", "reranker", "budget_model")
"""The settings of any section, or of its vLLM engine, that name a checkpoint or table of a run; of `models` every one
does."""


def with_followed_names(recipe: Recipe, asks_stores: bool = True) -> Recipe:
    """The recipe with the result itself in place of a run's name of it (`follow`), as fingerprints rest on it.

    Without `asks_stores` URIs stay as they are.
    """
    sections: dict[str, Config] = {}
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if isinstance(section, Config):
            settings = type(section).model_fields if name == "models" else SECTION_SETTINGS
            sections[name] = _followed(section, settings, asks_stores)
    return recipe.model_copy(update=sections)


def _followed(section: ConfigT, settings: Iterable[str], asks_stores: bool) -> ConfigT:
    results: dict[str, Any] = {}
    for setting in settings:
        name = getattr(section, setting, None)
        if name is None or ("://" in name and not asks_stores):
            continue
        result = follow(name)
        if result != name:
            results[setting] = result
    engine = getattr(section, "engine", None)
    if isinstance(engine, VllmEngine):
        results["engine"] = _followed(engine, SECTION_SETTINGS, asks_stores)
    return section.model_copy(update=results) if results else section
