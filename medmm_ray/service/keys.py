"""Who may ask for what: named keys, hashed at rest, each with scopes and limits, from a file or the environment.

A file of keys is YAML (JSON is YAML too); `python -m jobs.keys` writes it:

    keys:
      - name: ward-7
        sha256: 9f86d0…                # of the key, which nothing keeps
        scopes: [score]                # score, best_of_n, metrics, admin (all of them)
        requests_per_minute: 600       # none: no limit
        tokens_per_day: 5000000        # of the model, by the day of UTC
        expires: 2027-12-31            # last day; none: never
        revoked: false

The file is read again when it changes: a new or revoked key counts within a second, without a restart. Keys are 256
random bits, so that a plain SHA-256 keeps them as well as a slow hash would keep a password.
"""

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, field_validator

from medmm_ray.config import Config, ConfigError, build

logger = logging.getLogger("ray.serve")

KeyScope = Literal["score", "best_of_n", "metrics", "admin"]
PREFIX = "medmm_"  # by which scanners for leaked secrets find a key
RELOAD_S = 1.0
Limit = Annotated[int, Field(ge=1)]


class Key(Config):
    """One key, without the key itself."""

    name: Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$")]
    """What logs call it; no secret."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """The key's hash, hexadecimal."""
    scopes: tuple[KeyScope, ...] = ("score",)
    """What it may ask for; `admin` may ask for everything."""
    requests_per_minute: Limit | None = None
    """Requests in a minute; none: no limit."""
    tokens_per_day: Limit | None = None
    """Tokens that the model reads for it in a day of UTC; none: no limit."""
    expires: str | None = None
    """Last day on which it is taken, as 2027-12-31; none: it does not expire."""
    revoked: bool = False
    """Whether it is refused from now on."""

    @field_validator("expires")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            date.fromisoformat(value)
        return value

    def allows(self, scope: KeyScope) -> bool:
        """Whether it may ask for what `scope` names."""
        return scope in self.scopes or "admin" in self.scopes

    def is_valid(self, today: date) -> bool:
        """Whether it is neither revoked nor expired."""
        expired = self.expires is not None and today > date.fromisoformat(self.expires)
        return not (self.revoked or expired)


class KeyFile(Config):
    """What a file of keys holds."""

    keys: tuple[Key, ...] = ()
    """The keys; no two of a name."""

    @field_validator("keys")
    @classmethod
    def _has_each_name_once(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        names = [key.name for key in keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there twice; give each key a name of its own")
        return keys


def new_key() -> str:
    """A new random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def sha256(key: str) -> str:
    """The key's hash, hexadecimal: what files and replicas keep and compare."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(text: str, where: str) -> tuple[Key, ...]:
    """The keys of a file's text. Raises `ConfigError`, which names `where` and what is wrong."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        # Not the text itself: a key in the clear may stand there by mistake.
        raise ConfigError(f"{where} is not valid YAML ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold 'keys: [...]', got {type(values).__name__}")
    return build(KeyFile, _plain(values), where).keys


def _plain(values: Any) -> Any:
    """YAML's values as JSON has them: a day that stands there without quotes becomes text."""
    return TypeAdapter(Any).dump_python(values, mode="json")


@dataclass
class Keyring:
    """The keys that are taken: those that were `fixed` at the start (from the environment), and a file's."""

    fixed: Sequence[Key] = ()
    path: Path | None = None
    _from_file: Sequence[Key] = ()
    _version: tuple[int, int] | None = None
    _checked: float = field(default=0.0)

    def __post_init__(self) -> None:
        if self.path is not None:
            self._from_file = read_keys(self.path.read_text(), str(self.path))
            self._version = _version(self.path)
            self._checked = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the file may have changed since it was last looked at."""
        return self.path is not None and time.monotonic() - self._checked > RELOAD_S

    def reload(self) -> None:
        """Read the file again if it has changed; one that cannot be read is logged, and the earlier keys stay."""
        assert self.path is not None
        self._checked = time.monotonic()  # before: a file that cannot be read is not tried at every request
        try:
            version = _version(self.path)
            if version == self._version:
                return
            self._from_file = read_keys(self.path.read_text(), str(self.path))
            self._version = version
        except (OSError, ConfigError) as error:
            logger.error("keys: %s was not read again, the earlier keys stay: %s", self.path, type(error).__name__)
        else:
            logger.info("keys: %d read from %s", len(self._from_file), self.path)

    def find(self, key: str) -> Key | None:
        """The entry of a key that is shown; None for one that is unknown, revoked or expired."""
        hashed = sha256(key)
        match = None
        for entry in (*self.fixed, *self._from_file):
            # All are compared, each in constant time: how long it takes says nothing about any of them.
            if hmac.compare_digest(hashed, entry.sha256):
                match = entry
        today = datetime.now(UTC).date()
        return match if match is not None and match.is_valid(today) else None


def _version(path: Path) -> tuple[int, int]:
    """What changes when a file is written: its time in nanoseconds and its place on the disk."""
    status = path.stat()  # a file that is put in place whole has another inode, even within the clock's tick
    return status.st_mtime_ns, status.st_ino
