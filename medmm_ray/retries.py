"""When a request that the service refused for now is sent again: the rule of every client of ours.

A wait is what the service states (`Retry-After`) and a random share on top, whose range doubles with each try (full
jitter). The statement alone is a whole number of seconds: all that were refused at a moment would come back at one.
"""

import random
import time
from dataclasses import dataclass

from medmm_ray.engines.llm.faults import retry_after_seconds

RETRIED = (0, 429, 503)
"""Statuses that are sent again, 0 for a lost connection; not 408, which would take as long again, nor 500, which would
fail again."""


@dataclass(frozen=True)
class Retries:
    """For how long a request is sent again, and how long is waited between.

    The last attempt begins `total_s` after the first; what the service asks to wait longer for is not waited for. The
    random share of a wait is up to `first_s`, or up to the stated wait where that is longer, times two to the power of
    the try, at most `longest_share_s`. An outcome that states no wait, such as a lost connection, is tried again
    `number` times.
    """

    total_s: float = 300.0
    first_s: float = 0.5
    longest_share_s: float = 15.0
    number: int = 5


DEFAULT_RETRIES = Retries()


class Attempts:
    """The attempts at one request; the first begins when this is made."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._started = time.monotonic()
        self._num_waits = 0
        self._num_unstated = 0

    def wait_s(self, status: int, retry_after: str | None) -> float | None:
        """Seconds to wait before the next attempt, or None where the outcome stands.

        Args:
            status: of the answer; 0 where there was none.
            retry_after: its `Retry-After`, seconds or a date.
        """
        if status not in RETRIED:
            return None
        stated_s = retry_after_seconds(retry_after, "")
        # A proxy's 503, or a lost connection: how long to wait nobody says.
        if stated_s is None:
            self._num_unstated += 1
            stated_s = 0.0
        seconds_left = self._started + self._retries.total_s - time.monotonic()
        if stated_s > seconds_left or self._num_unstated > self._retries.number:
            return None
        # As wide as the stated wait at least: all who came within it were told to come back at its end.
        share_s = max(self._retries.first_s, stated_s) * 2.0**self._num_waits
        self._num_waits += 1
        longest_s = stated_s + min(share_s, self._retries.longest_share_s)
        return random.uniform(stated_s, min(longest_s, seconds_left))
