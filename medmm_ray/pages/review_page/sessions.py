"""Logins and sessions of the review page, and a brake on guessing passwords."""

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

from medmm_ray.pages.review_page.accounts import ReaderAccount, scrypt

# Failed logins that are let through within a window, of one name and of one network address.
MAX_FAILURES_PER_NAME = 5
MAX_FAILURES_PER_ADDRESS = 20
FAILURE_WINDOW_S = 300.0


class TooManyTriesError(RuntimeError):
    """Logging in is barred for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Too many failed tries. Try again in {round(seconds / 60) or 1} min.")
        self.seconds = seconds


class Sessions:
    """Logins and sessions. Sessions live in memory: after a restart readers log in again and go on."""

    def __init__(
        self,
        readers: Mapping[str, ReaderAccount],
        session_hours: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.readers = readers
        self.session_s = session_hours * 3600
        self.clock = clock
        self._sessions: dict[str, tuple[str, float]] = {}  # by the token's hash: name, and when the session ends
        self._failures: dict[str, deque[float]] = defaultdict(deque)  # by name or address: times of failed logins
        self._login_lock = threading.Lock()
        self._nobody = ReaderAccount(
            "reader",
            os.urandom(16).hex(),
            "",
        )

    def log_in(self, name: str, password: str, address: str) -> str | None:
        """Start a session; its token, or None where name or password is wrong. Raises `TooManyTriesError`."""
        account = self.readers.get(name)
        # Unknown names are not counted one by one: made-up names would fill the memory.
        limits = {f"address {address}": MAX_FAILURES_PER_ADDRESS}
        if account:
            limits[f"name {name}"] = MAX_FAILURES_PER_NAME
        with self._login_lock:  # tries side by side would slip past the count
            for key, max_failures in limits.items():
                self._check_failures(key, max_failures)
            if not _has_password(account or self._nobody, password):
                for key in limits:
                    self._failures[key].append(self.clock())
                return None
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = (name, self.clock() + self.session_s)
        return token

    def _check_failures(self, key: str, max_failures: int) -> None:
        times = self._failures[key]
        while times and times[0] <= self.clock() - FAILURE_WINDOW_S:
            times.popleft()
        if len(times) >= max_failures:
            # The oldest failure that still fills the window is the one that has to leave it.
            raise TooManyTriesError(times[-max_failures] + FAILURE_WINDOW_S - self.clock())

    def reader_of(self, token: str | None) -> str | None:
        """Name of the reader whose session the token is; None for an unknown or ended session."""
        # Without a session: one that ended long ago.
        name, end = self._sessions.get(
            _digest(token or ""),
            ("", 0.0),
        )
        return name if self.clock() < end else None

    def log_out(self, token: str | None) -> None:
        """End the session of a token, if there is one."""
        self._sessions.pop(_digest(token or ""), None)


def _has_password(account: ReaderAccount, password: str) -> bool:
    """An unknown name is hashed too, for an account without a password: it takes as long as a wrong password."""
    return hmac.compare_digest(scrypt(password, account.salt), account.hash)


def _digest(token: str) -> str:
    """The hash under which a session is kept: a dump of the memory holds no token."""
    return hashlib.sha256(token.encode()).hexdigest()
