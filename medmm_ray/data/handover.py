"""Rows of a table in the making, handed to a step that works on them before the table is complete.

Who makes the table notes a few rows at a time, as soon as they are written, which ids are taken from which part: a
shard, a file beside the parts that is written once. The table is made of just these rows in the end, also after a kill
or beside another driver, whose engine may have said something else: so what was made of a row is made of what the table
holds. Rows with an error are not handed over, as a next run makes them again; who follows takes them from the complete
table.
"""

import json
import math
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from medmm_ray.data.artifacts import MANIFEST, Artifact, TableError, create_file, read_file, write_file
from medmm_ray.data.part_log import THREADS
from medmm_ray.data.parts import PARTS, Part, read_rows
from medmm_ray.data.records import arrow_schema

if TYPE_CHECKING:
    from ray.data import Dataset

SHARDS = "handover"
"""The folder, beside the parts, of the shards."""
SHARD = ".shard"
SHARD_ROWS = 4
"""Rows of a shard, where that makes no more of them than `MAX_SHARDS`; the follower ends later by the time of one."""
MAX_SHARDS = 10_000
"""Each is a file and a task."""
SPARE_TASKS = 4
"""Tasks beyond the shards that are expected: another driver's last one may be a small one."""
WAITING_TASKS = 2
"""Tasks that wait for a shard at a time; they take no CPU."""
POLL_S = 0.5

Shard = dict[str, list[str]]
"""Ids by the name of the part that each is taken from."""


def read_shards(fs: pafs.FileSystem, folder: str, first: int = 0) -> list[Shard]:
    """The shards below a folder of parts, in their order, from the `first` on."""
    numbers = []
    for entry in fs.get_file_info(pafs.FileSelector(f"{folder}/{SHARDS}", allow_not_found=True)):
        if entry.base_name.endswith(SHARD):
            numbers.append(int(entry.base_name.removesuffix(SHARD)))
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(lambda number: _read_shard(fs, folder, number), sorted(numbers)[first:]))
    return [shard for shard in shards if shard is not None]


def parts_of_ids(shards: list[Shard]) -> dict[str, str]:
    """The part that each id which was handed over is taken from."""
    part_of: dict[str, str] = {}
    for shard in shards:
        for part, ids in shard.items():
            for row_id in ids:
                # The first stands, should two drivers have handed over the same row.
                part_of.setdefault(row_id, part)
    return part_of


def _shard_path(folder: str, number: int) -> str:
    return f"{folder}/{SHARDS}/{number:08d}{SHARD}"


def _read_shard(fs: pafs.FileSystem, folder: str, number: int) -> Shard | None:
    content = read_file(fs, _shard_path(folder, number))
    return None if content is None else json.loads(content)


class Handover:
    """Between the step that makes the table `name` and the one that follows it, each in a thread of one driver.

    The first calls `begin`, `add` for each part, `flush` before the table's manifest and `end`; the other waits for
    `has_begun` and reads `dataset`, which ends after `end`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_begun = threading.Event()
        """Whether there is something to read, or will be nothing."""
        self.has_failed = False
        """Whether the table was not completed."""
        self.num_rows = 0
        """Rows that the table will have."""
        self._table: Artifact | None = None
        self._record: type = object
        self._key = ""
        self._shard_rows = SHARD_ROWS
        self.num_tasks = 0
        """Shards that there may be, at most."""
        self._num_shards = 0
        self._part_of: dict[str, str] = {}
        self._queue: dict[str, str] = {}  # ids to hand over, with their parts
        self._end_path = ""

    # Who makes the table

    def begin(self, table: Artifact, record: type, parts: Iterable[Part], key: str, num_rows: int) -> None:
        """Go on from what an earlier run has handed over and written, the `parts` of a table of `record`.

        `num_rows` are those of the whole table, each named by its `key`.
        """
        self._table, self._record, self._key, self.num_rows = table, record, key, num_rows
        table.fs.create_dir(f"{self._folder}/{SHARDS}")
        # A name of this run's own: the end of an earlier one is not the end of this.
        self._end_path = f"{self._folder}/{SHARDS}/{uuid.uuid4().hex}.end"
        self._take_shards()
        # The tasks that read shards are made before these are known, so their number is reckoned from the rows.
        num_to_come = max(num_rows - len(self._part_of), 0)
        self._shard_rows = max(SHARD_ROWS, math.ceil(num_to_come / MAX_SHARDS))
        self.num_tasks = self._num_shards + math.ceil(num_to_come / self._shard_rows) + SPARE_TASKS
        if self._num_shards:  # of an earlier run: there is something to read at once
            self.has_begun.set()
        for part in parts:
            self.add(part)

    def add(self, part: Part) -> None:
        """Hand over the rows of a part, as many as make whole shards."""
        # A failed row is made again by a next run, perhaps from another part.
        failed = set(part.footer.failed)
        for row_id in part.footer.ids:
            if row_id not in failed and row_id not in self._part_of:
                self._queue.setdefault(row_id, part.name)
        while len(self._queue) >= self._shard_rows:
            self._hand_over()

    def flush(self) -> None:
        """Hand over what does not make a whole shard, as no more comes."""
        while self._queue:
            self._hand_over()

    def end(self, has_failed: bool = False) -> None:
        """Let who follows end: the table is complete, or is not going to be."""
        self.has_failed = has_failed
        # Without the folder nobody waits: another driver has finished the table and deleted it.
        try:
            if self._table is not None and self._table.fs.get_file_info(self._folder).type != pafs.FileType.NotFound:
                write_file(self._table.fs, self._end_path, b"")
        finally:
            self.has_begun.set()

    @property
    def _folder(self) -> str:
        assert self._table is not None, "begin comes first"
        return f"{self._table.path}/{PARTS}"

    def _hand_over(self) -> None:
        assert self._table is not None
        shard: Shard = {}
        for row_id in islice(self._queue, self._shard_rows):
            shard.setdefault(self._queue[row_id], []).append(row_id)
        content = json.dumps(shard).encode()
        try:
            is_first = create_file(self._table.fs, _shard_path(self._folder, self._num_shards), content)
        except (OSError, TableError):
            if not self._table.is_complete:
                raise
            self._queue.clear()  # another driver has finished the table, and the parts are gone
            return
        if is_first:
            self._count(shard)
        else:  # another driver was: its shard stands, and what is in it needs no further one
            self._take_shards()
        self.has_begun.set()

    def _take_shards(self) -> None:
        """Take those that are there as they are: another driver's too."""
        assert self._table is not None
        for shard in read_shards(self._table.fs, self._folder, self._num_shards):
            self._count(shard)

    def _count(self, shard: Shard) -> None:
        self._num_shards += 1
        self._part_of |= parts_of_ids([shard])
        for ids in shard.values():
            for row_id in ids:
                self._queue.pop(row_id, None)

    # Who follows it

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read: the table was there already, or none was begun."""
        return self._table is None

    def taker(self) -> "TakeShard":
        """What gives the rows of each of `num_tasks` shards."""
        assert self._table is not None, "begin comes first"
        return TakeShard(self._table.fs, self._table.path, self._record, self._key, self._end_path)

    def dataset(self) -> "Dataset":
        """The rows, as they come, a block a shard; without those that had an error."""
        import ray

        # A task a shard: one that is lost is run again, and reads the same.
        tasks = [{"number": number} for number in range(self.num_tasks)]
        return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            self.taker(),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=WAITING_TASKS,
        )


@dataclass(frozen=True)
class TakeShard:
    """The number of a shard in, its rows out, as soon as it is there; no rows where it will never be."""

    fs: pafs.FileSystem
    table_path: str
    record: type
    key: str
    end_path: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        [number] = batch["number"].to_pylist()
        # With the columns of a row also where there is none: what follows looks for them.
        schema = arrow_schema(self.record)
        parts = [schema.empty_table()]
        try:
            for part, ids in self._wait_for(number).items():
                rows = read_rows(self.fs, f"{self._folder}/{part}").replace_schema_metadata(None)
                parts.append(rows.filter(pc.is_in(rows[self.key], pa.array(ids))).cast(schema))
        except FileNotFoundError:
            if not self._is_complete():
                raise
            return schema.empty_table()  # another driver took the parts away; the complete table has the rows
        return pa.concat_tables(parts)

    @property
    def _folder(self) -> str:
        return f"{self.table_path}/{PARTS}"

    def _wait_for(self, number: int) -> Mapping[str, list[str]]:
        while (shard := _read_shard(self.fs, self._folder, number)) is None:
            if self._is_over():
                return _read_shard(self.fs, self._folder, number) or {}  # it may have come between the two
            time.sleep(POLL_S)
        return shard

    def _is_over(self) -> bool:
        return self._exists(self.end_path) or (not self._exists(self._folder) and self._is_complete())

    def _exists(self, path: str) -> bool:
        return bool(self.fs.get_file_info(path).type != pafs.FileType.NotFound)

    def _is_complete(self) -> bool:
        return self._exists(f"{self.table_path}/{MANIFEST}")
