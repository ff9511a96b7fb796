"""Reading while training goes on: rows of Parquet files by their numbers, a cache that is bounded in bytes, and threads
that read ahead. So a worker's memory does not grow with what there is to read."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from medmm_ray.data.tables import filesystem

MAX_OPEN_FILES = 64  # each keeps its footer: 1 KB a row group and column
Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Values by key, the last used ones, which have at most `most_bytes` together; threads may share it."""

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Value | None:
        """The value, where it is still there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value of so many bytes, in the place of the values that were used the longest ago."""
        with self._lock:
            # What is larger than the cache would only empty it.
            if key in self._values or num_bytes > self.most_bytes:
                return
            self._values[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.most_bytes:
                _, (_, freed) = self._values.popitem(last=False)
                self.num_bytes -= freed


class ReadAhead(Generic[Value]):
    """Work that is begun in threads before its result is asked for."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-ahead")
        self._futures: dict[Hashable, Future[Value]] = {}

    def begin(self, key: Hashable, work: Callable[[], Value]) -> None:
        """Have the work done, unless it is under way."""
        if key not in self._futures:
            self._futures[key] = self._pool.submit(work)

    def result(self, key: Hashable, work: Callable[[], Value]) -> Value:
        """The result of the work that was begun, or of doing it now; it is given once."""
        future = self._futures.pop(key, None)
        return work() if future is None else future.result()


class RowGroupReader:
    """Row groups of Parquet files, by the numbers of both; each file is a folder's path or URI, and its name there."""

    def __init__(self, files: Sequence[tuple[str, str]]) -> None:
        self._files = files
        self._folders: dict[str, tuple[pafs.FileSystem, str]] = {}
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = Lock()

    def read(
        self,
        file: int,
        row_group: int,
        columns: Sequence[str],
    ) -> pa.Table:
        """Some columns of a row group; of the file nothing else is read but its footer."""
        with self._lock:  # a Parquet file is for one thread at a time
            return self._opened(file).read_row_group(
                row_group,
                columns=list(columns),
                use_threads=False,
            )

    def read_all(
        self,
        file: int,
        columns: Sequence[str],
    ) -> tuple[pa.Table, pa.Array]:
        """Some columns of a whole file, and the place of each row: file, row group, row in that."""
        with self._lock:
            opened = self._new_file(file)
        # It is not asked for again: its footer is let go.
        with opened:
            sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
            rows_of_file = opened.read(columns=list(columns), use_threads=False)
        row_groups = np.repeat(np.arange(len(sizes)), sizes)
        first_rows = np.cumsum([0, *sizes])
        rows = np.arange(len(row_groups)) - first_rows[row_groups]
        places = np.column_stack([np.full_like(rows, file), row_groups, rows]).astype(np.int32)
        return rows_of_file, pa.FixedSizeListArray.from_arrays(pa.array(places.ravel()), 3)

    def _opened(self, file: int) -> pq.ParquetFile:
        if file not in self._open:
            self._open[file] = self._new_file(file)
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close(force=True)
        self._open.move_to_end(file)
        return self._open[file]

    def _new_file(self, file: int) -> pq.ParquetFile:
        folder, name = self._files[file]
        # One connection a folder: a filesystem of an object store takes longer to make than a file to open.
        if folder not in self._folders:
            self._folders[folder] = filesystem(folder)
        fs, path = self._folders[folder]
        # The columns of a row group in few requests, not one each.
        return pq.ParquetFile(fs.open_input_file(f"{path}/{name}"), pre_buffer=True)


class TableRows:
    """The rows of one Parquet file by their numbers; the row groups that were read last stay in memory."""

    def __init__(self, uri: str, most_bytes: float) -> None:
        folder, _, name = uri.rpartition("/")
        fs, path = filesystem(uri)
        with pq.ParquetFile(fs.open_input_file(path)) as file:
            metadata = file.metadata
            lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self.columns: list[str] = file.schema_arrow.names
        self._starts: list[int] = [0, *accumulate(lengths)]
        self._reader = RowGroupReader([(folder, name)])
        self._cache: Cache[pa.Table] = Cache(most_bytes)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        row_group = bisect_right(self._starts, number) - 1
        # A row of Python objects takes ten times as much as in Arrow: only the one that is asked for becomes that.
        rows = self._cache.get(row_group)
        if rows is None:
            rows = self._reader.read(0, row_group, self.columns)
            self._cache.put(row_group, rows, rows.nbytes)
        row: dict[str, Any] = rows.slice(number - self._starts[row_group], 1).to_pylist()[0]
        return row

    def scan(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Some columns of all rows, one row group in memory at a time."""
        for row_group in range(len(self._starts) - 1):
            yield from self._reader.read(0, row_group, columns).to_pylist()
