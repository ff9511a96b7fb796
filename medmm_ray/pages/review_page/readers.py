"""Who may come in: a file of readers with hashed passwords, sessions, and a brake on guessing.

The file is JSON, ``{name: {"role": …, "salt": …, "hash": …}}``; `add_reader` writes it. Hashes are scrypt's.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from medmm_ray.config import ConfigError
from medmm_ray.stats.targets import ADJUDICATOR

Role = Literal["reader", "adjudicator"]
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
MIN_PASSWORD = 10
MOST_FAILURES_OF_A_NAME, MOST_FAILURES_OF_AN_ADDRESS = 5, 20  # within:
FAILURE_WINDOW_S = 300.0


@dataclass(frozen=True)
class Reader:
    """One reader's entry; `salt` and `hash` are hexadecimal."""

    role: Role
    salt: str
    hash: str


def _scrypt(password: str, salt: str) -> str:
    return hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=1, dklen=32).hex()


def add_reader(path: str | Path, name: str, password: str, role: Role = "reader") -> None:
    """Add a reader to the file, or set an existing one's password and role anew."""
    if not NAME.fullmatch(name) or name == ADJUDICATOR:
        raise ConfigError(
            f"reader {name!r}: a name has 1 to 32 of a-z, 0-9, '.', '_' and '-', begins with a letter or digit, and is "
            f"not {ADJUDICATOR!r}"
        )
    if role not in get_args(Role):
        raise ConfigError(f"role {role!r}: it must be {' or '.join(get_args(Role))}")
    if len(password) < MIN_PASSWORD:
        raise ConfigError(f"the password of {name} has {len(password)} characters; at least {MIN_PASSWORD} are needed")
    path = Path(path)
    readers = read_readers(path) if path.exists() else {}
    salt = secrets.token_hex(16)
    readers[name] = Reader(role, salt, _scrypt(password, salt))
    text = json.dumps({key: asdict(reader) for key, reader in sorted(readers.items())}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.replace(path)


def read_readers(path: str | Path) -> dict[str, Reader]:
    """The file of readers."""
    path = Path(path)
    try:
        return {name: Reader(**entry) for name, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; add readers with --add-reader NAME") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file of readers ({error}); add readers with --add-reader NAME") from None


class TooManyTriesError(RuntimeError):
    """Logging in is barred for a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Too many failed tries. Try again in {round(seconds / 60) or 1} min.")
        self.seconds = seconds


class Door:
    """Logins and sessions. Sessions live in memory: after a restart readers log in again and go on."""

    def __init__(
        self, readers: Mapping[str, Reader], session_hours: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.readers = readers
        self.session_s = session_hours * 3600
        self.clock = clock
        self._sessions: dict[str, tuple[str, float]] = {}
        self._failures: dict[str, deque[float]] = defaultdict(deque)
        self._one_try = threading.Lock()
        self._nobody = Reader("reader", os.urandom(16).hex(), "")

    def enter(self, name: str, password: str, address: str) -> str | None:
        """A session's token for the right password, else None; raises `TooManyTriesError`."""
        reader = self.readers.get(name)
        limits = {f"address {address}": MOST_FAILURES_OF_AN_ADDRESS}
        if reader:
            limits[f"name {name}"] = MOST_FAILURES_OF_A_NAME
        with self._one_try:  # tries side by side would slip past the count
            for key, most in limits.items():
                self._check(key, most)
            known = reader or self._nobody  # an unknown name takes as long as a wrong password
            if not hmac.compare_digest(_scrypt(password, known.salt), known.hash):
                for key in limits:
                    self._failures[key].append(self.clock())
                return None
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = (name, self.clock() + self.session_s)
        return token

    def _check(self, key: str, most: int) -> None:
        times = self._failures[key]
        while times and times[0] <= self.clock() - FAILURE_WINDOW_S:
            times.popleft()
        if len(times) >= most:
            raise TooManyTriesError(times[-most] + FAILURE_WINDOW_S - self.clock())

    def reader(self, token: str | None) -> str | None:
        """Whose session a token is, if any."""
        name, until = self._sessions.get(_digest(token or ""), ("", 0.0))
        return name if self.clock() < until else None

    def role(self, name: str) -> Role:
        return self.readers[name].role

    def leave(self, token: str | None) -> None:
        self._sessions.pop(_digest(token or ""), None)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
