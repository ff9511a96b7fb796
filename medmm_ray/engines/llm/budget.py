"""The one budget that all calls of a run to a model go through, whichever machine they are sent from.

Enters: `PlannedCall`s for attempts, and what became of them (`Settlement`). Leaves: reservations, as rate limits
(requests and tokens a minute), the circuit breaker and the budget allow. The worst case of a call is reserved, durably,
before it may be sent, and settled after. The ledger is one small file, written whole; what it holds as reserved when
all was killed is looked up among the stored answers: one that is there is booked at its cost, the others as possibly
paid at their worst case, of each client never more than can have been in flight. `ApiBudget` is plain asyncio;
`start_budget` makes it a Ray actor.
"""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Protocol
from weakref import WeakValueDictionary

from pyarrow import fs as pafs
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from medmm_ray.config import ConfigError
from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.engines.llm.endpoint import EndpointError
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer

BURST_S = 10.0  # of a rate may be used at once, after a rest
LONGEST_OPEN_S = 60.0  # between two probes of an endpoint that fails
SILENCE_S = 300.0  # after which a sender counts as dead; it speaks every `HEARTBEAT_S`
HEARTBEAT_S = 10.0
FAULT_SHOWN = 200  # characters of what a server said


class BudgetError(ConfigError):
    """The next call could cost more than is left; the message has the figures."""


@dataclass(frozen=True)
class Limits:
    """What the gate enforces; None is no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost_usd: float | None = None
    breaker_faults: int = 20
    """Faults of the moment in a row, over all senders, after which nothing is sent for a while."""
    breaker_pause_s: float = 1.0
    """The first such while; it doubles."""
    breaker_limit_s: float = 900.0
    """Seconds after which an endpoint that only fails ends the job."""
    drain_s: float = 150.0
    """Longest wait for answers under way, when the job is to end."""

    def over(self, before: "Limits") -> "Limits":
        """These limits, with those of `before` where they say nothing."""
        said = asdict(self)
        return replace(self, **{name: limit for name, limit in asdict(before).items() if said[name] is None})


@dataclass(frozen=True)
class PlannedCall:
    """One attempt: what it is about, the most tokens and US dollars that it can take."""

    group: str
    key: str
    tokens: int
    dollars: float


@dataclass(frozen=True)
class Settlement:
    """What became of a lease: an answer, a `fault` of the moment in words, or neither (the endpoint refused it).

    `lost`: no whole answer came and it may be billed. `wait_s`: seconds that the endpoint asked to wait.
    """

    reservation_id: int
    tokens: int = 0
    dollars: float = 0.0
    answered: bool = False
    fault: str | None = None
    lost: bool = False
    wait_s: float = 0.0


@dataclass(frozen=True)
class ReserveResult:
    """Leases for the first asks, or the kind (budget, endpoint) and the words of what ended the job."""

    reservation_ids: tuple[int, ...] = ()
    stopped: tuple[str, str] | None = None


class Budget(Protocol):
    """What a sender needs of the gate."""

    async def reserve(self, sender: str, in_flight: int, asks: Sequence[PlannedCall]) -> ReserveResult: ...

    async def settle(self, sender: str, settled: Sequence[Settlement]) -> None: ...

    async def stop(self, message: str) -> None: ...


Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class Ledger:
    """US dollars and calls so far; `epoch` counts the gates that kept this ledger, one after the other."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    epoch: int = 0
    spent: Dollars = 0.0
    answers: int = 0
    possibly_paid: Dollars = 0.0
    lost_calls: int = 0


@dataclass
class _Stored(Ledger):
    """The ledger's file: beside the ledger sender, calls in flight, group, key and dollars of each open lease."""

    reserved: list[tuple[str, int, str, str, Dollars]] = field(default_factory=list)


_STORED = TypeAdapter(_Stored)


@dataclass(frozen=True)
class Reservation:
    sender: str
    in_flight: int
    ask: PlannedCall


class _Bucket:
    """Tokens that come at a steady rate; at most `BURST_S` of them are kept."""

    def __init__(self, a_minute: float | None) -> None:
        self.rate = None if a_minute is None else a_minute / 60
        self.level = self.most = 0.0 if self.rate is None else max(1.0, self.rate * BURST_S)
        self.at = time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken; one that is larger than the bucket waits until it is full."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self.level, self.at = min(self.most, self.level + (now - self.at) * self.rate), now
        return max(0.0, (min(amount, self.most) - self.level) / self.rate)

    def take(self, amount: float) -> None:
        self.level = min(self.most, self.level - amount)


class _Breaker:
    """Closed, or open with a pause, growing and no shorter than was asked for, after which one probe may pass."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.faults = 0
        self.opened_at: float | None = None
        self.until = 0.0
        self.pause_s = 0.0
        self.probe: int | None = None

    def wait_s(self) -> float | None:
        """Seconds until something may pass; None: not before the probe is back."""
        if self.opened_at is None:
            return 0.0
        return None if self.probe is not None else max(0.0, self.until - time.monotonic())

    def passed(self, lease: int) -> None:
        if self.opened_at is not None:
            self.probe = lease

    def settled(self, lease: int, fault: bool, wait_s: float) -> float:
        """Note an outcome; seconds for which nothing but faults came since the breaker opened, 0 where it is closed."""
        now, probed = time.monotonic(), lease == self.probe
        if not fault:
            self.faults, self.opened_at, self.probe = 0, None, None
            return 0.0
        self.faults += 1
        if self.opened_at is None and self.faults >= self.limits.breaker_faults:
            self.opened_at, self.pause_s, probed = now, self.limits.breaker_pause_s, True
        elif probed:
            self.pause_s = min(LONGEST_OPEN_S, self.pause_s * 2)
        if probed:
            self.probe, self.until = None, now + max(self.pause_s, wait_s)
        return 0.0 if self.opened_at is None else now - self.opened_at


class ApiBudget:
    """The gate itself, one a run and model; its ledger and the answers lie under `folder`."""

    def __init__(self, folder: str, limits: Limits) -> None:
        self.limits = limits
        self.fs, path = filesystem(folder)
        self.path = f"{path.rstrip('/')}/ledger.json"
        self.answers = AnswerStore(f"{folder.rstrip('/')}/answers")
        self.ledger = Ledger()
        self.stopped: tuple[str, str] | None = None
        self._out: dict[int, Reservation] = {}
        self._heard: dict[str, float] = {}
        self._numbers = itertools.count(1)
        self._requests, self._tokens = _Bucket(limits.requests_per_minute), _Bucket(limits.tokens_per_minute)
        self._breaker = _Breaker(limits)
        self._turn, self._writing = asyncio.Lock(), asyncio.Lock()
        self._changed = asyncio.Event()
        self._wanted = self._written = 0
        self._saver: asyncio.Task[bool] | None = None
        self._open()

    # What senders call

    async def reserve(self, sender: str, in_flight: int, asks: Sequence[PlannedCall]) -> ReserveResult:
        """Leases for at least the first of `asks`, as soon as it may be sent, and for those after it that may too."""
        self._hear(sender)
        leases: list[int] = []
        async with self._turn:
            for ask in asks:
                if not await self._admitted(ask, wait=not leases):
                    break
                leases.append(self._reserve(Reservation(sender, in_flight, ask)))
        if leases and not await self._save():  # nothing may be sent that the ledger does not know
            for lease in leases:
                del self._out[lease]
            leases = []
        if self.stopped and not leases:
            await self._drained()
            return ReserveResult(stopped=self.stopped)
        return ReserveResult(tuple(leases))

    async def settle(self, sender: str, settled: Sequence[Settlement]) -> None:
        """Book what became of leases; an empty list says that the sender is alive."""
        self._hear(sender)
        for one in settled:
            out = self._out.pop(one.reservation_id, None)
            if out is not None:
                self._book(out.ask, one)
        if settled:
            self._notify()
            if self._saver is None or self._saver.done():
                self._saver = asyncio.create_task(self._save())

    async def stop(self, message: str) -> None:
        """Lease nothing more: no request can succeed. Those who ask are told when all answers under way are kept."""
        self._stop("endpoint", message)

    async def figures(self) -> dict[str, float]:
        """The ledger: spent and possibly_paid in US dollars, answers and lost_calls in calls."""
        return asdict(self.ledger)

    async def limit(self, limits: Limits) -> None:
        """Go on with other limits, unset ones as they were; what they stopped before may be leased again."""
        self.limits, self.stopped = limits.over(self.limits), None
        self._requests = _Bucket(self.limits.requests_per_minute)
        self._tokens = _Bucket(self.limits.tokens_per_minute)
        self._breaker = _Breaker(self.limits)

    # Admission

    async def _admitted(self, ask: PlannedCall, wait: bool) -> bool:
        """Whether `ask` may be sent; with `wait`, as soon as it may. False where the job is to end."""
        while self.stopped is None:
            self._changed.clear()
            pause_s = self._pause_s(ask)
            if pause_s == 0:
                return True
            if not wait or self.stopped:
                return False
            try:
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()
            except TimeoutError:
                await self._bury_the_silent()
        return False

    def _pause_s(self, ask: PlannedCall) -> float:
        """Seconds until it is worth asking again; 0 where `ask` may be sent now."""
        limit, ledger = self.limits.max_cost_usd, self.ledger
        if limit is not None:
            booked = ledger.spent + ledger.possibly_paid
            if booked + ask.dollars > limit:
                self._stop("budget", self._budget_words(ask))
                return HEARTBEAT_S
            if booked + sum(out.ask.dollars for out in self._out.values()) + ask.dollars > limit:
                return HEARTBEAT_S  # what is under way will cost less than its worst case
        broken = self._breaker.wait_s()
        if broken is None:
            return HEARTBEAT_S
        return max(broken, self._requests.wait_s(1), self._tokens.wait_s(ask.tokens))

    def _reserve(self, out: Reservation) -> int:
        lease = next(self._numbers)
        self._out[lease] = out
        self._requests.take(1)
        self._tokens.take(out.ask.tokens)
        self._breaker.passed(lease)
        return lease

    def _book(self, ask: PlannedCall, settled: Settlement) -> None:
        ledger = self.ledger
        ledger.spent += settled.dollars
        ledger.answers += settled.answered
        if settled.lost:
            ledger.possibly_paid += ask.dollars
            ledger.lost_calls += 1
        else:
            self._tokens.take(settled.tokens - ask.tokens)  # gives back what was not used
        failing_s = self._breaker.settled(settled.reservation_id, settled.fault is not None, settled.wait_s)
        if failing_s > self.limits.breaker_limit_s:
            self._stop(
                "endpoint",
                f"for {failing_s:.0f} s there has been nothing but faults of the endpoint ({self._breaker.faults} in a "
                f"row), the last one: {str(settled.fault)[:FAULT_SHOWN]}. What had arrived is kept; run again when the "
                "endpoint is well, or raise breaker_limit_s",
            )

    def _budget_words(self, ask: PlannedCall) -> str:
        ledger = self.ledger
        paid = f"${ledger.spent:,.4f} are spent on {ledger.answers:,} answers"
        if ledger.lost_calls:
            paid += f", ${ledger.possibly_paid:,.4f} possibly paid for {ledger.lost_calls:,} calls that were cut off"
        return (
            f"the next call can cost ${ask.dollars:,.4f} and max_cost_usd={self.limits.max_cost_usd:g} does not hold "
            f"it: {paid}. What has arrived is kept; raise max_cost_usd and run again"
        )

    def _stop(self, kind: str, message: str) -> None:
        self.stopped = self.stopped or (kind, message)
        self._notify()

    async def _drained(self) -> None:
        """Wait until no lease is out, so that what is paid has arrived and is kept."""
        until = time.monotonic() + self.limits.drain_s
        while self._out and time.monotonic() < until:
            self._changed.clear()
            try:
                async with asyncio.timeout(min(1.0, self.limits.drain_s)):
                    await self._changed.wait()
            except TimeoutError:
                await self._bury_the_silent()

    def _notify(self) -> None:
        self._changed.set()

    # Senders that die

    def _hear(self, sender: str) -> None:
        self._heard[sender] = time.monotonic()

    async def _bury_the_silent(self) -> None:
        silent = {s for s, at in self._heard.items() if time.monotonic() - at > SILENCE_S}
        for sender in silent:
            del self._heard[sender]
            left = [self._out.pop(lease) for lease, out in list(self._out.items()) if out.sender == sender]
            self._bury(left, await asyncio.to_thread(self._kept, left))
        if silent:
            if self._breaker.probe not in self._out:
                self._breaker.probe = None
            self._notify()

    def _kept(self, left: Sequence[Reservation]) -> dict[str, dict[str, PricedAnswer]]:
        """The answers of the groups that open leases are about."""
        return {group: self.answers.read(group) for group in {out.ask.group for out in left}}

    def _bury(self, left: Sequence[Reservation], kept: dict[str, dict[str, PricedAnswer]]) -> None:
        """Book the leases of a dead sender: at its cost what is among the answers, the costliest others as lost."""
        lost = []
        for out in left:
            answer = kept[out.ask.group].get(out.ask.key)
            if answer is None:
                lost.append(out)
            else:
                self.ledger.spent += answer.cost
                self.ledger.answers += 1
        lost.sort(key=lambda out: -out.ask.dollars)
        for out in lost[: lost[0].in_flight] if lost else ():
            self.ledger.possibly_paid += out.ask.dollars
            self.ledger.lost_calls += 1

    # The ledger's file

    def _open(self) -> None:
        """Take over the ledger that is there; its open leases are of senders that are dead."""
        stored = self._read()
        left = [Reservation(o[0], o[1], PlannedCall(o[2], o[3], 0, o[4])) for o in stored.pop("reserved", [])]
        self.ledger = Ledger(**stored)
        self.ledger.epoch += 1
        for sender in {out.sender for out in left}:
            its = [out for out in left if out.sender == sender]
            self._bury(its, self._kept(its))
        self.fs.create_dir(self.path.rpartition("/")[0], recursive=True)
        self._write(self._content())

    def _read(self) -> dict[str, Any]:
        if self.fs.get_file_info(self.path).type == pafs.FileType.NotFound:
            return {}
        with self.fs.open_input_stream(self.path, compression=None) as stream:
            content = stream.read()
        try:
            return asdict(_STORED.validate_json(content))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        what = f"{where}: {fault['msg']}" if where else fault["msg"]
        if fault["type"] == "json_invalid":
            what = f"{len(content)} bytes that are no JSON"
        raise TableError(
            f"{self.path} is damaged ({what}). Restore it from a copy, or delete it: the answers stay, but "
            "what was spent so far no longer counts against max_cost_usd"
        )

    def _content(self) -> bytes:
        reserved = [[o.sender, o.in_flight, o.ask.group, o.ask.key, o.ask.dollars] for o in self._out.values()]
        return json.dumps({**asdict(self.ledger), "reserved": reserved}).encode()

    def _write(self, content: bytes) -> bool:
        """Whether the ledger is this gate's still, and `content` on storage."""
        if int(self._read().get("epoch", 0)) > self.ledger.epoch:
            self._stop("endpoint", f"another run has taken over the ledger {self.path}; this one ends")
            return False
        write_file(self.fs, self.path, content)
        return True

    async def _save(self) -> bool:
        """Whether the ledger as it is now is on storage (`_write`); who waits at the same time shares a write."""
        self._wanted += 1
        mine = self._wanted
        async with self._writing:
            if self._written < mine:
                covered, content = self._wanted, self._content()
                if not await asyncio.to_thread(self._write, content):
                    return False
                self._written = covered
        return True


_started: "WeakValueDictionary[str, RemoteBudget]" = WeakValueDictionary()  # those of this driver, while they are used


def close_ledger(folder: str) -> Ledger:
    """What a run has spent on a model, once it is over: what is open still is of senders that died, and is booked."""
    _started.pop(folder, None)
    return ApiBudget(folder, Limits()).ledger


class RemoteBudget:
    """The gate as a Ray actor, seen by a sender."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def reserve(self, sender: str, in_flight: int, asks: Sequence[PlannedCall]) -> ReserveResult:
        grant: ReserveResult = await self._call("reserve", sender, in_flight, asks)
        return grant

    async def settle(self, sender: str, settled: Sequence[Settlement]) -> None:
        await self._call("settle", sender, settled)

    async def stop(self, message: str) -> None:
        await self._call("stop", message)

    async def figures(self) -> dict[str, float]:
        figures: dict[str, float] = await self._call("figures")
        return figures

    async def _call(self, method: str, *given: object) -> Any:
        from ray.exceptions import RayActorError

        try:
            return await getattr(self.handle, method).remote(*given)
        except RayActorError as error:
            raise EndpointError(
                "the budget actor is gone, which keeps rate limits and money spent (its process or machine died); "
                "nothing more is sent. What has arrived is kept: run again"
            ) from error


def start_budget(folder: str, limits: Limits) -> RemoteBudget:
    """The gate of `folder`, a named actor on the driver's machine; it lives as long as what is returned here.

    Within a driver there is one: who starts it again (a later step, or a grader that shares the policy's model) gets
    it, with the limits given last; one that is not set lifts none. A gate of another driver is taken over: it leases
    nothing more.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    running = _started.get(folder)
    if running is not None:
        try:
            ray.get(running.handle.limit.remote(limits))
            return running
        except RayActorError:
            del _started[folder]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    name = f"gate {uuid.uuid4().hex[:8]} {folder}"
    actor = ray.remote(ApiBudget).options(name=name, num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)
    gate = RemoteBudget(actor.remote(folder, limits))
    ray.get(gate.handle.limit.remote(limits))  # a ledger that cannot be read or written ends the job here
    _started[folder] = gate
    return gate
