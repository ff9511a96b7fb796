"""Tables through a real Ray session: rows are written while they are made, and a second run makes only the rest."""

from pathlib import Path

import pyarrow as pa
import pytest

from jobs.entry import root_cause
from medmm_ray.data import compaction
from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Provenance, RowError, Table, attach, pending, rows_hash

ORIGIN = Provenance(name="v", fingerprint="f", config={}, upstream={})
IDS = [f"i{n}" for n in range(20)]
pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]


def make(batch: pa.Table) -> pa.Table:
    return to_arrow(Vector, [Vector(item_id=row["item_id"], vector=[float(row["n"])]) for row in batch.to_pylist()])


def test_interrupted_table_is_resumed_exactly(tmp_path: Path) -> None:
    import ray

    source = ray.data.from_arrow(pa.table({"item_id": IDS})).repartition(5)
    numbers = pa.table({"item_id": IDS[::-1], "n": list(range(20))})
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    first = pending(source, "item_id", set(IDS[8:]))
    table.write(attach(first, numbers, "item_id", ["n"]).map_batches(make, batch_format="pyarrow"), "item_id")
    assert table.done_ids() == set(IDS[:8])
    rest = attach(pending(source, "item_id", table.done_ids()), numbers, "item_id", ["n"])
    table.write(rest.map_batches(make, batch_format="pyarrow"), "item_id")
    assert table.finish(ORIGIN, "item_id", IDS, seconds=0).rows == 20
    values = {row["item_id"]: row["vector"] for row in table.dataset().take_all()}
    assert values == {f"i{n}": [19.0 - n] for n in range(20)}


def test_a_tables_files_are_merged_by_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one of them: rows do not pass through the driver."""
    table = Table(str(tmp_path / "t"), Vector, target_bytes=4_000)
    table.prepare()
    for number, row_id in enumerate(IDS):
        table.write_part(to_arrow(Vector, [Vector(item_id=row_id, vector=[float(number)])]), "item_id")

    def write_in_driver(*_: object) -> None:
        raise AssertionError("the driver writes a file")

    monkeypatch.setattr(compaction, "write_file", write_in_driver)  # in this process alone
    manifest = table.finish(ORIGIN, "item_id", IDS, seconds=0)
    assert (manifest.rows, len(manifest.files)) == (20, 7)  # parts of 1.6 kB: three a file, two in the last
    assert manifest.content_hash == rows_hash(table.to_arrow())


def test_attach_gives_null_where_the_other_table_has_no_row() -> None:
    import ray

    rows = attach(ray.data.from_arrow(pa.table({"k": ["a", "b"]})), pa.table({"k": ["a"], "v": [1]}), "k", ["v"])
    assert sorted(rows.take_all(), key=lambda r: str(r["k"])) == [{"k": "a", "v": 1}, {"k": "b", "v": None}]


def test_a_row_error_raised_in_a_worker_reaches_the_driver_as_itself() -> None:
    import ray

    def fail(batch: pa.Table) -> pa.Table:
        raise RowError("image_empty", "x")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.data.from_arrow(pa.table({"k": ["a"]})).map_batches(fail, batch_format="pyarrow").materialize()
    assert root_cause(caught.value) == "image_empty: x"
