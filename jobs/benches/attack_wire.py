"""Attacks as bytes on a connection: nothing between them and the server makes them well-formed.

Enters: attacks, each a family, a name and the parts that are written. Leaves: the statuses that came back, of all
answers on the connection. Sending is asynchronous, some attacks at a time.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 60.0  # for an answer
MAX_ANSWER = 64 << 20


@dataclass(frozen=True)
class Attack:
    """One connection's worth of bytes.

    `num_with_key` of its requests show a key that is taken. Where it `waits`, it never completes a request, and no
    answer is due. `peer` is the loopback address that it comes from; `pause_s` lies between its parts.
    """

    family: str
    name: str
    parts: Sequence[bytes]
    num_with_key: int = 0
    pause_s: float = 0.0
    waits: bool = False
    peer: str = "127.0.0.1"


@dataclass(frozen=True)
class Outcome:
    """What came of an attack: the statuses of all answers, and how long it took (seconds)."""

    attack: Attack
    statuses: Sequence[int]
    seconds: float

    @property
    def num_faults(self) -> int:
        """Answers that blame the service."""
        return sum(status >= 500 for status in self.statuses)

    @property
    def num_open(self) -> int:
        """Answers with content to requests that had no right to it."""
        return max(0, sum(200 <= status < 300 for status in self.statuses) - self.attack.num_with_key)

    @property
    def is_unanswered(self) -> bool:
        """Whether an answer was due and none came."""
        return not self.statuses and not self.attack.waits


def request_bytes(method: str, target: str, body: bytes | None = None, key: str | None = None, **headers: str) -> bytes:
    """A well-formed request, the last of its connection; `headers` by their names with underscores."""
    lines = [f"{method} {target} HTTP/1.1"]
    fields: dict[str, str] = {"Host": "127.0.0.1", "Connection": "close"}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    for name, value in headers.items():
        fields[name.replace("_", "-")] = value
    for name, value in fields.items():
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def json_request(path: str, value: Mapping[str, Any], key: str | None) -> bytes:
    """A POST of a value as JSON."""
    return request_bytes("POST", path, json.dumps(value).encode(), key)


async def send(attack: Attack, host: str, port: int) -> Outcome:
    """Write an attack's parts, and read until the server closes the connection."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port, local_addr=(attack.peer, 0), limit=MAX_ANSWER)
    reading = asyncio.create_task(_read(reader))
    # A server that refuses need not read all of it: its answer says why.
    with suppress(ConnectionError):
        for number, part in enumerate(attack.parts):
            if number:
                await asyncio.sleep(attack.pause_s)
            writer.write(part)
            await writer.drain()
        if attack.waits:
            await asyncio.wait((reading,), timeout=attack.pause_s)
            writer.close()
    content = await asyncio.wait_for(reading, PATIENCE_S)
    writer.close()
    has_bodies = not attack.parts[0].startswith(b"HEAD ")
    return Outcome(attack, statuses_of(content, has_bodies), time.monotonic() - started)


async def _read(reader: asyncio.StreamReader) -> bytes:
    """All that comes; what was there before a connection broke counts."""
    content = bytearray()
    while True:
        try:
            part = await reader.read(1 << 16)
        except ConnectionError:
            return bytes(content)
        if not part:
            return bytes(content)
        content += part


async def send_all(attacks: Sequence[Attack], url: str, num_at_once: int) -> list[Outcome]:
    """Send attacks, `num_at_once` at a time; one that has no answer in time has no statuses."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    waiting = list(reversed(attacks))
    outcomes: list[Outcome] = []

    async def attacker() -> None:
        while waiting:
            attack = waiting.pop()
            try:
                outcomes.append(await send(attack, host, int(port)))
            except (TimeoutError, OSError):
                outcomes.append(Outcome(attack, (), PATIENCE_S))

    await asyncio.gather(*(attacker() for _ in range(num_at_once)))
    return outcomes


def statuses_of(content: bytes, has_bodies: bool = True) -> list[int]:
    """The statuses of the answers in what a connection gave, by HTTP/1.1's framing; interim ones (1xx) left out."""
    statuses: list[int] = []
    while content.startswith(b"HTTP/1."):
        head, _, content = content.partition(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        status = int(status_line.split()[1])
        if status < 200:
            continue
        statuses.append(status)
        headers: dict[bytes, bytes] = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            content = _behind_chunks(content)
        elif has_bodies:
            content = content[int(headers.get(b"content-length", len(content))) :]
    return statuses


def _behind_chunks(content: bytes) -> bytes:
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size.split(b";")[0] or b"0", 16)
        content = content[length + 2 :]
        if not length:
            break
    return content
