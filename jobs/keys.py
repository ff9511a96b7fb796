"""The keys of the scorer: make one, list them, revoke one. The service reads the file again within a second.

    python -m jobs.keys make keys.yaml ward-7 --scopes score --requests-per-minute 600 --tokens-per-day 5000000
    python -m jobs.keys list keys.yaml
    python -m jobs.keys revoke keys.yaml ward-7

`make` prints the key, once: the file keeps its hash alone. Serve with ``serve.keys=keys.yaml``.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from jobs.entry import guarded
from medmm_ray.config import ConfigError, build
from medmm_ray.service.keys import Key, KeyFile, KeyScope, new_key, read_keys, sha256


def main(words: Sequence[str] | None = None) -> int:
    """Run the job; `words` are its arguments, else the command line's. Gives the exit status."""
    parser = argparse.ArgumentParser("python -m jobs.keys", description="Keys of the scorer.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="a new key, printed once")
    make.add_argument("file", type=Path, help="file of keys; made where it is not there")
    make.add_argument("name", help="what logs call the key")
    make.add_argument("--scopes", nargs="+", choices=get_args(KeyScope), default=["score"])
    make.add_argument("--requests-per-minute", type=int)
    make.add_argument("--tokens-per-day", type=int)
    make.add_argument("--expires", metavar="YYYY-MM-DD", help="last day on which it is taken")
    listing = commands.add_parser("list", help="the keys of a file")
    listing.add_argument("file", type=Path)
    revoke = commands.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("file", type=Path)
    revoke.add_argument("name")
    arguments = parser.parse_args(words)
    work = {"make": _make, "list": _list, "revoke": _revoke}[arguments.command]
    return guarded(lambda: work(arguments))


def _make(arguments: argparse.Namespace) -> int:
    secret = new_key()
    values = {
        "name": arguments.name,
        "sha256": sha256(secret),
        "scopes": arguments.scopes,
        "requests_per_minute": arguments.requests_per_minute,
        "tokens_per_day": arguments.tokens_per_day,
        "expires": arguments.expires,
    }
    key = build(Key, values, "make")
    with FileLock(f"{arguments.file}.lock"):
        keys = _read(arguments.file) if arguments.file.exists() else ()
        if any(entry.name == key.name for entry in keys):
            raise ConfigError(f"{arguments.file} has a key {key.name!r} already; take another name")
        _write(arguments.file, (*keys, key))
    print(secret)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    table = Table("name", "scopes", "requests/min", "tokens/day", "expires", "revoked", box=None)
    for key in _read(arguments.file):
        table.add_row(
            key.name,
            ", ".join(key.scopes),
            _shown(key.requests_per_minute),
            _shown(key.tokens_per_day),
            _shown(key.expires),
            "yes" if key.revoked else "",
        )
    Console().print(table)
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    with FileLock(f"{arguments.file}.lock"):
        keys = _read(arguments.file)
        if all(key.name != arguments.name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(f"{arguments.file} has no key {arguments.name!r}; it has {names}")
        revoked: list[Key] = []
        for key in keys:
            revoked.append(key.model_copy(update={"revoked": True}) if key.name == arguments.name else key)
        _write(arguments.file, revoked)
    return 0


def _read(path: Path) -> tuple[Key, ...]:
    try:
        return read_keys(path.read_text(), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; make a key first") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    """Put the file in place whole, readable by its owner alone: a service may read it at any time."""
    values = KeyFile(keys=tuple(keys)).model_dump(mode="json", exclude_none=True)
    text = yaml.safe_dump(values, sort_keys=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)


def _shown(value: object) -> str:
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
