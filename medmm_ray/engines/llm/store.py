"""Every answer of an endpoint, stored append-only by the content of its request before anybody uses it.

Enters: a group (a question's id), a request's key, an answer. Leaves: the answer, in this run or any later one. A group
is a folder of segment files, so that a resumed question lists one small folder; answers of a group that arrive while
one of its segments is being written share the next. A segment is there whole or not at all, with a checksum.
"""

import asyncio
import hashlib
import json
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from pyarrow import fs as pafs

from medmm_ray.data.tables import TableError, filesystem, write_file
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply

CACHED_GROUPS = 1024  # in memory; a question's answers are a few kilobytes


@dataclass(frozen=True)
class PricedAnswer:
    """A whole answer and what it cost when it was paid, US dollars."""

    reply: ChatReply
    cost: float


@dataclass(frozen=True)
class _Pending:
    """An answer that waits to be written; `stored` is set when it is on storage."""

    key: str
    answer: PricedAnswer
    stored: "asyncio.Future[None]"


class AnswerStore:
    """The answers under a folder or URI; one writer a group at a time, any number of groups."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)
        self._groups: OrderedDict[str, asyncio.Future[dict[str, PricedAnswer]]] = OrderedDict()
        self._pending: dict[str, list[_Pending]] = {}
        self._writers: set[asyncio.Task[None]] = set()
        # Folders that exist: on an object store creating one again is a request of its own.
        self._created: set[str] = set()
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="answers")  # not shared with slow readers of images

    async def find(self, group: str, key: str) -> PricedAnswer | None:
        """The answer to a request, None where none arrived. Raises `TableError` for a damaged segment."""
        answers = await self._group(group)
        return answers.get(key)

    async def put(self, group: str, key: str, answer: PricedAnswer) -> None:
        """Store an answer; it is on storage when this returns."""
        answers = await self._group(group)
        stored = asyncio.get_running_loop().create_future()
        waiting = self._pending.setdefault(group, [])
        waiting.append(_Pending(key, answer, stored))
        if len(waiting) == 1:  # otherwise a writer is at work, and takes it next
            writer = asyncio.create_task(self._write(group))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
        await stored
        answers[key] = answer

    async def _write(self, group: str) -> None:
        """Write what waits, and what comes meanwhile, until nothing waits."""
        loop = asyncio.get_running_loop()
        while batch := list(self._pending[group]):
            content = segment({pending.key: pending.answer for pending in batch})
            error: TableError | None = None
            try:
                await loop.run_in_executor(self._threads, self._write_segment, group, content)
            except TableError as caught:
                error = caught
            for pending in batch:
                if pending.stored.done():  # who asked was cancelled
                    continue
                if error is None:
                    pending.stored.set_result(None)
                else:
                    pending.stored.set_exception(error)
            del self._pending[group][: len(batch)]
        del self._pending[group]

    def _write_segment(self, group: str, content: bytes) -> None:
        folder = self._folder(group)
        try:
            if group not in self._created:
                self.fs.create_dir(folder, recursive=True)
                self._created.add(group)
        except OSError as error:
            raise TableError(f"cannot write {folder}: {error}. What is kept so far stays; run again") from error
        write_file(self.fs, f"{folder}/{uuid.uuid4().hex}.jsonl", content)

    async def _group(self, group: str) -> dict[str, PricedAnswer]:
        """The answers of a group, read once; those that were used last stay in memory."""
        answers = self._groups.get(group)
        if answers is None:
            loop = asyncio.get_running_loop()
            answers = asyncio.ensure_future(loop.run_in_executor(self._threads, self.read, group))
            self._groups[group] = answers
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return await asyncio.shield(answers)  # others wait for the same reading

    def read(self, group: str) -> dict[str, PricedAnswer]:
        """All answers of a group by the keys of their requests."""
        selector = pafs.FileSelector(self._folder(group), allow_not_found=True)
        answers: dict[str, PricedAnswer] = {}
        for info in self.fs.get_file_info(selector):
            if info.path.endswith(".jsonl"):
                with self.fs.open_input_stream(info.path, compression=None) as stream:
                    answers |= parse_segment(stream.read(), info.path)
        return answers

    def _folder(self, group: str) -> str:
        return f"{self.path}/{quote(group, safe='')}"


def segment(answers: dict[str, PricedAnswer]) -> bytes:
    """Answers as lines of JSON under the SHA-256 of those lines."""
    lines = []
    for key, answer in answers.items():
        row = {"key": key, "reply": _stored_reply(answer.reply), "cost": answer.cost}
        lines.append(json.dumps(row) + "\n")
    body = "".join(lines).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def parse_segment(content: bytes, name: str) -> dict[str, PricedAnswer]:
    """The answers of a segment file; raises `TableError` that names the file where it is damaged."""
    checksum, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise TableError(
            f"{name} is damaged: its checksum does not fit its {len(content)} bytes. Restore it from a copy, or delete "
            "it: the answers in it are then asked, and paid, again"
        )
    answers = {}
    for line in body.splitlines():
        row = json.loads(line)
        answers[row["key"]] = PricedAnswer(_parse_reply(row["reply"]), row["cost"])
    return answers


# The names of a reply's fields in files, where they are others: files of earlier runs stay readable.
_STORED_NAMES = {"prompt_tokens": "read", "cached_tokens": "cached", "completion_tokens": "written"}


def _stored_reply(reply: ChatReply) -> dict[str, Any]:
    return {_STORED_NAMES.get(name, name): value for name, value in asdict(reply).items()}


def _parse_reply(row: dict[str, Any]) -> ChatReply:
    tokens = {name: row.pop(stored_name) for name, stored_name in _STORED_NAMES.items()}
    choices = tuple(ChatChoice(**choice) for choice in row.pop("choices"))
    return ChatReply(choices=choices, **tokens, **row)
