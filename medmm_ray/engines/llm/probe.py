"""One small call to a model behind an API, before a run: whether it is there, who answers, and what to do where not.

Enters: how a section asks the model. Leaves: notes, or `ConfigError` with the words of the fault, which names the
models that the API lists where the requested one is not among them. The call is like those of the run: its temperature,
form, thoughts and tier and, where the run sends pictures, a picture; it is reserved in the run's budget, kept among the
run's answers, and paid once a day.
"""

import asyncio
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from PIL import Image

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import RowError, TableError
from medmm_ray.engines.llm import gemini, openai
from medmm_ray.engines.llm.access import api_folder, connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.endpoint import ChatImage, ChatRequest, EndpointError, Turn
from medmm_ray.engines.llm.prices import ENDING_DAYS
from medmm_ray.engines.llm.served import OtherModelError

ProbeError = ConfigError | TableError

KEYS: Mapping[str, str] = {"gemini": "GEMINI_API_KEY", "openai": "OPENAI_API_KEY"}
NAMED = 8  # models of a list that a message names
LIST_S = 30.0  # for a list of models, seconds
LONGEST_S = 120.0  # for the answer, at any tier
FLEX_ATTEMPTS = 3
_NAME_FAULT = re.compile(r"answered (401|403|404)\b")  # faults of the key, the model's name or the address
MAX_TOKENS = 1024  # thoughts count, and a model that thinks may refuse to answer in fewer
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
QUESTION = 'Can you be reached? Answer with one JSON object and nothing else: {"answer": "yes"}.'


@dataclass(frozen=True)
class ApiModel:
    """A model behind an API as a section asks it: with images (`sends_images`), for JSON (`wants_json`), or not."""

    engine: ApiEngine
    model: str
    config: ApiConfig
    temperature: float | None = 0.0
    sends_images: bool = False
    wants_json: bool = True

    @property
    def key_variable(self) -> str:
        """The environment variable that holds the key."""
        return self.config.key_variable or KEYS[self.engine.kind]

    @property
    def list_url(self) -> str:
        """Where the API lists its models."""
        if self.engine.kind == "gemini":
            address = self.config.endpoint or gemini.ADDRESS
            return f"{address.rstrip('/')}/v1beta/models?pageSize=1000"
        chat_url = urlsplit(openai.chat_url(self.config.endpoint or openai.ADDRESS))
        path = chat_url.path.removesuffix("/chat/completions") + "/models"
        return urlunsplit(chat_url._replace(path=path))

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries the key."""
        key = os.environ.get(self.key_variable, "")
        if self.engine.kind == "gemini":
            return {"x-goog-api-key": key}
        return openai.key_header(self.list_url, key)

    @property
    def address(self) -> str:
        """The API's, for people: without a query, in which a key may stand."""
        return urlunsplit(urlsplit(self.list_url)._replace(query="")).removesuffix("/models")


def request_of(model: ApiModel) -> ChatRequest:
    """The small request."""
    parts: tuple[str | ChatImage, ...] = (QUESTION,)
    if model.sends_images:
        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        parts = (ChatImage(grey), QUESTION)
    return ChatRequest(
        system="",
        turns=(Turn("user", parts),),
        schema=SCHEMA if model.wants_json else None,
        max_tokens=MAX_TOKENS,
        temperature=model.temperature,
        reasoning_effort=model.engine.reasoning_effort,
    )


async def probe(target: ApiModel, folder: str, day: date) -> list[str]:
    """Ask a model once a `day`; `folder` is where the run keeps its APIs' answers. Gives warnings about it.

    Raises `ConfigError` with the fault and what to do.
    """
    folder = api_folder(folder, target.model)
    config = _with_probe_timeouts(target.config)
    client = connect(target.engine, target.model, config, folder=folder)
    assert client.answers is not None
    request, group = request_of(target), f"preflight {day}"
    # The budget is opened only where there is something to pay: it takes the ledger over from a run under way.
    if await client.answers.find(group, request.key(client.endpoint.identity)) is None:
        budget = ApiBudget(folder, config.limits)
        client = connect(target.engine, target.model, config, budget, folder)
    try:
        answer = await client.ask(request, group)
    except OtherModelError:
        raise
    except EndpointError as error:
        explained = await _explained(target, str(error)) if _NAME_FAULT.search(str(error)) else str(error)
        raise ConfigError(explained) from None
    except RowError as fault:
        if fault.kind == "refused":  # who refuses has been reached
            return []
        if fault.kind == "unavailable" and target.config.tier:
            tier = target.config.tier
            return [f"{target.model} did not answer at the tier {tier}, which is served where there is room: {fault}"]
        raise ConfigError(f"{target.model} could not answer a small request: {fault}") from None
    if answer.reply.model is None:
        return [f"{target.model}: {target.address} does not say which model answers; a change would not be noticed"]
    return await _shutdown_warnings(target, day)


def _with_probe_timeouts(config: ApiConfig) -> ApiConfig:
    """A model's settings, with waits and attempts that suit a probe."""
    waits: dict[str, float] = {"timeout_s": min(config.longest_s, LONGEST_S)}
    if config.tier:  # it may have no room for hours, which is no fault
        waits["max_attempts"] = min(config.max_attempts, FLEX_ATTEMPTS)
    return config.model_copy(update=waits)


async def _explained(target: ApiModel, fault: str) -> str:
    """A fault with what the API's list of models says about it."""
    try:
        listed = await listed_models(target)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        what = f"{type(error).__name__} {error}".strip()
        return (
            f"{fault}. Its models could not be listed at {target.address} either ({what[:120]}): check the key "
            f"({target.key_variable}) and the address (endpoint; OpenAI-compatible ones mostly end with /v1)"
        )
    if target.model in listed:
        return f"{fault}. The API lists the model, so that the key ({target.key_variable}) has no access to it"
    return f"{fault}. The API does not list it; it lists {nearest(target.model, listed)}"


def nearest(model: str, listed: Mapping[str, Any]) -> str:
    """The names that are most like a model's, in words."""
    names = difflib.get_close_matches(model, listed, n=NAMED, cutoff=0.0)
    num_further = len(listed) - len(names)
    text = ", ".join(names) or "no model"
    return f"{text} and {num_further} more" if num_further > 0 else text


async def _shutdown_warnings(target: ApiModel, day: date) -> list[str]:
    """What the API's list says of the model's end, as OpenAI's does; nothing where there is no such list."""
    try:
        ends = (await listed_models(target)).get(target.model)
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return []
    if ends is None or (ends - day).days > ENDING_DAYS:
        return []
    return [f"{target.model}: {target.address} is to shut it down on {ends}"]


async def listed_models(target: ApiModel) -> dict[str, date | None]:
    """The models that an API lists, each with the day of its end where one is stated.

    Raises aiohttp.ClientError or TimeoutError where there is no answer, ValueError where it is no list.
    """
    timeout = aiohttp.ClientTimeout(total=LIST_S)
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
        session.get(target.list_url, headers=target.headers, raise_for_status=True) as answer,
    ):
        body = await answer.json(content_type=None)
    entries = body.get("data", body.get("models")) if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it is no list of models")
    models = {}
    for entry in entries:
        name = (entry.get("id") or entry.get("name")) if isinstance(entry, dict) else None
        if isinstance(name, str):
            models[name.removeprefix("models/")] = _day(entry.get("shutdown_date"))
    return models


def _day(stated: Any) -> date | None:
    try:
        return date.fromisoformat(stated) if isinstance(stated, str) else None
    except ValueError:
        return None


async def probe_all(models: Sequence[ApiModel], folder: str, day: date) -> list[list[str] | ProbeError]:
    """Each model's warnings, or its error; models are probed side by side, one that is reached in two ways in turn."""
    outcomes: list[list[str] | ProbeError] = [[] for _ in models]

    async def probe_in_turn(name: str) -> None:  # a model has one ledger, and one budget may keep it
        for place, model in enumerate(models):
            if model.model == name:
                try:
                    outcomes[place] = await probe(model, folder, day)
                except (ConfigError, TableError) as fault:
                    outcomes[place] = fault

    names = {model.model for model in models}
    await asyncio.gather(*map(probe_in_turn, names))
    return outcomes
