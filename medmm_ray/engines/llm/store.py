"""Every answer of an endpoint, stored append-only by the content of its request before anybody uses it.

Enters: a group (a question's id), a request's key, an answer. Leaves: the answer, in this run or any later one. Each
writer appends to segments of its own, so that there are as many files as writers and not as answers; a line of a
segment is one answer under its checksum. What a reader holds of an answer is where it lies.

On a disk an answer counts as stored when it is synced. Object stores append to nothing: there the answers of a moment
are an object, and a writer makes one of many when it has so many.
"""

import asyncio
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pyarrow import fs as pafs

from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply

SEGMENT_BYTES = 64 << 20
"""Size at which a writer starts another segment on a disk."""
MERGED_OBJECTS = 64
"""Objects of a writer that become one."""
LINGER_S = 0.2
"""Seconds that answers wait for others on an object store: each object is a request, and an answer took seconds."""
KNOWN_GROUPS = 100_000  # a reader remembers that it has looked for their answers

_ID_LENGTH = 32  # hexadecimal digits of a request's hash, and of a line's checksum


@dataclass(frozen=True)
class PricedAnswer:
    """A whole answer and what it cost when it was paid, US dollars."""

    reply: ChatReply
    cost: float


@dataclass(frozen=True)
class StoredAnswer:
    """An answer with the request that it answers."""

    group: str
    key: str
    answer: PricedAnswer


class _Place(NamedTuple):
    """Where an answer's line lies."""

    segment: str
    start: int
    length: int


@dataclass(frozen=True)
class _Pending:
    """A line that waits to be written; `stored` is set when it is on storage."""

    request_id: str
    line: bytes
    stored: "asyncio.Future[None]"


class AnswerStore:
    """The answers under a folder or URI: any number of writers and readers at a time, on any machines."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)
        is_disk = isinstance(self.fs, pafs.LocalFileSystem)
        self._writer: _Writer = _DiskWriter(self.path) if is_disk else _ObjectWriter(self.fs, self.path)
        self._linger_s = 0.0 if is_disk else LINGER_S
        self._places: dict[str, _Place] = {}
        self._read_bytes: dict[str, int] = {}  # of each segment
        self._reading = threading.Lock()
        self._refreshing = asyncio.Lock()
        self._refreshes_requested = self._refreshes_covered = 0
        self._groups: set[str] = set()  # that were looked for
        self._pending: list[_Pending] = []
        self._writing: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="answers")  # not shared with slow readers of images

    async def find(self, group: str, key: str) -> PricedAnswer | None:
        """The answer to a request, None where none arrived. Raises `TableError` for a damaged segment.

        What other writers have stored of a group is looked for once, when the group is first asked for.
        """
        if group not in self._groups:
            await self._refresh()
            if len(self._groups) >= KNOWN_GROUPS:
                self._groups.clear()
            self._groups.add(group)
        request_id = _request_id(group, key)
        if request_id not in self._places:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, request_id)

    async def put(self, group: str, key: str, answer: PricedAnswer) -> None:
        """Store an answer; it is on storage when this returns."""
        request_id = _request_id(group, key)
        line = line_of(StoredAnswer(group, key, answer))
        stored = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(request_id, line, stored))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_pending())
        await stored

    def look_up(self, requests: Iterable[tuple[str, str]]) -> dict[tuple[str, str], PricedAnswer]:
        """The answers to those requests, by group and key, that have one now, whoever stored it."""
        self.refresh()
        answers = {}
        for group, key in requests:
            request_id = _request_id(group, key)
            if request_id in self._places:
                answers[group, key] = self._read(request_id)
        return answers

    # Writing

    async def _write_pending(self) -> None:
        """Write what waits, and what comes meanwhile, until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._pending:
            if self._linger_s:
                await asyncio.sleep(self._linger_s)
            batch, self._pending = self._pending, []
            error: TableError | None = None
            try:
                lines = [pending.line for pending in batch]
                places = await loop.run_in_executor(self._threads, self._writer.write, lines)
                for pending, place in zip(batch, places, strict=True):
                    self._places[pending.request_id] = place
            except TableError as caught:
                error = caught
            for pending in batch:
                if pending.stored.done():  # who asked was cancelled
                    continue
                if error is None:
                    pending.stored.set_result(None)
                else:
                    pending.stored.set_exception(error)

    # Reading

    async def _refresh(self) -> None:
        """`refresh`, begun after this was called; who waits at the same time shares one."""
        self._refreshes_requested += 1
        this_refresh = self._refreshes_requested
        async with self._refreshing:
            if self._refreshes_covered < this_refresh:
                covered = self._refreshes_requested
                await asyncio.get_running_loop().run_in_executor(self._threads, self.refresh)
                self._refreshes_covered = covered

    def refresh(self) -> None:
        """Learn where the answers lie that others have stored since; raises `TableError` for a damaged segment."""
        with self._reading:
            for entry in self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)):
                start = self._read_bytes.get(entry.base_name, 0)
                if entry.base_name.endswith(".jsonl") and entry.size > start:
                    self._read_segment(entry.base_name, start)

    def _read_segment(self, segment: str, start: int) -> None:
        """Note the answers of a segment from byte `start` to its last whole line."""
        try:
            content = self._bytes_of(segment, start)
        except FileNotFoundError:  # one of many that have become one: the next listing has that
            return
        end = start
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # its writer is at it, or was killed there: nobody was told that it is stored
            request_id = _check(line, f"{self.path}/{segment}")
            self._places[request_id] = _Place(segment, end, len(line))
            end += len(line)
        self._read_bytes[segment] = end

    def _read(self, request_id: str) -> PricedAnswer:
        """The answer to a request that has one."""
        place = self._places[request_id]
        try:
            line = self._bytes_of(place.segment, place.start, place.length)
        except FileNotFoundError:
            # Its object became part of another one, which is there by now.
            self.refresh()
            place = self._places[request_id]
            line = self._bytes_of(place.segment, place.start, place.length)
        return _parse(line).answer

    def _bytes_of(self, segment: str, start: int, length: int | None = None) -> bytes:
        with self.fs.open_input_file(f"{self.path}/{segment}") as file:
            file.seek(start)
            return bytes(file.read(length))


class _Writer(Protocol):
    """Appends lines to segments of its own."""

    def write(self, lines: Sequence[bytes]) -> list[_Place]:
        """Write lines and tell where they lie; they are on storage when this returns."""
        ...


class _DiskWriter:
    """One file that grows, synced after each batch."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._segment = ""
        self._size = SEGMENT_BYTES

    def write(self, lines: Sequence[bytes]) -> list[_Place]:
        """As `_Writer.write`."""
        if self._size >= SEGMENT_BYTES:
            self._segment, self._size = f"{uuid.uuid4().hex}.jsonl", 0
        path = self._folder / self._segment
        try:
            self._append(path, b"".join(lines))
        except OSError as error:
            # Half a line may be there: it must stay the file's last.
            self._size = SEGMENT_BYTES
            raise _cannot_write(path, error) from error
        places = places_of(self._segment, self._size, lines)
        self._size += sum(map(len, lines))
        return places

    def _append(self, path: Path, content: bytes) -> None:
        is_new = self._size == 0
        if is_new:
            self._folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
            os.fsync(file.fileno())
        if is_new:
            # The file's name must be on the disk too.
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class _ObjectWriter:
    """An object a batch; of every `MERGED_OBJECTS` of them one."""

    def __init__(self, fs: pafs.FileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder
        self._lines_of: dict[str, Sequence[bytes]] = {}  # the objects that are not merged yet
        self._is_created = False

    def write(self, lines: Sequence[bytes]) -> list[_Place]:
        """As `_Writer.write`."""
        segment = self._put(lines)
        self._lines_of[segment] = lines
        if len(self._lines_of) >= MERGED_OBJECTS:
            self._merge()
        return places_of(segment, 0, lines)

    def _put(self, lines: Sequence[bytes]) -> str:
        segment = f"{uuid.uuid4().hex}.jsonl"
        try:
            if not self._is_created:
                self._fs.create_dir(self._folder, recursive=True)
                self._is_created = True
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        write_file(self._fs, f"{self._folder}/{segment}", b"".join(lines))
        return segment

    def _merge(self) -> None:
        """One object instead of those so far, which go when it is there: until then answers lie in both."""
        all_lines: list[bytes] = []
        for lines in self._lines_of.values():
            all_lines += lines
        self._put(all_lines)
        for segment in self._lines_of:
            self._fs.delete_file(f"{self._folder}/{segment}")
        self._lines_of = {}


def places_of(segment: str, start: int, lines: Iterable[bytes]) -> list[_Place]:
    """Where lines lie that follow each other from byte `start` of a segment."""
    places = []
    for line in lines:
        places.append(_Place(segment, start, len(line)))
        start += len(line)
    return places


def _cannot_write(path: Path | str, error: OSError) -> TableError:
    return TableError(f"cannot write {path}: {error}. What is stored so far stays; run again")


def _request_id(group: str, key: str) -> str:
    return hashlib.sha256(f"{group}\0{key}".encode()).hexdigest()[:_ID_LENGTH]


def line_of(stored: StoredAnswer) -> bytes:
    """A line of a segment: a checksum of what follows, the request's hash, and the answer as JSON."""
    row = {
        "group": stored.group,
        "key": stored.key,
        "reply": asdict(stored.answer.reply),
        "cost": stored.answer.cost,
    }
    body = f"{_request_id(stored.group, stored.key)} {json.dumps(row)}\n".encode()
    return _checksum(body) + b" " + body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_ID_LENGTH].encode()


def _check(line: bytes, path: str) -> str:
    """The hash of the request that a line answers; raises `TableError` where the line is damaged."""
    body = line[_ID_LENGTH + 1 :]
    if _checksum(body) + b" " != line[: _ID_LENGTH + 1]:
        raise TableError(
            f"{path} is damaged: a checksum does not fit its line. Restore it from a copy, or delete it: the answers "
            "in it are then asked, and paid, again"
        )
    return body[:_ID_LENGTH].decode()


def _parse(line: bytes) -> StoredAnswer:
    row: dict[str, Any] = json.loads(line[2 * (_ID_LENGTH + 1) :])
    reply = row["reply"]
    choices = tuple(ChatChoice(**choice) for choice in reply.pop("choices"))
    answer = PricedAnswer(ChatReply(choices=choices, **reply), row["cost"])
    return StoredAnswer(row["group"], row["key"], answer)


def stored_answers(uri: str) -> Iterator[StoredAnswer]:
    """All lines of all segments under a folder or URI; raises `TableError` for a damaged one."""
    fs, path = filesystem(uri)
    for entry in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
        if entry.base_name.endswith(".jsonl"):
            with fs.open_input_stream(entry.path, compression=None) as stream:
                content = stream.read()
            for line in content.splitlines(keepends=True):
                if line.endswith(b"\n"):
                    _check(line, entry.path)
                    yield _parse(line)
