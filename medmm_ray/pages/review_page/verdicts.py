"""The readers' verdicts: one `Verdict` a key press, appended and never changed; a reader's last one on an item counts.

On a local disk a reader's verdicts are lines of one file, each flushed to the disk before `append` returns; on an
object store each is an object of its own. A kill loses nothing that was acknowledged: at most the line that was being
written is torn; it is no JSON and is skipped, and the next verdict takes its number. A line that is no JSON and whose
number is missing was acknowledged and is damaged: that is a fault, as is a line that is no verdict.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pyarrow import fs as pafs
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from medmm_ray.data.tables import TableError, filesystem, write_file

STEP_VERDICTS = ("right", "wrong", "neutral", "unsure")
QUESTION_VERDICTS = ("keep", "drop", "unsure")
UNSURE, WITHDRAWN = "unsure", "withdrawn"
FAULTS = ("logical", "medical", "image_grounded")  # the tests that a wrong step fails
DIFFICULTIES = ("easy", "medium", "hard")
LOCK = ".lock"


def _one_of(*words: str) -> AfterValidator:
    """A pydantic check that a string is one of `words`."""

    def check(word: str) -> str:
        """The word itself; a ValueError where it is not allowed."""
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One reader's word on one item. `number` counts the reader's verdicts from 1, `seen` hashes what was read.

    `seconds` is how long the item was on the reader's screen, `at` the time of the verdict (UTC, ISO 8601).
    `verdict` is one of `STEP_VERDICTS` or `QUESTION_VERDICTS`, or `WITHDRAWN`, which takes the one before back.
    `faults` belong to a wrong step; `answer_right` and `difficulty` to a question.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    reader: str
    number: int
    item_id: str
    seen: str
    verdict: Annotated[str, _one_of(*dict.fromkeys((*STEP_VERDICTS, *QUESTION_VERDICTS, WITHDRAWN)))]
    adjudicates: bool = False
    faults: list[Annotated[str, _one_of(*FAULTS)]] = field(default_factory=list)
    answer_right: bool | None = None
    difficulty: Annotated[str, _one_of(*DIFFICULTIES)] | None = None
    feedback: str = ""
    seconds: float = 0.0
    at: str = ""


_LINE = TypeAdapter(Verdict)


class VerdictLog:
    """The verdicts below a folder or URI: `append` adds one, `read` gives all."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)
        self._lock: int | None = None

    def claim(self) -> None:
        """Make the folder and keep other pages on this machine away from it while this process lives."""
        self.fs.create_dir(self.path, recursive=True)
        # An object store has no locks: there it is on the user that one page runs.
        if not self.is_local:
            return
        self._lock = os.open(
            Path(self.path) / LOCK,
            os.O_RDWR | os.O_CREAT,
            0o600,
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise TableError(
                f"another review page writes to {self.uri}; two would deal an item twice. Use that one, or stop it"
            ) from None

    def release(self) -> None:
        """Let another page have the folder."""
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
            write_file(
                self.fs,
                f"{self.path}/{verdict.reader}/{verdict.number:08d}.json",
                line,
            )

    def read(self) -> list[Verdict]:
        """All verdicts, by reader and number; a `TableError` names the file and the line that is none."""
        selector = pafs.FileSelector(
            self.path,
            recursive=not self.is_local,
            allow_not_found=True,
        )
        extension = "jsonl" if self.is_local else "json"
        verdicts: list[Verdict] = []
        for info in self.fs.get_file_info(selector):
            if info.type == pafs.FileType.File and info.extension == extension:
                with self.fs.open_input_stream(info.path) as stream:
                    verdicts += parse(stream.read(), info.path)
        return sorted(verdicts, key=_order)


def _order(verdict: Verdict) -> tuple[str, int]:
    return verdict.reader, verdict.number


def parse(content: bytes, where: str) -> list[Verdict]:
    """The verdicts in the lines of the file `where`, without what a kill tore; a `TableError` names a line at fault."""
    verdicts: list[Verdict] = []
    torn_line = 0  # number of the first line that is no JSON since the last verdict; 0: none
    for line_number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        verdict = _verdict(line, f"{where} line {line_number}")
        if verdict is None:
            torn_line = torn_line or line_number
            continue
        is_first = not verdicts or verdicts[-1].reader != verdict.reader
        previous = 0 if is_first else verdicts[-1].number
        # A verdict that was being written at a kill was never acknowledged: the next one takes its number.
        if torn_line and verdict.number > previous + 1:
            raise TableError(
                f"{where} line {torn_line} is no JSON, and {verdict.reader}'s verdict {previous + 1} is missing: the "
                "line is damaged. Restore the file from a copy, or write that verdict's line anew"
            )
        torn_line = 0
        verdicts.append(verdict)
    return verdicts


def _verdict(line: bytes, where: str) -> Verdict | None:
    """The verdict in a line; None for what is no JSON."""
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    # A torn line is no JSON; whole JSON that is no verdict was written by somebody else.
    if fault["type"] == "json_invalid":
        return None
    field = ".".join(map(str, fault["loc"]))
    label = f"{field!r}: " if field else ""
    problem = fault["msg"].removeprefix("Value error, ")
    raise TableError(f"{where} is no verdict: {label}{problem}. Mend the line, or delete it")


def _append_line(path: Path, line: bytes) -> None:
    """Append a line to the file, whole and on the disk."""
    is_new = not path.exists()
    descriptor = os.open(
        path,
        os.O_RDWR | os.O_CREAT | os.O_APPEND,
        0o600,
    )
    try:
        size = os.fstat(descriptor).st_size
        # What a kill tore stays a line of its own, which `parse` skips.
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (b"\n" if is_torn else b"") + line + b"\n"
        # One write: a kill between two would leave half a line behind a whole one.
        written = os.write(descriptor, content)
        if written != len(content):
            raise TableError(f"cannot write {path}: {written} of {len(content)} bytes fit. Free space there")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the folder's entries to the disk: a new file is lost with its entry, whatever was synced of its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest_verdicts(verdicts: Iterable[Verdict]) -> dict[str, dict[str, Verdict]]:
    """By item and reader the verdict that counts: the last one, unless it was withdrawn."""
    by_item: dict[str, dict[str, Verdict]] = {}
    for verdict in sorted(verdicts, key=_order):
        by_reader = by_item.setdefault(verdict.item_id, {})
        by_reader.pop(verdict.reader, None)
        if verdict.verdict != WITHDRAWN:
            by_reader[verdict.reader] = verdict
    return by_item
