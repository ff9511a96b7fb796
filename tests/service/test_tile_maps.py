"""`POST /v1/tile_maps` and the demo page's own routes, on a scripted model."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend, StepMaps
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.keys import Key, Keyring, sha256
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.rerank import ModelInput, Scored
from tests.service.web import LEFT, QUESTION, RIGHT, WITH_IMAGES, b64, body, png

MAP = [[0.0, 1.5], [-0.5, 0.0]]


async def no_score(case: ModelInput) -> Scored:
    raise AssertionError("not asked")


async def two_by_two(case: ModelInput) -> Sequence[StepMaps]:
    """Two steps a solution, whatever it is."""
    return [[MAP, MAP] for _ in case.solutions]


def client(keyring: Keyring | None = None, **fields: Any) -> TestClient:
    backend = Backend(
        no_score, ServeConfig(model="m"), WITH_IMAGES, Readiness([2.0]), map_tiles=fields.pop("maps", None)
    )
    return TestClient(api(backend, keyring), base_url="http://127.0.0.1:8000")


def test_maps_come_a_step() -> None:
    reply = client(maps=two_by_two).post("/v1/tile_maps", json=body(image=b64(png())))
    assert reply.json() == {
        "model": "m",
        "solutions": [{"index": 0, "maps": [MAP, MAP]}, {"index": 1, "maps": [MAP, MAP]}],
    }


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
    assert TestClient(api(backend, None), base_url="http://127.0.0.1:8000").get("/demo").status_code == 404


@pytest.mark.parametrize("solutions", [[RIGHT], [LEFT, RIGHT]])
def test_a_map_is_of_the_solutions_that_were_sent(solutions: list[Any]) -> None:
    reply = client(maps=two_by_two).post(
        "/v1/tile_maps", json={"question": QUESTION, "solutions": solutions, "image": b64(png())}
    )
    assert [solution["index"] for solution in reply.json()["solutions"]] == list(range(len(solutions)))
