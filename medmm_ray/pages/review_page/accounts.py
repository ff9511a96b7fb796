"""The readers' accounts: a file of names, roles and hashed passwords.

The file is JSON, ``{name: {"role": …, "salt": …, "hash": …}}``; `add_reader` writes it. Hashes are scrypt's.
"""

import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from medmm_ray.config import ConfigError
from medmm_ray.stats.targets import ADJUDICATOR

Role = Literal["reader", "adjudicator"]
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
MIN_PASSWORD = 10


@dataclass(frozen=True)
class ReaderAccount:
    """One reader's entry in the file; `salt` and `hash` are hexadecimal."""

    role: Role
    salt: str
    hash: str


def scrypt(password: str, salt: str) -> str:
    """The hash of a password, hexadecimal; `salt` is hexadecimal too."""
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
    accounts = read_readers(path) if path.exists() else {}
    salt = secrets.token_hex(16)
    # A salt for each account: equal passwords have different hashes.
    accounts[name] = ReaderAccount(
        role,
        salt,
        scrypt(password, salt),
    )
    entries = {key: asdict(account) for key, account in sorted(accounts.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.touch(mode=0o600)  # the mode is there before the content is
    unfinished.write_text(json.dumps(entries, indent=2))
    unfinished.replace(path)


def read_readers(path: str | Path) -> dict[str, ReaderAccount]:
    """The accounts in the file `path`, by name; a `ConfigError` says what is wrong with the file."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
        return {name: ReaderAccount(**entry) for name, entry in entries.items()}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; add readers with --add-reader NAME") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file of readers ({error}); add readers with --add-reader NAME") from None
