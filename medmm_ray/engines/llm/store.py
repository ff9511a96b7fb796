"""Every answer of an endpoint, kept append-only by the content of its request before anybody uses it.

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

GROUPS_HELD = 1024  # in memory; a question's answers are a few kilobytes


@dataclass(frozen=True)
class PricedAnswer:
    """A whole answer and what it cost when it was paid, US dollars."""

    reply: ChatReply
    cost: float


class AnswerStore:
    """The answers under a folder or URI; one writer a group at a time, any number of groups."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.fs, self.path = filesystem(self.uri)
        self._held: OrderedDict[str, asyncio.Future[dict[str, PricedAnswer]]] = OrderedDict()
        self._pending: dict[str, list[tuple[str, PricedAnswer, asyncio.Future[None]]]] = {}
        self._writers: set[asyncio.Task[None]] = set()
        self._made: set[str] = set()  # folders; on an object store making one again is a request of its own
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="answers")  # not shared with slow readers of images

    async def find(self, group: str, key: str) -> PricedAnswer | None:
        """The answer to a request, None where none arrived. Raises `TableError` for a damaged segment."""
        return (await self._group(group)).get(key)

    async def put(self, group: str, key: str, answer: PricedAnswer) -> None:
        """Keep an answer; it is on storage when this returns."""
        answers = await self._group(group)
        done = asyncio.get_running_loop().create_future()
        waiting = self._pending.setdefault(group, [])
        waiting.append((key, answer, done))
        if len(waiting) == 1:
            writer = asyncio.create_task(self._write(group))
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)
        await done
        answers[key] = answer

    async def _write(self, group: str) -> None:
        """Write what waits, and what comes meanwhile, until nothing waits."""
        while batch := list(self._pending[group]):
            content = segment({key: answer for key, answer, _ in batch})
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._threads, self._write_segment, group, content)
                outcome = None
            except TableError as error:
                outcome = error
            for _, _, done in batch:
                if not done.done():
                    done.set_exception(outcome) if outcome else done.set_result(None)
            del self._pending[group][: len(batch)]
        del self._pending[group]

    def _write_segment(self, group: str, content: bytes) -> None:
        folder = f"{self.path}/{quote(group, safe='')}"
        try:
            if group not in self._made:
                self.fs.create_dir(folder, recursive=True)
                self._made.add(group)
        except OSError as error:
            raise TableError(f"cannot write {folder}: {error}. What is kept so far stays; run again") from error
        write_file(self.fs, f"{folder}/{uuid.uuid4().hex}.jsonl", content)

    async def _group(self, group: str) -> dict[str, PricedAnswer]:
        held = self._held.get(group)
        if held is None:
            loop = asyncio.get_running_loop()
            held = asyncio.ensure_future(loop.run_in_executor(self._threads, self.read, group))
            self._held[group] = held
            if len(self._held) > GROUPS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return await asyncio.shield(held)

    def read(self, group: str) -> dict[str, PricedAnswer]:
        """All answers of a group by the keys of their requests."""
        selector = pafs.FileSelector(f"{self.path}/{quote(group, safe='')}", allow_not_found=True)
        found: dict[str, PricedAnswer] = {}
        for info in self.fs.get_file_info(selector):
            if info.path.endswith(".jsonl"):
                with self.fs.open_input_stream(info.path, compression=None) as stream:
                    found |= parse_segment(stream.read(), info.path)
        return found


def segment(answers: dict[str, PricedAnswer]) -> bytes:
    """Answers as lines of JSON under the SHA-256 of those lines."""
    lines = [
        json.dumps({"key": key, "reply": _stored(answer.reply), "cost": answer.cost}) for key, answer in answers.items()
    ]
    body = "".join(f"{line}\n" for line in lines).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def parse_segment(content: bytes, name: str) -> dict[str, PricedAnswer]:
    """The answers of a segment file; raises `TableError` that names the file where it is damaged."""
    checksum, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise TableError(
            f"{name} is damaged: its checksum does not fit its {len(content)} bytes. Restore it from a copy, or delete "
            "it: the answers in it are then asked, and paid, again"
        )
    rows = [json.loads(line) for line in body.splitlines()]
    return {row["key"]: PricedAnswer(_reply(row["reply"]), row["cost"]) for row in rows}


# The token counts of a reply, and their names in files.
_TOKEN_FIELDS = {"prompt_tokens": "read", "cached_tokens": "cached", "completion_tokens": "written"}


def _stored(reply: ChatReply) -> dict[str, Any]:
    """A reply as its segment holds it."""
    return {_TOKEN_FIELDS.get(name, name): value for name, value in asdict(reply).items()}


def _reply(row: dict[str, Any]) -> ChatReply:
    """The reply of a segment's line."""
    fields = {name: row.pop(stored) for name, stored in _TOKEN_FIELDS.items()}
    choices = tuple(ChatChoice(**choice) for choice in row.pop("choices"))
    return ChatReply(choices=choices, **fields, **row)
