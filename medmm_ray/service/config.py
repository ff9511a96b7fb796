"""The settings of the served reward models."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, execution
from medmm_ray.service.load import Count, LoadConfig
from medmm_ray.service.policy import PolicyConfig
from medmm_ray.service.retrieval import RetrievalConfig


class ModelConfig(LoadConfig):
    """A reward model: which one, and on what."""

    model: str | None = execution(None)
    """Checkpoint that `RewardModel.from_pretrained` reads, such as <run>/two_tower, or a run, whose newest complete one
    is taken; required (in a recipe: the run's own by default)."""
    dtype: Literal["float32", "bfloat16", "float16"] = execution("float32")
    """Number format of the weights; bfloat16 on GPUs."""
    device: str = execution("cpu")
    """Torch device of each replica: cpu or cuda."""
    num_gpus: Annotated[float, Field(ge=0)] = execution(0.0)
    """GPUs per replica."""
    num_cpus: Annotated[float, Field(ge=0)] = execution(1.0)
    """CPUs per replica; Ray gives it as many OpenMP threads."""


class Canary(Config):
    """A model that is tried on some of the cases that ask for no model by its own name."""

    model: str
    """Its name among `models`."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the cases, 0 to 1."""


class ServeConfig(ModelConfig):
    """The served reward models, and what one request may hold. The first one is the service's own; it answers all that
    name no other."""

    served_model_name: str | None = execution(None)
    """Name that `GET /v1/models` and every answer state, and that a request may ask for; none: the checkpoint's."""
    models: dict[str, ModelConfig] = execution({})
    """Further models by name, each in a deployment of its own."""
    aliases: dict[str, str] = execution({})
    """Other names of models: {med-prm: med-prm-2026-11}; of the first model as it is named in `GET /v1/models`."""
    canary: Canary | None = execution(None)
    """A further model that gets some of the cases which name the first by an alias, or name none. A case (its question)
    always meets the same model, so that what is sent again or in parts is scored alike."""
    max_solutions: Count = execution(256)
    """Solutions in a request; more are answered with 413."""
    max_steps: Count = execution(64)
    """Steps in a solution; more are answered with 413."""
    max_documents: Annotated[int, Field(ge=0)] = execution(64)
    """Documents in a request; more are answered with 413."""
    max_reference_images: Annotated[int, Field(ge=0)] = execution(8)
    """Reference images in a request; more are answered with 413."""
    max_image_pixels: Count = execution(40_000_000)
    """Width x height of an image; more is answered with 413 before it is decoded. A mammogram has 27 million."""
    max_body_mb: Count = execution(64)
    """Size of a request in MiB; more is answered with 413."""
    host: str = execution("127.0.0.1")
    """Address to listen on; any other than loopback needs keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = execution(8000)
    """TCP port to listen on; 0 takes a free one."""
    retrieval: RetrievalConfig | None = execution(None)
    """The index that requests may ask for evidence from; none: there is none."""
    access: Literal["keys", "loopback"] = execution("keys")
    """Who is answered: who has a key, or, without any, whoever asks this machine's loopback address."""
    keys: str | None = execution(None)
    """File of keys (`python -m jobs.keys`), read again when it changes; every node must have it at this path."""
    token_env: str = execution("MEDMM_TOKEN")
    """Name of the environment variable that holds one key with every scope, beside those of the file."""
    policy: PolicyConfig = PolicyConfig()
    """What `POST /v1/best_of_n` samples from."""
    demo: bool = execution(True)
    """Whether `/demo` has the demo page; it needs no key itself, what it asks the service does."""

    @model_validator(mode="after")
    def _names_are_models(self) -> "ServeConfig":
        for name, further in self.models.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"models: {name!r} is no name; expected letters, digits, '.', '_' and '-'")
            if further.model is None:
                raise ValueError(f"models.{name}.model is not set; name a checkpoint")
        of_first = {self.served_model_name, self.model}
        for alias, target in self.aliases.items():
            if target not in self.models and target not in of_first and self.model is not None:
                served = ", ".join([self.served_model_name or str(self.model), *self.models])
                raise ValueError(
                    f"aliases: {alias!r} stands for {target!r}, which is no model; expected one of {served}"
                )
        if self.canary is not None and self.canary.model not in self.models:
            raise ValueError(f"canary: {self.canary.model!r} is not among models: {', '.join(self.models) or '-'}")
        return self
