"""What readers said: one `Verdict` a key press, appended and never changed; the last of a reader on an item counts.

On a local disk a reader's verdicts are lines of one file, each flushed to the disk before `append` returns; on an
object store each is an object of its own. A kill loses nothing that was acknowledged: at most the line that was being
written is torn, and a torn line is no JSON and is skipped.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pyarrow import fs as pafs

from medmm_ray.tables import TableError, filesystem, write_file

STEP_VERDICTS = ("right", "wrong", "neutral", "unsure")
QUESTION_VERDICTS = ("keep", "drop", "unsure")
UNSURE, WITHDRAWN = "unsure", "withdrawn"
FAULTS = ("logical", "medical", "image_grounded")  # the tests that a wrong step fails
DIFFICULTIES = ("easy", "medium", "hard")
LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One reader's word on one item. `number` counts the reader's verdicts from 1, `seen` hashes what was read.

    `verdict` is one of `STEP_VERDICTS` or `QUESTION_VERDICTS`, or `WITHDRAWN`, which takes the one before back.
    `faults` belong to a wrong step; `answer_right` and `difficulty` to a question.
    """

    reader: str
    number: int
    item_id: str
    seen: str
    verdict: str
    adjudicates: bool = False
    faults: list[str] = field(default_factory=list)
    answer_right: bool | None = None
    difficulty: str | None = None
    feedback: str = ""
    seconds: float = 0.0
    at: str = ""


class VerdictLog:
    """The verdicts below a folder or URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)
        self._lock: int | None = None

    def claim(self) -> None:
        """Make the folder and keep other pages on this machine away from it while this process lives."""
        self.fs.create_dir(self.path, recursive=True)
        if not self.is_local:
            return
        self._lock = os.open(Path(self.path) / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise TableError(
                f"another review page writes to {self.uri}; two would deal an item twice. Use that one, or stop it"
            ) from None

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, verdict: Verdict) -> None:
        """Keep a verdict; when this returns, it is on the disk (or in the object store)."""
        line = json.dumps(asdict(verdict), ensure_ascii=False).encode()
        if self.is_local:
            _append_line(Path(self.path) / f"{verdict.reader}.jsonl", line)
        else:
            self.fs.create_dir(f"{self.path}/{verdict.reader}", recursive=True)
            write_file(self.fs, f"{self.path}/{verdict.reader}/{verdict.number:08d}.json", line)

    def read(self) -> list[Verdict]:
        """All verdicts, by reader and number."""
        selector = pafs.FileSelector(self.path, recursive=not self.is_local, allow_not_found=True)
        found = []
        for info in self.fs.get_file_info(selector):
            if info.type == pafs.FileType.File and info.extension in ("json", "jsonl"):
                with self.fs.open_input_stream(info.path) as stream:
                    found += parse(stream.read())
        return sorted(found, key=lambda verdict: (verdict.reader, verdict.number))


def parse(content: bytes) -> list[Verdict]:
    """The verdicts in the lines of a file; a line that a kill tore is no verdict."""
    found = []
    for line in content.split(b"\n"):
        try:
            found.append(Verdict(**json.loads(line)))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue
    return found


def _append_line(path: Path, line: bytes) -> None:
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (b"\n" if torn else b"") + line + b"\n"
        written = os.write(descriptor, content)
        if written != len(content):
            raise TableError(f"cannot write {path}: {written} of {len(content)} bytes fit. Free space there")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def standing(verdicts: Iterable[Verdict]) -> dict[str, dict[str, Verdict]]:
    """By item and reader the verdict that counts: the last one, unless it was withdrawn."""
    found: dict[str, dict[str, Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda v: (v.reader, v.number)):
        of_item = found.setdefault(verdict.item_id, {})
        of_item.pop(verdict.reader, None)
        if verdict.verdict != WITHDRAWN:
            of_item[verdict.reader] = verdict
    return found
