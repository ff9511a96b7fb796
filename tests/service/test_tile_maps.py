"""`POST /v1/tile_maps` and the demo page's own routes, on a scripted model."""

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from medmm_ray.reward_model import StepAttention
from medmm_ray.reward_model.occlusion import PatchAttention
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend, TileMaps
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.keys import Key, Keyring, sha256
from medmm_ray.service.models import Models
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.rerank import ModelInput, Scored
from tests.service.web import LEFT, QUESTION, RIGHT, WITH_IMAGES, b64, body, png

MAP = [[0.0, 1.5], [-0.5, 0.0]]


async def no_score(case: ModelInput) -> Scored:
    raise AssertionError("not asked")


async def two_by_two(case: ModelInput) -> TileMaps:
    """Two steps a solution, whatever it is."""
    return TileMaps([[MAP, MAP] for _ in case.solutions], 123 * len(case.solutions))


def client(keyring: Keyring | None = None, **fields: Any) -> TestClient:
    backend = Backend(
        no_score, ServeConfig(model="m"), WITH_IMAGES, Readiness([2.0]), map_tiles=fields.pop("maps", None)
    )
    return TestClient(api(Models.single(backend), keyring), base_url="http://127.0.0.1:8000")


def test_maps_come_a_step() -> None:
    reply = client(maps=two_by_two).post("/v1/tile_maps", json=body(image=b64(png())))
    assert reply.json() == {
        "model": "m",
        "solutions": [{"index": 0, "maps": [MAP, MAP]}, {"index": 1, "maps": [MAP, MAP]}],
        "attention": None,
    }


def test_attention_over_patches_comes_beside_them() -> None:
    attention = StepAttention([[0.75, 0.25], [0.0, 0.0]], share=0.4)

    async def attended(case: ModelInput) -> TileMaps:
        steps = PatchAttention((0.125, 0.0, 0.875, 1.0), [[attention, attention] for _ in case.solutions])
        return TileMaps([[MAP, MAP] for _ in case.solutions], attention=steps)

    answer = client(maps=attended).post("/v1/tile_maps", json=body(image=b64(png()))).json()
    expected = {"weights": [[0.75, 0.25], [0.0, 0.0]], "share": 0.4}
    assert answer["attention"] == {"area": [0.125, 0.0, 0.875, 1.0], "solutions": [[expected] * 2] * 2}


def test_what_maps_cost_counts_for_the_keys_day() -> None:
    keyring = Keyring([Key(name="a", sha256=sha256("s3cret"), scopes=("score",), tokens_per_day=200)])
    web = client(keyring, maps=two_by_two)
    headers = {"Authorization": "Bearer s3cret"}
    replies = [web.post("/v1/tile_maps", json=body(image=b64(png())), headers=headers) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 429]


def test_maps_read_in_shared_passes_are_those_of_the_function(tmp_path: Path) -> None:
    from medmm_ray.reward_model import FusionConfig, RewardModel, ScoreRequest
    from medmm_ray.reward_model.occlusion import tile_maps
    from medmm_ray.service.replica import ReplicaScorer
    from tests.doubles import tiny_reward_model as tiny
    from tests.doubles.clip_folders import write_native_clip

    model = RewardModel.from_pretrained(tiny.save(tmp_path))
    model.add_image_tower(write_native_clip(tmp_path / "tower"), FusionConfig(width=16, num_heads=2))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight, std=0.5)
    model.eval()
    images = [Image.effect_noise((60, 40), 60).convert("RGB") for _ in range(2)]
    solutions = tuple(map(tuple, tiny.SOLUTIONS))
    case = ModelInput(tiny.QUESTION, solutions, tuple(tiny.DOCUMENTS), images[0], (images[1],), "case")
    request = ScoreRequest(case.question, case.solutions, case.documents, case.image, case.reference_images)
    expected = tile_maps(model, request, model.text_states(case.question, case.solutions, case.documents))
    scorer = ReplicaScorer.of_model(model, ServeConfig(model="m", token_budget=256))

    async def ask() -> tuple[TileMaps, Scored]:
        return await asyncio.gather(scorer.map_tiles(case), scorer.score(case))

    maps, scored = asyncio.run(ask())
    scorer.batcher.close()
    for of_solution, expected_of_solution in zip(maps.solutions, expected.tiles, strict=True):
        for step_map, expected_map in zip(of_solution, expected_of_solution, strict=True):
            assert np.array(step_map) == pytest.approx(np.array(expected_map), abs=1e-5)
    # 66 images, each at least a token, beside the text.
    assert scored.num_tokens is not None
    assert maps.num_tokens >= 66


def test_refusals() -> None:
    web = client(maps=two_by_two)
    without = web.post("/v1/tile_maps", json=body())
    assert (without.status_code, without.json()["detail"]) == (422, "image: required, but missing")
    many = web.post("/v1/tile_maps", json=body(image=b64(png()), solutions=[LEFT] * 9))
    assert many.status_code == 413
    assert "9 solutions; at most 8" in many.json()["detail"]
    blind = client().post("/v1/tile_maps", json=body(image=b64(png())))
    assert blind.status_code == 422
    assert "has no image tower" in blind.json()["detail"]


def test_the_page_and_its_files_need_no_key_and_hold_no_data() -> None:
    web = client(Keyring([Key(name="a", sha256=sha256("s3cret"), scopes=("score",))]), maps=two_by_two)
    page = web.get("/demo")
    assert page.status_code == 200
    assert "Not a medical device." in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert web.get("/demo/page.js").headers["content-type"].startswith("text/javascript")
    assert web.get("/demo/page.css").headers["content-type"].startswith("text/css")
    for path in ("/demo/__init__.py", "/demo/../guard.py", "/demo/%2e%2e%2fguard.py"):
        assert web.get(path).status_code in (401, 404)
    assert web.post("/v1/tile_maps", json=body(image=b64(png()))).status_code == 401


def test_examples_are_phantoms_with_a_solution_that_is_right() -> None:
    start = client(maps=two_by_two).get("/demo/examples").json()
    assert (start["model"], start["has_policy"], len(start["examples"])) == ("m", False, 6)
    for example in start["examples"]:
        image = Image.open(io.BytesIO(base64.b64decode(example["image"])))
        assert image.size == (256, 256)
        assert len(example["options"]) == 4
        assert len(example["solutions"]) == 4
        assert all(3 <= len(steps) <= 6 for steps in example["solutions"])


def test_the_page_can_be_left_out() -> None:
    backend = Backend(no_score, ServeConfig(model="m", demo=False), WITH_IMAGES, Readiness([2.0]))
    assert (
        TestClient(api(Models.single(backend), None), base_url="http://127.0.0.1:8000").get("/demo").status_code == 404
    )


@pytest.mark.parametrize("solutions", [[RIGHT], [LEFT, RIGHT]])
def test_a_map_is_of_the_solutions_that_were_sent(solutions: list[Any]) -> None:
    reply = client(maps=two_by_two).post(
        "/v1/tile_maps", json={"question": QUESTION, "solutions": solutions, "image": b64(png())}
    )
    assert [solution["index"] for solution in reply.json()["solutions"]] == list(range(len(solutions)))
