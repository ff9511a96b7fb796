"""sorted_rows.py: rows come out in the order of their ids, those of an id together and in the order they came in."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from medmm_ray.data.sorted_rows import SortedRows, listed_rows, rows_among, sort_rows, windows
from medmm_ray.data.tables import attach

SCHEMA = pa.schema({"question_id": pa.string(), "place": pa.int64(), "texts": pa.list_(pa.string())})


def some_rows(num_rows: int, num_ids: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ids in no order, some ids with many rows."""
    draw = random.Random(seed)
    return [
        {"question_id": f"q{draw.randrange(num_ids):04}", "place": place, "texts": ["ü" * 50] * draw.randrange(9)}
        for place in range(num_rows)
    ]


def written(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows", run_bytes: int = 1 << 16) -> SortedRows:
    table = pa.Table.from_pylist(rows, SCHEMA)
    parts = [table.slice(start, 700) for start in range(0, len(rows), 700)]
    return sort_rows(parts, "question_id", SCHEMA, str(tmp_path / name), run_bytes)


ROWS = some_rows(5000, 900)
BY_ID = sorted(ROWS, key=lambda row: (row["question_id"], row["place"]))


@pytest.mark.parametrize("run_bytes", [1 << 14, 1 << 30])
def test_rows_are_sorted_with_and_without_a_merge(
    tmp_path: Path, run_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmm_ray.data.sorted_rows.FAN_IN", 4)  # so that what is merged is merged again
    rows = written(tmp_path, ROWS, run_bytes=run_bytes)
    assert rows.between(None, None).to_pylist() == BY_ID
    assert pa.concat_tables(rows.batches()).to_pylist() == BY_ID
    assert [file.name for file in tmp_path.iterdir()] == ["rows"]  # the runs are gone


def test_rows_of_some_ids_are_those_of_a_table_and_of_a_file(tmp_path: Path) -> None:
    rows = [{"question_id": f"q{place}", "place": place, "texts": []} for place in range(2000)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    for lookup in (table, written(tmp_path, rows)):
        assert rows_among(lookup, "question_id", ["q7", "q1999", "absent", "q7"]) == {
            "q7": rows[7],
            "q1999": rows[1999],
        }
        assert rows_among(lookup, "question_id", []) == {}


def test_some_ids_are_found_by_whoever_opens_the_file(tmp_path: Path) -> None:
    rows = pickle.loads(pickle.dumps(written(tmp_path, ROWS)))  # noqa: S301 - its own
    ids = ["q0899", "q0000", "q0123", "q0124", "p", "q0900"]
    assert rows.rows_of(ids).to_pylist() == [row for row in BY_ID if row["question_id"] in ids]
    inside = rows.between("q0123", "q0500").to_pylist()
    assert inside == [row for row in BY_ID if "q0123" <= row["question_id"] < "q0500"]
    assert rows.rows_of([]).num_rows == rows.between("q0900", None).num_rows == 0


def test_windows_have_each_id_once_and_whole(tmp_path: Path) -> None:
    tables = {"many": written(tmp_path, ROWS), "few": written(tmp_path, some_rows(40, 1500, 1), "few")}
    ids_before: set[str] = set()
    read: dict[str, list[dict[str, Any]]] = {"many": [], "few": []}
    num_windows = 0
    for window in windows(tables, 100_000):
        num_windows += 1
        ids = {row_id for table in window.values() for row_id in table["question_id"].to_pylist()}
        assert not ids & ids_before
        ids_before |= ids
        for name, table in window.items():
            assert table.nbytes < 300_000
            read[name] += table.to_pylist()
    assert num_windows > 5
    assert read["many"] == BY_ID
    assert [row["question_id"] for row in read["few"]] == sorted(row["question_id"] for row in some_rows(40, 1500, 1))


def test_tables_without_rows_are_one_empty_window(tmp_path: Path) -> None:
    empty = sort_rows([], "question_id", SCHEMA, str(tmp_path / "empty"))
    assert [window["empty"].num_rows for window in windows({"empty": empty})] == [0]
    assert empty.rows_of(["q"]).schema == SCHEMA


def test_rows_that_lists_name_are_read_with_whoever_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medmm_ray.data.sorted_rows.RUN_BYTES", 1 << 16)
    monkeypatch.setattr("medmm_ray.data.sorted_rows.WINDOW_BYTES", 1 << 15)
    image_schema = pa.schema({"image_id": pa.string(), "uri": pa.string()})
    images = [{"image_id": f"i{number * 7919 % 10007:05}", "uri": "u" * 60 + str(number)} for number in range(3000)]
    draw = random.Random(0)
    owners: list[dict[str, Any]] = []
    for number in range(4000):
        ids = [image["image_id"] for image in draw.sample(images, draw.randrange(4))]
        owners.append({"question_id": f"q{number:04}", "place": 0, "texts": [*ids, "absent"] if number % 9 else ids})
    sorted_images = sort_rows(
        [pa.Table.from_pylist(images, image_schema)], "image_id", image_schema, str(tmp_path / "images")
    )
    listed = listed_rows(written(tmp_path, owners), "texts", sorted_images, str(tmp_path / "listed"))
    uris = {image["image_id"]: image["uri"] for image in images}
    expected = []
    for owner in owners:
        for image_id in sorted(set(owner["texts"]) - {"absent"}):
            expected.append({"question_id": owner["question_id"], "image_id": image_id, "uri": uris[image_id]})
    assert pa.concat_tables(listed.batches()).to_pylist() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "listed", "rows"]


def test_no_row_is_listed_where_nothing_is_named(tmp_path: Path) -> None:
    owners = written(tmp_path, [{"question_id": "q", "place": 0, "texts": []}])
    images = sort_rows([], "image_id", pa.schema({"image_id": pa.string()}), str(tmp_path / "images"))
    listed = listed_rows(owners, "texts", images, str(tmp_path / "listed"))
    assert listed.between(None, None).num_rows == 0


class Batches:
    """Stands for a Ray dataset of one batch; what works on it is pickled, as Ray does."""

    def __init__(self, batch: pa.Table) -> None:
        self.batch = batch

    def map_batches(self, work: Callable[[pa.Table], pa.Table], **_: Any) -> "Batches":
        pickled = cloudpickle.dumps(work)  # type: ignore[no-untyped-call]
        return Batches(cloudpickle.loads(pickled)(self.batch))


def test_what_is_attached_is_read_from_the_file_where_the_batch_is(tmp_path: Path) -> None:
    rows = [{"question_id": f"q{i:04}", "place": i, "texts": [str(i)]} for i in range(3000)]
    lookup = written(tmp_path, rows[::-1])
    batch = pa.table({"question_id": ["q2999", "nobody", "q0007", "q2999"]})
    ds: Any = Batches(batch)
    attached: Any = attach(ds, lookup, "question_id", ["texts", "place"])
    assert attached.batch.to_pylist() == [
        {"question_id": "q2999", "texts": ["2999"], "place": 2999},
        {"question_id": "nobody", "texts": None, "place": None},
        {"question_id": "q0007", "texts": ["7"], "place": 7},
        {"question_id": "q2999", "texts": ["2999"], "place": 2999},
    ]
