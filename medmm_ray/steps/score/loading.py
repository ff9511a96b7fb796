"""The reward model of a step: what it can read, asked before it is loaded, and the model itself."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from medmm_ray.config import ConfigError
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.vllm_engine import EngineConfig, VllmEngine
from medmm_ray.steps.score.config import IMAGE_ARMS, IMAGES_OF_ARM, ScoreConfig, ScoringConfig, StatesConfig

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel


log = logging.getLogger(__name__)

NUM_DOCUMENTS = 32  # of a checkpoint that does not say what it was trained on: Med-PRM's own number
NUM_REFERENCES = 3
ConfigT = TypeVar("ConfigT", bound=ScoringConfig)


def with_trained_inputs(config: ConfigT, model: "str | RewardModel") -> ConfigT:
    """The config with as many documents and reference images as `model` was trained on, where the config names none."""
    trained = _trained_inputs(model)
    defaults = {"num_documents": NUM_DOCUMENTS}
    if isinstance(config, ScoreConfig):
        reads_own_images_alone = isinstance(model, str) and image_input_of(model) == "language_model"
        defaults["num_references"] = 0 if reads_own_images_alone else NUM_REFERENCES
    numbers: dict[str, int] = {}
    for name, default in defaults.items():
        if getattr(config, name) is None:
            number = trained.get(name)
            numbers[name] = default if number is None else number
    return config.model_copy(update=numbers)


def warn_of_other_inputs(config: ScoringConfig, path: str) -> None:
    """Log a warning for each number of the config that is not the one that the checkpoint was trained on."""
    for name, trained_on in _trained_inputs(path).items():
        number = getattr(config, name, None)
        if number is not None and trained_on is not None and number != trained_on:
            log.warning(
                "%s is %d, but %s was trained on %d; leave it out to read as many", name, number, path, trained_on
            )


def _trained_inputs(model: "str | RewardModel") -> Mapping[str, int | None]:
    if not isinstance(model, str):
        return asdict(model.trained_inputs)
    # Checkpoints of older versions do not say.
    numbers: Mapping[str, int | None] = _saved_config(model).get("trained_inputs", {})
    return numbers


def _saved_config(path: str) -> dict[str, Any]:
    """What a reward model of ours says of itself in its folder; nothing of any other checkpoint."""
    folder = Path(resolve(path))
    file = folder / "reward_model.json"
    if not file.is_file():
        return {}
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def image_input_of(path: str) -> Literal["tower", "language_model"] | None:
    """What reads a checkpoint's images: a tower, the language model, or nothing. Asked of a local checkpoint's small
    files, before anything is loaded."""
    if _saved_config(path).get("fusion") is not None:
        return "tower"
    config_file = Path(resolve(path)) / "config.json"
    if not config_file.is_file():
        return None
    config: dict[str, Any] = json.loads(config_file.read_text())
    architectures = config.get("architectures") or []
    # What Transformers calls the classes that take images beside a text.
    reads_images = any(name.endswith("ForConditionalGeneration") for name in architectures)
    return "language_model" if reads_images else None


def check_image_input(path: str, config: ScoreConfig) -> None:
    """Raise `ConfigError` where an arm gives the model what it cannot read: images, or reference images."""
    image_arms = [arm for arm in config.arms if arm in IMAGE_ARMS]
    image_input = image_input_of(path)
    if image_arms and image_input is None:
        raise ConfigError(
            f"score.arms has {', '.join(image_arms)}, but {path} has no image tower; "
            "name the folder of a two-tower checkpoint or of a vision-language model, or set score.arms=[text_only]"
        )
    uses_images = any(map(IMAGES_OF_ARM.get, config.arms))
    if image_input == "language_model" and config.num_references and uses_images:
        raise ConfigError(
            f"score.num_references is {config.num_references}, but {path} is a vision-language model, which reads a "
            "question's own images alone; set score.num_references=0"
        )


def load(model: str, config: ScoringConfig, images: bool = True) -> "RewardModel":
    """The reward model of a config: on its engine, on a GPU where the config asks for one.

    Without `images` a vLLM engine is spared the states for the image part, which is then left out.
    """
    from medmm_ray.reward_model import RewardModel

    loaded: RewardModel
    if config.engine == "vllm":
        from medmm_ray.reward_model.vllm import PooledRewardModel

        states = isinstance(config, StatesConfig) or (images and image_input_of(model) == "tower")
        settings = engine_of(config)
        loaded = PooledRewardModel.open(resolve(model), settings, states=states)
    else:
        device = "cuda" if config.num_gpus else "cpu"
        loaded = RewardModel.from_pretrained(resolve(model), dtype=config.dtype, device=device)
    # What the checkpoint was saved with holds unless the step says otherwise.
    if config.max_length is not None:
        loaded.max_length = config.max_length
    if config.reserve is not None:
        loaded.reserve = config.reserve
    return loaded


def engine_of(config: ScoringConfig) -> VllmEngine:
    """What of a step's settings its vLLM engine takes; without a length, any that the checkpoint reads."""
    settings = {name: getattr(config, name) for name in EngineConfig.model_fields}
    # `VllmEngine` has a field of its own for the length.
    arguments = dict(config.vllm)
    longest = arguments.pop("max_model_len", sys.maxsize)
    settings |= {
        "dtype": config.dtype,
        "max_model_len": longest,
        "vllm": arguments,
    }
    return VllmEngine(**settings)
