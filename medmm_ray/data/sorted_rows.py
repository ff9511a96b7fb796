"""Rows sorted by an id, in a file: how tables that fit no memory are joined.

Enters: tables part by part. Leaves: `SortedRows`, one Arrow file of small batches, of which those alone are read that
are asked for. `windows` reads several such files side by side, the rows of some ids at a time: a join in bounded
memory, in the order of the ids. Rows of one id keep the order in which they came. `listed_rows` joins by lists of ids.

Parquet and Ray Data have no such reading: a row group is for columns, and a shuffle for all nodes at once.
"""

import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import merge
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medmm_ray.data.artifacts import filesystem

BATCH_BYTES = 64 << 10
"""What is read at least, of an id."""
RUN_BYTES = 8 << 20
"""What is sorted in memory at a time."""
FAN_IN = 64
"""Sorted runs that are merged at a time: of each two batches are in memory, beside a window of all."""
WINDOW_BYTES = 4 << 20
"""What `windows` gives at a time, in Arrow; as Python objects it is ten times as much. Half of what is sorted at a
time, so that merging takes no more memory than sorting: a driver of many questions needs no more than one of few."""


class SortedRows:
    """The rows of a file that `sort_rows` wrote: `first_ids` and `sizes` (bytes) are of its batches.

    It may be pickled: a worker opens the file for itself.
    """

    def __init__(
        self,
        uri: str,
        key: str,
        schema: pa.Schema,
        first_ids: Sequence[str],
        sizes: Sequence[int],
    ) -> None:
        self.uri = uri
        self.key = key
        self.schema = schema
        self.first_ids = first_ids
        self.sizes = sizes
        self._reader: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def between(self, low: str | None, high: str | None) -> pa.Table:
        """The rows with low <= id < high; None: without a limit."""
        # An id may begin in the batch before the first that begins with it.
        start = 0 if low is None else max(0, bisect_left(self.first_ids, low) - 1)
        end = len(self.first_ids) if high is None else bisect_left(self.first_ids, high)
        rows = self._batches(range(start, end))
        num_below = 0 if low is None else _num_below(rows[self.key], low)
        num_inside = rows.num_rows if high is None else _num_below(rows[self.key], high)
        return rows.slice(num_below, num_inside - num_below)

    def batches(self) -> Iterator[pa.Table]:
        """All rows, a batch at a time."""
        for number in range(len(self.first_ids)):
            yield self._batches([number])

    def rows_of(self, ids: Iterable[str]) -> pa.Table:
        """The rows of some ids, in the order of the file."""
        distinct_ids = set(ids)
        numbers: set[int] = set()
        for row_id in distinct_ids:
            start = max(0, bisect_left(self.first_ids, row_id) - 1)
            numbers.update(range(start, bisect_right(self.first_ids, row_id)))
        rows = self._batches(sorted(numbers))
        is_among = pc.is_in(rows[self.key], pa.array(sorted(distinct_ids), pa.string()))
        return rows.filter(is_among)

    def delete(self) -> None:
        """Delete the file."""
        self._reader = None
        fs, path = filesystem(self.uri)
        fs.delete_file(path)

    def _batches(self, numbers: Sequence[int]) -> pa.Table:
        if not numbers:
            return self.schema.empty_table()
        if self._reader is None:
            fs, path = filesystem(self.uri)
            self._reader = pa.ipc.open_file(fs.open_input_file(path))
        batches = [self._reader.get_batch(number) for number in numbers]
        return pa.Table.from_batches(batches, self.schema)


def rows_among(rows: pa.Table | SortedRows, key: str, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows of some ids, each by its id in column `key`; of a file no others are read."""
    distinct_ids = sorted(set(ids))
    if isinstance(rows, SortedRows):
        rows = rows.rows_of(distinct_ids)
    else:
        rows = rows.filter(pc.is_in(rows[key], pa.array(distinct_ids, pa.string())))
    return {row[key]: row for row in rows.to_pylist()}


def _num_below(sorted_ids: pa.ChunkedArray, limit: str) -> int:
    return int(pc.sum(pc.less(sorted_ids, limit)).as_py() or 0)


def sort_rows(
    parts: Iterable[pa.Table],
    key: str,
    schema: pa.Schema,
    uri: str,
    run_bytes: int = RUN_BYTES,
) -> SortedRows:
    """Write the rows of all parts, sorted by the ids in column `key`, to the file `uri`."""
    level = 0
    runs: list[SortedRows] = []
    for rows in _runs(parts, schema, run_bytes):
        runs.append(write_sorted([rows.sort_by(key)], key, schema, f"{uri}.{level}-{len(runs)}"))
    while len(runs) > 1:
        level += 1
        merged: list[SortedRows] = []
        for start in range(0, len(runs), FAN_IN):
            merged.append(_merged(runs[start : start + FAN_IN], f"{uri}.{level}-{len(merged)}"))
        runs = merged
    if not runs:
        return write_sorted([], key, schema, uri)
    fs, path = filesystem(uri)
    fs.move(filesystem(runs[0].uri)[1], path)
    return SortedRows(uri, key, schema, runs[0].first_ids, runs[0].sizes)


def sort_tables(
    tables: Mapping[str, tuple[Iterable[pa.Table], pa.Schema]],
    key: str,
    folder: str,
) -> dict[str, SortedRows]:
    """`sort_rows` of the parts of several tables, each with the columns to take, to files of their names."""
    return {name: sort_rows(parts, key, schema, f"{folder}/{name}") for name, (parts, schema) in tables.items()}


def _merged(runs: Sequence[SortedRows], uri: str) -> SortedRows:
    """One file of neighbouring runs, which are deleted."""
    key, schema = runs[0].key, runs[0].schema
    names = {str(number): run for number, run in enumerate(runs)}
    # Runs stay in their order within a window, and the sort is stable: so do the rows of an id.
    tables = (_joined(list(window.values()), schema).sort_by(key) for window in windows(names))
    merged = write_sorted(tables, key, schema, uri)
    for run in runs:
        run.delete()
    return merged


def _runs(
    parts: Iterable[pa.Table],
    schema: pa.Schema,
    run_bytes: int,
) -> Iterator[pa.Table]:
    """The rows in tables of about `run_bytes`."""
    pending: list[pa.Table] = []
    num_bytes = 0
    for part in parts:
        for rows in pieces(part.select(schema.names).cast(schema), run_bytes):
            pending.append(rows)
            num_bytes += rows.nbytes
            if num_bytes >= run_bytes:
                yield _joined(pending, schema)
                pending, num_bytes = [], 0
    if num_bytes:
        yield _joined(pending, schema)


def pieces(rows: pa.Table, num_bytes: int) -> Iterator[pa.Table]:
    """A table in slices of about so many bytes each."""
    step = max(1, rows.num_rows * num_bytes // max(1, rows.nbytes))
    for start in range(0, rows.num_rows, step):
        yield rows.slice(start, step)


def _joined(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def write_sorted(
    tables: Iterable[pa.Table],
    key: str,
    schema: pa.Schema,
    uri: str,
) -> SortedRows:
    """Write tables whose rows are sorted by `key`, one after another, to the file `uri`."""
    fs, path = filesystem(uri)
    # Of each batch, so that none is opened in vain; Arrow's footer knows neither.
    first_ids: list[str] = []
    sizes: list[int] = []
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with fs.open_output_stream(path) as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for table in tables:
            for rows in pieces(table.combine_chunks(), BATCH_BYTES):
                batch = rows.combine_chunks().to_batches()[0]
                writer.write_batch(batch)
                first_ids.append(batch[key][0].as_py())
                sizes.append(batch.nbytes)
    return SortedRows(uri, key, schema, first_ids, sizes)


def windows(
    tables: Mapping[str, SortedRows],
    num_bytes: int = WINDOW_BYTES,
) -> Iterator[dict[str, pa.Table]]:
    """All rows of the tables by name, some ids of about `num_bytes` at a time, in the order of the ids; once at least.

    The rows of an id are in one window, whichever tables they are in.
    """
    # By the sizes of all tables together: a window of one may be empty where another's is full.
    entries = merge(*(zip(rows.first_ids, rows.sizes, strict=True) for rows in tables.values()))
    limits: list[str | None] = [None]
    size = 0
    for first_id, batch_bytes in entries:
        if size >= num_bytes and first_id != limits[-1]:
            limits.append(first_id)
            size = 0
        size += batch_bytes
    for low, high in pairwise([*limits, None]):
        yield {name: rows.between(low, high) for name, rows in tables.items()}


def listed_rows(
    owners: SortedRows,
    column: str,
    rows: SortedRows,
    uri: str,
) -> SortedRows:
    """The rows that the lists of ids in `column` of `owners` name, each with its owner's id, in the file `uri`.

    Sorted by the owner's id. A row that several owners name is there for each of them; an id without a row is left out.
    The ids of owners and of rows share no order: looked up for some owners at a time, nearly all rows would be read and
    held each time. So the pairs of both are sorted twice.
    """
    pair_schema = pa.schema({owners.key: pa.string(), rows.key: pa.string()})
    pairs = sort_rows(
        (_pairs(part, owners.key, column, pair_schema) for part in owners.batches()),
        rows.key,
        pair_schema,
        f"{uri}.pairs",
    )
    schema = pa.schema([pair_schema.field(owners.key), *rows.schema])
    matched = (_matched(window["pairs"], window["rows"], schema) for window in windows({"pairs": pairs, "rows": rows}))
    listed = sort_rows(matched, owners.key, schema, uri)
    pairs.delete()
    return listed


def _pairs(
    owners: pa.Table,
    key: str,
    column: str,
    schema: pa.Schema,
) -> pa.Table:
    """A row for each id in the lists: its owner's, and the id."""
    lists = owners[column].combine_chunks()
    owner_ids = owners[key].take(pc.list_parent_indices(lists))
    return pa.Table.from_arrays([owner_ids, pc.list_flatten(lists)], schema=schema)


def _matched(
    pairs: pa.Table,
    rows: pa.Table,
    schema: pa.Schema,
) -> pa.Table:
    """The pairs whose row there is, with the row."""
    owner_ids, row_ids = pairs.columns
    places = pc.index_in(row_ids, rows[schema.names[1]].combine_chunks())
    is_known = pc.is_valid(places)
    matches = rows.take(places.filter(is_known))
    return pa.Table.from_arrays([owner_ids.filter(is_known), *matches.columns], schema=schema)


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for files that the block needs; TMPDIR names the disk that it is on."""
    with tempfile.TemporaryDirectory(prefix="medmm-rows-") as folder:
        yield folder
