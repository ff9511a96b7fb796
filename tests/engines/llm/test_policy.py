"""engines/llm/policy.py: samples of an API are requests of their own, stored, priced, and paid for once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Sampling
from medmm_ray.engines.llm.access import connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatImage, ChatReply, ChatRequest, EndpointError, RetryableError
from medmm_ray.engines.llm.policy import ApiPolicy, request_of
from medmm_ray.engines.llm.prices import Price
from medmm_ray.engines.llm.store import AnswerStore
from medmm_ray.prompts import policy_messages
from tests.doubles.api_server import chat_said, serving

FAST = ApiConfig(in_flight=4, pause_s=0.001, max_attempts=2)
PRICE = Price(input_price=1.0, cached_input_price=0.5, output_price=100.0)
PROMPT = ChatPrompt(policy_messages("What is it?"))
HOW = Sampling(temperature=0.7, max_tokens=50)


class Model:
    """Says its seed; refuses seed 2, cuts seed 3 off; seed 7 is a bad request, 8 is away, 9 too long."""

    identity = "model"

    def __init__(self) -> None:
        self.seeds: list[int | None] = []
        self.ended: list[int | None] = []

    async def send(self, request: ChatRequest) -> ChatReply:
        self.seeds.append(request.seed)
        await asyncio.sleep(0.001)
        self.ended.append(request.seed)
        if request.seed == 7:
            raise RowError("request", "answered 422")
        if request.seed == 8:
            raise RetryableError("503")
        if request.seed == 9:
            raise RowError("prompt_too_long", "9 tokens")
        choice = ChatChoice(f"seed {request.seed}", "length" if request.seed == 3 else "stop")
        return ChatReply(
            (choice,),
            prompt_tokens=1000,
            cached_tokens=200,
            completion_tokens=10,
            refusal="no" if request.seed == 2 else None,
        )


def policy(model: Any, folder: Path) -> ApiPolicy:
    return ApiPolicy(Client(model, PRICE, FAST, ApiBudget(str(folder), FAST.limits), AnswerStore(f"{folder}/answers")))


def test_samples_have_a_seed_each_and_a_price_and_are_asked_once(tmp_path: Path) -> None:
    async def draw(model: Model, n: int) -> Any:
        return await policy(model, tmp_path).generate(PROMPT, n, 0, HOW)

    model = Model()
    made = asyncio.run(draw(model, 4))
    assert sorted(s for s in model.seeds if s is not None) == [0, 1, 2, 3]
    assert [(c.text, c.finish_reason, c.seed) for c in made] == [
        ("seed 0", "stop", 0),
        ("seed 1", "stop", 1),
        ("", "refused", 2),
        ("seed 3", "length", 3),
    ]
    assert (made[0].prompt_tokens, made[0].cached_tokens, made[0].num_tokens) == (1000, 200, 10)
    assert made[0].cost == pytest.approx((800 * 1.0 + 200 * 0.5 + 10 * 100.0) / 1e6)
    assert [c.cost for c in made] == [made[0].cost] * 4, "a refusal is paid too"
    again = Model()
    assert asyncio.run(draw(again, 5))[:4] == made
    assert again.seeds == [4]


def test_a_sample_that_could_not_be_had_leaves_the_others_whole(tmp_path: Path) -> None:
    made = asyncio.run(policy(Model(), tmp_path).generate(PROMPT, 4, 5, HOW))
    assert [(c.text, c.finish_reason, c.seed, c.cost > 0) for c in made] == [
        ("seed 5", "stop", 5, True),
        ("seed 6", "stop", 6, True),
        ("", "request", 7, False),
        ("", "unavailable", 8, False),
    ]
    assert [str(c.fault) for c in made] == [
        "None", "None", "request: answered 422", "unavailable: model failed 2 times, last: 503"
    ]  # fmt: skip


def test_a_prompt_that_is_too_long_is_the_questions_fault(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="prompt_too_long: 9 tokens"):
        asyncio.run(policy(Model(), tmp_path).generate(PROMPT, 2, 8, HOW))


def test_the_first_sample_goes_ahead_so_that_the_others_find_their_prompt_cached(tmp_path: Path) -> None:
    class Watched(Model):
        async def send(self, request: ChatRequest) -> ChatReply:
            assert request.seed == 10 or 10 in self.ended
            return await super().send(request)

    model = Watched()
    asyncio.run(policy(model, tmp_path).generate(PROMPT, 5, 10, HOW))
    assert sorted(s for s in model.seeds if s is not None) == [10, 11, 12, 13, 14]


def test_a_key_that_is_refused_ends_the_job(tmp_path: Path) -> None:
    class Locked(Model):
        async def send(self, request: ChatRequest) -> ChatReply:
            raise EndpointError("model answered 401: no key; check K")

    with pytest.raises(EndpointError, match="answered 401"):
        asyncio.run(policy(Locked(), tmp_path).generate(PROMPT, 3, 0, HOW))


def test_a_prompt_as_a_request() -> None:
    picture = Image.new("RGB", (4, 4), "red")
    request = request_of(ChatPrompt(PROMPT.messages, [picture], prefix="Step 1:"), HOW)
    assert request.system == PROMPT.messages[0]["content"]
    asked, said = request.turns
    assert (asked.role, asked.parts[0], len(asked.parts)) == ("user", "Question: What is it?", 2)
    assert isinstance(asked.parts[1], ChatImage)
    assert (said.role, said.parts) == ("model", ("Step 1:",))
    assert (request.temperature, request.max_tokens, request.seed) == (0.7, 50, None)


def test_a_real_client_passes_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    with serving() as server:
        server.script = [chat_said("Step 1: Look.")]
        config = ApiConfig(endpoint=f"{server.address}/v1", input_price=1.0, output_price=2.0)

        async def draw() -> Any:
            budget = ApiBudget(str(tmp_path), config.limits)
            client = connect(ApiEngine(kind="openai"), "gpt-x", config, budget, str(tmp_path))
            return await ApiPolicy(client).generate(PROMPT, 3, 4096, HOW)

        made = asyncio.run(draw())
        assert [c.text for c in made] == ["Step 1: Look."] * 3
        assert sorted(asked["seed"] for asked in server.requests) == [4096, 4097, 4098]
        assert {(asked["temperature"], asked["max_completion_tokens"]) for asked in server.requests} == {(0.7, 50)}
        assert sum(c.cost for c in made) == pytest.approx(3 * (1000 * 1.0 + 100 * 2.0) / 1e6)
