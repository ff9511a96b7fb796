"""The proxy's own errors as problems: with the messages that Ray 2.60's proxy sends, and its own middleware inside."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from ray.serve._private.http_util import _apply_middlewares, convert_object_to_asgi_messages
from starlette.types import Message, Receive, Scope, Send

from medmm_ray.service.proxy import middlewares


def through(messages: Sequence[Message], **headers: str) -> tuple[dict[str, str], bytes, int]:
    """What a client gets where Ray's proxy sends `messages`: headers, body and status."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/x", "headers": pairs}
    app = _apply_middlewares(proxy, middlewares())  # type: ignore[arg-type]

    async def call() -> None:
        await app(scope, receive, send)

    asyncio.run(call())
    names = [name.lower() for name, _ in answer[0]["headers"]]
    assert len(names) == len(set(names)), f"a header stands twice: {names}"
    received = {name.decode().lower(): value.decode() for name, value in answer[0]["headers"]}
    return received, b"".join(message.get("body", b"") for message in answer[1:]), answer[0]["status"]


@pytest.mark.parametrize(
    ("status", "words", "kind", "retry_after"),
    [
        (404, "Path '/x' not found. Ping http://.../-/routes for available routes.", "not_found", None),
        (408, "Request r-1 timed out after 300.0s.", "timeout", None),
        (503, "Request dropped due to backpressure (num_queued_requests=9)", "unavailable", "1"),
        (500, "Internal Server Error", "internal", None),
        (503, "", "unavailable", "1"),
    ],
)
def test_what_ray_says_in_plain_text_is_a_problem(status: int, words: str, kind: str, retry_after: str | None) -> None:
    messages = convert_object_to_asgi_messages(words, status_code=status)
    headers, content, answered = through(messages, x_request_id="r-1")
    problem = json.loads(content)
    assert (answered, headers["content-type"]) == (status, "application/problem+json")
    assert (problem["type"], problem["status"], problem["instance"]) == (f"/problems/{kind}", status, "r-1")
    assert problem["detail"] == (words or "The service is not available")
    assert (headers.get("retry-after"), headers["x-request-id"]) == (retry_after, "r-1")


def test_rays_own_retry_after_is_kept() -> None:
    messages = convert_object_to_asgi_messages("busy", status_code=429, extra_headers=[(b"retry-after", b"7")])
    headers, _, status = through(messages)
    assert (status, headers["retry-after"]) == (429, "7")


def test_a_replica_that_died_is_503_and_not_500() -> None:
    headers, content, status = through([])
    assert (status, headers["retry-after"]) == (503, "1")
    assert b"the replica that had the request is gone; send it again" in content


def test_a_client_that_went_away_is_answered_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # and so the proxy cancels the request

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    app = _apply_middlewares(proxy, middlewares())  # type: ignore[arg-type]

    async def call() -> None:
        await app({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)

    asyncio.run(call())
    assert answer == []
    assert "replica died" not in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"), [(200, b"text/plain"), (422, b"application/problem+json"), (418, b"application/json")]
)
def test_what_a_replica_answers_passes_as_it_is_but_for_one_id(status: int, kind: bytes) -> None:
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", kind), (b"x-request-id", b"r")],
    }
    parts = [{"type": "http.response.body", "body": part, "more_body": part != b"b"} for part in (b"a", b"b")]
    headers, content, answered = through([start, *parts], x_request_id="r")
    assert (answered, content) == (status, b"ab")
    assert headers == {"content-type": kind.decode(), "x-request-id": "r"}


def test_an_id_that_is_not_usable_is_replaced_before_ray_echoes_it() -> None:
    headers, _, _ = through(convert_object_to_asgi_messages("ok"), x_request_id="a b")
    assert len(headers["x-request-id"]) == 32
