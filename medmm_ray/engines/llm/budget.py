"""The one budget that all calls of a run to a model go through, whichever machine they are sent from.

Enters: `PlannedCall`s for attempts, and what became of them (`Settlement`). Leaves: reservations, as rate limits
(requests and tokens per minute), the circuit breaker and the money allow. The worst case of a call is reserved in the
ledger before it may be sent, and settled after. `ApiBudget` is plain asyncio; `start_budget` makes it a Ray actor.

No library does this: vendors' clients have no budget, and a proxy such as LiteLLM counts money once it is spent, so
that calls in flight can exceed it, and a killed run has no account of them.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol
from weakref import WeakValueDictionary

from medmm_ray.config import ConfigError
from medmm_ray.engines.llm.endpoint import EndpointError
from medmm_ray.engines.llm.ledger import (
    Ledger,
    LedgerFile,
    LedgerState,
    PlannedCall,
    Reservation,
    ledger_bytes,
    stored_answers_of,
)
from medmm_ray.engines.llm.limits import CircuitBreaker, Limits, TokenBucket
from medmm_ray.engines.llm.store import AnswerStore

HEARTBEAT_S = 10.0  # after so long without a settlement a client sends an empty one
CLIENT_TIMEOUT_S = 300.0  # a client without a heartbeat for so long counts as dead
FAULT_CHARACTERS = 200  # of a server's message in ours


class BudgetError(ConfigError):
    """The next call could cost more than is left; the message has the figures."""


@dataclass(frozen=True)
class Stop:
    """Why nothing more may be sent: the money, or an endpoint at which no request can succeed."""

    kind: Literal["budget", "endpoint"]
    message: str


@dataclass(frozen=True)
class ReserveResult:
    """Reservations of the first calls of the request, by id, or what ended the job."""

    reservation_ids: tuple[int, ...] = ()
    stopped: Stop | None = None


@dataclass(frozen=True)
class Settlement:
    """What became of a reservation: an answer, a transient `fault` in words, or neither (the endpoint refused it).

    `lost`: no whole answer came and it may be billed. `wait_s`: seconds that the endpoint asked to wait.
    """

    reservation_id: int
    tokens: int = 0
    dollars: float = 0.0
    answered: bool = False
    fault: str | None = None
    lost: bool = False
    wait_s: float = 0.0


class Budget(Protocol):
    """What a client needs of the budget: `ApiBudget` in this process, `RemoteBudget` from any machine."""

    async def reserve(self, client_id: str, in_flight: int, calls: Sequence[PlannedCall]) -> ReserveResult:
        """Reservations for at least the first of `calls`, as soon as it may be sent."""
        ...

    async def settle(self, client_id: str, settlements: Sequence[Settlement]) -> None:
        """Book what became of reservations."""
        ...

    async def stop(self, message: str) -> None:
        """Reserve nothing more."""
        ...


class ApiBudget:
    """The budget itself, one a run and model; the ledger and the stored answers lie under `folder`.

    It takes the ledger over, or goes on with the one of this `epoch`, as it was when the process before died.
    """

    def __init__(self, folder: str, limits: Limits, epoch: int | None = None) -> None:
        self.answers = AnswerStore(f"{folder.rstrip('/')}/answers")
        self.stopped: Stop | None = None
        self._file = LedgerFile(folder)
        self._reservations: dict[int, Reservation] = {}
        self._resumed_ids: dict[tuple[str, str, str], int] = {}
        self._ids = itertools.count(1)
        self._last_heartbeat: dict[str, float] = {}
        self._admission, self._writing = asyncio.Lock(), asyncio.Lock()
        self._changed = asyncio.Event()
        self._saves_requested = self._saves_covered = 0
        self._saver: asyncio.Task[bool] | None = None
        self._apply(limits)
        self.ledger = self._take_over() if epoch is None else self._resume(epoch)

    # What clients call

    async def reserve(self, client_id: str, in_flight: int, calls: Sequence[PlannedCall]) -> ReserveResult:
        """Reservations for at least the first of `calls`, as soon as it may be sent, and for those after it that may
        too. Once the job is to end, what stopped it, after all answers under way have arrived."""
        self._note_heartbeat(client_id)
        new_ids: list[int] = []
        async with self._admission:  # one client at a time: who came first is served first
            for call in calls:
                if not await self._admit(call, wait=not new_ids):
                    break
                new_ids.append(self._add(Reservation(client_id, in_flight, call)))
        if new_ids and not await self._save():  # nothing may be sent that the ledger's file does not have
            for reservation_id in new_ids:
                del self._reservations[reservation_id]
            new_ids = []
        if self.stopped and not new_ids:
            await self._drain()
            return ReserveResult(stopped=self.stopped)
        return ReserveResult(tuple(new_ids))

    async def settle(self, client_id: str, settlements: Sequence[Settlement]) -> None:
        """Book what became of reservations; an empty list is a heartbeat."""
        self._note_heartbeat(client_id)
        for settlement in settlements:
            reservation = self._reservations.pop(settlement.reservation_id, None)
            if reservation is not None:
                self._book(reservation.call, settlement)
        if settlements:
            self._changed.set()
            if self._saver is None or self._saver.done():
                self._saver = asyncio.create_task(self._save())

    async def stop(self, message: str) -> None:
        """Reserve nothing more: no request can succeed. Clients learn of it when all answers under way are stored."""
        self._stop(Stop("endpoint", message))

    async def figures(self) -> dict[str, float]:
        """The ledger: spent and possibly_paid in US dollars, answers and lost_calls in calls."""
        return asdict(self.ledger)

    async def set_limits(self, limits: Limits) -> None:
        """Go on with other limits, unset ones as they were; what they stopped before may be reserved again."""
        self.stopped = None
        self._apply(limits.over(self.limits))
        await self._save()

    def _apply(self, limits: Limits) -> None:
        self.limits = limits
        self._requests = TokenBucket(limits.requests_per_minute)
        self._tokens = TokenBucket(limits.tokens_per_minute)
        self._breaker = CircuitBreaker(limits)

    # Admission

    async def _admit(self, call: PlannedCall, wait: bool) -> bool:
        """Whether `call` may be sent; with `wait`, as soon as it may. False where the job is to end."""
        while self.stopped is None:
            self._changed.clear()
            wait_s = self._wait_s(call)
            if wait_s == 0:
                return True
            if not wait or self.stopped:
                return False
            await self._wait_for_change(wait_s)
        return False

    def _wait_s(self, call: PlannedCall) -> float:
        """Seconds until it is worth trying `call` again; 0 where it may be sent now."""
        max_cost = self.limits.max_cost_usd
        if max_cost is not None:
            booked = self.ledger.spent + self.ledger.possibly_paid
            if booked + call.dollars > max_cost:
                self._stop(Stop("budget", self._budget_message(call)))
                return HEARTBEAT_S
            reserved = sum(reservation.call.dollars for reservation in self._reservations.values())
            if booked + reserved + call.dollars > max_cost:
                return HEARTBEAT_S  # what is under way will cost less than its worst case
        breaker_s = self._breaker.wait_s()
        if breaker_s is None:
            return HEARTBEAT_S
        return max(breaker_s, self._requests.wait_s(1), self._tokens.wait_s(call.tokens))

    async def _wait_for_change(self, longest_s: float) -> None:
        """Wait until something is settled or stopped; after `longest_s` seconds look for dead clients instead."""
        try:
            async with asyncio.timeout(longest_s):
                await self._changed.wait()
        except TimeoutError:
            await self.expire_dead_clients()

    def _add(self, reservation: Reservation) -> int:
        """Take what a call needs of the rate limits; gives the reservation's id."""
        # A client makes one attempt at a request at a time: what the process before reserved for it never arrived.
        stale_id = self._resumed_ids.pop(_attempt(reservation), None)
        if stale_id is not None:
            self._reservations.pop(stale_id, None)
        reservation_id = next(self._ids)
        self._reservations[reservation_id] = reservation
        self._requests.take(1)
        self._tokens.take(reservation.call.tokens)
        self._breaker.pass_call(reservation_id)
        return reservation_id

    def _book(self, call: PlannedCall, settlement: Settlement) -> None:
        self.ledger.spent += settlement.dollars
        self.ledger.answers += settlement.answered
        if settlement.lost:
            self.ledger.book_lost(call.dollars)
        else:
            self._tokens.take(settlement.tokens - call.tokens)  # gives back what was not used
        is_fault = settlement.fault is not None
        failing_s = self._breaker.settle(settlement.reservation_id, is_fault, settlement.wait_s)
        if failing_s > self.limits.breaker_limit_s:
            message = (
                f"for {failing_s:.0f} s there has been nothing but faults of the endpoint ({self._breaker.faults} in a "
                f"row), the last one: {str(settlement.fault)[:FAULT_CHARACTERS]}. What had arrived is kept; run again "
                "when the endpoint is back, or raise breaker_limit_s"
            )
            self._stop(Stop("endpoint", message))

    def _budget_message(self, call: PlannedCall) -> str:
        ledger = self.ledger
        paid = f"${ledger.spent:,.4f} are spent on {ledger.answers:,} answers"
        if ledger.lost_calls:
            paid += f", ${ledger.possibly_paid:,.4f} possibly paid for {ledger.lost_calls:,} calls that were cut off"
        return (
            f"the next call can cost ${call.dollars:,.4f} and would exceed max_cost_usd={self.limits.max_cost_usd:g}: "
            f"{paid}. What has arrived is kept; raise max_cost_usd and run again"
        )

    def _stop(self, stop: Stop) -> None:
        self.stopped = self.stopped or stop  # the first reason is reported
        self._changed.set()

    async def _drain(self) -> None:
        """Wait until no reservation is open, so that what is paid has arrived and is stored."""
        deadline = time.monotonic() + self.limits.drain_s
        while self._reservations and time.monotonic() < deadline:
            self._changed.clear()
            await self._wait_for_change(min(1.0, self.limits.drain_s))

    # Clients that die

    def _note_heartbeat(self, client_id: str) -> None:
        self._last_heartbeat[client_id] = time.monotonic()

    async def expire_dead_clients(self) -> None:
        """Book and free the reservations of clients that sent no heartbeat for `CLIENT_TIMEOUT_S`."""
        now = time.monotonic()
        dead_clients = [client for client, at in self._last_heartbeat.items() if now - at > CLIENT_TIMEOUT_S]
        for client_id in dead_clients:
            self._last_heartbeat.pop(client_id, None)
            expired_ids = [i for i, reservation in self._reservations.items() if reservation.client_id == client_id]
            expired = [self._reservations.pop(i) for i in expired_ids]
            stored_answers = await asyncio.to_thread(stored_answers_of, expired, self.answers)
            self.ledger.book_dead(expired, stored_answers)
        if dead_clients:
            if self._breaker.probe_id not in self._reservations:
                self._breaker.probe_id = None
            self._changed.set()

    # The ledger's file

    def _take_over(self) -> Ledger:
        """The ledger in the file, from now on this budget's; its open reservations are of clients that are dead."""
        state = self._file.read()
        ledger = state.ledger
        ledger.epoch += 1
        by_client: dict[str, list[Reservation]] = {}
        for reservation in state.reservations.values():
            by_client.setdefault(reservation.client_id, []).append(reservation)
        for dead in by_client.values():
            ledger.book_dead(dead, stored_answers_of(dead, self.answers))
        self._file.create_folder()
        self._write(ledger_bytes(LedgerState(ledger, {}, self.limits)), ledger.epoch)
        return ledger

    def _resume(self, epoch: int) -> Ledger:
        """The ledger in the file with its open reservations: their clients live, and will settle them."""
        state = self._file.read()
        if state.ledger.epoch != epoch:
            self._stop(self._taken_over())
            return state.ledger
        self._apply(state.limits)
        self._reservations = state.reservations
        self._ids = itertools.count(time.time_ns())  # none that the process before gave
        for reservation_id, reservation in state.reservations.items():
            self._resumed_ids[_attempt(reservation)] = reservation_id
            self._note_heartbeat(reservation.client_id)
        return state.ledger

    def _write(self, content: bytes, epoch: int) -> bool:
        """Whether the ledger is this budget's still, and `content` on storage."""
        if self._file.write(content, epoch):
            return True
        self._stop(self._taken_over())
        return False

    def _taken_over(self) -> Stop:
        return Stop("endpoint", f"another run has taken over the ledger {self._file.path}; this one ends")

    async def _save(self) -> bool:
        """Whether the ledger as it is now is on storage; who waits at the same time shares a write."""
        self._saves_requested += 1
        this_save = self._saves_requested
        async with self._writing:
            if self._saves_covered < this_save:
                covered = self._saves_requested
                content = ledger_bytes(LedgerState(self.ledger, self._reservations, self.limits))
                if not await asyncio.to_thread(self._write, content, self.ledger.epoch):
                    return False
                self._saves_covered = covered
        return True


def _attempt(reservation: Reservation) -> tuple[str, str, str]:
    return reservation.client_id, reservation.call.group, reservation.call.key


# The budgets of this driver, by folder, while somebody uses them.
_running: "WeakValueDictionary[str, RemoteBudget]" = WeakValueDictionary()


def close_ledger(folder: str) -> Ledger:
    """What a run has spent on a model, once it is over: reservations that are open still are of clients that died."""
    _running.pop(folder, None)
    return ApiBudget(folder, Limits()).ledger


class RemoteBudget:
    """The budget as a Ray actor, seen by a client."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def reserve(self, client_id: str, in_flight: int, calls: Sequence[PlannedCall]) -> ReserveResult:
        """As `ApiBudget.reserve`."""
        result: ReserveResult = await self._call("reserve", client_id, in_flight, calls)
        return result

    async def settle(self, client_id: str, settlements: Sequence[Settlement]) -> None:
        """As `ApiBudget.settle`."""
        await self._call("settle", client_id, settlements)

    async def stop(self, message: str) -> None:
        """As `ApiBudget.stop`."""
        await self._call("stop", message)

    async def figures(self) -> dict[str, float]:
        """As `ApiBudget.figures`."""
        figures: dict[str, float] = await self._call("figures")
        return figures

    async def _call(self, method: str, *arguments: object) -> Any:
        from ray.exceptions import RayActorError

        try:
            return await getattr(self.handle, method).remote(*arguments)
        except RayActorError as error:
            raise EndpointError(
                "the budget actor, which keeps rate limits and money, is gone (its process or machine died); nothing "
                "more is sent. What has arrived is kept: run again"
            ) from error


def start_budget(folder: str, limits: Limits) -> RemoteBudget:
    """The budget of `folder`, a named actor on the driver's machine; it lives as long as what is returned here.

    Within a driver there is one: who starts it again (a later step, or a grader that shares the policy's model) gets
    it, with the limits given last; one that is not set lifts none. A budget of another driver is taken over: it
    reserves nothing more. Where its process dies Ray starts it again, and it goes on with what the ledger's file has.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    running = _running.get(folder)
    if running is not None:
        try:
            ray.get(running.handle.set_limits.remote(limits))
            return running
        except RayActorError:
            del _running[folder]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    name = f"api budget {uuid.uuid4().hex[:8]} {folder}"
    epoch = ApiBudget(folder, limits).ledger.epoch  # a ledger that cannot be read or written ends the job here
    # Calls may be made twice: a reservation replaces the one of the same attempt, and is settled once.
    actor = ray.remote(ApiBudget).options(
        name=name,
        num_cpus=0,
        max_concurrency=10_000,
        scheduling_strategy=here,
        max_restarts=-1,
        max_task_retries=-1,
    )
    budget = RemoteBudget(actor.remote(folder, limits, epoch))
    ray.get(budget.handle.figures.remote())
    _running[folder] = budget
    return budget
