"""The client: against the application in process, against one that refuses, and the documents' curl lines."""

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from medmm_ray.client import AsyncClient, Client, ServiceError, rerank_request
from medmm_ray.retries import Retries
from medmm_ray.service.best_of_n import BestOfNRequest, Round
from medmm_ray.service.foreign import CohereRequest
from medmm_ray.service.rewards import PromptCompletions, RewardsRequest
from medmm_ray.service.scores import ScoreRequest
from tests.doubles.served_app import served_app
from tests.paths import ROOT
from tests.service.web import LEFT, OPTIONS, QUESTION, RIGHT, FakeModel, client, png

REQUEST = rerank_request(QUESTION, OPTIONS, [RIGHT, LEFT], image=png(colour="white"), reference_images=[png()])
AT_ONCE = Retries(number=3, first_s=0.0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_app(client(FakeModel(), token="s3cret").app) as url:  # noqa: S106
        yield url


def test_each_call_is_answered_typed(url: str) -> None:
    with Client(url, "s3cret") as service:
        answer = service.rerank(REQUEST)
        assert (answer.best_of_n.answer, answer.arm) == ("C", "multimodal")
        scores = service.score(ScoreRequest(question=QUESTION, solutions=[RIGHT]))
        assert scores.solutions[0].text_log_odds == [2.0, 2.0]
        prompt = PromptCompletions(question=QUESTION, options=OPTIONS, completions=[LEFT], gold="C")
        assert service.rewards(RewardsRequest(prompts=[prompt])).rewards[0].answer == 1.0
        ranked = service.rerank_documents(CohereRequest(query=QUESTION, documents=["x", LEFT]))
        assert [result.index for result in ranked.results] == [1, 0]
        assert [card.id for card in service.models()] == ["runs/x/two_tower"]


SAMPLED = BestOfNRequest(question=QUESTION, options=OPTIONS, num_samples=6, round_size=2, reliability=None)


def test_best_of_n_whole_and_as_it_comes(url: str) -> None:
    with Client(url, "s3cret") as service:
        answer = service.best_of_n(SAMPLED)
        *rounds, last = service.best_of_n_events(SAMPLED)
    assert (answer.choice.answer, last) == ("C", answer)
    # All six are alike: best of N stands only when no other sample can come.
    assert [len(event.texts) for event in rounds] == [2, 2, 2]
    assert {type(event) for event in rounds} == {Round}

    async def events() -> list[Any]:
        async with AsyncClient(url, "s3cret") as service:
            assert await service.best_of_n(SAMPLED) == answer
            return [event async for event in service.best_of_n_events(SAMPLED)]

    assert asyncio.run(events()) == [*rounds, last]


def test_a_stream_that_is_refused_or_fails_is_an_error(url: str) -> None:
    with Client(url) as stranger, pytest.raises(ServiceError, match="answered 401"):
        next(stranger.best_of_n_events(SAMPLED))
    with pytest.raises(ServiceError, match="cannot be reached"), Client("http://127.0.0.1:9") as lost:
        next(lost.best_of_n_events(SAMPLED))
    problem = 'event: problem\ndata: {"status": 503, "detail": "the policy is gone"}\n\n'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=problem))
    with (
        Client("http://127.0.0.1:9", transport=transport) as service,
        pytest.raises(ServiceError, match="ended the stream with 503: the policy is gone") as broken,
    ):
        list(service.best_of_n_events(SAMPLED))
    assert broken.value.status == 503


def test_the_same_for_asyncio(url: str) -> None:
    async def calls() -> None:
        async with AsyncClient(url, "s3cret") as service:
            assert (await service.rerank(REQUEST)).best_of_n.answer == "C"
            scores = await service.score(ScoreRequest(question=QUESTION, solutions=[RIGHT]))
            assert len(scores.solutions) == 1
            prompt = PromptCompletions(question=QUESTION, completions=[LEFT])
            assert len((await service.rewards(RewardsRequest(prompts=[prompt]))).rewards) == 1
            ranked = await service.rerank_documents(CohereRequest(query=QUESTION, documents=["x"]))
            assert len(ranked.results) == 1
            assert len(await service.models()) == 1

    asyncio.run(calls())


def test_a_refusal_has_the_services_words(url: str) -> None:
    with Client(url) as stranger, pytest.raises(ServiceError, match=r"answered 401: .*key is missing") as refused:
        stranger.rerank(REQUEST)
    assert (refused.value.status, refused.value.problem["type"]) == (401, "/problems/unauthenticated")
    with (
        Client(f"{url}/elsewhere", "s3cret") as lost,
        pytest.raises(ServiceError, match="answered 404: POST /elsewhere"),
    ):
        lost.rerank(REQUEST)


def test_without_a_service() -> None:
    with pytest.raises(ServiceError, match="cannot be reached"), Client("http://127.0.0.1:9", retries=AT_ONCE) as lost:
        lost.rerank(REQUEST)
    with pytest.raises(ServiceError, match="expected http://host:port"):
        Client("127.0.0.1:8000")


# Many requests


def numbered(count: int) -> list[Any]:
    return [rerank_request(QUESTION, OPTIONS, [RIGHT] * (number + 1)) for number in range(count)]


def test_many_requests_are_answered_as_they_come_each_with_its_place(url: str) -> None:
    with Client(url, "s3cret") as service:
        answers = dict(service.rerank_many(numbered(9), concurrency=3))
    assert {place: len(answer.solutions) for place, answer in answers.items()} == {n: n + 1 for n in range(9)}

    async def sizes() -> dict[int, int]:
        async with AsyncClient(url, "s3cret") as service:
            return {place: len(answer.solutions) async for place, answer in service.rerank_many(numbered(9))}

    assert asyncio.run(sizes()) == {n: n + 1 for n in range(9)}


def test_a_fault_among_many_ends_them() -> None:
    sent: list[httpx.Request] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(422, json={"detail": "no"})

    service = Client("http://service", transport=httpx.MockTransport(refuse))
    with service, pytest.raises(ServiceError, match="answered 422: no"):
        list(service.rerank_many(numbered(50), concurrency=1))
    assert len(sent) < 50


# Retries


class Scripted:
    """Answers with each outcome in turn: a status, a status with `Retry-After`, or an error."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.num_calls = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.num_calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        status, retry_after = outcome if isinstance(outcome, tuple) else (outcome, None)
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        if status != 200:
            return httpx.Response(status, headers=headers, json={"detail": f"status {status}"})
        return httpx.Response(200, json={"object": "list", "data": []})


@pytest.mark.parametrize(
    ("outcomes", "num_calls", "status"),
    [
        ([200], 1, None),
        ([503, 429, 200], 3, None),
        ([httpx.ReadError("reset"), httpx.ConnectError("refused"), 200], 3, None),
        ([(429, "0"), (503, "0"), (503, "0"), 200], 4, None),
        ([503] * 4, 4, 503),
        ([httpx.ReadError("reset")] * 4, 4, 0),
        ([422], 1, 422),
        ([500], 1, 500),
        ([(429, "86400")], 1, 429),
    ],
)
def test_what_is_refused_for_now_is_sent_again(outcomes: list[Any], num_calls: int, status: int | None) -> None:
    for is_async in (False, True):
        script = Scripted(*outcomes)
        if status is None:
            assert models(script, is_async) == []
        else:
            with pytest.raises(ServiceError) as fault:
                models(script, is_async)
            assert fault.value.status == status
        assert script.num_calls == num_calls


def models(script: Scripted, is_async: bool) -> list[Any]:
    transport = httpx.MockTransport(script)
    if not is_async:
        with Client("http://service", retries=AT_ONCE, transport=transport) as service:
            return list(service.models())

    async def call() -> list[Any]:
        async with AsyncClient("http://service", retries=AT_ONCE, transport=transport) as service:
            return list(await service.models())

    return asyncio.run(call())


def test_retry_after_is_waited_for() -> None:
    started = time.monotonic()
    assert models(Scripted((503, "1"), 200), is_async=False) == []
    assert time.monotonic() - started >= 1


# The documents


def curl_commands() -> list[list[str]]:
    """The curl commands of the documents, each as its words."""
    commands: list[list[str]] = []
    for name in ("README.md", "docs/serving.md"):
        for block in re.findall(r"```bash\n(curl.*?)```", (ROOT / name).read_text(), re.DOTALL):
            for word in shlex.split(block.replace("\\\n", " ")):
                if word == "curl":
                    commands.append([])
                commands[-1].append(word)
    return commands


def test_the_documents_curl_commands_are_answered(url: str) -> None:
    commands = curl_commands()
    assert len(commands) >= 5
    for words in commands:
        there = [word.replace("http://127.0.0.1:8000", url).replace("$MEDMM_TOKEN", "s3cret") for word in words]
        command = [*there, "--silent", "--show-error", "--write-out", "\n%{http_code}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, (words, done.stderr)
        content, _, status = done.stdout.rpartition("\n")
        assert status == "200", (words, content)
