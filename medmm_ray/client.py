"""The client of the service, for scripts (`Client`) and for asyncio (`AsyncClient`): typed requests, typed answers.

    with Client("http://127.0.0.1:8000", key) as client:
        answer = client.rerank(rerank_request("Which side?", ["left", "right"], solutions))

A request that was refused for now (429, 503) or whose connection broke is sent again, after the `Retry-After` that the
service states and a growing random share (`retries`): scoring changes nothing, so that sending twice does no harm. What
is left in the end is a `ServiceError` with the service's words.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from medmm_ray.retries import DEFAULT_RETRIES, Attempts, Retries
from medmm_ray.service.best_of_n import BestOfNAnswer, BestOfNRequest, Round
from medmm_ray.service.cards import ModelCard, ModelList
from medmm_ray.service.foreign import CohereAnswer, CohereRequest
from medmm_ray.service.openrlhf import OpenRlhfAnswer, OpenRlhfRequest
from medmm_ray.service.rerank import Aggregate, AnswerType, RerankAnswer, RerankRequest
from medmm_ray.service.rewards import RewardsAnswer, RewardsRequest
from medmm_ray.service.scores import ScoreAnswer, ScoreRequest

Outcome = httpx.Response | httpx.TransportError
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class ServiceError(RuntimeError):
    """The service refused, or could not be reached.

    `status` is the HTTP status, 0 where there was no answer; `problem` the service's RFC 9457 object, empty where
    something else answered.
    """

    def __init__(self, status: int, message: str, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.problem = dict(problem or {})


def rerank_request(
    question: str,
    options: Sequence[str],
    solutions: Sequence[str | Sequence[str]],
    *,
    documents: Sequence[str] = (),
    image: bytes | None = None,
    reference_images: Sequence[bytes] = (),
    answer_type: AnswerType = "choice",
    aggregate: Aggregate = "min",
) -> RerankRequest:
    """A request from plain values; images are the bytes of their files."""
    return RerankRequest(
        question=question,
        options=list(options),
        solutions=[s if isinstance(s, str) else list(s) for s in solutions],
        documents=list(documents),
        image=None if image is None else image_text(image),
        reference_images=[image_text(content) for content in reference_images],
        answer_type=answer_type,
        aggregate=aggregate,
    )


def image_text(content: bytes) -> str:
    """An image file's bytes as a request has them: base64."""
    return base64.b64encode(content).decode()


@dataclass(frozen=True)
class _Call:
    """One request: what is sent, and what comes back."""

    method: str
    path: str
    body: BaseModel | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The body, as httpx takes it."""
        if self.body is None:
            return {}
        # What was not set is the service's to decide: its defaults may be newer than ours.
        content = self.body.model_dump_json(exclude_unset=True)
        return {"content": content, "headers": {"Content-Type": "application/json"}}


class _Settings:
    """What both clients have in common: where the service is, and what an outcome means."""

    def __init__(self, url: str, key: str, timeout_s: float, retries: Retries) -> None:
        if not url.startswith(("http://", "https://")):
            raise ServiceError(0, f"{url!r} is not the address of a service; expected http://host:port")
        self.url = url.rstrip("/")
        self.retries = retries
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options: dict[str, Any] = {"base_url": self.url, "headers": headers, "timeout": timeout_s}

    def _answer(self, outcome: Outcome, answer: type[AnswerT]) -> AnswerT:
        """What a final outcome holds; a `ServiceError` where it is none that was hoped for."""
        if isinstance(outcome, httpx.TransportError):
            words = str(outcome) or type(outcome).__name__
            raise ServiceError(0, f"{self.url} cannot be reached: {words}; is the service running?") from outcome
        if not outcome.is_success:
            problem = _problem(outcome)
            words = str(problem.get("detail") or outcome.text[:200])
            raise ServiceError(outcome.status_code, f"{self.url} answered {outcome.status_code}: {words}", problem)
        return answer.model_validate_json(outcome.content)

    def _event(self, name: str, data: str) -> Round | BestOfNAnswer:
        """What a server-sent event holds; a `ServiceError` where it is a problem."""
        # The status was sent before anything failed: a fault behind it is an event.
        if name == "problem":
            problem = _object(data)
            status = int(problem.get("status", 500))
            raise ServiceError(status, f"{self.url} ended the stream with {status}: {problem.get('detail')}", problem)
        return (Round if name == "round" else BestOfNAnswer).model_validate_json(data)


def _wait_s(attempts: Attempts, outcome: Outcome) -> float | None:
    """Seconds until the request is sent again; None where its outcome stands."""
    if isinstance(outcome, httpx.TransportError):
        return attempts.wait_s(0, None)
    return attempts.wait_s(outcome.status_code, outcome.headers.get("Retry-After"))


def _streamed(request: BestOfNRequest) -> _Call:
    return _Call("POST", "/v1/best_of_n", request.model_copy(update={"stream": True}))


class _EventParser:
    """Server-sent events from lines: `event:` and `data:`, ended by an empty line (HTML standard, 9.2.6)."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[str] = []

    def feed(self, line: str) -> tuple[str, str] | None:
        """The event that this line ends, its name and its data; None where it ends none."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._name = value
            elif name == "data":
                self._data.append(value)
            return None
        event = (self._name, "\n".join(self._data)) if self._data else None
        self._name, self._data = "", []
        return event


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The problem that an answer is; empty where it is none."""
    return _object(response.text)


def _object(content: str) -> dict[str, Any]:
    # A proxy in between answers in HTML, or in JSON of its own.
    try:
        problem = json.loads(content)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


class Client(_Settings):
    """A client that waits for each answer; safe to use from several threads, and a context manager that closes it."""

    def __init__(
        self,
        url: str,
        key: str = "",
        *,
        timeout_s: float = 120.0,
        retries: Retries = DEFAULT_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, key, timeout_s, retries)
        self._http = httpx.Client(**self._options, transport=transport)

    def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Scores and the ranking of a case's solutions."""
        return self._call(_Call("POST", "/v1/rerank", request), RerankAnswer)

    def rerank_documents(self, request: CohereRequest) -> CohereAnswer:
        """The same in Cohere's shape."""
        return self._call(_Call("POST", "/v1/rerank", request), CohereAnswer)

    def score(self, request: ScoreRequest) -> ScoreAnswer:
        """The probabilities of the steps of a case's solutions."""
        return self._call(_Call("POST", "/v1/score", request), ScoreAnswer)

    def best_of_n(self, request: BestOfNRequest) -> BestOfNAnswer:
        """The answer to a question that the service's policy samples solutions of."""
        return self._call(_Call("POST", "/v1/best_of_n", request), BestOfNAnswer)

    def best_of_n_events(self, request: BestOfNRequest) -> Iterator[Round | BestOfNAnswer]:
        """The same as it comes: each round, then the answer. What is refused is not sent again; to stop reading stops
        the sampling."""
        call = _streamed(request)
        parser = _EventParser()
        try:
            with self._http.stream(call.method, call.path, **call.options) as response:
                # A refusal is no stream: its words are read whole.
                if not response.is_success:
                    response.read()
                    self._answer(response, BestOfNAnswer)
                for line in response.iter_lines():
                    if event := parser.feed(line):
                        yield self._event(*event)
        except httpx.TransportError as error:
            self._answer(error, BestOfNAnswer)

    def rewards(self, request: RewardsRequest) -> RewardsAnswer:
        """Rewards of prompts' completions."""
        return self._call(_Call("POST", "/v1/rewards", request), RewardsAnswer)

    def openrlhf_rewards(self, request: OpenRlhfRequest) -> OpenRlhfAnswer:
        """The same in OpenRLHF's shape."""
        return self._call(_Call("POST", "/v1/rewards", request), OpenRlhfAnswer)

    def models(self) -> list[ModelCard]:
        """The served models."""
        return self._call(_Call("GET", "/v1/models"), ModelList).data

    def rerank_many(
        self, requests: Sequence[RerankRequest], *, concurrency: int = 8
    ) -> Iterator[tuple[int, RerankAnswer]]:
        """The answers to many requests as they come, each with its place among them; `concurrency` at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            places = {pool.submit(self.rerank, request): place for place, request in enumerate(requests)}
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            finally:
                # After a fault, or where the caller takes no more, what has not begun is not sent.
                pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, call: _Call, answer: type[AnswerT]) -> AnswerT:
        attempts = Attempts(self.retries)
        while True:
            outcome: Outcome
            try:
                outcome = self._http.request(call.method, call.path, **call.options)
            except httpx.TransportError as error:
                outcome = error
            wait_s = _wait_s(attempts, outcome)
            if wait_s is None:
                return self._answer(outcome, answer)
            time.sleep(wait_s)


class AsyncClient(_Settings):
    """The same for asyncio; an asynchronous context manager."""

    def __init__(
        self,
        url: str,
        key: str = "",
        *,
        timeout_s: float = 120.0,
        retries: Retries = DEFAULT_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, key, timeout_s, retries)
        self._http = httpx.AsyncClient(**self._options, transport=transport)

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Scores and the ranking of a case's solutions."""
        return await self._call(_Call("POST", "/v1/rerank", request), RerankAnswer)

    async def rerank_documents(self, request: CohereRequest) -> CohereAnswer:
        """The same in Cohere's shape."""
        return await self._call(_Call("POST", "/v1/rerank", request), CohereAnswer)

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        """The probabilities of the steps of a case's solutions."""
        return await self._call(_Call("POST", "/v1/score", request), ScoreAnswer)

    async def best_of_n(self, request: BestOfNRequest) -> BestOfNAnswer:
        """The answer to a question that the service's policy samples solutions of."""
        return await self._call(_Call("POST", "/v1/best_of_n", request), BestOfNAnswer)

    async def best_of_n_events(self, request: BestOfNRequest) -> AsyncIterator[Round | BestOfNAnswer]:
        """The same as it comes: each round, then the answer. What is refused is not sent again; to stop reading stops
        the sampling."""
        call = _streamed(request)
        parser = _EventParser()
        try:
            async with self._http.stream(call.method, call.path, **call.options) as response:
                # A refusal is no stream: its words are read whole.
                if not response.is_success:
                    await response.aread()
                    self._answer(response, BestOfNAnswer)
                async for line in response.aiter_lines():
                    if event := parser.feed(line):
                        yield self._event(*event)
        except httpx.TransportError as error:
            self._answer(error, BestOfNAnswer)

    async def rewards(self, request: RewardsRequest) -> RewardsAnswer:
        """Rewards of prompts' completions."""
        return await self._call(_Call("POST", "/v1/rewards", request), RewardsAnswer)

    async def models(self) -> list[ModelCard]:
        """The served models."""
        return (await self._call(_Call("GET", "/v1/models"), ModelList)).data

    async def rerank_many(
        self, requests: Sequence[RerankRequest], *, concurrency: int = 8
    ) -> AsyncIterator[tuple[int, RerankAnswer]]:
        """The answers to many requests as they come, each with its place among them; `concurrency` at a time."""
        slots = asyncio.Semaphore(concurrency)

        async def answer(place: int, request: RerankRequest) -> tuple[int, RerankAnswer]:
            """One of them, when its turn has come."""
            async with slots:
                return place, await self.rerank(request)

        tasks = [asyncio.ensure_future(answer(place, request)) for place, request in enumerate(requests)]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for unfinished in tasks:
                unfinished.cancel()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _call(self, call: _Call, answer: type[AnswerT]) -> AnswerT:
        attempts = Attempts(self.retries)
        while True:
            outcome: Outcome
            try:
                outcome = await self._http.request(call.method, call.path, **call.options)
            except httpx.TransportError as error:
                outcome = error
            wait_s = _wait_s(attempts, outcome)
            if wait_s is None:
                return self._answer(outcome, answer)
            await asyncio.sleep(wait_s)
