"""``failing://<folder>/...``: a store of objects, in a folder of this machine, that fails, waits and lists late.

By a plan, the file `PLAN` in the folder, so that every process follows it, Ray's workers too: they find the scheme as
they would find any package's, by the entry point in ``tests/doubles/plugins``. Objects are whole or not there, as those
of any store; what a fault leaves undone, done or half read is the plan's to say.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.local import LocalFileSystem

PLAN = "faults.json"
SCRATCH = ".put"
FAULTS: tuple[Callable[[], OSError], ...] = (
    lambda: OSError("503 Slow Down"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: TimeoutError(),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
)


@dataclass(frozen=True)
class Plan:
    """Which calls fail.

    A call at an object fails with the chance `rate`, at most `most` times in a row to a thread: before it does
    anything, or after it has done all. Puts of objects whose path fits the pattern `refused` always fail: as
    `refusal` says, an errno, or 0 for a fault that would pass. Listings miss what is younger than `late_s`; a call
    waits for up to `delay_s`.
    """

    seed: int = 0
    rate: float = 0.0
    most: int = 2
    refused: str = ""
    refusal: int = 0
    late_s: float = 0.0
    delay_s: float = 0.0


def write_plan(folder: Path, plan: Plan) -> str:
    """Let a folder's store follow a plan from now on; gives the store's URI."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{PLAN}.{uuid.uuid4().hex}"
    scratch.write_text(json.dumps(asdict(plan)))
    scratch.replace(folder / PLAN)
    return f"failing://{folder}"


def plan_of(path: str) -> Plan:
    """The plan of the store in which a path lies; one without faults where there is none."""
    for folder in Path(path).parents:
        if (folder / PLAN).exists():
            return Plan(**json.loads((folder / PLAN).read_text()))
    return Plan()


def age(folder: Path) -> None:
    """Let the listings catch up: all that is there becomes an hour old."""
    past = time.time() - 3600
    for path in folder.rglob("*"):
        os.utime(path, (past, past))


class FailingStorage(LocalFileSystem):  # type: ignore[misc]
    """The store; see the module. `num_faults` counts those of this process."""

    protocol = "failing"
    num_faults: ClassVar[Counter[str]] = Counter()
    _in_a_row: ClassVar[Counter[tuple[str, str, int]]] = Counter()
    _num_calls: ClassVar[Counter[tuple[str, str]]] = Counter()
    _counting: ClassVar[threading.Lock] = threading.Lock()

    def _call(self, operation: str, path: str, do: Any) -> Any:
        """What `do` gives, with the plan's faults before or after it."""
        plan = plan_of(path)
        chance = self._chance(plan, operation, path)
        time.sleep(plan.delay_s * chance)
        if operation == "write" and plan.refused and fnmatch(path, plan.refused):
            raise OSError(plan.refusal, os.strerror(plan.refusal)) if plan.refusal else FAULTS[0]()
        fails = self._fails(plan, operation, path, chance)
        fault = FAULTS[int(chance * 1e6) % len(FAULTS)]()
        if not fails:
            return do()
        if chance > plan.rate / 2:
            with suppress(OSError):
                do()
        raise fault

    def _chance(self, plan: Plan, operation: str, path: str) -> float:
        """A number in [0, 1) that the plan's seed and the call decide."""
        with self._counting:
            self._num_calls[operation, path] += 1
            words = f"{plan.seed} {operation} {Path(path).name} {self._num_calls[operation, path]}"
        return int(hashlib.sha256(words.encode()).hexdigest()[:12], 16) / 16**12

    def _fails(self, plan: Plan, operation: str, path: str, chance: float) -> bool:
        call = (operation, path, threading.get_ident())
        with self._counting:
            fails = chance < plan.rate and self._in_a_row[call] < plan.most
            self._in_a_row[call] = self._in_a_row[call] + 1 if fails else 0
            self.num_faults[operation] += fails
        return fails

    def info(self, path: Any, **options: Any) -> dict[str, Any]:
        """As a store's; strongly consistent."""
        look = super().info
        if isinstance(path, os.DirEntry):
            return dict(look(path, **options))
        path = self._strip_protocol(path)
        return dict(self._call("info", path, lambda: look(path, **options)))

    def isfile(self, path: str) -> bool:
        """As fsspec's own, for any store: a fault is a no."""
        return bool(super(LocalFileSystem, self).isfile(path))

    def isdir(self, path: str) -> bool:
        """As fsspec's own, for any store: a fault is a no."""
        return bool(super(LocalFileSystem, self).isdir(path))

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
        """What is in a folder, without what is young."""
        path = self._strip_protocol(path)
        entries = self._call("list", path, lambda: LocalFileSystem().ls(path, detail=True, **options))
        entries = [entry for entry in entries if not entry["name"].endswith(SCRATCH)]
        if late_s := plan_of(path).late_s:
            youngest = time.time() - late_s
            entries = [entry for entry in entries if entry["type"] == "directory" or entry["mtime"] <= youngest]
        return entries if detail else [entry["name"] for entry in entries]

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        """Put an object; with the mode ``create`` where there is none."""
        path = self._strip_protocol(path)
        self._call("write", path, lambda: _put(Path(path), bytes(value), is_new=mode == "create"))

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """Copy an object in the store."""
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        self._call("write", target, lambda: _put(Path(target), Path(source).read_bytes(), is_new=False))

    def rm_file(self, path: str) -> None:
        """Delete an object."""
        path = self._strip_protocol(path)
        self._call("delete", path, lambda: Path(path).unlink())

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete an object, or all in a folder."""
        path = self._strip_protocol(path)
        delete = shutil.rmtree if Path(path).is_dir() else os.unlink
        self._call("delete", path, lambda: delete(path))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            return self._call("open", path, lambda: _Reader(self, path))
        return _Writer(self, path)


class _Reader(io.FileIO):
    def __init__(self, storage: FailingStorage, path: str) -> None:
        super().__init__(path, "rb")
        self._storage, self._path = storage, path

    def read(self, size: int | None = -1) -> bytes:
        """As a file's; a fault after it has read leaves it further on."""
        read = super().read
        return bytes(self._storage._call("read", self._path, lambda: read(size)))


class _Writer(io.BytesIO):
    def __init__(self, storage: FailingStorage, path: str) -> None:
        super().__init__()
        self._storage, self._path = storage, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._storage.pipe_file(self._path, content)


def _put(path: Path, content: bytes, is_new: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f"{uuid.uuid4().hex}{SCRATCH}"
    scratch.write_bytes(content)
    try:
        if is_new:
            os.link(scratch, path)
        else:
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
