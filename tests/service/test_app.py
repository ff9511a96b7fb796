"""The rerank service: its arithmetic, its refusals, its client; once with real Serve and a real (tiny) reward model."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from rich.console import Console

from jobs import bench
from medmm_ray.client import Client, ServiceError, rerank_request
from medmm_ray.config import ConfigError
from medmm_ray.data.artifacts import Artifact, Provenance
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.service.best_of_n import BestOfNAnswer, BestOfNRequest, Round
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.deployment import application, build_app
from medmm_ray.service.guard import is_loopback
from medmm_ray.service.policy import PolicyConfig
from medmm_ray.service.rerank import (
    ModelTraits,
    RerankAnswer,
    RerankRequest,
    Scored,
    StepLogOdds,
    rerank,
    to_model_input,
)
from medmm_ray.service.show import show
from medmm_ray.session import fresh_token, has_token_mode
from tests.doubles.fake_generator import make_tiny_policy
from tests.engines.test_pixels import KINDS
from tests.service.web import LEFT, OPTIONS, QUESTION, RIGHT, FakeModel, Scores, b64, body, client, png


@pytest.fixture
def web() -> TestClient:
    return client(FakeModel())


# The arithmetic


def test_the_answer_in_numbers() -> None:
    request = RerankRequest(question=QUESTION, options=OPTIONS, solutions=[LEFT, RIGHT, RIGHT, "no idea"])
    scores: list[StepLogOdds] = [
        Scores([2.0, 1.0], [0.5, -1.0]),
        Scores([0.0, 1.0], [-1.0, 0.0]),
        Scores([math.log(3), math.log(3)], [0.0, 0.0]),
        Scores(error="empty: no steps"),
    ]
    answer = rerank(request, Scored(scores), "m")
    assert answer.ranking == [2, 0, 1]
    assert [s.rank for s in answer.solutions] == [2, 3, 1, None]
    assert [s.answer for s in answer.solutions] == ["C", "B", "B", None]
    first = answer.solutions[0]
    assert [s.text for s in first.steps] == ["The left angle is blunted.", "So the answer is (C)."]
    assert [s.probability for s in first.steps] == pytest.approx([1 / (1 + math.exp(-2.5)), 0.5])
    assert [(s.text_log_odds, s.image_log_odds) for s in first.steps] == [(2.0, 0.5), (1.0, -1.0)]
    assert answer.solutions[2].aggregates == pytest.approx({"min": 0.75, "last": 0.75, "mean": 0.75})
    assert first.aggregates["min"] == first.aggregates["last"] == first.reward == 0.5
    assert answer.solutions[3].error == "empty: no steps"
    assert (answer.solutions[3].reward, answer.solutions[3].steps) == (None, [])
    assert (answer.best_of_n.answer, answer.best_of_n.solution) == ("B", 2)
    assert answer.best_of_n.support == pytest.approx(0.75)
    low = 1 / (1 + math.e)
    assert (answer.sc_rm.answer, answer.sc_rm.solution) == ("B", 2)
    assert answer.sc_rm.support == pytest.approx((0.75 + low) / (0.75 + low + 0.5))
    assert answer.majority.answer == "B"
    assert answer.majority.support == pytest.approx(2 / 3)


def test_the_rules_can_disagree_and_the_aggregate_matters() -> None:
    request = RerankRequest(question=QUESTION, options=OPTIONS, solutions=[RIGHT, RIGHT, LEFT], aggregate="last")
    scores: list[StepLogOdds] = [Scores([3.0, -1.0], [0, 0]), Scores([3.0, -1.0], [0, 0]), Scores([-2.0, 0.5], [0, 0])]
    by_last = rerank(request, Scored(scores), "m")
    assert (by_last.best_of_n.answer, by_last.sc_rm.answer, by_last.majority.answer) == ("C", "C", "B")
    by_min = rerank(request.model_copy(update={"aggregate": "min"}), Scored(scores), "m")
    assert by_min.ranking == [0, 1, 2]


def test_saturated_probabilities_do_not_tie() -> None:
    request = RerankRequest(question=QUESTION, options=OPTIONS, solutions=[RIGHT, LEFT])
    answer = rerank(request, Scored([Scores([40.0, 40.0], [0, 0]), Scores([45.0, 45.0], [0, 0])]), "m")
    assert [s.reward for s in answer.solutions] == [1.0, 1.0]
    assert answer.ranking == [1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_and_leaves_the_order_of_the_others(value: float) -> None:
    request = RerankRequest(question=QUESTION, options=OPTIONS, solutions=[RIGHT, LEFT, RIGHT, LEFT])
    scores = [Scores([-1.0, 0.0], [0, 0]), Scores([1.0, value], [0, 0]), Scores([2.0, 1.0], [0, 0]),
              Scores([0.0, 0.0], [value, 0])]  # fmt: skip
    answer = rerank(request, Scored(scores), "m")
    assert (answer.ranking, [s.rank for s in answer.solutions]) == ([2, 0], [2, None, 1, None])
    assert [(s.reward, s.steps, s.aggregates) for s in answer.solutions[1::2]] == [(None, [], {})] * 2
    assert str(answer.solutions[1].error).startswith("not_finite: 1 of 2 step scores are no finite numbers; ")
    assert (answer.best_of_n.answer, answer.best_of_n.solution) == ("B", 2)
    assert answer.best_of_n.support == pytest.approx(1 / (1 + math.exp(-1)))
    assert (answer.sc_rm.answer, answer.sc_rm.support, answer.majority.answer) == ("B", 1.0, "B")
    json.dumps(answer.model_dump(), allow_nan=False)


def test_open_answers_vote_as_they_are_graded() -> None:
    said = ["pneumonia", "the pleural effusion", "pneumonia", "Pleural effusions", "a pleural effusion"]
    request = RerankRequest(question=QUESTION, solutions=[f"The answer is {s}." for s in said], answer_type="open")
    answer = rerank(request, Scored([Scores([0.0], [0.0])] * 5), "m")
    assert (answer.majority.answer, answer.majority.solution) == ("the pleural effusion", 1)
    assert [answer.majority.support, answer.sc_rm.support] == pytest.approx([0.6, 0.6])


def test_nothing_scored_is_an_answer_too() -> None:
    request = RerankRequest(question=QUESTION, options=OPTIONS, solutions=["hm"])
    answer = rerank(request, Scored([Scores(error="too_long: x")]), "m")
    assert answer.ranking == []
    assert answer.best_of_n.solution is answer.sc_rm.solution is answer.majority.solution is None


def test_a_case_is_named_by_everything_but_its_solutions() -> None:
    def context(**changes: Any) -> str:
        return to_model_input(RerankRequest(**body(**changes)), 10_000).context_key

    base = context()
    assert base == context(solutions=[LEFT])
    others = [
        context(question="Which side?"),
        context(options=["none", "right"]),
        context(documents=["left"]),
        context(options=["none", "right"], documents=["left"]),
        context(image=b64(png())),
        context(image=b64(png(colour="white"))),
        context(image=b64(png()), reference_images=[b64(png())]),
    ]
    assert len({base, *others}) == 1 + len(others)


# Over HTTP


def test_rerank_over_http(web: TestClient) -> None:
    reply = web.post("/v1/rerank", json=body(image=b64(png(colour="white")), documents=["Angles blunt."]))
    assert reply.status_code == 200
    answer = RerankAnswer.model_validate(reply.json())
    assert (answer.arm, answer.model, answer.aggregate) == ("multimodal", "runs/x/two_tower", "min")
    assert answer.ranking == [1, 0]
    assert [s.image_log_odds for s in answer.solutions[0].steps] == [-3.0, -3.0]


def test_without_an_image_the_image_says_nothing(web: TestClient) -> None:
    answer = web.post("/v1/rerank", json=body()).json()
    assert answer["arm"] == "text_only"
    assert {step["image_log_odds"] for s in answer["solutions"] for step in s["steps"]} == {0.0}


def test_more_than_the_model_was_trained_on_is_answered_with_a_warning() -> None:
    web = client(FakeModel(), traits=ModelTraits(True, num_documents=2, num_references=0))
    image = b64(png())
    (card,) = web.get("/v1/models").json()["data"]
    assert (card["num_documents"], card["num_references"]) == (2, 0)
    assert web.post("/v1/rerank", json=body(documents=["a", "b"], image=image)).json()["warnings"] == []
    answer = web.post("/v1/rerank", json=body(documents=["a", "b", "c"], image=image, reference_images=[image])).json()
    assert answer["warnings"] == [
        "documents: 3 were sent, and the model was trained on 2; send the best 2",
        "reference_images: 1 were sent, and the model was trained without; leave them out",
    ]
    assert len(answer["ranking"]) == 2
    untold = client(FakeModel()).post("/v1/rerank", json=body(documents=["a"] * 64)).json()
    assert untold["warnings"] == []


def test_a_data_url_and_white_space_in_base64_are_read(web: TestClient) -> None:
    plain = web.post("/v1/rerank", json=body(image=b64(png()))).json()
    wrapped = b64(png())[:20] + "\n" + b64(png())[20:]
    assert web.post("/v1/rerank", json=body(image=f"data:image/png;base64,{wrapped}")).json() == plain


def test_a_solution_that_cannot_be_scored_leaves_the_others(web: TestClient) -> None:
    answer = web.post("/v1/rerank", json=body(solutions=["endless", RIGHT])).json()
    assert answer["ranking"] == [1]
    assert answer["solutions"][0]["error"] == "too_long: 5,000 tokens, more than 4,096"


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"solutions": []}, 422, ["solutions", "[]", "at least 1"]),
        ({"solutions": [[]]}, 422, ["solutions.0", "at least 1"]),
        ({"solutions": [" "]}, 422, ["solutions.0", "' '"]),
        ({"solutions": "Step 1"}, 422, ["solutions", "valid list"]),
        ({"solutions": [None]}, 422, ["solutions.0: None: Input should be a valid string; solutions.0: None: "]),
        ({"solutions": [["a", 3]]}, 422, ["solutions.0.1: 3: Input should be a valid string"]),
        ({"solutions": [["left", "\udfff"]]}, 422, ["solutions.0.1: '\\udfff': ", "unicode"]),
        ({"question": "\ud800"}, 422, ["question: '\\ud800': ", "unicode"]),
        ({"question": " "}, 422, ["question: ' ': "]),
        ({"documents": "a text"}, 422, ["documents: 'a text': Input should be a valid list"]),
        ({"documents": ["\ud800"]}, 422, ["documents.0: '\\ud800'"]),
        ({"solutions": [LEFT] * 5}, 413, ["5 solutions", "at most 4"]),
        ({"solutions": [["a step"] * 7]}, 413, ["7 steps", "at most 6"]),
        ({"documents": ["d"] * 3}, 413, ["3 documents", "at most 2"]),
        ({"optoins": OPTIONS}, 422, ["optoins", "unknown name", "options"]),
        ({"question": None}, 422, ["question", "None", "string"]),
        ({"options": ["x"] * 27}, 422, ["options", "26"]),
        ({"aggregate": "max"}, 422, ["aggregate", "'max'", "'min'"]),
        ({"image": "no base64!"}, 422, ["image_encoding", "10 characters", "base64"]),
        ({"image": "QUJDQ"}, 422, ["image_encoding", "no multiple of 4", "5 characters"]),
        ({"image": "QUJD\nQUJ*"}, 422, ["image_encoding", "not of its alphabet", "9 characters"]),
        ({"image": "QUJD\u0410"}, 422, ["image_encoding", "character 4 is not ASCII", "5 characters"]),
        ({"image": b64(b"GIF89a broken")}, 422, ["image_corrupt", "image is not"]),
        ({"image": "data:image/png;base64,"}, 422, ["image_empty", "0 bytes"]),
        ({"image": b64(png((101, 100)))}, 413, ["image_too_large", "101 x 100", "10000"]),
        ({"image": b64(png()), "reference_images": [b64(b"x")]}, 422, ["reference_images.0"]),
        ({"reference_images": [b64(png())]}, 422, ["image_missing", "1 reference_images"]),
        ({"image": b64(png()), "reference_images": [b64(png())] * 3}, 413, ["3 reference_images", "at most 2"]),
    ],
)
def test_refusals_say_what_the_value_and_what_was_expected(
    changes: dict[str, Any], status: int, words: list[str]
) -> None:
    limits: dict[str, Any] = {"max_solutions": 4, "max_steps": 6, "max_documents": 2, "max_reference_images": 2}
    web = client(FakeModel(), max_image_pixels=10_000, **limits)
    sent = json.dumps(body(**changes))  # escapes what is no character, as some clients do
    reply = web.post("/v1/rerank", content=sent, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    for word in words:
        assert word in reply.json()["detail"]


@pytest.mark.parametrize("kind", ["cmyk", "sixteen_bit", "nan", "la", "palette", "animation", "one_pixel"])
def test_every_kind_of_picture_is_answered(kind: str) -> None:
    make, *_ = KINDS[kind]
    sink = io.BytesIO()
    make().save(sink, {"cmyk": "JPEG", "nan": "TIFF", "animation": "GIF"}.get(kind, "PNG"))
    assert client(FakeModel()).post("/v1/rerank", json=body(image=b64(sink.getvalue()))).status_code == 200


@pytest.mark.parametrize("solution", ["Step 1: Step 2:", "\x00\x07", "الرئة 左肺 👩‍⚕️ e\u0301", " ки"])
def test_odd_text_is_answered(web: TestClient, solution: str) -> None:
    reply = web.post("/v1/rerank", json=body(question=f"{solution}?", solutions=[solution, RIGHT]))
    assert reply.status_code == 200
    assert len(reply.json()["solutions"]) == 2


def test_a_missing_name_a_broken_body_and_a_big_one() -> None:
    web = client(FakeModel(), max_body_mb=1)
    assert web.post("/v1/rerank", json={"question": QUESTION}).json()["detail"] == "solutions: required, but missing"
    broken = web.post("/v1/rerank", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 422
    assert broken.json()["detail"].startswith("body: no JSON from character 1 on: ")
    big = web.post("/v1/rerank", json=body(documents=["x" * (1 << 20)]))
    assert (big.status_code, big.json()["detail"]) == (413, "the body is larger than 1 MiB")


def test_every_error_is_a_problem_with_the_requests_id() -> None:
    web = client(FakeModel(), token="s3cret", max_body_mb=1)  # noqa: S106
    right = {"Authorization": "Bearer s3cret"}
    for reply, kind, status in (
        (web.get("/v1/models"), "unauthenticated", 401),
        (client(FakeModel()).get("/v1/models", headers={"Host": "evil.example.org"}), "forbidden", 403),
        (web.get("/nowhere", headers=right), "not_found", 404),
        (web.get("/v1/rerank", headers=right), "method_not_allowed", 405),
        (web.post("/v1/rerank", headers=right, content=b"x" * (1 << 20 | 1)), "too_large", 413),
        (web.post("/v1/rerank", headers=right, json=body(image=b64(b"GIF"))), "invalid", 422),
        (web.post("/v1/rerank", headers=right, json=body(optoins=[], question=3)), "invalid", 422),
    ):
        assert reply.status_code == status
        assert reply.headers["content-type"] == "application/problem+json"
        problem = reply.json()
        assert (problem["type"], problem["status"]) == (f"/problems/{kind}", status)
        assert problem["instance"] == reply.headers["x-request-id"]
    assert [fault["pointer"] for fault in problem["errors"]] == ["#/question", "#/optoins"]


def test_a_request_keeps_its_id_where_that_is_usable(web: TestClient) -> None:
    assert web.get("/health", headers={"X-Request-Id": "trace-1/2"}).headers["x-request-id"] == "trace-1/2"
    for odd in ("", "a b", "x" * 129, 'x"y'):
        assert re.fullmatch("[0-9a-f]{32}", web.get("/health", headers={"X-Request-Id": odd}).headers["x-request-id"])


def test_what_nobody_foresaw_is_a_problem_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeModel):
        def score(self, *arguments: Any, **options: Any) -> list[Scores]:
            raise KeyError("The left angle is blunted.")

    service = logging.getLogger("ray.serve")
    service.addHandler(caplog.handler)
    reply = client(Broken()).post("/v1/rerank", json=body(), headers={"X-Request-Id": "id-7"})
    service.removeHandler(caplog.handler)
    assert (reply.status_code, reply.json()["type"], reply.json()["instance"]) == (500, "/problems/internal", "id-7")
    assert "angle" not in reply.text + caplog.text
    assert "id-7: KeyError at " in caplog.text
    assert "test_app.py" in caplog.text


def test_an_image_for_a_model_without_image_tower_is_refused() -> None:
    web = client(FakeModel(), traits=ModelTraits(has_image_tower=False))
    assert "has no image tower" in web.post("/v1/rerank", json=body(image=b64(png()))).json()["detail"]
    assert web.post("/v1/rerank", json=body()).status_code == 200


def test_health_card_and_openapi_page(web: TestClient) -> None:
    with web:  # start-up and shut-down pass the guard
        assert web.get("/docs").status_code == 200
    assert web.get("/health").json() == {"status": "ok"}
    (card,) = web.get("/v1/models").json()["data"]
    assert (card["id"], card["has_image_tower"], card["max_solutions"]) == ("runs/x/two_tower", True, 256)
    page = web.get("/openapi.json").json()
    shown = page["components"]["schemas"]["RerankRequest"]
    assert all("description" in shown["properties"][name] for name in RerankRequest.model_fields)
    assert set(page["paths"]["/v1/rerank"]["post"]["responses"]) == {"200", "401", "403", "404", "413", "422", "429"}


def test_logs_hold_counts_and_no_text(web: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    service = logging.getLogger("ray.serve")  # once Ray has been started, its records stay below the "ray" logger
    service.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, service.name):
            web.post("/v1/rerank", json=body(documents=["A secret text."]))
            web.post("/v1/rerank", json=body(question=""))
    finally:
        service.removeHandler(caplog.handler)
    ours = list({id(r): r.getMessage() for r in caplog.records if r.name == service.name}.values())
    assert len(ours) == 2
    assert " route=/v1/rerank status=200 " in ours[0]
    assert " solutions=2 unscored=0 " in ours[0]
    assert " status=422 " in ours[1]
    for words in ("effusion", "angle", "secret"):
        assert words not in caplog.text


# Who may ask


def test_a_key_is_demanded_where_one_is_set() -> None:
    web = client(FakeModel(), token="s3cret")  # noqa: S106
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
        reply = web.post("/v1/rerank", json=body(), headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "send 'Authorization: Bearer <key>'" in reply.json()["detail"]
    assert web.get("/v1/models").status_code == 401
    assert web.post("/v1/rerank", content=b"{").status_code == 401  # before the body is looked at
    for path, status in (("/health", 200), ("/docs", 200), ("/openapi.json", 200), ("/redoc", 401), ("/", 401)):
        assert web.get(path).status_code == status
    under = TestClient(web.app, base_url="http://127.0.0.1", root_path="/medmm")
    assert under.get("/v1/models").status_code == 401
    assert under.get("/health").status_code == 200
    right = {"Authorization": "Bearer s3cret"}
    assert web.post("/v1/rerank", json=body(), headers=right).status_code == 200
    elsewhere = {**right, "Host": "gpu.example.org"}
    assert web.post("/v1/rerank", json=body(), headers=elsewhere).status_code == 200


def test_without_keys_only_loopback_is_answered(web: TestClient) -> None:
    for host in ("127.0.0.1:8000", "localhost", "localhost:8000", "[::1]:8000"):
        assert web.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example.org", "10.0.0.5:8000", "127.0.0.1.nip.io"):
        assert web.get("/v1/models", headers={"Host": host}).status_code == 403
    outside = TestClient(web.app, base_url="http://10.0.0.5:8000", headers={"Host": "127.0.0.1"})
    assert outside.post("/v1/rerank", json=body()).status_code == 403


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)],  # noqa: S104
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def deployed(app: Any) -> Any:
    return app._bound_deployment


@pytest.fixture
def token_mode() -> Iterator[None]:
    """Ray's, as in a session: that of the tests' own session where it is up."""
    with nullcontext() if has_token_mode() else fresh_token():
        yield


@pytest.mark.usefixtures("token_mode")
def test_an_open_host_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="there is no key: set MEDMM_TOKEN"):
        application(ServeConfig(model="org/m"))
    with pytest.raises(ConfigError, match=r"host=0\.0\.0\.0 is open to other machines, and access=loopback"):
        application(ServeConfig(model="org/m", host="0.0.0.0", access="loopback"))  # noqa: S104
    monkeypatch.setenv("MEDMM_TOKEN", "s3cret")
    bound = deployed(application(ServeConfig(model="org/m", host="0.0.0.0")))  # noqa: S104
    (key,) = bound.init_args[1]
    assert (key.name, key.scopes) == ("MEDMM_TOKEN", ("admin",))
    assert key.sha256 == "1ec1c26b50d5d3c58d9583181af8076655fe00756bf7285940ba3670f99fcba0"  # of s3cret


@pytest.mark.usefixtures("token_mode")
def test_build_app_reads_words_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    bound = deployed(build_app({"model": str(tmp_path), "num_replicas": "2", "num_gpus": 0.5, "access": "loopback"}))
    config, keys, _ = bound.init_args
    assert (config.model, config.num_replicas, config.num_gpus, keys) == (str(tmp_path), 2, 0.5, ())
    assert (bound.num_replicas, bound.max_ongoing_requests, bound.name) == (2, 1000, "Reranker")
    assert bound.ray_actor_options["num_gpus"] == 0.5


@pytest.mark.usefixtures("token_mode")
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_served_model_is_the_result_that_its_name_stood_for_when_the_application_was_built(
    scheme: str, tmp_path: Path
) -> None:
    origin = Provenance(name="two_tower", fingerprint="f00d", config={}, upstream={})
    artifact = Artifact(f"{scheme}{tmp_path}/run/two_tower/f00d")
    artifact.prepare()
    artifact.commit(origin, seconds=0.0)
    for name in ("two_tower", "two_tower/latest", "two_tower/f00d"):
        bound = deployed(build_app({"model": f"{scheme}{tmp_path}/run/{name}", "access": "loopback"}))
        assert bound.init_args[0].model == f"{scheme}{tmp_path}/run/two_tower/f00d"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "model is not set"),
        ({"model": "nowhere"}, "'nowhere' is not a folder"),
        ({"model": "m", "num_replica": "2"}, "did you mean 'num_replicas'"),
        ({"model": "m", "num_replicas": "two"}, "'num_replicas' is 'two'"),
        ({"model": "org/m", "min_replicas": "3", "max_replicas": "2"}, "min_replicas=3 is above max_replicas=2"),
    ],
)
def test_build_app_refuses(args: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_app(args)


OPEN_RAY = """
from medmm_ray.service.config import ModelConfig, ServeConfig
from medmm_ray.service.deployment import Reranker, build_app
starts = (lambda: build_app({"model": "org/m", "access": "loopback"}), lambda: Reranker(ServeConfig(model="org/m")))
for start in starts:
    try:
        start()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_nothing_is_served_in_a_ray_without_token_mode(mode: str | None) -> None:
    """Neither by what a driver, `serve run` and a cluster's build of a config call, nor by the replica."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    env = unset | ({"RAY_AUTH_MODE": mode} if mode else {})
    words = [sys.executable, "-c", OPEN_RAY]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=120)
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert "nothing is served in a Ray without token mode (RAY_AUTH_MODE is not 'token')" in refusal
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in refusal


# On the screen


def printed(answer: RerankAnswer, request: RerankRequest, gold: str | None) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    show(request, answer, gold=gold, console=console)
    return console.export_text()


def test_the_printed_answer_names_best_worst_and_choices() -> None:
    request = rerank_request(QUESTION, OPTIONS, [RIGHT, RIGHT, LEFT, "endless"], image=png())
    scores: list[StepLogOdds] = [
        Scores([0.0, 0.0], [-2.0, 1.0]),
        Scores([0.0, 0.0], [-1.0, 1.0]),
        Scores([1.0, 1.0], [3.0, 2.0]),
        Scores(error="too_long: 5,000 tokens"),
    ]
    shown = printed(rerank(request, Scored(scores), "m"), request, "C")
    lines = [line.rstrip() for line in shown.splitlines()]
    assert "│   (C) left" in shown
    assert "The best solution (number 3, answer C ✓, min 0.953)" in lines
    assert "The worst solution (number 1, answer B ✗, min 0.119)" in lines
    assert [line.split() for line in lines if "left angle" in line] == [
        ["0.982", "+1.0", "+3.0", "The", "left", "angle", "is", "blunted."]
    ]
    assert "1 solutions could not be scored: too_long" in lines
    words = [" ".join(line.split()) for line in lines]
    assert words[-3:] == [
        "best of N C ✓ reward 0.953",
        "SC+RM C ✓ 71% of the rewards",
        "majority vote B ✗ 67% of the votes",
    ]


def test_the_printed_answer_without_gold_and_without_scores() -> None:
    request = rerank_request(QUESTION, OPTIONS, ["hm"])
    unscored = printed(rerank(request, Scored([Scores(error="x: y")]), "m"), request, None)
    assert "SC+RM none 0% of the rewards" in " ".join(unscored.split())
    shown = printed(rerank(request, Scored([Scores([1.0], [0.0])]), "m"), request, None)
    assert "worst" not in shown
    assert "image log-odds" not in shown
    assert "warning" not in shown
    warned = printed(rerank(request, Scored([Scores([1.0], [0.0])]), "m", ["documents: 3 were sent"]), request, None)
    assert "warning: documents: 3 were sent" in [line.rstrip() for line in warned.splitlines()]


# With real Serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model with an image tower, its fusion opened a little so that the image counts."""
    import torch

    from medmm_ray.reward_model import FusionConfig, RewardModel
    from tests.doubles import clip_folders, tiny_reward_model

    folder = tmp_path_factory.mktemp("model")
    model = RewardModel.from_pretrained(tiny_reward_model.save(folder / "text"))
    model.add_image_tower(clip_folders.write_native_clip(folder / "tower"), FusionConfig())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.fusion.parameters():  # type: ignore[union-attr]
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder / "two_tower")
    return folder / "two_tower"


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_real_serve_gives_the_scores_of_the_offline_function(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from medmm_ray.reward_model import RewardModel
    from medmm_ray.service.deployment import running

    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    picture = png((40, 30), "teal")
    documents = ["An angle is blunted by fluid."]
    chunks: list[list[str | Sequence[str]]] = [
        [RIGHT, LEFT],
        [RIGHT],
        [["The left lung is normal.", "So the answer is (A)."]],
    ]
    requests = [rerank_request(QUESTION, OPTIONS, c, documents=documents, image=picture) for c in chunks]
    with running(ServeConfig(model=str(checkpoint), port=0, num_cpus=0.5, access="loopback")) as url:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(Client(url).rerank, requests))
        text_only = Client(url).rerank(requests[0].model_copy(update={"image": None}))
        assert "/v1/rerank" in httpx.get(f"{url}/openapi.json").json()["paths"]
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example.org"}).status_code == 403
        ready = httpx.get(f"{url}/ready", headers={"X-Request-Id": "not usable"})
        assert (ready.status_code, len(ready.headers.get_list("x-request-id"))) == (200, 1), "the proxy adds its own"
        assert re.fullmatch("[0-9a-f]{32}", ready.headers["x-request-id"])
        with (
            pytest.raises(ConfigError, match="already serves medmm"),
            running(ServeConfig(model=str(checkpoint), access="loopback")),
        ):
            pass

    model = RewardModel.from_pretrained(checkpoint)
    asked, image = to_model_input(requests[0], 10_000).question, to_model_input(requests[0], 10_000).image
    for chunk, answer in zip(chunks, answers, strict=True):
        offline = model.score(asked, chunk, documents, image)
        for expected, solution in zip(offline, answer.solutions, strict=True):
            assert [s.text_log_odds for s in solution.steps] == pytest.approx(expected.text_log_odds, abs=1e-5)
            assert [s.image_log_odds for s in solution.steps] == pytest.approx(expected.image_log_odds, abs=1e-5)
            assert [s.probability for s in solution.steps] == pytest.approx(expected.plus_probs, abs=1e-6)
        assert answer.arm == "multimodal"
        assert any(step.image_log_odds for s in answer.solutions for step in s.steps)
    assert {step.image_log_odds for s in text_only.solutions for step in s.steps} == {0.0}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    written = "".join(f.read_text(errors="replace") for f in logs.rglob("*") if f.is_file())
    assert re.search(r"audit: id=\w+ key=- route=/v1/rerank status=200 model=\w+ cases=\w+ solutions=2 ", written)
    for words in ("angle is blunted", "shows the effusion", "blunted by fluid"):
        assert words not in written


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_attacks_find_no_fault_no_open_door_and_leave_no_text_in_logs(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["drawn=1", "every=12", "slow_senders=3", "body_timeout_s=1", "flood_s=0.5", "legal=1"]
    families = "families=[drawn, images, keys, texts, json, framing, paths]"
    assert bench.main(["attack", f"model={checkpoint}", families, *small, f"json={tmp_path}/rows.json"]) == 0
    rows = {row["name"]: row["ours"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["attacks"] > 80
    for name in (
        "answered with 5xx",
        "answered with content and without a key",
        "not answered",
        "lines of logs with a text of a request",
    ):
        assert rows[name] == 0, capsys.readouterr().out


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_a_vision_language_model_is_served_beside_another(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medmm_ray.reward_model import RewardModel
    from medmm_ray.service.deployment import running
    from tests.doubles import tiny_vision

    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    folder = tiny_vision.save_llava(tmp_path)
    request = rerank_request(QUESTION, OPTIONS, [RIGHT, LEFT], image=png((40, 30), "teal"))
    towers = ModelConfig(model=str(checkpoint), num_cpus=0.5)
    config = ServeConfig(
        model=str(folder),
        port=0,
        num_cpus=0.5,
        access="loopback",
        models={"towers": towers},
        aliases={"newest": "towers"},
    )
    with running(config) as url:
        answer = Client(url).rerank(request)
        of_towers = Client(url).rerank(request.model_copy(update={"model": "newest"}))
        card, further_card = Client(url).models()
        unknown = httpx.post(f"{url}/v1/rerank", json={**request.model_dump(exclude_unset=True), "model": "oldest"})
        with pytest.raises(ServiceError, match="1 reference_images; at most 0 are allowed"):
            Client(url).rerank(rerank_request(QUESTION, OPTIONS, [RIGHT], image=png(), reference_images=[png()]))
    assert (card.has_image_tower, card.max_reference_images, card.aliases) == (True, 0, [])
    assert (further_card.id, further_card.max_reference_images, further_card.aliases) == ("towers", 8, ["newest"])
    assert (unknown.status_code, "served: " in unknown.json()["detail"]) == (404, True)
    assert (answer.model, of_towers.model) == (str(folder), "towers")
    (of_right, _) = RewardModel.from_pretrained(checkpoint).score(
        to_model_input(request, 10_000).question, [RIGHT, LEFT], image=to_model_input(request, 10_000).image
    )
    steps = of_towers.solutions[0].steps
    assert [step.probability for step in steps] == pytest.approx(of_right.plus_probs, abs=1e-6)
    case = to_model_input(request, 10_000)
    model = RewardModel.from_pretrained(folder)
    for expected, unseen, solution in zip(
        model.score(case.question, [RIGHT, LEFT], (), case.image),
        model.score(case.question, [RIGHT, LEFT]),
        answer.solutions,
        strict=True,
    ):
        assert [s.text_log_odds for s in solution.steps] == pytest.approx(expected.log_odds, abs=1e-5)
        assert expected.log_odds != pytest.approx(unseen.log_odds, abs=1e-3)


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_best_of_n_samples_from_an_engine_of_our_own(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose tiny policy states no answer: each of its samples is counted, and none is scored."""
    from medmm_ray.service.deployment import running

    monkeypatch.delenv("MEDMM_TOKEN", raising=False)
    engine = VllmEngine(max_model_len=512, dtype="float32")
    policy = PolicyConfig(model=str(make_tiny_policy(tmp_path / "policy")), engine=engine)
    config = ServeConfig(model=str(checkpoint), port=0, num_cpus=0.5, access="loopback", policy=policy)
    request = BestOfNRequest(question=QUESTION, options=OPTIONS, num_samples=6, round_size=3, max_tokens=24)
    with running(config) as url, Client(url) as service:
        answer = service.best_of_n(request)
        first, second, last = service.best_of_n_events(request)
    assert (answer.num_drawn, answer.stopped, answer.choice.answer) == (6, "exhausted", None)
    assert sum(answer.rejected.values()) == 6
    assert 6 <= answer.cost.policy.completion_tokens <= 6 * 24
    # The same seeds give the same samples; only the engine's cache knows their prompt now.
    assert isinstance(last, BestOfNAnswer)
    costs = [each.cost.policy for each in (answer, last)]
    assert (last.rejected, costs[1].completion_tokens) == (answer.rejected, costs[0].completion_tokens)
    assert costs[1].cached_tokens >= costs[0].cached_tokens
    assert isinstance(first, Round)
    assert isinstance(second, Round)
    assert (first.num_drawn, second.num_drawn) == (3, 6)
    assert second.cost == last.cost
