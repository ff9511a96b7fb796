"""engines/llm/client.py around a scripted endpoint, and engines/llm/openai.py against a local server."""

import asyncio
import base64
import gc
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from jobs.benches import judge as bench
from jobs.benches.model_server import Answer
from medmm_ray.config import ConfigError, build
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm import access as accesses
from medmm_ray.engines.llm.access import connect, open_access
from medmm_ray.engines.llm.budget import ApiBudget, BudgetError, close_ledger
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine, Client, retry_pause_s
from medmm_ray.engines.llm.endpoint import (
    ChatChoice,
    ChatImage,
    ChatReply,
    ChatRequest,
    EndpointError,
    RetryableError,
    Turn,
)
from medmm_ray.engines.llm.faults import ServerError, fault_of, retry_after_seconds
from medmm_ray.engines.llm.openai import OpenAIEndpoint
from medmm_ray.engines.llm.prices import FREE, Price
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer, stored_answers
from tests.doubles.api_server import CUT, Server, chat_said, failed, serving

OPENAI = ApiEngine(kind="openai")
FAST = ApiConfig(in_flight=4, pause_s=0.001, max_attempts=3)
DEAR = Price(input_price=0.0, cached_input_price=0.0, output_price=1e6 / 100)  # 0.01 dollars a token written


class Scripted:
    """Answers each request by what `script` has for its text: an error to raise, or a text; the last one stays."""

    identity = "scripted"

    def __init__(self, delay_s: float = 0.0, **script: list[Any]) -> None:
        self.script, self.delay_s = script, delay_s
        self.sent: list[str] = []

    async def send(self, request: ChatRequest) -> ChatReply:
        text = str(request.turns[0].parts[0])
        self.sent.append(text)
        await asyncio.sleep(self.delay_s)
        entries = self.script.get(text.split(" ")[0], ["yes"])
        said = entries.pop(0) if len(entries) > 1 else entries[0]
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, ChatReply) else ChatReply((ChatChoice(said, "stop"),), 10, 0, 1)


def asked(text: str, **how: Any) -> ChatRequest:
    return ChatRequest("s", (Turn("user", (text,)),), **{"max_tokens": 10, **how})


def client(endpoint: Any, folder: Path | None = None, config: ApiConfig = FAST, price: Price = FREE) -> Client:
    budget = ApiBudget(str(folder), config.limits) if folder else None
    return Client(endpoint, price, config, budget, AnswerStore(f"{folder}/answers") if folder else None)


def figures(made: Client) -> dict[str, float]:
    assert isinstance(made.budget, ApiBudget)
    return asyncio.run(made.budget.figures())


@pytest.mark.parametrize(
    "fault",
    [
        {"max_cost_usd": -1.0}, {"max_cost_usd": float("nan")}, {"input_price": -1.0}, {"cached_input_price": -1.0},
        {"output_price": -1.0}, {"requests_per_minute": 0.0}, {"tokens_per_minute": 0.0}, {"timeout_s": 0.0},
        {"pause_s": -1.0}, {"pause_s": float("inf")}, {"breaker_faults": 0}, {"breaker_limit_s": -1.0},
    ],
)  # fmt: skip
def test_a_limit_that_limits_nothing_is_refused(fault: dict[str, float]) -> None:
    [name] = fault
    with pytest.raises(ConfigError, match=f"'{name}' is .*: Input should be "):
        build(ApiConfig, fault, "test")


def test_an_answer_is_paid_once_and_kept(tmp_path: Path) -> None:
    endpoint = Scripted()

    async def work(made: Client) -> list[float]:
        return [(await made.ask(asked(text), "q")).cost for text in ("a", "b")]

    first = client(endpoint, tmp_path, price=DEAR)
    assert asyncio.run(work(first)) == [0.01, 0.01]
    again = client(endpoint, tmp_path, price=DEAR)
    assert asyncio.run(work(again)) == [0.01, 0.01]
    assert endpoint.sent == ["a", "b"]
    assert figures(again)["spent"] == 0.02


def test_what_decides_an_answer_is_in_its_key() -> None:
    white, grey = (ChatImage(PIL.Image.new("RGB", (4, 4), (c, c, c))) for c in (255, 127))
    base = ChatRequest("s", (Turn("user", ("a", white)),))
    others = [
        ChatRequest("t", (Turn("user", ("a", white)),)),
        ChatRequest("s", (Turn("model", ("a", white)),)),
        ChatRequest("s", (Turn("user", ("a", grey)),)),
        ChatRequest("s", (Turn("user", (white, "a")),)),
        ChatRequest("s", (Turn("user", ("a", white)),), schema={"type": "array"}),
        ChatRequest("s", (Turn("user", ("a", white)),), max_tokens=5),
        ChatRequest("s", (Turn("user", ("a", white)),), temperature=0.5),
        ChatRequest("s", (Turn("user", ("a", white)),), n=2),
        ChatRequest("s", (Turn("user", ("a", white)),), seed=1),
    ]
    assert len({base.key("m"), base.key("n"), *(other.key("m") for other in others)}) == 11
    same = ChatRequest("s", (Turn("user", ("a", ChatImage(PIL.Image.new("RGB", (4, 4), (255, 255, 255))))),))
    assert same.key("m") == base.key("m")


def test_a_fault_of_the_moment_is_tried_again_and_booked_where_it_may_be_paid(tmp_path: Path) -> None:
    cut, busy = RetryableError("cut", maybe_paid=True), RetryableError("503: busy")
    endpoint = Scripted(a=[cut, busy, "yes"])
    made = client(endpoint, tmp_path, price=DEAR)
    assert asyncio.run(made.ask(asked("a"), "q")).reply.text == "yes"
    found = figures(made)
    assert (found["spent"], found["possibly_paid"], found["lost_calls"]) == (0.01, 0.1, 1)


def test_an_endpoint_that_fails_every_time_is_the_rows_error(tmp_path: Path) -> None:
    endpoint = Scripted(a=[RetryableError("500: oh")])
    with pytest.raises(RowError, match="unavailable: scripted failed 3 times, last: 500: oh"):
        asyncio.run(client(endpoint, tmp_path).ask(asked("a"), "q"))
    assert len(endpoint.sent) == 3


def test_a_pause_is_at_least_what_the_server_asks_for() -> None:
    assert [retry_pause_s(n, 1.0, 0.5, None) for n in (1, 2, 3, 10)] == [1.0, 2.0, 4.0, 30.0]
    assert retry_pause_s(3, 1.0, 0.0, None) == 0.0
    assert retry_pause_s(1, 1.0, 0.25, 7.0) == 7.5


@pytest.mark.parametrize(("asked_s", "said"), [(86_400.0, "86,400"), (float("inf"), "inf")])
def test_a_server_that_asks_for_too_long_a_pause_is_not_waited_for(asked_s: float, said: str) -> None:
    endpoint = Scripted(a=[RetryableError("429: come back tomorrow", retry_after_s=asked_s)])
    with pytest.raises(RowError) as fault:
        asyncio.run(client(endpoint).ask(asked("a"), "q"))
    assert str(fault.value) == (
        f"unavailable: scripted asks to wait {said} s, and longest_wait_s is 600: 429: come back tomorrow"
    )
    assert endpoint.sent == ["a"]


def test_a_refused_request_is_not_sent_again_and_a_refusal_is_not_paid_again(tmp_path: Path) -> None:
    refused = ChatReply((), 10, 0, 0, refusal="it would rather not")
    endpoint = Scripted(bad=[RowError("request", "400")], no=[refused])

    async def work() -> list[str]:
        made = client(endpoint, tmp_path)
        found = await asyncio.gather(*(made.ask(asked(t), "q") for t in ("bad", "no")), return_exceptions=True)
        return [str(fault) for fault in found]

    expected = ["request: 400", "refused: it would rather not"]
    assert (asyncio.run(work()), asyncio.run(work())) == (expected, expected)
    assert sorted(endpoint.sent) == ["bad", "bad", "no"]


async def together(made: Client, number: int, text: str = "a") -> list[Any]:
    asks = (made.ask(asked(text), "q") for _ in range(number))
    return await asyncio.gather(*asks, return_exceptions=True)


def test_what_is_asked_at_the_same_time_is_sent_and_paid_once(tmp_path: Path) -> None:
    endpoint = Scripted(0.02)
    made = client(endpoint, tmp_path, price=DEAR)
    assert [found.cost for found in asyncio.run(together(made, 3))] == [0.01, 0.0, 0.0]
    assert endpoint.sent == ["a"]
    assert (figures(made)["spent"], figures(made)["answers"]) == (0.01, 1)
    again = client(endpoint, tmp_path, price=DEAR)
    assert [found.cost for found in asyncio.run(together(again, 3))] == [0.01, 0.0, 0.0], "kept, the cost is the same"
    assert endpoint.sent == ["a"]


@pytest.mark.parametrize(
    ("said", "fault", "costs", "sent"),
    [
        (RowError("request", "400"), "request: 400", [0.0, 0.0], 1),
        (RetryableError("500"), "unavailable: scripted failed 3 times, last: 500", [0.0, 0.0], 3),
        (ChatReply((), 10, 0, 1, refusal="no"), "refused: no", [0.01, 0.0], 1),
        (EndpointError("401: expired"), "401: expired", None, 1),
    ],
)
def test_a_fault_is_of_all_who_ask_the_same(said: Any, fault: str, costs: list[float] | None, sent: int) -> None:
    endpoint = Scripted(0.01, a=[said])
    found = asyncio.run(together(client(endpoint, price=DEAR), 2))
    assert [str(one) for one in found] == [fault, fault]
    assert costs is None or [one.cost for one in found] == costs
    assert len(endpoint.sent) == sent


def test_where_who_asked_first_is_cancelled_another_takes_over() -> None:
    endpoint = Scripted(0.05)

    async def work() -> list[Any]:
        made = client(endpoint, price=DEAR)
        asking = [asyncio.create_task(made.ask(asked("a"), "q")) for _ in range(4)]
        await asyncio.sleep(0.02)
        asking[0].cancel()
        asking[1].cancel()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert made._in_progress == {}
        return found

    first, second, *others = asyncio.run(work())
    assert isinstance(first, asyncio.CancelledError)
    assert isinstance(second, asyncio.CancelledError)
    assert [answer.cost for answer in others] == [0.01, 0.0]
    assert endpoint.sent == ["a", "a"]


class Held:
    """Holds every request until the test lets one go; each seventh meets a fault whose retry_pause_s is long."""

    identity = "held"

    def __init__(self) -> None:
        self.held: list[asyncio.Future[bool]] = []

    async def send(self, request: ChatRequest) -> ChatReply:
        mine = asyncio.get_running_loop().create_future()
        self.held.append(mine)
        if await mine:
            raise RetryableError("busy", retry_after_s=60.0)
        return ChatReply((ChatChoice("yes", "stop"),), 10, 0, 1)


def test_as_many_are_at_the_server_as_configured(tmp_path: Path) -> None:
    """Whenever one ends another goes in, whoever else waits for a retry_pause_s to end; never more than 8."""
    endpoint = Held()
    made = client(endpoint, tmp_path, ApiConfig(in_flight=8))

    async def work() -> None:
        asking = [asyncio.create_task(made.ask(asked(f"a{i}"), f"q{i % 5}")) for i in range(100)]
        for number in range(92):
            while len(endpoint.held) < 8:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.001)
            assert len(endpoint.held) == 8
            endpoint.held.pop(0).set_result(number % 7 == 0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_who_came_first_is_sent_first_even_again() -> None:
    endpoint = Scripted(0.02, a=[RetryableError("x"), "yes"])
    config = ApiConfig(in_flight=1, pause_s=0.0)

    async def work() -> None:
        made = client(endpoint, config=config)
        await asyncio.gather(*(made.ask(asked(text), "q") for text in ("a", "b", "c", "d")))

    asyncio.run(work())
    assert endpoint.sent == ["a", "b", "c", "a", "d"], "b was at the server by then, c had its reservation"


def test_the_budget_ends_the_job_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    """0.10 dollars at most and 0.01 in truth a call: 1.001 holds (1.00 - 0.10) / 0.01 + 1 calls."""
    endpoint = Scripted()

    async def work(limit: float) -> list[Any]:
        made = client(endpoint, tmp_path, ApiConfig(in_flight=4, max_cost_usd=limit), DEAR)
        return await asyncio.gather(*(made.ask(asked(f"a{i}"), "q") for i in range(120)), return_exceptions=True)

    first = asyncio.run(work(1.001))
    arrived = [found for found in first if not isinstance(found, Exception)]
    over = [found for found in first if isinstance(found, BudgetError)]
    assert (len(arrived), len(over)) == (91, 29)
    assert "would exceed max_cost_usd=1.001: $0.9100 are spent on 91 answers" in str(over[0])
    assert not [found for found in asyncio.run(work(2.0)) if isinstance(found, Exception)]
    assert len(endpoint.sent) == 120, "none was paid twice"


class Unreliable:
    """Bills what it works on, also where the answer is lost on the way; at most `Price.max_cost`."""

    identity = "unreliable"

    def __init__(self, seed: int) -> None:
        self.chance, self.bill = random.Random(seed), 0.0

    async def send(self, request: ChatRequest) -> ChatReply:
        await asyncio.sleep(self.chance.uniform(0, 0.002))
        if self.chance.random() < 0.1:
            raise RetryableError("500")
        written = self.chance.randint(1, request.max_tokens)
        self.bill += written * 0.01
        if self.chance.random() < 0.2:
            raise RetryableError("cut", maybe_paid=True)
        return ChatReply((ChatChoice("yes", "stop"),), 10, 0, written)


@pytest.mark.parametrize("seed", range(3))
def test_no_bill_is_ever_above_the_budget(tmp_path: Path, seed: int) -> None:
    endpoint = Unreliable(seed)
    config = ApiConfig(in_flight=5, max_cost_usd=4.0, pause_s=0.001, max_attempts=9)

    async def work() -> None:
        budget = ApiBudget(str(tmp_path), config.limits)
        clients_of_budget = [
            Client(endpoint, DEAR, config, budget, AnswerStore(f"{tmp_path}/answers")) for _ in range(3)
        ]
        asks = [clients_of_budget[i % 3].ask(asked(f"a{i}"), f"q{i % 7}") for i in range(150)]
        found = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(f) for f in found} <= {BudgetError, PricedAnswer}
        ledger = await budget.figures()
        assert endpoint.bill <= ledger["spent"] + ledger["possibly_paid"] + 1e-9
        assert 3.8 < ledger["spent"] + ledger["possibly_paid"] <= 4.0 + 1e-9

    asyncio.run(work())


def test_a_refused_key_ends_the_job_after_what_is_under_way_is_kept(tmp_path: Path) -> None:
    endpoint = Scripted(0.05, bad=[EndpointError("401: expired; check KEY")])

    async def work() -> list[Any]:
        made = client(endpoint, tmp_path, ApiConfig(in_flight=3))
        texts = ("bad", "b", "c", "d", "e")
        return await asyncio.gather(*(made.ask(asked(text), "q") for text in texts), return_exceptions=True)

    found = asyncio.run(work())
    assert next(str(f) for f in found if isinstance(f, EndpointError)) == "401: expired; check KEY"
    kept = {stored.key: stored.answer for stored in stored_answers(f"{tmp_path}/answers")}
    assert len(kept) == len(endpoint.sent) - 1 == len([f for f in found if not isinstance(f, Exception)])
    assert len(endpoint.sent) < 6


# Faults


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (401, "no key", "EndpointError"),
        (403, "denied", "EndpointError"),
        (404, "no model", "EndpointError"),
        (400, "API key expired. Please renew the API key.", "EndpointError"),
        (429, "You exceeded your quota: insufficient_quota", "EndpointError"),
        (429, "slow down", "RetryableError"),
        (408, "late", "RetryableError"),
        (409, "aborted", "RetryableError"),
        (503, "overloaded", "RetryableError"),
        (400, "content_filter triggered", "refused"),
        (400, "This model's maximum context length is 8192 tokens", "prompt_too_long"),
        (422, "odd image", "request"),
    ],
)
def test_what_a_status_means(status: int, said: str, expected: str) -> None:
    fault = fault_of("m", ServerError(status, said, said), 2.5, "KEY")
    assert (fault.kind if isinstance(fault, RowError) else type(fault).__name__) == expected
    if isinstance(fault, RetryableError):
        assert fault.retry_after_s == 2.5


INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7.25s"}
LIMITED = {"error": {"code": 429, "message": "slow", "details": [{"@type": "x"}, INFO]}}


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [
        (None, "slow down", None),
        ("2.5", "", 2.5),
        ("-1", "", 0.0),
        ("soon", "", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "", 0.0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", "", None),
        (None, json.dumps(LIMITED), 7.25),
        (None, json.dumps([LIMITED], indent=2), 7.25),
        ("2", json.dumps(LIMITED), 7.25),
        ("9", json.dumps(LIMITED), 9.0),
        (None, '{"retryDelay": "a while"}', None),
    ],
)
def test_how_long_a_server_asks_to_wait(header: str | None, body: str, seconds: float | None) -> None:
    assert retry_after_seconds(header, body) == seconds


def test_a_server_may_ask_to_wait_until_a_date() -> None:
    asked_s = retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True), "")
    assert asked_s is not None
    assert 98 < asked_s <= 100


# The OpenAI-compatible endpoint against a local server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with serving() as running:
        yield running


def openai(server: Server, **more: Any) -> OpenAIEndpoint:
    return OpenAIEndpoint("m", address=f"{server.address}/v1", **more)


def test_openai_is_asked_with_texts_pictures_and_a_schema(server: Server) -> None:
    server.script = [chat_said("[1]", cached=400)]
    picture = ChatImage(PIL.Image.new("RGB", (40, 20), (255, 0, 0)), max_side=10)
    turns = (Turn("user", ("look", picture)), Turn("model", ("hm",)), Turn("user", ("again", "please")))
    request = ChatRequest("be kind", turns, {"type": "array"}, max_tokens=7, temperature=0.5, n=2, seed=3)
    reply = asyncio.run(openai(server).send(request))
    assert reply == ChatReply(
        (ChatChoice("[1]", "stop"),), prompt_tokens=1000, cached_tokens=400, completion_tokens=100, model="m"
    )
    [body] = server.requests
    url = body["messages"][1]["content"].pop()["image_url"]["url"]
    sent = PIL.Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (sent.size, sent.getpixel((0, 0))) == ((10, 5), (255, 0, 0))
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "look"}]},
            {"role": "assistant", "content": "hm"},
            {"role": "user", "content": "again\nplease"},
        ],
        "max_completion_tokens": 7,
        "n": 2,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": {"type": "array"}},
        },
    }


@pytest.mark.parametrize(("form", "expected"), [("object", {"type": "json_object"}), ("text", None)])
def test_a_server_without_schemas_is_asked_for_less(server: Server, form: str, expected: Any) -> None:
    server.script = [chat_said("[1]")]
    asyncio.run(openai(server, form=form).send(ChatRequest("s", (), {"type": "array"}, temperature=None)))
    [body] = server.requests
    assert body.get("response_format") == expected
    assert "temperature" not in body


@pytest.mark.parametrize(
    ("answer", "fault", "maybe_paid"),
    [
        (failed(429, "slow"), "429: .*slow", False),
        (failed(500), "500: ", False),
        (CUT, "the connection broke: ServerDisconnectedError", True),
        (Answer("{broken"), "a garbled answer of 7 bytes", True),
        (Answer({"choices": []}), "it has no choices", True),
        (Answer({"choices": [None]}), "a choice is no JSON object", True),
        (Answer({"choices": [{"message": None}]}), "a message is no JSON object", True),
        (Answer({"choices": [{"message": {"content": 5}}]}), "a message's content is no text", True),
        (Answer([]), "the body is no JSON object", True),
        (Answer("null"), "the body is no JSON object", True),
        (Answer('"x"'), "the body is no JSON object", True),
        (Answer("[" * 100_000), "a garbled answer of 100000 bytes", True),
        (
            Answer("<html>", 200, {"Content-Type": "text/html"}),
            r"a garbled answer of 6 bytes \(text/html\): Expecting",
            True,
        ),
    ],
)
def test_faults_of_the_moment(server: Server, answer: Any, fault: str, maybe_paid: bool) -> None:
    server.script = [answer]
    with pytest.raises(RetryableError, match=fault) as error:
        asyncio.run(openai(server).send(asked("a")))
    assert error.value.maybe_paid is maybe_paid
    assert len(server.requests) == 1, "the endpoint does not try again by itself"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"message": {"content": "yes"}}]}, "yes"),
        (
            {"choices": [{"message": {"content": [{"type": "text", "text": "y"}, {"text": "es"}, {"type": "x"}]}}]},
            "yes",
        ),
        ('{"choices": [{"message": {"content": "bad \\ud800 half"}}]}', "bad \ufffd half"),
    ],
)
def test_odd_forms_of_an_answer_are_read(server: Server, body: Any, text: str) -> None:
    server.script = [Answer(body)]
    assert asyncio.run(openai(server).send(asked("a"))).choices == (ChatChoice(text, "stop"),)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 9}}, (7, 7, 3)),
        ({"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": [1]}, (7, 0, 3)),
        ({"prompt_tokens": 7, "completion_tokens": -3}, (7, 0, 20)),
        ({"prompt_tokens": -7, "completion_tokens": None}, (2, 0, 20)),
        ({"prompt_tokens": float("inf"), "completion_tokens": 10**400}, (2, 0, 20)),
        ({"prompt_tokens": float("nan"), "completion_tokens": "3"}, (2, 0, 20)),
        ("none", (2, 0, 20)),
        (None, (2, 0, 20)),
    ],
)
def test_tokens_that_a_server_does_not_count_are_all_that_are_possible(
    server: Server, usage: Any, tokens: tuple[int, int, int]
) -> None:
    """Of "s" and "a", and of 2 answers of at most 10 tokens."""
    server.script = [Answer({"choices": [{"message": {"content": "yes"}}], "usage": usage})]
    reply = asyncio.run(openai(server).send(asked("a", n=2)))
    assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens) == tokens


def test_retry_after_is_honoured(server: Server, tmp_path: Path) -> None:
    server.script = [failed(429, **{"Retry-After": "1"}), chat_said("1")]
    config = ApiConfig(endpoint=f"{server.address}/v1", pause_s=0.0, input_price=1.0, output_price=1.0)
    answer = asyncio.run(connect(OPENAI, "m", config).ask(asked("a"), "q"))
    assert (answer.reply.text, answer.cost) == ("1", 1100 / 1e6)
    assert server.times[1] - server.times[0] >= 1.0


def test_the_pause_of_a_retry_info_is_honoured(server: Server) -> None:
    """As Gemini's OpenAI-compatible address states it."""
    server.script = [Answer([LIMITED], 429)]
    with pytest.raises(RetryableError, match="429: ") as error:
        asyncio.run(openai(server).send(asked("a")))
    assert error.value.retry_after_s == 7.25


def test_a_server_that_hangs_is_a_fault_of_the_moment(server: Server) -> None:
    server.script, server.delay_s = [chat_said("1")], 1.0
    with pytest.raises(RetryableError, match="no answer within 0.2 s") as error:
        asyncio.run(openai(server, timeout_s=0.2).send(asked("a")))
    assert error.value.maybe_paid


def test_what_a_model_does_not_answer(server: Server) -> None:
    server.script = [
        chat_said(None, refusal="I cannot"),
        chat_said("", finish="content_filter"),
        chat_said("[", "length"),
    ]
    replies = [asyncio.run(openai(server).send(asked("a"))) for _ in range(3)]
    assert [reply.refusal for reply in replies] == ["m refused: I cannot", "m did not answer (content filter)", None]
    assert replies[2].cut_off


def test_connections_end_with_their_event_loop_and_the_next_has_its_own(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [chat_said("1")]
    endpoint = openai(server)
    replies = [asyncio.run(endpoint.send(asked("a"))).text for _ in range(2)]
    del endpoint
    gc.collect()
    assert replies == ["1", "1"]
    assert "Unclosed" not in caplog.text


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://", "ftp://host/v1"])
def test_an_address_that_is_none_ends_the_job(server: Server, address: str) -> None:
    with pytest.raises(EndpointError, match="is no address of an API; expected http"):
        asyncio.run(OpenAIEndpoint("m", address=address).send(asked("a")))


def test_a_server_that_is_away_cannot_have_been_paid(server: Server) -> None:
    with pytest.raises(RetryableError, match="no connection: .*127.0.0.1:9") as error:
        asyncio.run(OpenAIEndpoint("m", address="http://127.0.0.1:9/v1").send(asked("a")))
    assert not error.value.maybe_paid


def test_an_expired_key_says_what_to_check(server: Server) -> None:
    server.script = [failed(401, "expired")]
    with pytest.raises(EndpointError, match=r"m answered 401: .*expired.*check OPENAI_API_KEY, the model's name"):
        asyncio.run(openai(server).send(asked("a")))


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(EndpointError, match="environment variable OTHER_KEY; it is not set"):
        connect(OPENAI, "gpt-4o", ApiConfig(key_variable="OTHER_KEY"))


def test_a_missing_key_is_said_before_any_actor_starts_but_for_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's workers may have a key that its driver has not."""
    monkeypatch.setattr(accesses, "start_budget", ApiBudget)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = ApiConfig(key_variable="OTHER_KEY")
    with pytest.raises(EndpointError, match="environment variable OTHER_KEY; it is not set"):
        open_access(OPENAI, "gpt-4o", config, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert open_access(OPENAI, "gpt-4o", config, str(tmp_path)).folder == f"{tmp_path}/gpt-4o"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("OTHER_KEY", "k")
    assert open_access(OPENAI, "gpt-4o", config, str(tmp_path)).model == "gpt-4o"


# Killed

ASK_ALL = """
import asyncio, sys
from medmm_ray.engines.llm.access import connect
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.engines.llm.endpoint import ChatRequest, Turn
from medmm_ray.engines.llm.budget import ApiBudget

address, folder = sys.argv[1:]
how = {"in_flight": 8, "pause_s": 0.02, "max_attempts": 9, "input_price": 1.0, "output_price": 1.0}
config = ApiConfig(endpoint=f"{address}/v1", **how)

async def work():
    client = connect(ApiEngine(kind="openai"), "m", config, ApiBudget(folder, config.limits), folder)
    requests = [ChatRequest("s", (Turn("user", (f"Step 1: {i}.",)),), max_tokens=99) for i in range(160)]
    await asyncio.gather(*(client.ask(request, f"q{i % 9}") for i, request in enumerate(requests)))

asyncio.run(work())
"""


def test_a_kill_pays_nothing_twice_but_what_was_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed three times; a fifth of the attempts meets a fault. In flight: 8."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    config = bench.BenchConfig(latency_s=0.05, fault_rate=0.2)
    with bench.server(config) as address:
        for moment in (30, 80, 130):
            with subprocess.Popen([sys.executable, "-c", ASK_ALL, address, str(tmp_path)]) as process:
                while bench.server_report(address)["arrivals"] < moment:
                    assert process.poll() is None
                    time.sleep(0.01)
                process.kill()
        subprocess.run([sys.executable, "-c", ASK_ALL, address, str(tmp_path)], check=True)
        found = bench.server_report(address)
    assert found["requests"] == 160
    assert found["twice"] <= 3 * 8
    kept = {(stored.group, stored.key) for stored in stored_answers(f"{tmp_path}/answers")}
    assert len(kept) == 160
    paid = close_ledger(str(tmp_path))
    cut = found["faults"]["cut"] + found["faults"]["garbled"]
    assert cut <= paid.lost_calls <= cut + 3 * 8
    bill = (found["tokens"]["prompt"] + found["tokens"]["completion"]) / 1e6
    assert bill <= paid.spent + paid.possibly_paid
