"""Many small files: tables that were written in thousands of parts, the stored answers of an API.

Of tables, baseline is what a folder of parts costs without an index and without merging: each footer opened in turn,
once to resume and twice to finish, each part opened to read the table. Ours is the table's own way. The rows "at ... ms
a request" stand for an object store: a local disk on which each opening takes so long. Of answers, baseline is a file
an answer, ours the store; both are synced to the disk.
"""

import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as pafs
from pydantic import Field
from rich.console import Console

from jobs.benches import Measured
from medmm_ray.config import Config
from medmm_ray.data.parts import PARTS, PartFooter
from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Provenance, Table, rows_hash
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer

ORIGIN = Provenance(name="vectors", fingerprint="bench", config={}, upstream={})


class BenchConfig(Config):
    """How many files, and how slow they are."""

    parts: int = Field(2000, ge=1)
    """Parts of the table, one row each."""
    remote_parts: int = Field(200, ge=1)
    """Parts of the table whose files open slowly."""
    latency_ms: float = Field(20.0, ge=0)
    """Milliseconds that a slow file takes to open."""
    answers: int = Field(2000, ge=1)
    """Answers of an API, 2 kB each, 32 in flight at a time."""


class SlowFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A disk of which each file takes a while to open, and which counts how often each is."""

    cachable = False

    def __init__(self, latency_s: float) -> None:
        super().__init__()
        self.latency_s = latency_s
        self.num_opened: Counter[str] = Counter()

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """As fsspec's, later."""
        if mode == "rb":
            self.num_opened[path] += 1
        time.sleep(self.latency_s)
        return super().open(path, mode, **options)


@dataclass(frozen=True)
class Times:
    """Seconds of a table's life after its parts are written."""

    resume: float
    finish: float
    read: float


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Resuming, finishing and reading a table on a fast and on a slow disk; how often a part is opened."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _local(config.parts, f"{folder}/local", console)
        yield from _remote(config, f"{folder}/remote", console)
        yield from _stored_answers(config.answers, Path(folder), console)


def _local(num_parts: int, folder: str, console: Console) -> Iterator[Measured]:
    fs = pafs.LocalFileSystem()
    _write(folder, num_parts)
    baseline = _baseline(fs, folder)
    listing_s = _seconds(lambda: fs.get_file_info(pafs.FileSelector(f"{folder}/{PARTS}")))
    table = Table(folder, Vector)
    times = _ours(table, num_parts)
    polling_s = _seconds(lambda: table.rows_written)
    console.print(f"{num_parts:,} parts on a local disk: {baseline}, then {times}")
    name = f"resume from {num_parts:,} parts"
    yield Measured(name, baseline.resume, times.resume, baseline.resume / times.resume, "≥ 3", "s")
    name = f"finish {num_parts:,} parts and read the table"
    before, after = baseline.finish + baseline.read, times.finish + times.read
    yield Measured(name, before, after, before / after, "≥ 2", "s")
    name = f"progress of {num_parts:,} parts, each time that it is shown"
    yield Measured(name, listing_s, polling_s, polling_s / listing_s, "≤ 0.1", "s")
    num_files = len(table.files())
    yield Measured("files of the table", num_parts, num_files, num_files / num_parts, "≤ 0.5", "files")
    is_equal = table.manifest().content_hash == rows_hash(table.to_arrow())
    yield Measured("content hash of the files equals the parts'", 1, is_equal, float(is_equal), "≥ 1", "tables")


def _remote(config: BenchConfig, folder: str, console: Console) -> Iterator[Measured]:
    num_parts = config.remote_parts
    _write(folder, num_parts)
    disk = SlowFileSystem(config.latency_ms / 1000)
    fs = pafs.PyFileSystem(pafs.FSSpecHandler(disk))
    baseline = _baseline(fs, folder)
    disk.num_opened.clear()
    table = Table(folder, Vector, fs)
    times = _ours(table, num_parts)
    console.print(f"{num_parts:,} parts at {config.latency_ms:g} ms a request: {baseline}, then {times}")
    name = f"resume and finish {num_parts:,} parts at {config.latency_ms:g} ms a request"
    before, after = baseline.resume + baseline.finish, times.resume + times.finish
    yield Measured(name, before, after, before / after, "≥ 8", "s")
    num_opened = max(count for path, count in disk.num_opened.items() if f"/{PARTS}/" in path)
    yield Measured("openings of a part, most, resumed and finished", 4, num_opened, num_opened, "≤ 2", "openings")


def _stored_answers(num_answers: int, folder: Path, console: Console) -> Iterator[Measured]:
    """Answers stored, then all looked up by a process that knows none."""
    reply = ChatReply((ChatChoice("x" * 2000, "stop"),), prompt_tokens=100, cached_tokens=0, completion_tokens=10)
    answers = {}
    for number in range(num_answers):
        answers[f"q{number // 8}", f"k{number}"] = PricedAnswer(reply, 0.5)
    single, segments = folder / "single", folder / "segments"
    single.mkdir()
    before_write = _seconds(lambda: _write_single(answers, single))
    before_read = _seconds(lambda: [json.loads(file.read_bytes()) for file in single.iterdir()])
    write_s = _seconds(lambda: asyncio.run(_put_all(answers, str(segments))))
    store = AnswerStore(str(segments))
    index_s = _seconds(store.refresh)
    found = store.look_up(answers)
    read_s = _seconds(lambda: store.look_up(answers))
    console.print(f"{num_answers:,} answers: index read in {index_s:.3f} s, each looked up in {read_s:.3f} s")
    name = f"store {num_answers:,} answers"
    yield Measured(name, before_write, write_s, before_write / write_s, "≥ 1", "s")
    num_files = len(list(segments.iterdir()))
    yield Measured("files of the answers", num_answers, num_files, num_files / num_answers, "≤ 0.1", "files")
    name = f"resume with {num_answers:,} answers, to know which are there"
    yield Measured(name, before_read, index_s, before_read / index_s, "≥ 2", "s")
    lost = sum(found.get(request) != answer for request, answer in answers.items())
    yield Measured("answers lost or changed", num_answers, lost, lost, "≤ 0", "answers")


def _write_single(answers: Mapping[tuple[str, str], PricedAnswer], folder: Path) -> None:
    for (group, key), answer in answers.items():
        row = {"group": group, "key": key, "reply": asdict(answer.reply), "cost": answer.cost}
        with (folder / f"{key}.json").open("wb") as file:
            file.write(json.dumps(row).encode())
            file.flush()
            os.fsync(file.fileno())


async def _put_all(answers: Mapping[tuple[str, str], PricedAnswer], folder: str) -> None:
    store, slots = AnswerStore(folder), asyncio.Semaphore(32)

    async def put(group: str, key: str, answer: PricedAnswer) -> None:
        async with slots:
            await store.put(group, key, answer)

    await asyncio.gather(*(put(group, key, answer) for (group, key), answer in answers.items()))


def _write(folder: str, num_parts: int) -> None:
    """A table's parts, as a driver leaves them that was killed before its end."""
    table = Table(folder, Vector)
    table.prepare()
    for item_id in _ids(num_parts):
        table.write_part(to_arrow(Vector, [Vector(item_id=item_id, vector=[0.5] * 8)]), "item_id")


def _ids(num_parts: int) -> list[str]:
    return [f"i{number}" for number in range(num_parts)]


def _baseline(fs: pafs.FileSystem, folder: str) -> Times:
    """Each part opened in turn, for each that is to be learnt of it."""
    entries = fs.get_file_info(pafs.FileSelector(f"{folder}/{PARTS}"))
    files = [entry.path for entry in entries if entry.path.endswith(".parquet")]

    def resume() -> None:
        for file in files:
            PartFooter.read(fs, file)

    def finish() -> None:
        for file in files:
            PartFooter.read(fs, file)
            pq.read_metadata(file, filesystem=fs)

    def read() -> None:
        for file in files:
            pq.read_table(file, filesystem=fs)

    return Times(_seconds(resume), _seconds(finish), _seconds(read))


def _ours(table: Table, num_parts: int) -> Times:
    return Times(
        resume=_seconds(table.done_ids),
        finish=_seconds(lambda: table.finish(ORIGIN, "item_id", _ids(num_parts), seconds=0)),
        read=_seconds(table.to_arrow),
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
