"""The web application around a scripted model, in process."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend, TileMaps
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.evidence import EvidenceSource
from medmm_ray.service.keys import Key, Keyring, sha256
from medmm_ray.service.models import FurtherModel, Models
from medmm_ray.service.policy import GeneratorPolicy, PolicyConfig
from medmm_ray.service.quotas import Quotas
from medmm_ray.service.readiness import Readiness, Scorer, not_stuck
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored, steps_of
from tests.doubles.fake_generator import FakeGenerator

QUESTION = "Which side shows the effusion?"
OPTIONS = ["none", "right", "left"]
WITH_IMAGES = ModelTraits(has_image_tower=True)
RIGHT = ["The right angle is blunted.", "So the answer is (B)."]
LEFT = "Step 1: The left angle is blunted. Step 2: So the answer is (C)."


@dataclass(frozen=True)
class Scores:
    text_log_odds: Sequence[float] = ()
    image_log_odds: Sequence[float] = ()
    error: str | None = None


def png(size: tuple[int, int] = (8, 8), colour: str = "grey") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, colour).save(sink, "PNG")
    return sink.getvalue()


@dataclass
class FakeModel:
    """Scores a step by what it says and by the colour of the image; notes each call."""

    calls: list[tuple[str, int, int, bool]] = field(default_factory=list)

    def score(
        self,
        question: str,
        solutions: Sequence[str | Sequence[str]],
        documents: Sequence[str] = (),
        image: Image.Image | None = None,
        reference_images: Sequence[Image.Image] = (),
        *,
        token_budget: int | None = None,
    ) -> list[Scores]:
        self.calls.append((question, len(solutions), len(documents), image is not None))
        light = 0.0 if image is None else 3.0 if image.getpixel((0, 0)) == (255, 255, 255) else -3.0
        split = [steps_of(s) if isinstance(s, str) else list(s) for s in solutions]
        return [
            Scores(error="too_long: 5,000 tokens, more than 4,096")
            if "endless" in " ".join(steps)
            else Scores([float(len(steps))] * len(steps), [light if "left" in " ".join(steps) else -light] * len(steps))
            for steps in split
        ]


async def even_maps(case: ModelInput) -> TileMaps:
    """Maps of 2 x 2 for two steps a solution."""
    return TileMaps([[[[0.5, 0.5], [0.5, 0.5]]] * 2 for _ in case.solutions], num_tokens=7)


def client(
    model: FakeModel,
    token: str = "",
    traits: ModelTraits = WITH_IMAGES,
    stuck: Callable[[], str | None] = not_stuck,
    keyring: Keyring | None = None,
    quotas: Quotas | None = None,
    evidence: EvidenceSource | None = None,
    scorer: Scorer | None = None,
    further: Mapping[str, FurtherModel] | None = None,
    **fields: Any,
) -> TestClient:
    """A client of the application around `model`, or around `scorer` in its place."""

    async def score(case: ModelInput) -> Scored:
        solutions = model.score(case.question, case.solutions, case.documents, case.image, case.reference_images)
        return Scored(solutions, num_tokens=7)

    config = ServeConfig(model="runs/x/two_tower", **fields)
    if token:
        keyring = Keyring([Key(name="MEDMM_TOKEN", sha256=sha256(token), scopes=("admin",))])
    policy = GeneratorPolicy(FakeGenerator(lambda prompt, seed: LEFT), PolicyConfig())
    readiness = Readiness([2.0, 2.0], stuck)
    backend = Backend(scorer or score, config, traits, readiness, "f00d", evidence, policy=policy, map_tiles=even_maps)
    app = api(Models(backend, config, further or {}), keyring, quotas)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def body(**changes: Any) -> dict[str, Any]:
    return {"question": QUESTION, "options": OPTIONS, "solutions": [RIGHT, LEFT], **changes}


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()
