"""Solutions become step scores (for reranking) or text states (for training the image part).

Enters: solutions, one row a question, joined with their questions, images and evidence (`inputs`), and a reward model's
folder. Leaves: one row a question with the list of its `Scores` (one a solution and arm) or `States` (one a solution).
The text of a question is read once; all arms that share it add their image part to it. A vision-language model has no
such part: it reads a question once without an image and once for each that an arm shows; what it says without is the
text part, what the image changes of it the image part. What cannot be scored leaves as an entry with an error, never as
an exception.
"""

from typing import TYPE_CHECKING, Any

from medmm_ray.config import ConfigError
from medmm_ray.engines.placement import actor_placement
from medmm_ray.steps.score.actors import Scorer, StateExtractor
from medmm_ray.steps.score.config import ScoreConfig, ScoringConfig, StatesConfig
from medmm_ray.steps.score.joining import INPUT_SCHEMA, InputFiles, input_files, inputs
from medmm_ray.steps.score.loading import (
    check_image_input,
    engine_of,
    image_input_of,
    load,
    warn_of_other_inputs,
    with_trained_inputs,
)

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = [
    "INPUT_SCHEMA",
    "STATES_VERSION",
    "VERSION",
    "InputFiles",
    "ScoreConfig",
    "Scorer",
    "ScoringConfig",
    "StateExtractor",
    "StatesConfig",
    "check_image_input",
    "engine_of",
    "image_input_of",
    "input_files",
    "inputs",
    "load",
    "score",
    "states",
    "warn_of_other_inputs",
    "with_trained_inputs",
]

STATES_VERSION, VERSION = 2, 2  # of what a step makes: raise it when the same config makes something else


def score(ds: "Dataset", config: ScoreConfig, model_path: str, model_id: str) -> "Dataset":
    """Rows of `inputs` -> ``{question_id, scores: list<Scores>}``.

    `model_path` is a reward model's folder or URI; `model_id` (a fingerprint or content hash) goes into each entry.
    Raises `ConfigError` where an arm has images and the checkpoint reads none, or reads no reference images.
    """
    warn_of_other_inputs(config, model_path)
    config = with_trained_inputs(config, model_path)
    check_image_input(model_path, config)
    return _map(ds, Scorer, config, model_path, model_id)


def states(ds: "Dataset", config: StatesConfig, model_path: str, model_id: str) -> "Dataset":
    """Rows of `inputs` -> ``{question_id, states: list<States>}``.

    Raises `ConfigError` for a vision-language model: its states depend on the image, so they are no constants.
    """
    if image_input_of(model_path) == "language_model":
        raise ConfigError(
            f"{model_path} is a vision-language model: its states depend on the image, and no image part is trained on "
            "them; compute states of a text-only reward model"
        )
    warn_of_other_inputs(config, model_path)
    return _map(ds, StateExtractor, with_trained_inputs(config, model_path), model_path, model_id)


def _map(ds: "Dataset", actor: type, config: ScoringConfig, path: str, model_id: str) -> "Dataset":
    from ray.data import ActorPoolStrategy

    if config.engine == "vllm" and image_input_of(path) == "language_model":
        raise ConfigError(f"engine=vllm reads texts alone, and {path} is a vision-language model; take engine=torch")
    restarts: dict[str, Any] = {"max_restarts": config.max_restarts} if config.engine == "vllm" else {}
    return ds.map_batches(
        actor,
        fn_constructor_kwargs={"config": config, "model": path, "model_id": model_id},
        batch_format="pyarrow",
        batch_size=config.batch_size,
        compute=ActorPoolStrategy(min_size=1, initial_size=config.num_actors, max_size=config.num_actors),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        **actor_placement(config, config.num_gpus),
        **restarts,
    )
