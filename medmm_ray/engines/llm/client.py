"""How a step asks an API: each request once, whatever is killed; many at a time; within rate limits and budget.

Enters: a `ChatRequest` and its group (a question's id). Leaves: a `PricedAnswer` with its cost. An answer that is kept
already is taken from there, one that is under way is waited for. Otherwise the worst case is reserved in the budget,
ahead of time, so that `in_flight` requests really are at the server; faults of the moment are tried again with growing,
jittered pauses, never sooner than the server asks; a whole answer is kept durably before it is used, and until then it
counts as in flight: a kill loses no more than `in_flight` answers, and no more are booked as possibly paid.
"""

import asyncio
import heapq
import itertools
import logging
import math
import os
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import Field

from medmm_ray.config import Config, ConfigError, execution
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.budget import (
    HEARTBEAT_S,
    Budget,
    BudgetError,
    Limits,
    PlannedCall,
    ReserveResult,
    Settlement,
    start_budget,
)
from medmm_ray.engines.llm.endpoint import ChatReply, ChatRequest, Endpoint, EndpointError, RetryableError
from medmm_ray.engines.llm.gemini import gemini_endpoint
from medmm_ray.engines.llm.openai import OpenAIEndpoint
from medmm_ray.engines.llm.prices import Price, price_of
from medmm_ray.engines.llm.served import OtherModelError, is_same_model, names_a_model, other_model_message
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer

log = logging.getLogger("medmm_ray")

GEMINI_ADDRESS = "https://generativelanguage.googleapis.com/v1beta/openai"  # of its OpenAI-compatible API
LONGEST_PAUSE_S = 60.0
AHEAD = 0.5  # leases that wait beside those at the server, as a share of in_flight
BYTES_A_TOKEN = 4  # of English text, about: for the rate limit, which the provider estimates too
Backend = Literal["gemini", "openai"]
Item = TypeVar("Item")
Result = TypeVar("Result")


class ApiConfig(Config):
    """How a step reaches a model behind an API, and what it may cost. The models' own names are the step's."""

    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature; null leaves it to the model (reasoning models take no other)."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(None)
    """How long a model that thinks may do so; null leaves it to the model."""
    form: str = Field("schema", pattern="^(schema|object|text)$")
    """How an API is held to JSON: schema (a JSON schema), object (any JSON object) or text (by the prompt alone)."""
    input_price: float | None = execution(None, ge=0)
    """US dollars per million prompt tokens; null takes the table's."""
    cached_input_price: float | None = execution(None, ge=0)
    """US dollars per million prompt tokens that the provider had cached; null takes the table's."""
    output_price: float | None = execution(None, ge=0)
    """US dollars per million generated tokens; null takes the table's."""
    flex_price_share: float | None = execution(None, ge=0)
    """Share of these prices that the flex tier costs; null takes the table's (a half for Google's and OpenAI's models,
    1 for those that it does not have)."""
    tier: Literal["flex"] | None = execution(None)
    """Service tier: flex is slower, may be refused for want of capacity, and costs a half at Google and OpenAI; null:
    the standard one. An answer is booked at the tier that really served it."""
    on_other_model: Literal["stop", "warn"] = execution("stop")
    """What happens where another model answers than the one that was asked (a retired one may be routed to its
    successor): stop ends the job, warn goes on. A dated snapshot counts as the asked model; a bare word (default) names
    none, and is told alone."""
    answers_as: str | None = execution(None)
    """Name under which the model answers, where its address calls it otherwise: an Azure deployment, an alias."""
    max_cost_usd: float | None = execution(None, ge=0)
    """Most US dollars that the run may spend on this model, worst cases included; null: no limit of this section's."""
    requests_per_minute: float | None = execution(None, gt=0)
    """Most requests a minute of the whole cluster to this model; null: no limit of this section's."""
    tokens_per_minute: float | None = execution(None, gt=0)
    """Most tokens a minute of the whole cluster to this model; null: no limit of this section's."""
    endpoint: str | None = execution(None)
    """Another address of the API: a proxy, a vLLM server, Gemini's OpenAI-compatible one."""
    length_field: Literal["max_completion_tokens", "max_tokens"] | None = execution(None)
    """openai: the name under which the server takes the longest answer; null: the first, and the second from when the
    server refuses that. Name it where a server ignores the first, as Ollama does."""
    gemini_client: Literal["rest", "sdk"] | None = execution(None)
    """gemini: rest (nothing to install) or sdk (google-generativeai); null: sdk where that is installed, rest for tier
    and reasoning_effort, which the sdk has no fields for."""
    key_variable: str | None = execution(None)
    """Environment variable that holds the key; null: GEMINI_API_KEY or OPENAI_API_KEY."""
    in_flight: int = Field(16, ge=1, json_schema_extra={"identity": False})
    """Most requests of one actor at a time."""
    timeout_s: float | None = execution(None, gt=0)
    """Longest wait for one answer, seconds; null: 120, and 900 at the flex tier, as its vendors advise."""
    max_attempts: int = Field(6, ge=1, json_schema_extra={"identity": False})
    """Tries of one request before its row fails."""
    pause_s: float = execution(1.0, ge=0)
    """Mean pause before the second try, seconds; it doubles with each further one."""
    longest_wait_s: float = execution(600.0, ge=0)
    """Longest pause that a server may ask for, seconds; where it asks for more, the row fails (unavailable)."""
    breaker_faults: int = execution(20, ge=1)
    """Faults in a row, over all actors, after which nothing is sent for a growing pause."""
    breaker_limit_s: float = execution(900.0, ge=0)
    """Seconds of faults alone after which the job ends."""

    @property
    def longest_s(self) -> float:
        """Longest wait for one answer, seconds."""
        return self.timeout_s or (900.0 if self.tier else 120.0)

    @property
    def limits(self) -> Limits:
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_cost_usd=self.max_cost_usd,
            breaker_faults=self.breaker_faults,
            breaker_pause_s=self.pause_s,
            breaker_limit_s=self.breaker_limit_s,
            drain_s=self.longest_s + 30,
        )


class Client:
    """Asks one endpoint. Without a gate (a model in this process) nothing is leased, without a store nothing kept.

    `model` is the name under which the asked model answers; None: whoever answers is taken.
    """

    def __init__(
        self, endpoint: Endpoint, price: Price, config: ApiConfig, budget: Budget | None = None,
        answers: AnswerStore | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        self.endpoint, self.price, self.config, self.budget, self.answers = endpoint, price, config, budget, answers
        self.model = model
        self._told: set[str] = set()
        self.client_id = uuid.uuid4().hex
        self._asked: dict[tuple[str, str], asyncio.Future[PricedAnswer | RowError | ConfigError | None]] = {}
        self._order = itertools.count()
        self._slots = PrioritySemaphore(config.in_flight)
        self._reserved_ahead = PrioritySemaphore(config.in_flight + math.ceil(config.in_flight * AHEAD))
        if budget is not None:
            self._reservations = Batcher(self._reserve)
            self._settlements = Batcher(self._settle, idle_s=HEARTBEAT_S)

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:
        """The answer to `request`, kept or new; who asks the same while it is under way gets it at no cost.

        Raises `RowError` refused, prompt_too_long, request, or unavailable (every attempt failed), and `ConfigError`
        where the job is to end: budget, key, an endpoint that stays away, another model than the one that was asked.
        """
        if self.config.reasoning_effort:
            request = replace(request, reasoning_effort=self.config.reasoning_effort)
        answer = await self._once(request, group, request.key(self.endpoint.identity))
        await self._check_model(answer.reply)
        if answer.reply.refusal is not None:
            raise RowError("refused", answer.reply.refusal, answer.cost)
        return answer

    async def _once(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        """The answer or fault of who asks the same already; where there is nobody, or they were cancelled, our own."""
        while (leader := self._asked.get((group, key))) is not None:
            outcome = await asyncio.shield(leader)
            if isinstance(outcome, PricedAnswer):
                return replace(outcome, cost=0.0)
            if outcome is not None:
                raise outcome
        outcome = None
        mine = self._asked[group, key] = asyncio.get_running_loop().create_future()
        try:
            outcome = await self._found_or_fetched(request, group, key)
            return outcome
        except (RowError, ConfigError) as fault:
            outcome = fault
            raise
        finally:
            del self._asked[group, key]
            mine.set_result(outcome)

    async def _check_model(self, reply: ChatReply) -> None:
        """End the job, or warn, where another model answered; its answer is kept by now."""
        answered = reply.model
        if answered is None or self.model is None or is_same_model(self.model, answered):
            return
        message = other_model_message(self.endpoint.identity, answered)
        if self.config.on_other_model == "stop" and names_a_model(answered):
            await self._end(message)
            raise OtherModelError(message)
        self._warn(message)

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("%s", message)

    async def _found_or_fetched(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        found = await self.answers.find(group, key) if self.answers else None
        return found or await self._fetch(request, group, key)

    async def _fetch(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        order = next(self._order)  # who asked first goes first, in later attempts too
        if self.config.tier:
            request = replace(request, tier=self.config.tier)
        ask = PlannedCall(group, key, estimated_tokens(request, self.price), self.price.max_cost(request))
        fault, paid = RetryableError(""), 0.0
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                return await self._attempt(request, ask, order)
            except RetryableError as error:
                fault = error
                paid += self._cost(fault)
            except EndpointError as error:
                await self._end(str(error))
                raise
            if (fault.retry_after_s or 0.0) > self.config.longest_wait_s:
                raise RowError(
                    "unavailable",
                    f"{self.endpoint.identity} asks to wait {fault.retry_after_s:,.0f} s, and longest_wait_s is "
                    f"{self.config.longest_wait_s:g}: {str(fault)[:200]}",
                    paid,
                )
            if attempt < self.config.max_attempts:
                await asyncio.sleep(retry_pause_s(attempt, self.config.pause_s, random.random(), fault.retry_after_s))
        raise RowError(
            "unavailable",
            f"{self.endpoint.identity} failed {self.config.max_attempts} times, last: {str(fault)[:200]}",
            paid,
        )

    def _cost(self, fault: RetryableError) -> float:
        """US dollars of the tokens that a server counted for a fault."""
        return self.price.cost(fault.billed) if fault.billed else 0.0

    async def _attempt(self, request: ChatRequest, ask: PlannedCall, order: int) -> PricedAnswer:
        async with self._reserved_ahead.place(order):
            lease = await self._reservations.of(ask) if self.budget else 0
            settled = Settlement(lease, lost=True)  # where the sending is cancelled
            try:
                async with self._slots.place(order):
                    reply = await self.endpoint.send(request)
                    answer = PricedAnswer(reply, self.price.cost(reply))
                    if self.config.tier and (reply.tier or "").lower() != self.config.tier:
                        self._warn(
                            f"{self.endpoint.identity} was asked at the tier {self.config.tier} and answered at "
                            f"{reply.tier or 'one that it does not state'}: booked at the list price"
                        )
                    settled = Settlement(
                        lease, reply.prompt_tokens + reply.completion_tokens, answer.cost, answered=True
                    )
                    if self.answers:
                        await self.answers.put(ask.group, ask.key, answer)
                return answer
            except RetryableError as error:
                asked_s = error.retry_after_s or 0.0
                wait_s = asked_s if asked_s <= self.config.longest_wait_s else 0.0
                tokens = error.billed.prompt_tokens + error.billed.completion_tokens if error.billed else 0
                settled = Settlement(
                    lease, tokens, self._cost(error), fault=str(error), lost=error.maybe_paid, wait_s=wait_s
                )
                raise
            except (RowError, EndpointError):
                settled = Settlement(lease)
                raise
            finally:
                if self.budget:
                    await self._settlements.of(settled)

    async def _end(self, message: str) -> None:
        """Tell the gate that no request can succeed, and wait until what is under way anywhere is kept."""
        if self.budget:
            await self.budget.stop(message)
            await self.budget.reserve(self.client_id, self.config.in_flight, [PlannedCall("", "", 0, 0.0)])

    async def _reserve(self, asks: Sequence[PlannedCall]) -> Sequence[int]:
        assert self.budget is not None
        grant: ReserveResult = await self.budget.reserve(self.client_id, self.config.in_flight, asks)
        if grant.stopped is not None:
            kind, message = grant.stopped
            raise (BudgetError if kind == "budget" else EndpointError)(message)
        return grant.reservation_ids

    async def _settle(self, settled: Sequence[Settlement]) -> Sequence[None]:
        assert self.budget is not None
        await self.budget.settle(self.client_id, settled)
        return [None] * len(settled)


@dataclass(frozen=True)
class Access:
    """How every actor of a step reaches the model: through one gate, to the same kept answers in `folder`."""

    backend: Backend
    model: str
    config: ApiConfig
    budget: Budget
    folder: str

    def connect(self) -> Client:
        """Called in the actor."""
        return connect(self.backend, self.model, self.config, self.budget, self.folder)


def open_access(backend: Backend, model: str, config: ApiConfig, folder: str) -> Access:
    """Called in the driver, in a Ray session: starts the gate of the model's limits and budget, once for all actors.

    `folder` is where the run keeps what it asked of APIs. Raises `EndpointError` for a key that is not set, where the
    actors have this process's environment; on a cluster they may have one that is not set here.
    """
    if not os.environ.get("RAY_ADDRESS"):
        connect(backend, model, config)
    folder = api_folder(folder, model)
    return Access(backend, model, config, start_budget(folder, config.limits), folder)


def connect(
    backend: Backend, model: str, config: ApiConfig, budget: Budget | None = None, folder: str | None = None
) -> Client:
    """A client of a model behind an API; `folder` is the run's for this model, where its answers are kept."""
    endpoint: Endpoint
    check_tier(backend, config)
    if backend == "gemini":
        endpoint = gemini_endpoint(
            model, "rest" if config.tier or config.reasoning_effort else config.gemini_client, address=config.endpoint,
            key_variable=config.key_variable or "GEMINI_API_KEY", timeout_s=config.longest_s,
            in_flight=config.in_flight,
        )  # fmt: skip
    else:
        endpoint = OpenAIEndpoint(
            model, address=config.endpoint, key_variable=config.key_variable or "OPENAI_API_KEY",
            timeout_s=config.longest_s, form=config.form, length_field=config.length_field,
        )  # fmt: skip
    store = AnswerStore(f"{folder.rstrip('/')}/answers") if folder else None
    return Client(endpoint, configured_price(model, config), config, budget, store, config.answers_as or model)


def configured_price(model: str, config: ApiConfig) -> Price:
    """What a model costs today, at the standard tier: the table's price with the config's own in its place."""
    return price_of(model, config.input_price, config.output_price, config.cached_input_price, config.flex_price_share)


def check_tier(backend: str, config: ApiConfig) -> None:
    """Raise `ConfigError` where a tier, or an effort, is asked for by a client that has no field for it."""
    asked = {"tier": config.tier, "reasoning_effort": config.reasoning_effort}
    if backend == "gemini" and config.gemini_client == "sdk" and any(asked.values()):
        told = " and ".join(f"{name}={value}" for name, value in asked.items() if value)
        raise ConfigError(
            f"{told} does not go with gemini_client=sdk: google-generativeai has no field for it. Set "
            "gemini_client=rest, or backend=openai with the compatible address of the same models: "
            f"endpoint={GEMINI_ADDRESS} key_variable=GEMINI_API_KEY"
        )


def api_folder(folder: str, model: str) -> str:
    """Where, under `folder`, the answers of a model and the ledger of their cost lie."""
    return f"{folder.rstrip('/')}/{quote(model, safe='')}"


def estimated_tokens(request: ChatRequest, price: Price) -> int:
    """Tokens of a request and its answer at full length, as a rate limit counts them."""
    read = request.text_bytes // BYTES_A_TOKEN + len(request.images) * price.image_tokens
    return read + request.n * request.max_tokens


def retry_pause_s(attempt: int, mean_s: float, chance: float, asked_for_s: float | None) -> float:
    """Seconds before the next attempt: doubling, anywhere from 0 by `chance` in [0, 1), on top of what is asked for."""
    return chance * min(LONGEST_PAUSE_S, mean_s * 2.0**attempt) + (asked_for_s or 0.0)


class PrioritySemaphore:
    """A number of places; a free one goes to the lowest order that waits."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ties = itertools.count()

    @asynccontextmanager
    async def place(self, order: int) -> AsyncIterator[None]:
        await self._enter(order)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, order: int) -> None:
        if self._free:
            self._free -= 1
            return
        mine = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, next(self._ties), mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it was given the place and then cancelled
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            _, _, next_one = heapq.heappop(self._waiting)
            if not next_one.done():
                next_one.set_result(None)
                return
        self._free += 1


class Batcher(Generic[Item, Result]):
    """Calls `do` with all items that came while its last call ran; it gives results for some of the first of them.

    With `idle_s`, also with none when nothing came for so long. Once `do` raises, every item gets that error.
    """

    def __init__(
        self, do: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]], idle_s: float | None = None
    ) -> None:
        self._do, self._idle_s = do, idle_s
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def of(self, item: Item) -> Result:
        if self._task is None:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)
        mine: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, mine))
        self._came.set()
        if self._task.done():
            self._ended(self._task)
        return await mine

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._came.clear()
                try:
                    async with asyncio.timeout(self._idle_s):  # wait_for can swallow a cancellation
                        await self._came.wait()
                except TimeoutError:
                    await self._do([])
                    continue
            results = await self._do([item for item, _ in self._waiting])
            done, self._waiting = self._waiting[: len(results)], self._waiting[len(results) :]
            for (_, future), result in zip(done, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if future.done():
                continue
            if task.cancelled():
                future.cancel()
            else:
                error = task.exception()
                assert error is not None, "_run ends by an error only"
                future.set_exception(error)
