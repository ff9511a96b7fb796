"""How long clients wait before they send again what was refused for now."""

from statistics import fmean

import numpy as np
import pytest

from medmm_ray import retries
from medmm_ray.retries import Attempts, Retries

NUM_CLIENTS = 2000


class Clock:
    """The seconds that a test says have passed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def waits(rule: Retries, retry_after: str | None, num_tries: int) -> np.ndarray:
    """Seconds that each of many clients waits before its first, second … retry, which takes no time itself."""
    attempts = [Attempts(rule) for _ in range(NUM_CLIENTS)]
    return np.array([[of_one.wait_s(429, retry_after) for of_one in attempts] for _ in range(num_tries)], dtype=float)


def test_waits_begin_at_the_stated_one_and_spread_evenly_over_a_range_that_doubles() -> None:
    by_try = waits(Retries(total_s=1000, longest_share_s=20.0), "3", 5)
    for waited, most in zip(by_try, (3 + 3, 3 + 6, 3 + 12, 3 + 20, 3 + 20), strict=True):
        assert waited.min() >= 3
        assert waited.max() <= most
        # Of 2,000 even draws a quarter's count has a standard deviation of 19.4.
        counts, _ = np.histogram(waited, bins=4, range=(3, most))
        assert np.abs(counts - NUM_CLIENTS / 4).max() < 5 * 19.4


def test_clients_that_are_refused_at_a_moment_do_not_come_back_at_one() -> None:
    (waited,) = waits(Retries(), "1", 1)
    # Tenths of a second between the first and the last: without the random share all would be in one.
    counts, _ = np.histogram(waited, bins=10, range=(1, 2))
    assert counts.sum() == NUM_CLIENTS
    assert counts.max() < 0.14 * NUM_CLIENTS


def test_without_a_stated_wait_the_share_grows_from_its_own_start() -> None:
    by_try = waits(Retries(number=6, first_s=1.0, longest_share_s=8.0), None, 6)
    for waited, most in zip(by_try, (1, 2, 4, 8, 8, 8), strict=True):
        assert 0.9 * most < waited.max() <= most
        assert waited.min() < 0.1 * most
        assert fmean(waited) == pytest.approx(most / 2, rel=0.1)


def test_what_states_no_wait_is_tried_a_number_of_times_whatever_was_stated_between() -> None:
    attempts = Attempts(Retries(number=2))
    outcomes: list[tuple[int, str | None]] = [(0, None), (429, "1"), (503, None), (429, "1"), (0, None)]
    assert [attempts.wait_s(*outcome) is None for outcome in outcomes] == [False, False, False, False, True]


def test_the_last_attempt_begins_within_the_total(clock: Clock) -> None:
    for _ in range(200):
        attempts, started, num_waits = Attempts(Retries(total_s=60, longest_share_s=5)), clock.now, 0
        while (wait_s := attempts.wait_s(429, "2")) is not None:
            assert wait_s >= 2
            clock.now += wait_s
            num_waits += 1
        assert 58 < clock.now - started <= 60
        assert num_waits > 60 / (2 + 5), "a small number of tries is no limit"


@pytest.mark.parametrize(
    ("status", "retry_after"), [(500, None), (408, "1"), (422, None), (200, None), (429, "61"), (503, "86400")]
)
def test_what_stands_is_not_waited_for(status: int, retry_after: str | None) -> None:
    assert Attempts(Retries(total_s=60)).wait_s(status, retry_after) is None


def test_a_date_is_waited_for_too() -> None:
    wait_s = Attempts(Retries()).wait_s(503, "Thu, 01 Jan 1970 00:00:00 GMT")
    assert wait_s is not None
    assert 0 <= wait_s <= 0.5
