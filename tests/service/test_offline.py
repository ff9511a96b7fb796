"""The scores of every route are those of the offline function, on a real (tiny) reward model."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from medmm_ray.service.config import ServeConfig
from medmm_ray.stats.decoders import aggregate
from tests.service.web import LEFT, OPTIONS, QUESTION, RIGHT, b64, client, png

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel

TEXT = "Which side shows the effusion? (A) none (B) right (C) left"
SOLUTIONS: list[str | Sequence[str]] = [RIGHT, LEFT, "The answer is (A)."]
DOCUMENTS = ["An angle is blunted by fluid."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> "RewardModel":
    from medmm_ray.reward_model import RewardModel
    from tests.doubles import tiny_reward_model

    return RewardModel.from_pretrained(tiny_reward_model.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def web(model: "RewardModel") -> Iterator[TestClient]:
    """The application on a replica's own scorer, in passes so small that a request takes several."""
    from medmm_ray.service.replica import ReplicaScorer

    config = ServeConfig(model="m", token_budget=256)
    scorer = ReplicaScorer.of_model(model, config)
    yield client(model, scorer=scorer.score, max_image_pixels=10_000)  # type: ignore[arg-type]
    scorer.batcher.close()


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def answered(web: TestClient, path: str, sent: dict[str, Any]) -> Any:
    reply = web.post(path, json=sent)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_rerank_score_and_rewards_give_the_steps_probabilities(web: TestClient, model: "RewardModel") -> None:
    expected = [score.plus_probs for score in model.score(TEXT, SOLUTIONS, DOCUMENTS)]
    assert len({round(p, 3) for steps in expected for p in steps}) > 2, "the model tells steps apart"
    case = {"question": QUESTION, "options": OPTIONS, "documents": DOCUMENTS}
    ranked = answered(web, "/v1/rerank", {**case, "solutions": SOLUTIONS})["solutions"]
    scored = answered(web, "/v1/score", {**case, "solutions": SOLUTIONS})["solutions"]
    rewarded = answered(web, "/v1/rewards", {"prompts": [{**case, "completions": SOLUTIONS}]})["rewards"]
    for place, steps in enumerate(expected):
        assert [step["probability"] for step in ranked[place]["steps"]] == pytest.approx(steps, abs=1e-6)
        assert scored[place]["probabilities"] == pytest.approx(steps, abs=1e-6)
        assert rewarded[place]["probabilities"] == pytest.approx(steps, abs=1e-6)
        assert sum(rewarded[place]["step_rewards"]) == pytest.approx(rewarded[place]["reward"])


@pytest.mark.parametrize("how", ["min", "last", "mean"])
def test_other_servers_scores_are_the_aggregates(web: TestClient, model: "RewardModel", how: Any) -> None:
    texts = [LEFT, "The answer is (A)."]
    expected = [sigmoid(aggregate(score.log_odds, how)) for score in model.score(TEXT, texts)]
    sent = {"query": TEXT, "documents": texts, "aggregate": how}
    results = {result["index"]: result for result in answered(web, "/v1/rerank", sent)["results"]}
    pairs = answered(web, "/v1/score", {"text_1": TEXT, "text_2": texts, "aggregate": how})["data"]
    assert [results[place]["relevance_score"] for place in (0, 1)] == pytest.approx(expected, abs=1e-6)
    assert [pair["score"] for pair in pairs] == pytest.approx(expected, abs=1e-6)


def test_openrlhfs_rewards_are_the_min_form(web: TestClient, model: "RewardModel") -> None:
    (score,) = model.score(TEXT, [LEFT])
    rewards = [2 * p - 1 for p in score.plus_probs]
    weights = [math.exp(-reward / 0.1) for reward in rewards]
    process = sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)
    sent = {"query": [f"{TEXT}{LEFT}</s>"], "prompts": [TEXT], "labels": ["C"]}
    assert answered(web, "/v1/rewards", sent)["rewards"] == pytest.approx([process + 1], abs=1e-6)


def test_a_text_model_refuses_images_on_every_route(model: "RewardModel") -> None:
    from medmm_ray.service.rerank import ModelTraits

    web = client(model, traits=ModelTraits(has_image_tower=False))  # type: ignore[arg-type]
    image = b64(png())
    for path, sent in (
        ("/v1/rerank", {"question": "A?", "solutions": ["x"], "image": image}),
        ("/v1/rerank", {"query": "A?", "documents": ["x"], "image": image}),
        ("/v1/score", {"question": "A?", "solutions": ["x"], "image": image}),
        ("/v1/rewards", {"prompts": [{"question": "A?", "completions": ["x"], "image": image}]}),
    ):
        assert web.post(path, json=sent).status_code == 422


def test_a_pass_that_fails_half_way_is_read_again_piece_by_piece_with_the_same_scores(model: "RewardModel") -> None:
    from medmm_ray.reward_model.pass_engine import RewardEngine
    from medmm_ray.service.fair_queue import FairQueue
    from medmm_ray.service.rerank import ModelInput

    engine = RewardEngine(model, 16 << 20)
    queue: FairQueue[Any] = FairQueue()
    cases = [
        ModelInput(TEXT, (tuple(RIGHT), LEFT), (f"{i}: {DOCUMENTS[0] * 30}",), None, (), f"case {i}") for i in range(2)
    ]
    works = [engine.prepare(case) for case in cases]
    for work in works:
        queue.add(work)
    num_calls = 0

    def fail_third(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise MemoryError

    # Behind the layers that have added to the prefix already.
    last_layer: Any = model.text_model.get_decoder().layers[-1]
    handle = last_layer.register_forward_pre_hook(fail_third)
    num_failed = 0
    while len(queue):
        pieces: Any = queue.next_pass(200)
        try:
            engine.forward(pieces)
        except MemoryError:
            num_failed += 1
            for piece in pieces:
                engine.forward([piece])
    handle.remove()
    assert num_failed == 1
    for work, case in zip(works, cases, strict=True):
        expected = model.score(TEXT, case.solutions, case.documents)
        scores: Any = engine.result(work)
        for score, offline in zip(scores, expected, strict=True):
            assert score.text_log_odds == pytest.approx(offline.text_log_odds, abs=1e-5)
