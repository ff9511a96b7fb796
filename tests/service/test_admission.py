"""What a request meets before its route: slow bodies, bodies that are too much, clients that leave, a busy replica."""

import asyncio
import base64
import io
import json
import time
from collections.abc import Coroutine, Mapping
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.benches.slow_engine import SlowModel, SlowScores
from medmm_ray.service import reading
from medmm_ray.service.app import api
from medmm_ray.service.backend import Backend, no_check
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.models import Models
from medmm_ray.service.problems import Kind, Problem
from medmm_ray.service.readiness import Readiness
from medmm_ray.service.reading import WINDOW, count_values, parse
from medmm_ray.service.replica import ReplicaScorer
from medmm_ray.service.rerank import ModelInput, ModelTraits, Scored

TRAITS = ModelTraits(has_image_tower=True)
BODY = {"question": "Which side?", "solutions": [["one two three", "So the answer is (B)."]], "options": ["a", "b"]}
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/rerank",
    "raw_path": b"/v1/rerank",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "client": ("127.0.0.1", 5000),
    "server": ("127.0.0.1", 8000),
}


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def at_once(case: ModelInput) -> Scored:
    return Scored([SlowScores([1.0] * len(solution), [0.0] * len(solution)) for solution in case.solutions])


def application(score: Any = at_once, check: Any = None, **fields: Any) -> FastAPI:
    config = ServeConfig(model="m", **fields)
    backend = Backend(score, config, TRAITS, Readiness([]), check=check or no_check)
    return api(Models.single(backend), None)


def web(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", timeout=30)


class Connection:
    """One request as a server sees it, its body in parts; `answer` is what came back."""

    def __init__(self, app: FastAPI, headers: Mapping[bytes, bytes] | None = None) -> None:
        self.app = app
        self.scope = {**SCOPE, "headers": [*SCOPE["headers"], *(headers or {}).items()]}
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.answer: list[dict[str, Any]] = []

    def send(self, body: bytes, more: bool) -> None:
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def run(self) -> None:
        async def send(message: dict[str, Any]) -> None:
            self.answer.append(message)

        await self.app(self.scope, self.messages.get, send)  # type: ignore[arg-type]

    @property
    def status(self) -> int | None:
        return self.answer[0]["status"] if self.answer else None

    @property
    def detail(self) -> str:
        return str(json.loads(self.answer[1]["body"])["detail"])


# Slow and absent clients


def test_forty_senders_that_stop_block_nobody_and_are_cut() -> None:
    # Longer than a starved machine takes for one request, which is answered meanwhile.
    app = application(body_timeout_s=5.0)

    async def ask() -> list[Connection]:
        connections = [Connection(app) for _ in range(40)]
        tasks = [asyncio.create_task(connection.run()) for connection in connections]
        for connection in connections:
            connection.send(b'{"question": ', more=True)
        await asyncio.sleep(0)
        async with web(app) as client:
            assert (await client.post("/v1/rerank", json=BODY)).status_code == 200
        assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        return connections

    connections = run(ask())
    assert {connection.status for connection in connections} == {408}
    assert connections[0].detail == "only 13 bytes of the body came within 5 s; send it faster"
    assert (b"connection", b"close") in connections[0].answer[0]["headers"]


def test_a_client_that_leaves_cancels_its_request() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(case: ModelInput) -> Scored:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Scored([])

    app = application(endless)

    async def ask() -> None:
        connection = Connection(app)
        task = asyncio.create_task(connection.run())
        connection.send(json.dumps(BODY).encode(), more=False)
        await started.wait()
        connection.hang_up()
        await task
        assert cancelled.is_set()
        assert connection.answer == []
        # One that leaves in its body is no fault either.
        early = Connection(app)
        early.send(b"{", more=True)
        early.hang_up()
        await early.run()
        assert early.answer == []

    run(ask())


def test_a_body_in_many_parts_is_whole_again() -> None:
    async def ask() -> Connection:
        connection = Connection(application())
        for byte in json.dumps(BODY).encode():
            connection.send(bytes([byte]), more=True)
        connection.send(b"", more=False)
        await connection.run()
        return connection

    assert run(ask()).status == 200


# Bounds


def test_bytes_in_flight_are_bounded_and_given_back() -> None:
    app = application(max_body_mb_in_flight=1, max_body_mb=4)

    async def ask() -> None:
        first, second = Connection(app), Connection(app)
        task = asyncio.create_task(first.run())
        first.send(b" " * 900_000, more=True)
        await asyncio.sleep(0.01)
        second.send(b" " * 200_000, more=False)
        await second.run()
        assert second.status == 429
        assert (b"retry-after", b"1") in second.answer[0]["headers"]
        first.hang_up()
        await task
        third = Connection(app)
        third.send(json.dumps(BODY).encode() + b" " * 200_000, more=False)
        await third.run()
        assert third.status == 200

    run(ask())


def test_pixels_in_flight_are_bounded() -> None:
    gate = asyncio.Event()

    async def waits(case: ModelInput) -> Scored:
        await gate.wait()
        return await at_once(case)

    app = application(waits, max_pixels_in_flight=10_000)
    picture = io.BytesIO()
    Image.new("L", (80, 80)).save(picture, "PNG")
    body = {**BODY, "image": base64.b64encode(picture.getvalue()).decode()}

    async def ask() -> None:
        async with web(app) as client:
            first = asyncio.create_task(client.post("/v1/rerank", json=body))
            await asyncio.sleep(0.2)
            refused = await client.post("/v1/rerank", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "6400 pixels of images are held; with 6400 more" in refused.json()["detail"]
            gate.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/rerank", json=body)).status_code == 200

    run(ask())


def test_a_busy_replica_refuses_before_the_body_is_read() -> None:
    def busy() -> None:
        raise Problem(Kind.OVERLOADED, "overloaded", retry_after_s=3.2)

    async def ask() -> Connection:
        connection = Connection(application(check=busy))  # it sends nothing
        await connection.run()
        return connection

    connection = run(ask())
    assert connection.status == 429
    assert (b"retry-after", b"4") in connection.answer[0]["headers"]


@pytest.mark.parametrize(
    ("value", "limit", "words"),
    [
        (["x"] * 100_001, 100_000, "more values than 100000"),
        ({"question": '"' * 200_001}, 200_000, "a text of 200001 characters is longer than 200000"),
        ("x" * 200_001, 200_000, "a text of 200001 characters is longer than 200000"),
        ({"a": ["x" * 199_000] * 11}, 2_000_000, "together more characters than 2000000"),
        ({"image": [{"text": "x" * 300_000}]}, 0, ""),
        ({"image": "x" * 3_000_000}, 0, ""),
    ],
)
def test_what_a_body_may_hold(value: Any, limit: int, words: str) -> None:
    body = json.dumps(value).encode()
    if not words:
        assert parse(body) == value
        return
    with pytest.raises(Problem, match=words) as refused:
        parse(body)
    assert refused.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "words"),
    [
        # No JSON, any of them: refused before a parser builds the first million values.
        (b"[]," * 300_000, "more values than 100000"),
        (b"[" * 100_001, "more values than 100000"),
        (b'"a":1,' * 100_001, "more values than 100000"),
        (b'{"question": "' + b'\\"' * 2_000_001, "together more escaped characters than 2000000"),
    ],
)
def test_values_are_counted_before_they_are_parsed(body: bytes, words: str) -> None:
    with pytest.raises(Problem, match=words) as refused:
        count_values(body)
    assert refused.value.status_code == 413


@pytest.mark.parametrize("text", ['a "quoted" word', "back\\slash\\", "\\" * 7 + '"', ",:[{" * 40_000, ""])
@pytest.mark.parametrize("num_before", [0, *range(WINDOW - 24, WINDOW)])
def test_what_stands_in_texts_is_no_value(num_before: int, text: str) -> None:
    """Wherever the windows end that are counted at a time: in a text, or between a backslash and a quote."""
    body = b" " * num_before + json.dumps({"question": text, "solutions": [text, "b"]}).encode()
    count_values(body)
    assert parse(body)["solutions"] == [text, "b"]


@given(
    st.lists(st.text(st.sampled_from('a,[]{}:"\\é'), max_size=40), max_size=30),
    st.integers(0, 3),
    st.integers(1, 80),
)
@settings(deadline=None)  # a window of one byte takes long
def test_values_are_counted_in_any_windows(texts: list[str], num_lists: int, window: int) -> None:
    """Commas and brackets of texts are none, whatever else the texts hold: as many as there are pass, one less not."""
    value = [texts, *[[]] * num_lists, {text: text for text in texts}]
    commas = sum(max(0, number - 1) for number in (len(texts), len(value), len({*texts})))
    brackets = 1 + len(value)
    body = json.dumps(value, ensure_ascii=False).encode()
    with patch.multiple(reading, WINDOW=window, MAX_VALUES=max(commas, brackets)):
        count_values(body)
    with (
        patch.multiple(reading, WINDOW=window, MAX_VALUES=max(commas, brackets) - 1),
        pytest.raises(Problem, match="more values"),
    ):
        count_values(body)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'["\\ud800"]', ["\ud800"]),  # half a character, as some clients send
        (b"\xef\xbb\xbf[1]", [1]),
        (b'{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_what_the_fast_parser_refuses_the_standard_one_reads(body: bytes, value: Any) -> None:
    assert parse(body) == value


def test_a_number_that_python_does_not_convert_is_invalid() -> None:
    with pytest.raises(Problem, match="a number of more than 4300 digits") as refused:
        parse(b'{"top_n": ' + b"1" * 5000 + b"}")
    assert refused.value.status_code == 422


@pytest.mark.parametrize("depth", [20, 100_000])
def test_a_deep_body_is_refused(depth: int) -> None:
    with pytest.raises(Problem, match="nested deeper than 16"):
        parse(b"[" * depth + b"]" * depth)


def test_health_answers_while_a_large_body_is_read() -> None:
    """5 MB of values that pydantic would take seconds for, and of text that looks like answers."""
    app = application()
    values = json.dumps({**BODY, "solutions": ["a"] * 1_000_000}).encode()
    answers = json.dumps({**BODY, "solutions": ["the answer is (A). " * 10_000] * 25}).encode()

    async def ask() -> tuple[float, list[float]]:
        async with web(app) as client:
            await client.get("/health")
            started = time.perf_counter()
            for _ in range(20):
                await client.get("/health")
            alone = (time.perf_counter() - started) / 20
            posts = []
            for content in (values, answers):
                headers = {"content-type": "application/json"}
                posts.append(asyncio.create_task(client.post("/v1/rerank", content=content, headers=headers)))
            seconds = []
            while not all(post.done() for post in posts):
                started = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                seconds.append(time.perf_counter() - started)
                await asyncio.sleep(0.002)
            assert [post.result().status_code for post in posts] == [413, 413]
            return alone, sorted(seconds)

    alone, seconds = run(ask())
    # Half of them, and beside what it takes alone: a test shares its cores with others.
    assert seconds[len(seconds) // 2] < 0.05 + 5 * alone


# Time


def slow_application(tokens_per_s: float, **fields: Any) -> tuple[FastAPI, ReplicaScorer]:
    config = ServeConfig(model="m", token_budget=256, **fields)
    scorer = ReplicaScorer(SlowModel(tokens_per_s), config, default_budget=1024)
    return api(Models.single(Backend(scorer.score, config, TRAITS, Readiness([]), check=scorer.check)), None), scorer


def solutions(number: int, words: int) -> list[list[str]]:
    return [["so " * words] for _ in range(number)]


def test_a_request_that_takes_too_long_is_cut_at_its_own_deadline() -> None:
    app, scorer = slow_application(1000)

    async def ask() -> None:
        async with web(app) as client:
            body = {**BODY, "solutions": solutions(20, 200)}
            reply = await client.post("/v1/rerank", json=body, headers={"X-Request-Timeout": "0.3"})
            assert (reply.status_code, reply.json()["type"]) == (408, "/problems/timeout")
            wrong = await client.post("/v1/rerank", json=BODY, headers={"X-Request-Timeout": "soon"})
            assert wrong.status_code == 422
            assert (await client.post("/v1/rerank", json=BODY)).status_code == 200

    try:
        run(ask())
        assert scorer.batcher.counts.num_tokens < 2000  # of 4,000: the rest left the queue
    finally:
        scorer.batcher.close()


def test_under_three_times_the_load_there_are_scores_and_429_and_nothing_else() -> None:
    """Three times what the model reads: what is let in is never more than what may wait."""
    app, scorer = slow_application(4000, max_wait_s=0.2)
    scorer.batcher.meter.add(4000, 1.0)
    waiting: list[int] = []

    async def ask() -> list[httpx.Response]:
        async with web(app) as client:

            async def post(delay: float) -> httpx.Response:
                await asyncio.sleep(delay)
                reply = await client.post("/v1/rerank", json={**BODY, "solutions": solutions(1, 200)})
                waiting.append(scorer.batcher.waiting_tokens)
                return reply

            await post(0.0)  # the first pays for much besides
            # 200 words at 4,000 a second: 20 requests a second are what it can, and 60 come.
            return await asyncio.gather(*(post(i / 60) for i in range(90)))

    try:
        replies = run(ask())
    finally:
        scorer.batcher.close()
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    assert statuses.count(429) >= 30
    assert {reply.headers["retry-after"] for reply in replies if reply.status_code == 429} == {"1"}
    # 0.2 s at 4,000 a second, and the one that was let in last.
    assert max(waiting) <= 0.2 * 4000 + 200


@pytest.mark.parametrize("num_clients", [1, 4, 32])
def test_passes_are_full_with_any_number_of_clients(num_clients: int) -> None:
    """Time says little in a test; that no pass goes out half empty is what throughput rests on."""
    app, scorer = slow_application(60_000, max_wait_s=100.0)

    async def ask() -> None:
        async with web(app) as client:

            async def loop(number: int) -> None:
                for _ in range(number):
                    reply = await client.post("/v1/rerank", json={**BODY, "solutions": solutions(8, 128)})
                    assert reply.status_code == 200

            await asyncio.gather(*(loop(32 // num_clients) for _ in range(num_clients)))

    try:
        run(ask())
        assert scorer.batcher.counts.num_tokens == 32 * 8 * 128
        assert scorer.batcher.counts.fill >= 0.9
    finally:
        scorer.batcher.close()
