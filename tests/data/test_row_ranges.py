"""Ranges of rows cover a table once, whatever its files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from medmm_ray.data.row_ranges import RowRange


def ids_of(rows: RowRange) -> list[int]:
    ids: list[int] = []
    for group in rows.row_groups(["id"]):
        ids += group["id"].to_pylist()
    return ids


@pytest.fixture
def rows(tmp_path: Path) -> RowRange:
    """100 rows in files of 30, 0 and 70, in row groups of 8."""
    files: list[str] = []
    for first, end in ((0, 30), (30, 30), (30, 100)):
        files.append(str(tmp_path / f"{len(files)}.parquet"))
        pq.write_table(pa.table({"id": pa.array(range(first, end), pa.int64())}), files[-1], row_group_size=8)
    return RowRange(pafs.LocalFileSystem(), tuple(files), (30, 0, 70), 0, 100)


def test_a_range_is_split_without_loss(rows: RowRange) -> None:
    assert ids_of(rows) == list(range(100))
    for number in (1, 3, 7, 100):
        shares = rows.split(number)
        assert [len(share) for share in shares] == [len(part) for part in np.array_split(range(100), number)]
        assert [i for share in shares for i in ids_of(share)] == list(range(100))
    assert len(rows.split(120)) == 120
    assert [i for share in rows.split(120) for i in ids_of(share)] == list(range(100))


def test_rows_that_do_not_count_are_left_out(rows: RowRange) -> None:
    mask = np.arange(100) % 10 == 7
    shares = rows.only(mask).split(3)
    assert [ids_of(share) for share in shares] == [[7, 17, 27, 37], [47, 57, 67], [77, 87, 97]]
    assert list(map(len, shares)) == [4, 3, 3]
    assert [ids_of(share) for share in rows.only(np.zeros(100, np.bool_)).split(1)] == [[]]


def test_of_the_rows_that_count_some_count(rows: RowRange) -> None:
    every_tenth = rows.only(np.arange(100) % 10 == 7)
    some = every_tenth.among(np.arange(10) % 2 == 0)
    assert ids_of(some) == [7, 27, 47, 67, 87]
    assert [ids_of(share) for share in some.split(2)] == [[7, 27, 47], [67, 87]]
    assert ids_of(rows.among(np.arange(100) < 3)) == [0, 1, 2]
