"""The shapes that other servers' clients and trainers speak, and what the service says of itself."""

import asyncio
import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.rerank import ModelInput, Scored
from tests.service.web import LEFT, OPTIONS, QUESTION, RIGHT, FakeModel, Scores, b64, body, client, png

TWO_STEPS, ONE_STEP = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
"""The probabilities that the fake gives to the steps of a solution with two of them, and with one."""


@pytest.fixture
def web() -> TestClient:
    return client(FakeModel())


# Cohere's and Jina's rerank


def test_coheres_body_is_answered_in_coheres_shape(web: TestClient) -> None:
    sent = {"model": "two_tower", "query": QUESTION, "documents": ["So (B).", LEFT, {"text": "endless"}]}
    reply = web.post("/v1/rerank", json=sent, headers={"X-Request-Id": "r-1"})
    assert reply.status_code == 200
    assert reply.json() == {
        "id": "r-1",
        "model": "runs/x/two_tower",
        "results": [
            {"index": 1, "relevance_score": pytest.approx(TWO_STEPS), "document": None},
            {"index": 0, "relevance_score": pytest.approx(ONE_STEP), "document": None},
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
        "meta": {"warnings": ["documents.2 has no score: too_long: 5,000 tokens, more than 4,096"]},
    }


@pytest.mark.parametrize(("top_n", "indices"), [(1, [1]), (0, [1, 0]), (9, [1, 0]), (None, [1, 0])])
def test_top_n_and_return_documents(web: TestClient, top_n: int | None, indices: list[int]) -> None:
    sent = {"query": QUESTION, "documents": ["So (B).", {"text": LEFT}], "top_n": top_n, "return_documents": True}
    results = web.post("/v1/rerank", json=sent).json()["results"]
    assert [result["index"] for result in results] == indices
    assert results[0]["document"] == {"text": LEFT}


def test_what_coheres_body_cannot_ask_is_named(web: TestClient) -> None:
    reply = web.post("/v1/rerank", json={"query": QUESTION, "documents": ["x"], "max_tokens_per_doc": 9})
    problem = reply.json()
    assert reply.status_code == 422
    assert [fault["pointer"] for fault in problem["errors"]] == ["#/max_tokens_per_doc"]
    assert "known names: query, documents, top_n, return_documents, model" in problem["detail"]
    other = web.post("/v1/rerank", json={"query": QUESTION, "documents": ["x"], "model": "rerank-v3.5"})
    assert (other.status_code, other.json()["type"]) == (404, "/problems/not_found")
    assert "'rerank-v3.5' is not served here; served: runs/x/two_tower" in other.json()["detail"]


# Scores of steps, and vLLM's score


def test_score_gives_each_steps_probability_and_its_parts(web: TestClient) -> None:
    answer = web.post("/v1/score", json=body(solutions=[RIGHT, LEFT, "endless"], image=b64(png()))).json()
    right, left, unscored = answer["solutions"]
    assert right["probabilities"] == pytest.approx([1 / (1 + math.exp(-5))] * 2)
    assert (right["text_log_odds"], right["image_log_odds"]) == ([2.0, 2.0], [3.0, 3.0])
    assert left["image_log_odds"] == [-3.0, -3.0]
    assert (unscored["probabilities"], unscored["error"]) == ([], "too_long: 5,000 tokens, more than 4,096")
    assert (answer["arm"], answer["usage"]["prompt_tokens"]) == ("multimodal", 7)


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"),
                                   ("data_1", "data_2")])  # fmt: skip
def test_vllms_body_is_answered_in_vllms_shape(web: TestClient, names: tuple[str, str]) -> None:
    reply = web.post("/v1/score", json={"model": "two_tower", names[0]: QUESTION, names[1]: ["So (B).", LEFT]})
    answer = reply.json()
    assert reply.status_code == 200
    assert (answer["object"], answer["id"]) == ("list", reply.headers["x-request-id"])
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": pytest.approx(ONE_STEP)},
        {"index": 1, "object": "score", "score": pytest.approx(TWO_STEPS)},
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_pairs_of_one_question_share_its_reading_and_keep_their_places() -> None:
    model = FakeModel()
    sent = {"text_1": ["Which?", "Where?", "Which?"], "text_2": [LEFT, "So (B).", "So (A)."]}
    answer = client(model).post("/v1/score", json=sent).json()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx([TWO_STEPS, ONE_STEP, ONE_STEP])
    assert sorted(model.calls) == [("Where?", 1, 0, False), ("Which?", 2, 0, False)]
    assert answer["usage"]["total_tokens"] == 14


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "2 questions for 3 solutions; expected one, or as many"),
        ({"text_1": "a", "documents": ["c"]}, "documents, text_1 was sent; expected one pair of text_1 and text_2"),
        ({"text_1": "a", "text_2": []}, "a side is empty"),
        ({"text_1": "a", "text_2": "endless"}, "solution 0 has no score: too_long"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(web: TestClient, sent: dict[str, Any], words: str) -> None:
    reply = web.post("/v1/score", json=sent)
    assert reply.status_code == 422
    assert words in reply.json()["detail"]


# Rewards


def test_rewards_in_numbers(web: TestClient) -> None:
    prompt = {"question": QUESTION, "options": OPTIONS, "gold": "B", "completions": [RIGHT, LEFT, "", "endless (B)"]}
    terms = {"temperature": 0, "answer_weight": 0.5, "max_characters": 60, "margin_characters": 20}
    answer = web.post("/v1/rewards", json={"prompts": [prompt], "terms": terms}).json()
    right, left, empty, unscored = answer["rewards"]
    process = 2 * TWO_STEPS - 1
    # RIGHT has 27 + 21 characters, of which 60 - 20 are free.
    assert right["length"] == pytest.approx(-8 / 20)
    assert right["reward"] == pytest.approx(process + 0.5 - 8 / 20)
    assert right["step_rewards"] == pytest.approx([process, 0.0])
    assert right["probabilities"] == pytest.approx([TWO_STEPS] * 2)
    assert (left["stated"], left["answer"], left["length"]) == ("C", 0.0, -1.0)
    assert left["reward"] == pytest.approx(process - 1)
    assert (empty["reward"], empty["process"], empty["error"]) == (-1.0, -1.0, "empty: the completion has no text")
    assert (unscored["process"], unscored["step_rewards"]) == (-1.0, [])
    assert unscored["error"].startswith("too_long")
    assert [(entry["prompt"], entry["completion"]) for entry in answer["rewards"]] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_prompts_keep_their_places_and_without_a_gold_answer_none_is_checked(web: TestClient) -> None:
    prompts = [{"question": "A?", "completions": ["x"]}, {"question": "B?", "completions": ["", LEFT]}]
    rewards = web.post("/v1/rewards", json={"prompts": prompts}).json()["rewards"]
    assert [(entry["prompt"], entry["completion"], entry["answer"]) for entry in rewards] == [
        (0, 0, None),
        (1, 0, None),
        (1, 1, None),
    ]
    assert rewards[2]["reward"] == pytest.approx(2 * TWO_STEPS - 1)


def test_a_letter_needs_its_options(web: TestClient) -> None:
    reply = web.post("/v1/rewards", json={"prompts": [{"question": "A?", "completions": ["x"], "gold": "B"}]})
    assert reply.status_code == 422
    assert "gold is a letter of the options, and there are none" in reply.json()["detail"]


def test_a_score_that_is_no_number_is_no_reward() -> None:
    class Broken(FakeModel):
        def score(self, *arguments: Any, **options: Any) -> list[Scores]:
            return [Scores([math.nan], [0.0])]

    reply = client(Broken()).post("/v1/rewards", json={"prompts": [{"question": "A?", "completions": ["x"]}]})
    assert (reply.status_code, reply.json()["type"]) == (500, "/problems/internal")
    assert "not_finite" in reply.json()["detail"]


def test_openrlhfs_body_is_answered_in_openrlhfs_shape(web: TestClient) -> None:
    case = {"question": QUESTION, "options": OPTIONS, "gold": "left", "answer_type": "open"}
    sent = {
        "query": [f"P {LEFT}<|im_end|>\n", "P so. The answer is (A).</s>", "Q The answer is left.<eos>"],
        "prompts": ["P ", "P ", "Q "],
        "labels": ["C", "C", json.dumps(case)],
    }
    answer = web.post("/v1/rewards", json=sent).json()
    assert answer["scores"] == [1.0, 0.0, 1.0]
    assert answer["rewards"] == pytest.approx([2 * TWO_STEPS - 1 + 1, 2 * ONE_STEP - 1, 2 * ONE_STEP - 1 + 1])
    assert answer["extra_logs"]["num_steps"] == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"query": ["P x"], "prompts": ["Q"]}, "query.0 does not begin with prompts.0"),
        ({"query": ["P x"], "prompts": ["P", "P"]}, "1 queries, 2 prompts, 1 labels"),
        ({"query": ["P x"], "prompts": ["P"], "labels": ['{"optoins": []}']}, "labels: optoins: Extra inputs"),
    ],
)
def test_samples_that_do_not_fit_are_refused(web: TestClient, sent: dict[str, Any], words: str) -> None:
    reply = web.post("/v1/rewards", json=sent)
    assert reply.status_code == 422
    assert words in reply.json()["detail"]


def test_limits_hold_on_every_route() -> None:
    web = client(FakeModel(), max_solutions=2)
    three = [LEFT] * 3
    for path, sent in (
        ("/v1/rerank", {"query": QUESTION, "documents": three}),
        ("/v1/score", body(solutions=three)),
        ("/v1/score", {"text_1": QUESTION, "text_2": three}),
        ("/v1/rewards", {"prompts": [{"question": QUESTION, "completions": three}]}),
    ):
        reply = web.post(path, json=sent)
        assert (reply.status_code, reply.json()["type"]) == (413, "/problems/too_large")
        assert "3 solutions; at most 2 are allowed" in reply.json()["detail"]


# What the service says of itself


def test_every_example_of_the_openapi_page_is_answered(web: TestClient) -> None:
    page = web.get("/openapi.json").json()
    names: set[str] = set()
    for path, methods in page["paths"].items():
        if "{" in path:
            continue
        if "get" in methods:
            assert web.get(path).status_code == 200, path
        if "post" in methods:
            examples = methods["post"]["requestBody"]["content"]["application/json"]["examples"]
            for name, example in examples.items():
                reply = web.post(path, json=example["value"])
                assert reply.status_code == 200, (path, name, reply.text)
                names.add(f"{path} {name}")
    assert names == {
        "/v1/rerank steps", "/v1/rerank cohere", "/v1/score steps", "/v1/score vllm", "/v1/rewards completions",
        "/v1/rewards openrlhf", "/v1/best_of_n rounds", "/v1/best_of_n stream", "/v1/tile_maps image",
    }  # fmt: skip
    schema = page["paths"]["/v1/score"]["post"]["responses"]["413"]["content"]["application/problem+json"]["schema"]
    assert schema["$ref"].rpartition("/")[2] in page["components"]["schemas"]


def test_models_in_openais_shape(web: TestClient) -> None:
    answer = client(FakeModel(), served_model_name="medmm-8b").get("/v1/models").json()
    assert answer["object"] == "list"
    (card,) = answer["data"]
    assert (card["id"], card["object"], card["checkpoint"]) == ("medmm-8b", "model", "runs/x/two_tower")
    assert (card["fingerprint"], card["max_solutions"]) == ("f00d", 256)
    assert web.get("/v1/models/runs/x/two_tower").json()["id"] == "runs/x/two_tower"
    assert web.get("/v1/models/gpt-4").status_code == 404


def test_metrics_count_requests_solutions_steps_and_tokens(web: TestClient) -> None:
    web.post("/v1/rerank", json=body(solutions=[RIGHT, "endless"]))
    web.post("/v1/rerank", json={})
    web.get("/secret-path")
    samples = {}
    for family in text_string_to_metric_families(web.get("/metrics").text):
        for sample in family.samples:
            samples[sample.name, *sample.labels.values()] = sample.value
    assert samples["medmm_requests_total", "POST", "/v1/rerank", "200"] == 1
    assert samples["medmm_requests_total", "POST", "/v1/rerank", "422"] == 1
    assert samples["medmm_requests_total", "GET", "none", "404"] == 1
    assert samples["medmm_solutions_total", "runs/x/two_tower"] == 1
    assert samples["medmm_solutions_unscored_total", "runs/x/two_tower"] == 1
    assert samples["medmm_steps_total", "runs/x/two_tower"] == 2
    assert samples["medmm_tokens_total", "runs/x/two_tower"] == 7
    assert samples["medmm_request_seconds_count", "/v1/rerank"] == 2
    assert samples["medmm_requests_in_progress",] == 1  # that for the metrics
    assert "secret" not in web.get("/metrics").text


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Scores([2.0, 2.0], [0, 0]), None),
        (Scores([2.0, 2.001], [0, 0]), None),
        (Scores([2.0, 3.0], [0, 0]), "a tiny case has another score than when the model was loaded"),
        (Scores([2.0, math.nan], [0, 0]), "a tiny case has another score than when the model was loaded"),
        (Scores(error="too_long: x"), "a tiny case was not scored: too_long: x"),
        (RuntimeError("CUDA"), "a tiny case was not scored: RuntimeError"),
        (Problem(Kind.OVERLOADED, "busy"), None),
        (Problem(Kind.TIMEOUT, "too slow"), "a tiny case was not scored: too slow"),
    ],
)
def test_readiness_scores_a_tiny_case(answer: Scores | Exception, fault: str | None) -> None:
    calls: list[ModelInput] = []

    async def score(case: ModelInput) -> Scored:
        calls.append(case)
        if isinstance(answer, Exception):
            raise answer
        return Scored([answer])

    readiness = Readiness([2.0, 2.0])
    assert asyncio.run(readiness.fault(score)) == fault
    assert asyncio.run(readiness.fault(score)) == fault
    assert len(calls) == 1, "several balancers share a trial"


def test_what_is_stuck_is_not_ready_and_says_when_to_come_again() -> None:
    web = client(FakeModel(), stuck=lambda: "no pass has ended for 120 s")
    reply = web.get("/ready")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert reply.json()["detail"] == "no pass has ended for 120 s"
    assert web.get("/health").status_code == 200
    assert client(FakeModel()).get("/ready").json() == {"status": "ready", "model": "runs/x/two_tower"}
