"""Several models behind one address: which of them a case meets, and how one in another deployment is asked.

A replica of the service holds the first model itself, so that its requests make no second hop. Each further one has
replicas of its own (`ModelReplica`), which the service's replicas ask.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from medmm_ray.service.admission import seconds_left, time_left
from medmm_ray.service.backend import Backend, TileMaps
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.handles import answer_of
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.replica import Load, ReplicaScorer
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored


def model_of(config: ServeConfig, first: str, name: str | None, question: str | None) -> str | None:
    """The name of the further model that a case meets; None: the first, which is called `first`.

    Without its question a case is no canary's. Raises `Problem` (404) for a name that is not served.
    """
    named = config.aliases.get(name or "", name)
    if named in config.models:
        return named
    # Clients of other servers must name one: the folder's last part is what people take.
    if name in (first, PurePath(first).name):
        return None
    if name and name not in config.aliases:
        served = ", ".join([first, *config.models, *config.aliases])
        raise Problem(Kind.NOT_FOUND, f"model {name!r} is not served here; served: {served}")
    if config.canary is None or question is None or _draw(question) >= config.canary.share:
        return None
    return config.canary.model


def _draw(question: str) -> float:
    """A number from 0 to 1 that stands for the question."""
    # Not Python's hash, which each process salts: all replicas must choose alike.
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Description:
    """What the service's replicas must know of a model that another deployment holds."""

    traits: ModelTraits
    fingerprint: str
    takes_references: bool
    maps_tiles: bool


def without_references(config: ServeConfig) -> ServeConfig:
    """The settings of a model that knows a question's own images alone."""
    return config.model_copy(update={"max_reference_images": 0})


@dataclass(frozen=True)
class Refusal:
    """A `Problem` on its way from one replica to another: Serve would wrap an exception."""

    kind: Kind
    detail: str
    retry_after: str | None

    @classmethod
    def of(cls, problem: Problem) -> "Refusal":
        """That of a problem."""
        return cls(problem.kind, problem.detail, (problem.headers or {}).get("Retry-After"))

    def problem(self) -> Problem:
        """The problem again."""
        headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
        return Problem(self.kind, self.detail, headers=headers)


class LoadReports:
    """What Serve asks of a replica that scores."""

    def __init__(self, scorer: ReplicaScorer) -> None:
        self._scorer = scorer

    def check_health(self) -> None:
        """Serve's question whether the replica works: one that hangs is replaced."""
        if hanging := self._scorer.stuck():
            raise RuntimeError(hanging)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling is told of this replica."""
        return self._scorer.stats()


class ModelReplica(LoadReports):
    """A replica of a further model."""

    def __init__(self, config: ModelConfig, load: Load) -> None:
        self._model = load(config)
        super().__init__(self._model.scorer)

    async def describe(self) -> Description:
        """What the model is."""
        model = self._model
        return Description(model.traits, model.fingerprint, model.takes_references, model.map_tiles is not None)

    async def score(self, case: ModelInput, within_s: float | None) -> Scored | Refusal:
        """The log-odds of a case's solutions, or why there are none."""
        # The deadline came along as seconds: clocks of machines differ.
        try:
            with time_left(within_s):
                return await self._model.scorer.score(case)
        except Problem as problem:
            return Refusal.of(problem)

    async def map_tiles(self, case: ModelInput, within_s: float | None) -> TileMaps | Refusal:
        """The maps of a case's solutions, or why there are none."""
        assert self._model.map_tiles is not None
        try:
            with time_left(within_s):
                return await self._model.map_tiles(case)
        except Problem as problem:
            return Refusal.of(problem)


class FurtherModel:
    """A model of another deployment, as a replica of the service asks it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        # Requests that come together shall ask for the description once.
        self._lock = asyncio.Lock()
        self._backend: Backend | None = None

    async def score(self, case: ModelInput) -> Scored:
        """As the model's own replica scores."""
        scored: Scored = await self._result(self._handle.score.remote(case, seconds_left()))
        return scored

    async def map_tiles(self, case: ModelInput) -> TileMaps:
        """As the model's own replica maps."""
        maps: TileMaps = await self._result(self._handle.map_tiles.remote(case, seconds_left()))
        return maps

    async def backend(self, first: Backend, config: ServeConfig) -> Backend:
        """The model as the routes see it: the first one's backend, with this model and its settings in it."""
        async with self._lock:  # asked for once, when it is first needed: by then its replicas are up
            if self._backend is None:
                described: Description = await answer_of(self._handle.describe.remote())
                # What a replica holds for all models (counters, pixels, policy, index) stays the first one's.
                self._backend = replace(
                    first,
                    score=self.score,
                    config=config if described.takes_references else without_references(config),
                    traits=described.traits,
                    fingerprint=described.fingerprint,
                    map_tiles=self.map_tiles if described.maps_tiles else None,
                    pixels=first.pixels_held,
                )
        return self._backend

    async def _result(self, response: Any) -> Any:
        result = await answer_of(response)
        if isinstance(result, Refusal):
            raise result.problem()
        return result


@dataclass(frozen=True)
class Models:
    """All models of the service by `config`: `first` is this replica's own."""

    first: Backend
    config: ServeConfig
    further: Mapping[str, FurtherModel] = field(default_factory=dict)

    @classmethod
    def single(cls, first: Backend) -> "Models":
        """A service of one model."""
        return cls(first, first.config)

    async def of(self, name: str | None, question: str | None = None) -> Backend:
        """The model that a case about `question` meets where its request asks for `name`.

        Raises `Problem` (404, 503) where there is none of this name, or it does not answer.
        """
        chosen = model_of(self.config, self.first.model, name, question)
        return self.first if chosen is None else await self._further(chosen)

    async def all(self) -> list[Backend]:
        """Each of them that answers."""
        backends = [self.first]
        for name in self.further:
            # One that is down shall not hide the others.
            with suppress(Problem):
                backends.append(await self._further(name))
        return backends

    async def _further(self, name: str) -> Backend:
        config = self.config.model_copy(update={**dict(self.config.models[name]), "served_model_name": name})
        return await self.further[name].backend(self.first, config)

    def aliases_of(self, name: str) -> list[str]:
        """The other names of a model."""
        # An alias of no further model is the first one's, whose name may be a path that was followed.
        of_first = name == self.first.model
        return [
            alias
            for alias, target in self.config.aliases.items()
            if target == name or (of_first and target not in self.further)
        ]
