"""Ranges of a table's rows, in the order of its files: what a task reads of a table that nobody holds whole."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from medmm_ray.data.part_log import THREADS
from medmm_ray.data.tables import Table


@dataclass(frozen=True)
class RowRange:
    """Rows `first` to `end` (not included) of files that have `num_rows` each, together."""

    fs: pafs.FileSystem
    files: tuple[str, ...]
    num_rows: tuple[int, ...]
    first: int
    end: int
    mask: NDArray[np.bool_] | None = None
    """Which of the rows count; all without it."""

    @classmethod
    def whole(cls, table: Table) -> "RowRange":
        """All rows of a complete table; only the files' footers are read."""
        files = tuple(table.files())
        with ThreadPoolExecutor(THREADS) as pool:
            num_rows = tuple(pool.map(lambda path: _num_rows(table.fs, path), files))
        return cls(table.fs, files, num_rows, 0, sum(num_rows))

    def __len__(self) -> int:
        return self.end - self.first if self.mask is None else int(self.mask.sum())

    def only(self, mask: NDArray[np.bool_]) -> "RowRange":
        """The rows of this range for which `mask` is true."""
        return RowRange(self.fs, self.files, self.num_rows, self.first, self.end, mask)

    def among(self, mask: NDArray[np.bool_]) -> "RowRange":
        """The rows of this range that count and for which `mask`, of those rows alone, is true."""
        if self.mask is None:
            return self.only(mask)
        of_all = np.zeros(self.end - self.first, np.bool_)
        of_all[np.flatnonzero(self.mask)] = mask
        return self.only(of_all)

    def split(self, number: int) -> "list[RowRange]":
        """The range as `number` ranges that follow each other, of equally many rows that count."""
        places = np.arange(self.first, self.end) if self.mask is None else self.first + np.flatnonzero(self.mask)
        borders = [self.first]
        for share in np.array_split(places, number)[1:]:
            borders.append(int(share[0]) if len(share) else self.end)
        borders.append(self.end)
        ranges = []
        for first, end in pairwise(borders):
            mask = None if self.mask is None else self.mask[first - self.first : end - self.first]
            ranges.append(RowRange(self.fs, self.files, self.num_rows, first, end, mask))
        return ranges

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows that count, a row group at a time: no more is held."""
        start = 0
        for path, num_rows in zip(self.files, self.num_rows, strict=True):
            if start < self.end and start + num_rows > self.first:
                yield from self._of_file(path, start, columns)
            start += num_rows

    def _of_file(self, path: str, start: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        with pq.ParquetFile(path, filesystem=self.fs) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                first, last = max(start, self.first), min(end, self.end)
                if first < last:
                    rows = file.read_row_group(group, columns=list(columns))
                    yield self._counted(rows.slice(first - start, last - first), first)
                start = end

    def _counted(self, rows: pa.Table, first: int) -> pa.Table:
        if self.mask is None:
            return rows
        start = first - self.first
        return rows.filter(pa.array(self.mask[start : start + len(rows)]))


def _num_rows(fs: pafs.FileSystem, path: str) -> int:
    with pq.ParquetFile(path, filesystem=fs) as file:
        return int(file.metadata.num_rows)
