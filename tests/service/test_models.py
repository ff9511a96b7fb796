"""Which model a case meets, and one that another deployment holds, asked through a double of its handle."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import RayActorError

from medmm_ray.config import ConfigError, build
from medmm_ray.service.admission import seconds_left
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Description, FurtherModel, ModelReplica, Refusal, model_of
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.replica import ServedModel
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored, steps_of
from tests.service.web import QUESTION, FakeModel, Scores, body, client

FIRST = "runs/x/two_tower"
NAMES: dict[str, Any] = {
    "models": {"small": {"model": "org/small"}, "next": {"model": "org/next"}},
    "aliases": {"default": FIRST, "quick": "small"},
}


def config(**changes: Any) -> ServeConfig:
    return build(ServeConfig, {"model": FIRST, **NAMES, **changes}, "serve")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, None),
        ("", None),
        (FIRST, None),
        ("two_tower", None),
        ("default", None),
        ("small", "small"),
        ("quick", "small"),
        ("next", "next"),
    ],
)
def test_names_and_aliases(name: str | None, expected: str | None) -> None:
    assert model_of(config(), FIRST, name, "q") == expected


def test_an_unknown_name_is_told_which_there_are() -> None:
    with pytest.raises(Problem, match="'big' is not served here; served: runs/x/two_tower, small, next, default"):
        model_of(config(), FIRST, "big", "q")


def test_a_canary_gets_its_share_of_cases_each_always() -> None:
    with_canary = config(canary={"model": "next", "share": 0.1})
    questions = [f"question {number}" for number in range(5000)]
    chosen = [model_of(with_canary, FIRST, None, question) for question in questions]
    # Of 5,000 draws at .1 the share has a standard deviation of .0042.
    assert abs(chosen.count("next") / 5000 - 0.1) < 0.017
    assert set(chosen) == {"next", None}
    assert [model_of(with_canary, FIRST, "default", question) for question in questions] == chosen
    assert {model_of(with_canary, FIRST, FIRST, question) for question in questions} == {None}
    assert {model_of(with_canary, FIRST, "quick", question) for question in questions} == {"small"}
    assert model_of(with_canary, FIRST, None, None) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": {"a b": {"model": "m"}}, "aliases": {}}, "'a b' is no name"),
        ({"models": {"small": {}}, "aliases": {}}, r"models\.small\.model is not set"),
        (
            {"aliases": {"x": "nothing"}},
            "'x' stands for 'nothing', .* one of runs/x/two_tower, small",
        ),
        ({"canary": {"model": "nothing", "share": 0.5}}, "canary: 'nothing' is not among models: small, next"),
        ({"canary": {"model": "next", "share": 1.5}}, r"canary\.share"),
    ],
)
def test_settings_that_name_no_model_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**changes)


class Response:
    """A call's answer as Serve hands it out."""

    def __init__(self, answer: Awaitable[Any]) -> None:
        self._task = asyncio.ensure_future(answer)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Response:
        return Response(self._call(*arguments))


class Handle:
    """A handle of a deployment in this process."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._replica, name))


class Scorer:
    """The scorer of a further model, sure of everything, or refusing."""

    def __init__(self, refusal: Problem | None = None) -> None:
        self.refusal = refusal
        self.seconds_left: list[float | None] = []

    async def score(self, case: ModelInput) -> Scored:
        self.seconds_left.append(seconds_left())
        if self.refusal is not None:
            raise self.refusal
        solutions = []
        for solution in case.solutions:
            num_steps = len(steps_of(solution) if isinstance(solution, str) else solution)
            solutions.append(Scores([5.0] * num_steps, [0.0] * num_steps))
        return Scored(solutions, num_tokens=11)


def further(scorer: Any) -> dict[str, FurtherModel]:
    model = ServedModel(scorer, ModelTraits(has_image_tower=False, num_documents=1), [], "beef", takes_references=False)
    return {name: FurtherModel(Handle(ModelReplica(ServeConfig(), lambda _: model))) for name in ("small", "next")}


def test_each_route_asks_the_model_that_a_request_names() -> None:
    scorer = Scorer()
    web = client(FakeModel(), further=further(scorer), **NAMES)
    case = body(documents=["one", "two"], model="quick")
    answer = web.post("/v1/rerank", json=case, headers={"X-Request-Timeout": "60"}).json()
    assert (answer["model"], answer["usage"]["total_tokens"]) == ("small", 11)
    assert answer["warnings"] == ["documents: 2 were sent, and the model was trained on 1; send the best 1"]
    assert answer["solutions"][0]["steps"][0]["text_log_odds"] == 5.0
    assert scorer.seconds_left[0] is not None
    assert 30 < scorer.seconds_left[0] <= 60
    assert web.post("/v1/score", json=body(model="next")).json()["model"] == "next"
    pairs = {"text_1": QUESTION, "text_2": ["So (A). Step", "So (B)."], "model": "small"}
    assert web.post("/v1/score", json=pairs).json()["model"] == "small"
    prompts = [
        {"question": QUESTION, "completions": [["One.", "So (A)."]], "model": name} for name in ("small", "next")
    ]
    assert web.post("/v1/rewards", json={"prompts": prompts[:1]}).json()["model"] == "small"
    mixed = web.post("/v1/rewards", json={"prompts": prompts})
    assert (mixed.status_code, "ask for 2 models" in mixed.json()["detail"]) == (422, True)
    drawn = web.post("/v1/best_of_n", json={"question": QUESTION, "model": "small", "num_samples": 2}).json()
    assert drawn["ranking"]["model"] == "small"
    counted = [line for line in web.get("/metrics").text.splitlines() if line.startswith("medmm_tokens_total{")]
    # rerank, vLLM's pair, a reward and the rounds of a best of N; the other model's score.
    assert counted == [
        'medmm_tokens_total{model="runs/x/two_tower"} 0.0',
        'medmm_tokens_total{model="small"} 44.0',
        'medmm_tokens_total{model="next"} 11.0',
    ]
    image = web.post("/v1/rerank", json=body(model="small", image="AAAA"))
    assert (image.status_code, "the model small has no image tower" in image.json()["detail"]) == (422, True)


def test_all_models_have_a_card() -> None:
    web = client(FakeModel(), further=further(Scorer()), **NAMES)
    first, small, following = web.get("/v1/models").json()["data"]
    assert (first["id"], first["aliases"], first["fingerprint"]) == (FIRST, ["default"], "f00d")
    assert (small["id"], small["aliases"], small["fingerprint"]) == ("small", ["quick"], "beef")
    assert (small["checkpoint"], small["max_reference_images"], small["has_image_tower"]) == ("org/small", 0, False)
    assert (following["id"], following["aliases"]) == ("next", [])
    assert web.get("/v1/models/quick").json()["id"] == "small"
    assert web.get("/v1/models/other").status_code == 404


def test_a_refusal_of_the_other_deployment_is_the_clients() -> None:
    busy = Problem(Kind.OVERLOADED, "come again", retry_after_s=3)
    web = client(FakeModel(), further=further(Scorer(busy)), **NAMES)
    answer = web.post("/v1/rerank", json=body(model="small"))
    assert (answer.status_code, answer.headers["Retry-After"], answer.json()["detail"]) == (429, "3", "come again")
    assert Refusal.of(Problem(Kind.TOO_LARGE, "much")).problem().headers == {}


class Gone:
    """A deployment whose replica dies under a call."""

    def __init__(self, answers_once: bool) -> None:
        self.answers_once = answers_once

    async def describe(self) -> Description:
        if not self.answers_once:
            raise RayActorError()
        return Description(ModelTraits(has_image_tower=False), "beef", takes_references=True, maps_tiles=False)

    async def score(self, *arguments: Any) -> Scored:
        raise RayActorError()


@pytest.mark.parametrize("answers_once", [True, False])
def test_a_model_whose_replica_died_is_unavailable_for_now(answers_once: bool) -> None:
    web = client(FakeModel(), further={"small": FurtherModel(Handle(Gone(answers_once)))}, **NAMES)
    ids = [card["id"] for card in web.get("/v1/models").json()["data"]]
    assert ids == ([FIRST, "small"] if answers_once else [FIRST])
    answer = web.post("/v1/rerank", json=body(model="small"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "RayActorError" in answer.json()["detail"]
    assert web.post("/v1/rerank", json=body()).status_code == 200
