"""What a replica scores with: the model behind a `Batcher`, whose refusals are the service's problems."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Tracer

from medmm_ray.config import ConfigError, digest
from medmm_ray.data.artifacts import MANIFEST
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.service.admission import seconds_left
from medmm_ray.service.backend import MapTiles, TileMaps
from medmm_ray.service.batching import (
    MIN_PASS_TOKENS,
    Batcher,
    DeadlineError,
    OverloadedError,
    RequestTimes,
    TooManyTokensError,
)
from medmm_ray.service.load import LOAD, LoadConfig, batch_limits
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.readiness import TINY_CASE
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored
from medmm_ray.service.tracing import score_spans, tracer_to

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel
    from medmm_ray.service.batching import Engine
    from medmm_ray.service.config import ModelConfig

WARM_UP = ModelInput(
    question="Is one and one two? (A) yes (B) no",
    solutions=tuple(("One and one are two. " * 8, f"So the answer is (A), as {i} others say.") for i in range(16)),
    documents=("One is a number. " * 64,),
    image=None,
    reference_images=(),
    context_key="warm-up",
)
"""What is scored before the first request, to know the rate: some hundreds of tokens."""


class ReplicaScorer:
    """Scores cases on the batcher of one replica."""

    def __init__(
        self,
        engine: "Engine[Any, Any]",
        config: LoadConfig,
        default_budget: int,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        # Made here, as exporters do not travel to a replica.
        self.tracer = tracer or tracer_to(config.traces_endpoint)
        # Of cases and of tile maps, each with its own kind of result.
        self.batcher: Batcher[Any, Any] = Batcher(engine, batch_limits(config, default_budget))

    @classmethod
    def of_model(cls, model: "RewardModel", config: LoadConfig) -> "ReplicaScorer":
        """A scorer on a reward model, warmed up."""
        from medmm_ray.reward_model.pass_engine import RewardEngine

        # Its cache is the replica's own: shared ones would cost more to ask than to compute.
        engine = RewardEngine(model, config.prefix_cache_mb << 20)
        scorer = cls(engine, config, model.default_budget)
        scorer.batcher.warm_up(WARM_UP)
        return scorer

    async def score(self, model_input: ModelInput) -> Scored:
        """The log-odds of a case's solutions; a `Problem` where it is refused or too late."""
        solutions, num_tokens = await self._read(model_input, model_input)
        return Scored(solutions, num_tokens)

    async def map_tiles(self, model_input: ModelInput) -> TileMaps:
        """Where in a case's image its steps' scores come from, in passes with all others; a `Problem` as for scores."""
        from medmm_ray.reward_model.pass_engine import TileMapCase

        maps, num_tokens = await self._read(TileMapCase(model_input), model_input)
        return TileMaps(maps.tiles, num_tokens, maps.attention)

    async def _read(self, request: Any, case: ModelInput) -> tuple[Any, int]:
        """What the engine makes of a request about a case, and the tokens that it read for it."""
        times = RequestTimes()
        counts = {
            "solutions": len(case.solutions),
            "documents": len(case.documents),
            "images": len(case.reference_images) + (case.image is not None),
        }
        try:
            with score_spans(self.tracer, times, counts):
                result = await self.batcher.score(request, seconds_left(), times)
        except OverloadedError as error:
            raise Problem(Kind.OVERLOADED, str(error), retry_after_s=error.retry_after_s) from None
        except TooManyTokensError as error:
            raise Problem(Kind.TOO_LARGE, str(error)) from None
        except DeadlineError as error:
            raise Problem(Kind.TIMEOUT, str(error)) from None
        return result, times.num_tokens

    def check(self) -> None:
        """Raise a `Problem` (429) where even a small request would wait too long."""
        try:
            self.batcher.check_wait(MIN_PASS_TOKENS)
        except OverloadedError as error:
            raise Problem(Kind.OVERLOADED, str(error), retry_after_s=error.retry_after_s) from None

    def stuck(self) -> str | None:
        """What hangs; None where nothing does."""
        if not self.batcher.is_stuck:
            return None
        return f"{self.batcher.num_waiting} requests wait, and nothing was scored for {self.config.stuck_s:g} s"

    def stats(self) -> dict[str, float]:
        """The replica's load, for `load.wanted_replicas`."""
        # Seconds, not tokens: what a token takes differs from machine to machine.
        waiting_s = self.batcher.waiting_tokens / self.batcher.meter.rate
        return {LOAD: waiting_s / self.config.target_wait_s}


@dataclass(frozen=True)
class ServedModel:
    """A model as a replica has loaded it."""

    scorer: ReplicaScorer
    traits: ModelTraits
    tiny_log_odds: Sequence[float]
    """What the offline function gives to `readiness.TINY_CASE`."""
    fingerprint: str = ""
    """What its weights are named by."""
    takes_references: bool = True
    """Whether a request may have reference images."""
    map_tiles: MapTiles | None = None
    """Where in the image scores come from; None without an image tower."""


Load = Callable[["ModelConfig"], ServedModel]
"""How a replica gets its model."""


def load_model(config: "ModelConfig") -> ServedModel:
    """The reward model of the settings. Raises `ConfigError` where it cannot score a tiny case."""
    # Here, not above: a driver that starts the replicas needs no torch.
    from medmm_ray.reward_model import RewardModel

    folder = resolve(str(config.model))
    model = RewardModel.from_pretrained(folder, dtype=config.dtype, device=config.device)
    # The offline function itself says what the served one must answer; a model that cannot score serves nothing.
    (tiny,) = model.score(TINY_CASE.question, list(TINY_CASE.solutions))
    if tiny.error is not None:
        raise ConfigError(f"{config.model} cannot score a tiny case: {tiny.error}")
    scorer = ReplicaScorer.of_model(model, config)
    return ServedModel(
        scorer,
        # What it was trained on is known here alone: the driver never reads the checkpoint.
        ModelTraits(model.reads_images, **asdict(model.trained_inputs)),
        tiny.log_odds,
        fingerprint_of(folder),
        # A vision-language model knows a question's own images alone.
        takes_references=model.vision is None,
        map_tiles=scorer.map_tiles if model.image_tower is not None else None,
    )


def fingerprint_of(folder: str) -> str:
    """What a checkpoint is named by: the fingerprint of its manifest, else a hash of its files' names and sizes."""
    root = Path(folder)
    manifest = root / MANIFEST
    if manifest.is_file():
        return str(json.loads(manifest.read_text())["fingerprint"])
    # A hub's id, which its revision pins, has no files here.
    files = sorted(root.rglob("*")) if root.is_dir() else []
    sizes = [(str(file.relative_to(root)), file.stat().st_size) for file in files if file.is_file()]
    return digest(sizes or folder)
