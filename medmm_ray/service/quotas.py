"""How much each key may ask for: requests a minute, tokens a day; and how often a peer may guess.

Each replica counts for itself and allows its share, a limit by the number of replicas: Serve spreads requests evenly.
Counts begin anew with a replica.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from medmm_ray.service.keys import Key

DAY_S = 86_400.0
GUESSES = 10
"""Wrong keys that a peer may show in a minute; further ones are not looked at."""
MAX_PEERS = 10_000  # remembered; beyond it those seen longest ago are forgotten

Clock = Callable[[], float]


@dataclass
class Bucket:
    """A token bucket: `capacity` at once, refilled at `rate` a second."""

    capacity: float
    rate: float
    level: float
    updated: float

    def wait_s(self, now: float) -> float:
        """Seconds until one may be taken; 0: now."""
        self.level = min(self.capacity, self.level + (now - self.updated) * self.rate)
        self.updated = now
        return max(0.0, (1.0 - self.level) / self.rate)

    def take(self) -> None:
        """Take one."""
        self.level -= 1.0


def _minute(number: float, now: float) -> Bucket:
    """A bucket of `number` a minute, full. A share below one still lets one through, less often."""
    return Bucket(max(1.0, number), number / 60.0, max(1.0, number), now)


class Quotas:
    """What keys have used; `num_replicas` says among how many the limits are shared."""

    def __init__(
        self,
        num_replicas: Callable[[], int] = lambda: 1,
        clock: Clock = time.monotonic,
        today: Clock = time.time,
    ) -> None:
        self._num_replicas = num_replicas
        self._clock = clock
        self._today = today
        self._requests: dict[str, tuple[float, Bucket]] = {}
        self._tokens: dict[str, tuple[int, int]] = {}

    def wait_s(self, key: Key) -> float:
        """Seconds until the key may ask again, and count the request where that is now (0)."""
        wait_s = self._wait_for_tokens(key)
        if wait_s or key.requests_per_minute is None:
            return wait_s
        now = self._clock()
        share = key.requests_per_minute / self._num_replicas()
        # The share changes with the number of replicas; a bucket of the old one would grant too much or too little.
        known_share, bucket = self._requests.get(key.name, (0.0, None))
        if bucket is None or known_share != share:
            bucket = _minute(share, now)
            self._requests[key.name] = (share, bucket)
        wait_s = bucket.wait_s(now)
        if not wait_s:
            bucket.take()
        return wait_s

    def add_tokens(self, key: Key, num_tokens: int) -> None:
        """Note what the model read for a key."""
        day = int(self._today() // DAY_S)
        noted_day, total = self._tokens.get(key.name, (day, 0))
        self._tokens[key.name] = (day, num_tokens + (total if noted_day == day else 0))

    def _wait_for_tokens(self, key: Key) -> float:
        """Seconds until the next day where the key has used up this one's tokens, else 0."""
        if key.tokens_per_day is None:
            return 0.0
        seconds = self._today()
        noted_day, total = self._tokens.get(key.name, (0, 0))
        is_used_up = noted_day == int(seconds // DAY_S) and total >= key.tokens_per_day / self._num_replicas()
        return math.ceil(DAY_S - seconds % DAY_S) if is_used_up else 0.0


class Guesses:
    """Wrong keys by peer; a peer with too many has to wait, whatever it shows."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._peers: OrderedDict[str, Bucket] = OrderedDict()

    def wait_s(self, peer: str) -> float:
        """Seconds until a peer's next key is looked at; 0: now."""
        bucket = self._peers.get(peer)
        return 0.0 if bucket is None else bucket.wait_s(self._clock())

    def add(self, peer: str) -> None:
        """Note a wrong key."""
        bucket = self._peers.pop(peer, None) or _minute(GUESSES, self._clock())
        bucket.wait_s(self._clock())  # refills it
        bucket.take()
        self._peers[peer] = bucket
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
