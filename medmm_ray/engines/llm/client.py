"""How a step asks an API: each request once, whatever is killed; many at a time; within rate limits and budget.

Enters: a `ChatRequest` and its group (a question's id). Leaves: a `PricedAnswer` with its cost. An answer that is
stored already is taken from there, one that is under way is waited for. Otherwise the worst case is reserved in the
budget, ahead of time, so that `in_flight` requests really are at the server; transient faults are tried again with
growing, jittered pauses, never sooner than the server asks; a whole answer is stored before it is used, and until then
it counts as in flight: a kill loses no more than `in_flight` answers, and no more are booked as possibly paid.
"""

import asyncio
import itertools
import logging
import math
import random
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from medmm_ray.config import Config, ConfigError, execution
from medmm_ray.data.tables import RowError
from medmm_ray.engines.llm.budget import HEARTBEAT_S, Budget, BudgetError, Settlement
from medmm_ray.engines.llm.concurrency import Batcher, PrioritySemaphore
from medmm_ray.engines.llm.endpoint import ChatReply, ChatRequest, Endpoint, EndpointError, RetryableError
from medmm_ray.engines.llm.ledger import PlannedCall
from medmm_ray.engines.llm.limits import Limits
from medmm_ray.engines.llm.prices import Price
from medmm_ray.engines.llm.served import OtherModelError, is_same_model, names_a_model, other_model_message
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer

log = logging.getLogger("medmm_ray")

LONGEST_PAUSE_S = 60.0
AHEAD = 0.5  # reservations that wait beside those at the server, as a share of in_flight
BYTES_PER_TOKEN = 4  # of English text, about: for the rate limit, which the provider estimates too
FAULT_CHARACTERS = 200  # of a server's message in ours


class ApiEngine(Config):
    """A model behind an API, as a section of a recipe asks it."""

    kind: Literal["gemini", "openai"]
    """gemini, openai: a model behind an API of that kind."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(None)
    """How much a reasoning model may think before it answers; null leaves it to the model."""
    form: Literal["schema", "object", "text"] = "schema"
    """How the API is held to JSON: schema (a JSON schema), object (any JSON object) or text (by the prompt alone)."""


class ApiConfig(Config):
    """How a model behind an API is reached, and what it may cost: the same for all that ask it."""

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
    """What happens where a reply names another model than the request (a retired one may be routed to its successor):
    stop ends the job, warn goes on. A dated snapshot matches; a generic name ("default") only warns."""
    answers_as: str | None = execution(None)
    """Name under which the model answers, where its address calls it otherwise: an Azure deployment, an alias."""
    max_cost_usd: float | None = execution(None, ge=0)
    """Most US dollars that the run may spend on this model, worst cases included; null: no limit."""
    requests_per_minute: float | None = execution(None, gt=0)
    """Most requests per minute of the whole cluster to this model; null: no limit."""
    tokens_per_minute: float | None = execution(None, gt=0)
    """Most tokens per minute of the whole cluster to this model; null: no limit."""
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
    in_flight: int = execution(16, ge=1)
    """Most requests of one actor at a time."""
    timeout_s: float | None = execution(None, gt=0)
    """Longest wait for one answer, seconds; null: 120, and 900 at the flex tier, as its vendors advise."""
    max_attempts: int = execution(6, ge=1)
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
        """What the budget of the model enforces."""
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
    """Asks one endpoint. Without a budget (a model in this process) nothing is reserved, without a store nothing kept.

    `model` is the name under which the model answers; None: whoever answers is taken. `reasoning_effort` goes with each
    request.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        price: Price,
        config: ApiConfig,
        budget: Budget | None = None,
        answers: AnswerStore | None = None,
        model: str | None = None,
        reasoning_effort: str | None = None,
    ) -> None:
        self.endpoint, self.price, self.config = endpoint, price, config
        self.budget, self.answers, self.model = budget, answers, model
        self.reasoning_effort = reasoning_effort
        self.client_id = uuid.uuid4().hex
        self._warned: set[str] = set()
        self._in_progress: dict[tuple[str, str], asyncio.Future[PricedAnswer | RowError | ConfigError | None]] = {}
        self._order = itertools.count()
        self._slots = PrioritySemaphore(config.in_flight)
        self._reserved_slots = PrioritySemaphore(config.in_flight + math.ceil(config.in_flight * AHEAD))
        if budget is not None:
            self._reservations = Batcher(self._reserve)
            self._settlements = Batcher(self._settle, idle_s=HEARTBEAT_S)

    async def ask(self, request: ChatRequest, group: str) -> PricedAnswer:
        """The answer to `request`, stored or new; who asks the same while it is under way gets it at no cost.

        Raises `RowError` refused, prompt_too_long, request, or unavailable (every attempt failed), and `ConfigError`
        where the job is to end: budget, key, an endpoint that stays away, another model than the requested one.
        """
        if self.reasoning_effort:
            request = replace(request, reasoning_effort=self.reasoning_effort)
        answer = await self._ask_once(request, group, request.key(self.endpoint.identity))
        await self._check_model(answer.reply)
        if answer.reply.refusal is not None:
            raise RowError("refused", answer.reply.refusal, answer.cost)
        return answer

    async def _ask_once(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        """The answer or fault of who asks the same already; a new one where there is nobody, or they were cancelled."""
        while (leader := self._in_progress.get((group, key))) is not None:
            outcome = await asyncio.shield(leader)
            if isinstance(outcome, PricedAnswer):
                return replace(outcome, cost=0.0)
            if outcome is not None:
                raise outcome
        outcome = None
        future = self._in_progress[group, key] = asyncio.get_running_loop().create_future()
        try:
            outcome = await self._look_up_or_fetch(request, group, key)
            return outcome
        except (RowError, ConfigError) as fault:
            outcome = fault
            raise
        finally:
            del self._in_progress[group, key]
            future.set_result(outcome)

    async def _check_model(self, reply: ChatReply) -> None:
        """End the job, or warn, where another model answered; its answer is stored by now."""
        answered_by = reply.model
        if answered_by is None or self.model is None or is_same_model(self.model, answered_by):
            return
        message = other_model_message(self.endpoint.identity, answered_by)
        if self.config.on_other_model == "stop" and names_a_model(answered_by):
            await self._end_job(message)
            raise OtherModelError(message)
        self._warn(message)

    def _check_tier(self, reply: ChatReply) -> None:
        tier = self.config.tier
        if tier and (reply.tier or "").lower() != tier:
            served_tier = reply.tier or "one that it does not state"
            self._warn(
                f"{self.endpoint.identity} was asked at the tier {tier} and answered at {served_tier}: booked at the "
                "list price"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)

    async def _look_up_or_fetch(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        if self.answers:
            answer = await self.answers.find(group, key)
            if answer is not None:
                return answer
        return await self._fetch(request, group, key)

    async def _fetch(self, request: ChatRequest, group: str, key: str) -> PricedAnswer:
        """A new answer, after as many attempts as it takes and the config allows."""
        order = next(self._order)  # an earlier request goes first, in later attempts too
        if self.config.tier:
            request = replace(request, tier=self.config.tier)
        call = PlannedCall(group, key, estimated_tokens(request, self.price), self.price.max_cost(request))
        paid = 0.0
        fault = RetryableError("")
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                return await self._attempt(request, call, order)
            except RetryableError as error:
                fault = error
                paid += self._cost(error)
            except EndpointError as error:
                await self._end_job(str(error))
                raise
            retry_after_s = fault.retry_after_s or 0.0
            if retry_after_s > self.config.longest_wait_s:
                message = (
                    f"{self.endpoint.identity} asks to wait {retry_after_s:,.0f} s, and longest_wait_s is "
                    f"{self.config.longest_wait_s:g}: {str(fault)[:FAULT_CHARACTERS]}"
                )
                raise RowError("unavailable", message, paid)
            if attempt < self.config.max_attempts:
                await asyncio.sleep(retry_pause_s(attempt, self.config.pause_s, random.random(), retry_after_s))
        last_fault = str(fault)[:FAULT_CHARACTERS]
        message = f"{self.endpoint.identity} failed {self.config.max_attempts} times, last: {last_fault}"
        raise RowError("unavailable", message, paid)

    async def _attempt(self, request: ChatRequest, call: PlannedCall, order: int) -> PricedAnswer:
        async with self._reserved_slots.slot(order):
            reservation_id = await self._reservations.submit(call) if self.budget else 0
            settlement = Settlement(reservation_id, lost=True)  # where the call is cancelled
            try:
                async with self._slots.slot(order):
                    reply = await self.endpoint.send(request)
                    answer = PricedAnswer(reply, self.price.cost(reply))
                    self._check_tier(reply)
                    settlement = Settlement(reservation_id, reply.tokens, answer.cost, answered=True)
                    if self.answers:  # within the slot: until it is stored, an answer counts as in flight
                        await self.answers.put(call.group, call.key, answer)
                return answer
            except RetryableError as error:
                settlement = self._settlement_of(error, reservation_id)
                raise
            except (RowError, EndpointError):
                settlement = Settlement(reservation_id)
                raise
            finally:
                if self.budget:
                    await self._settlements.submit(settlement)

    def _settlement_of(self, error: RetryableError, reservation_id: int) -> Settlement:
        """What a transient fault means for the budget; a wait that is too long fails its row, and holds up no other."""
        retry_after_s = error.retry_after_s or 0.0
        return Settlement(
            reservation_id,
            tokens=error.billed.tokens if error.billed else 0,
            dollars=self._cost(error),
            fault=str(error),
            lost=error.maybe_paid,
            wait_s=retry_after_s if retry_after_s <= self.config.longest_wait_s else 0.0,
        )

    def _cost(self, error: RetryableError) -> float:
        """US dollars of the tokens that a server counted for a fault."""
        return self.price.cost(error.billed) if error.billed else 0.0

    async def _end_job(self, message: str) -> None:
        """Tell the budget that no request can succeed, and wait until what is under way anywhere is stored."""
        if self.budget:
            await self.budget.stop(message)
            nothing = PlannedCall("", "", tokens=0, dollars=0.0)
            await self.budget.reserve(self.client_id, self.config.in_flight, [nothing])

    async def _reserve(self, calls: Sequence[PlannedCall]) -> Sequence[int]:
        assert self.budget is not None
        result = await self.budget.reserve(self.client_id, self.config.in_flight, calls)
        if result.stopped is None:
            return result.reservation_ids
        if result.stopped.kind == "budget":
            raise BudgetError(result.stopped.message)
        raise EndpointError(result.stopped.message)

    async def _settle(self, settlements: Sequence[Settlement]) -> Sequence[None]:
        assert self.budget is not None
        await self.budget.settle(self.client_id, settlements)
        return [None] * len(settlements)


def estimated_prompt_tokens(request: ChatRequest, price: Price) -> int:
    """Tokens of a request's texts and images, as far as they can be known without the model's tokenizer."""
    return request.text_bytes // BYTES_PER_TOKEN + len(request.images) * price.image_tokens


def estimated_tokens(request: ChatRequest, price: Price) -> int:
    """Tokens of a request and its answer at full length, as a rate limit counts them."""
    return estimated_prompt_tokens(request, price) + request.n * request.max_tokens


def retry_pause_s(attempt: int, mean_s: float, chance: float, retry_after_s: float | None) -> float:
    """Seconds before the next attempt: doubling, anywhere from 0 by `chance` in [0, 1), on top of `retry_after_s`."""
    return chance * min(LONGEST_PAUSE_S, mean_s * 2.0**attempt) + (retry_after_s or 0.0)
