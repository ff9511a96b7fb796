"""The scores of every route, and the rewards of every adapter, are those of the offline function to 1e-6, on a real
(tiny) reward model of two towers."""

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from medmm_ray.rewards import openrlhf, verl
from medmm_ray.rewards.trl import step_reward
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.policy import GeneratorPolicy, PolicyConfig
from medmm_ray.service.readiness import Readiness
from medmm_ray.stats.decoders import aggregate
from tests.doubles.fake_generator import FakeGenerator
from tests.doubles.served_app import served_app
from tests.service.web import LEFT, OPTIONS, QUESTION, RIGHT, WITH_IMAGES, b64, client, png

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel

TEXT = "Which side shows the effusion? (A) none (B) right (C) left"
SOLUTIONS: list[str | Sequence[str]] = [RIGHT, LEFT, "The answer is (A)."]
DOCUMENTS = ["An angle is blunted by fluid."]
SAMPLES = [
    f"Step 1: The {side} angle is {sign}.\nStep 2: So the answer is ({letter})."
    for side, sign, letter in (
        ("left", "blunted", "C"), ("right", "blunted", "B"), ("left", "normal", "A"), ("right", "clear", "A"),
        ("left", "an opacity", "C"), ("right", "enlarged", "B"), ("left", "clear", "B"), ("right", "normal", "C"),
    )
]  # fmt: skip


def noise(seed: int) -> Image.Image:
    """A picture of random greys that differ from place to place."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def file_of(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


IMAGE, REFERENCE = noise(1), noise(2)
SEEN = {"documents": DOCUMENTS, "image": b64(file_of(IMAGE)), "reference_images": [b64(file_of(REFERENCE))]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> "RewardModel":
    from tests.doubles import tiny_reward_model

    return tiny_reward_model.two_tower(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def web(model: "RewardModel") -> Iterator[TestClient]:
    """The application on a replica's own scorer, in passes so small that a request takes several."""
    from medmm_ray.service.replica import ReplicaScorer

    config = ServeConfig(model="m", token_budget=256, max_image_pixels=10_000)
    scorer = ReplicaScorer.of_model(model, config)
    policy = GeneratorPolicy(FakeGenerator(_nth_sample()), PolicyConfig())
    backend = Backend(scorer.score, config, WITH_IMAGES, Readiness([]), policy=policy, map_tiles=scorer.map_tiles)
    yield TestClient(api(Models.single(backend), None), base_url="http://127.0.0.1:8000")
    scorer.batcher.close()


def _nth_sample() -> Any:
    """A policy that writes one of `SAMPLES` for each seed, all of them over eight seeds in a row."""
    return lambda prompt, seed: SAMPLES[seed % len(SAMPLES)]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def answered(web: TestClient, path: str, sent: dict[str, Any]) -> Any:
    reply = web.post(path, json=sent)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("is_seen", [False, True])
def test_rerank_score_and_rewards_give_the_steps_probabilities(
    web: TestClient, model: "RewardModel", is_seen: bool
) -> None:
    offline = (
        model.score(TEXT, SOLUTIONS, DOCUMENTS, IMAGE, [REFERENCE])
        if is_seen
        else model.score(TEXT, SOLUTIONS, DOCUMENTS)
    )
    assert any(max(map(abs, score.image_log_odds)) > 0.1 for score in offline) == is_seen
    expected = [score.plus_probs for score in offline]
    assert len({round(p, 3) for steps in expected for p in steps}) > 2, "the model tells steps apart"
    case = {"question": QUESTION, "options": OPTIONS, **(SEEN if is_seen else {"documents": DOCUMENTS})}
    ranked = answered(web, "/v1/rerank", {**case, "solutions": SOLUTIONS})["solutions"]
    scored = answered(web, "/v1/score", {**case, "solutions": SOLUTIONS})["solutions"]
    rewarded = answered(web, "/v1/rewards", {"prompts": [{**case, "completions": SOLUTIONS}]})["rewards"]
    for place, steps in enumerate(expected):
        assert [step["probability"] for step in ranked[place]["steps"]] == pytest.approx(steps, abs=1e-6)
        assert scored[place]["probabilities"] == pytest.approx(steps, abs=1e-6)
        assert rewarded[place]["probabilities"] == pytest.approx(steps, abs=1e-6)
        assert rewarded[place]["reward"] == pytest.approx(process_reward(steps), abs=1e-6)
        assert sum(rewarded[place]["step_rewards"]) == pytest.approx(rewarded[place]["reward"])


def process_reward(probabilities: Sequence[float]) -> float:
    """PURE's min-form at its temperature of 0.1: the rewards 2 p - 1 of the steps, weighted by a softmin of them."""
    rewards = [2 * p - 1 for p in probabilities]
    weights = [math.exp(-reward / 0.1) for reward in rewards]
    return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)


@pytest.mark.parametrize("rule", ["best_of_n", "sc_rm", "majority"])
def test_best_of_n_scores_and_chooses_as_the_offline_function(web: TestClient, model: "RewardModel", rule: str) -> None:
    sent = {"question": QUESTION, "options": OPTIONS, **SEEN, "rule": rule, "num_samples": 7, "round_size": 3}
    answer = answered(web, "/v1/best_of_n", {**sent, "reliability": None if rule == "best_of_n" else 1.0, "seed": 1})
    texts, ranking = answer["texts"], answer["ranking"]
    assert set(texts) < set(SAMPLES)
    offline = model.score(TEXT, texts, DOCUMENTS, IMAGE, [REFERENCE])
    for solution, score in zip(ranking["solutions"], offline, strict=True):
        assert [step["probability"] for step in solution["steps"]] == pytest.approx(score.plus_probs, abs=1e-6)
    rewards = [min(score.plus_probs) for score in offline]
    letters = [text[-3] for text in texts]
    best = max(range(len(texts)), key=lambda place: rewards[place])
    totals: defaultdict[str, float] = defaultdict(float)
    for letter, reward in zip(letters, rewards, strict=True):
        totals[letter] += reward
    votes = {letter: letters.count(letter) for letter in letters}
    if rule == "best_of_n":
        assert (answer["choice"]["solution"], answer["choice"]["answer"]) == (best, letters[best])
    elif rule == "sc_rm":
        assert answer["choice"]["answer"] == max(totals, key=lambda letter: totals[letter])
    else:
        assert votes[answer["choice"]["answer"]] == max(votes.values())


def test_tile_maps_are_the_offline_functions(web: TestClient, model: "RewardModel") -> None:
    from medmm_ray.reward_model import ScoreRequest
    from medmm_ray.reward_model.occlusion import tile_maps

    request = ScoreRequest(TEXT, SOLUTIONS, DOCUMENTS, IMAGE, [REFERENCE])
    expected = tile_maps(model, request, model.text_states(TEXT, SOLUTIONS, DOCUMENTS))
    answer = answered(web, "/v1/tile_maps", {"question": QUESTION, "options": OPTIONS, **SEEN, "solutions": SOLUTIONS})
    for solution, maps in zip(answer["solutions"], expected.tiles, strict=True):
        assert np.array(solution["maps"]) == pytest.approx(np.array(maps), abs=1e-6)
        assert np.abs(maps).max() > 1e-3
    assert expected.attention is not None
    for steps, expected_steps in zip(answer["attention"]["solutions"], expected.attention.solutions, strict=True):
        for step, expected_step in zip(steps, expected_steps, strict=True):
            assert step["share"] == pytest.approx(expected_step.share, abs=1e-6)
            assert np.array(step["weights"]) == pytest.approx(np.array(expected_step.weights), abs=1e-6)


def test_adapters_give_the_offline_functions_rewards(
    web: TestClient, model: "RewardModel", monkeypatch: pytest.MonkeyPatch
) -> None:
    completions = [LEFT, SAMPLES[1]]
    fields = {"question": QUESTION, "options": OPTIONS, "gold": "C"}
    seen = model.score(TEXT, completions, DOCUMENTS, IMAGE, [REFERENCE])
    # LEFT states the gold answer, the other one does not.
    expected = [process_reward(score.plus_probs) + is_right for score, is_right in zip(seen, (1, 0), strict=True)]
    row = {**fields, "documents": DOCUMENTS, "image": file_of(IMAGE), "reference_images": [file_of(REFERENCE)]}
    with served_app(web.app) as url:
        monkeypatch.setenv("MEDMM_URL", url)
        monkeypatch.delenv("MEDMM_TOKEN", raising=False)
        columns = {name: [value] * 2 for name, value in row.items()}
        by_trl = step_reward()(prompts=["P"] * 2, completions=completions, **columns)
        verl_row = {name: value for name, value in row.items() if name != "gold"}
        by_verl = verl.compute_scores(["d"] * 2, completions, ["C"] * 2, [verl_row] * 2, url=url)
        label = json.dumps({**fields, **SEEN})
        by_openrlhf = openrlhf.reward_func([f"P {text}</s>" for text in completions], ["P "] * 2, [label] * 2)
    assert by_trl == pytest.approx(expected, abs=1e-6)
    assert [reward["score"] for reward in by_verl] == pytest.approx(expected, abs=1e-6)
    assert by_openrlhf["rewards"].tolist() == pytest.approx(expected, abs=1e-6)


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
    process = process_reward(score.plus_probs)
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
