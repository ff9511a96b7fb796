"""How fast calls may be sent to an API: rate limits by token buckets, and a circuit breaker for a failing endpoint."""

import time
from dataclasses import asdict, dataclass, replace

BURST_S = 10.0  # seconds' worth of a rate that may be used at once, after a rest
LONGEST_OPEN_S = 60.0  # between two probes of an endpoint that fails


@dataclass(frozen=True)
class Limits:
    """What the budget enforces; None is no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost_usd: float | None = None
    breaker_faults: int = 20
    """Transient faults in a row, over all clients, after which nothing is sent for a while."""
    breaker_pause_s: float = 1.0
    """The first such while, seconds; it doubles."""
    breaker_limit_s: float = 900.0
    """Seconds after which an endpoint that only fails ends the job."""
    drain_s: float = 150.0
    """Longest wait for answers under way, seconds, when the job is to end."""

    def over(self, previous: "Limits") -> "Limits":
        """These limits, with those of `previous` where these are None."""
        own_limits = asdict(self)
        inherited = {name: limit for name, limit in asdict(previous).items() if own_limits[name] is None}
        return replace(self, **inherited)


class TokenBucket:
    """A steady rate with bursts of at most `BURST_S` seconds' worth; None is no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.rate = None if per_minute is None else per_minute / 60
        self.capacity = 0.0 if self.rate is None else max(1.0, self.rate * BURST_S)
        self.level = self.capacity
        self._refilled_at = time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken; one that is larger than the bucket waits until it is full."""
        if self.rate is None:
            return 0.0
        now = time.monotonic()
        self.level = min(self.capacity, self.level + (now - self._refilled_at) * self.rate)
        self._refilled_at = now
        return max(0.0, (min(amount, self.capacity) - self.level) / self.rate)

    def take(self, amount: float) -> None:
        """Use `amount` of the bucket; a negative one is given back."""
        self.level = min(self.capacity, self.level - amount)


class CircuitBreaker:
    """Closed while calls succeed; after `breaker_faults` faults in a row open, so that nothing is sent.

    After a pause, which grows and is no shorter than the server asked for, one call may pass as a probe: its success
    closes the breaker, its fault starts the next pause.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.faults = 0
        self.probe_id: int | None = None
        self._opened_at: float | None = None
        self._open_until = 0.0
        self._pause_s = 0.0

    def wait_s(self) -> float | None:
        """Seconds until a call may pass; None: not before the probe is settled."""
        if self._opened_at is None:
            return 0.0
        if self.probe_id is not None:
            return None
        return max(0.0, self._open_until - time.monotonic())

    def pass_call(self, reservation_id: int) -> None:
        """Note that a call is about to be sent; while the breaker is open it is the probe."""
        if self._opened_at is not None:
            self.probe_id = reservation_id

    def settle(self, reservation_id: int, is_fault: bool, wait_s: float) -> float:
        """Note what became of a call; `wait_s` are the seconds that the server asked to wait.

        Gives the seconds for which nothing but faults came since the breaker opened, 0 where it is closed.
        """
        if not is_fault:
            self.faults, self._opened_at, self.probe_id = 0, None, None
            return 0.0
        now = time.monotonic()
        starts_pause = reservation_id == self.probe_id
        self.faults += 1
        if self._opened_at is None and self.faults >= self.limits.breaker_faults:
            self._opened_at, self._pause_s, starts_pause = now, self.limits.breaker_pause_s, True
        elif starts_pause:
            self._pause_s = min(LONGEST_OPEN_S, self._pause_s * 2)
        if starts_pause:
            self.probe_id, self._open_until = None, now + max(self._pause_s, wait_s)
        return 0.0 if self._opened_at is None else now - self._opened_at
