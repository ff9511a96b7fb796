"""How the actors of a step reach a model behind an API: a client each, one budget, the same stored answers.

Enters: an engine of kind gemini or openai, the model's name, what ``apis`` says of it. Leaves: an `Access`, which goes
to the actors.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.budget import Budget, start_budget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client
from medmm_ray.engines.llm.endpoint import Endpoint
from medmm_ray.engines.llm.gemini import gemini_endpoint
from medmm_ray.engines.llm.openai import OpenAIEndpoint
from medmm_ray.engines.llm.prices import Price, price_of
from medmm_ray.engines.llm.store import AnswerStore

GEMINI_ADDRESS = "https://generativelanguage.googleapis.com/v1beta/openai"  # of its OpenAI-compatible API


@dataclass(frozen=True)
class Access:
    """How every actor of a step reaches the model: through one budget, to the same stored answers in `folder`.

    Without a budget nothing is reserved, without a folder nothing is stored.
    """

    engine: ApiEngine
    model: str
    config: ApiConfig
    budget: Budget | None = None
    folder: str | None = None

    def connect(self) -> Client:
        """A client in the actor that calls this."""
        return connect(self.engine, self.model, self.config, self.budget, self.folder)


@dataclass(frozen=True)
class Apis:
    """The models behind APIs of a run: how each is reached and limited, by its name, and where it keeps the answers."""

    folder: str
    configs: Mapping[str, ApiConfig] = field(default_factory=dict)

    def config(self, model: str) -> ApiConfig:
        """What the run says of a model; the defaults where it says nothing."""
        return self.configs.get(model, ApiConfig())

    def open(self, engine: ApiEngine, model: str) -> Access:
        """Access to a model for all actors of a step, as `open_access`."""
        return open_access(engine, model, self.config(model), self.folder)


def open_access(engine: ApiEngine, model: str, config: ApiConfig, folder: str) -> Access:
    """Start the budget of the model, once for all actors; called in the driver, in a Ray session.

    `folder` is where the run keeps the answers of APIs. Raises `EndpointError` for a key that is not set, where the
    actors have this process's environment; on a cluster they may have one that is not set here.
    """
    # A client that is thrown away: a fault of the key shows before any actor starts.
    if not os.environ.get("RAY_ADDRESS"):
        connect(engine, model, config)
    folder = api_folder(folder, model)
    return Access(engine, model, config, start_budget(folder, config.limits), folder)


def connect(
    engine: ApiEngine, model: str, config: ApiConfig, budget: Budget | None = None, folder: str | None = None
) -> Client:
    """A client of a model behind an API; `folder` is the run's for this model, where its answers are stored."""
    check_tier(engine, config)
    endpoint = _gemini(engine, model, config) if engine.kind == "gemini" else _openai(engine, model, config)
    store = AnswerStore(f"{folder.rstrip('/')}/answers") if folder else None
    return Client(
        endpoint,
        configured_price(model, config),
        config,
        budget,
        store,
        config.answers_as or model,
        engine.reasoning_effort,
    )


def _gemini(engine: ApiEngine, model: str, config: ApiConfig) -> Endpoint:
    needs_rest = config.tier or engine.reasoning_effort  # the SDK has no fields for them
    return gemini_endpoint(
        model,
        "rest" if needs_rest else config.gemini_client,
        address=config.endpoint,
        key_variable=config.key_variable or "GEMINI_API_KEY",
        timeout_s=config.longest_s,
        in_flight=config.in_flight,
    )


def _openai(engine: ApiEngine, model: str, config: ApiConfig) -> Endpoint:
    return OpenAIEndpoint(
        model,
        address=config.endpoint,
        key_variable=config.key_variable or "OPENAI_API_KEY",
        timeout_s=config.longest_s,
        form=engine.form,
        length_field=config.length_field,
    )


def configured_price(model: str, config: ApiConfig) -> Price:
    """What a model costs today, at the standard tier: the table's price with the config's own in its place."""
    return price_of(model, config.input_price, config.output_price, config.cached_input_price, config.flex_price_share)


def check_tier(engine: ApiEngine, config: ApiConfig) -> None:
    """Raise `ConfigError` where a tier, or an effort, is set for a client that has no field for it."""
    if engine.kind != "gemini" or config.gemini_client != "sdk":
        return
    settings = {"tier": config.tier, "reasoning_effort": engine.reasoning_effort}
    unknown = " and ".join(f"{name}={value}" for name, value in settings.items() if value)
    if unknown:
        raise ConfigError(
            f"{unknown} does not go with gemini_client=sdk: google-generativeai has no field for it. Set "
            "gemini_client=rest, or the engine's kind=openai with the compatible address of the same models: "
            f"endpoint={GEMINI_ADDRESS} key_variable=GEMINI_API_KEY"
        )


def api_folder(folder: str, model: str) -> str:
    """Where, under `folder`, the answers of a model and the ledger of their cost lie."""
    return f"{folder.rstrip('/')}/{quote(model, safe='')}"
