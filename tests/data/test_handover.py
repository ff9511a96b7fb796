"""What is handed over while a table is made is what the table holds in the end, whatever is killed or doubled."""

import threading
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from medmm_ray.data import handover
from medmm_ray.data.handover import Handover, TakeShard
from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Provenance, Table

ORIGIN = Provenance(name="v", fingerprint="f", config={}, upstream={})
IDS = [f"i{number}" for number in range(20)]


def vectors(ids: list[str], value: float = 1.0, error: str | None = None) -> pa.Table:
    return to_arrow(Vector, [Vector(item_id=row_id, vector=[value], error=error) for row_id in ids])


@pytest.fixture(autouse=True)
def eight_rows_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SHARD_ROWS", 8)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(f"{tmp_path}/t", Vector)
    table.prepare()
    return table


def begun(table: Table, num_rows: int = len(IDS)) -> Handover:
    """A handover of a table that goes on from what is there."""
    table.done_ids()
    handover = Handover("v")
    handover.begin(table, Vector, table.parts(), "item_id", num_rows)
    return handover


def write(table: Table, handover: Handover, rows: pa.Table) -> None:
    """Write a part, as a step does."""
    part = table.write_part(rows, "item_id")
    assert part is not None
    handover.add(part)


def taker(table: Table, end: str = "") -> TakeShard:
    return TakeShard(table.fs, table.path, Vector, "item_id", end or f"{table.path}/never")


def shard(table: Table, number: int) -> dict[str, float]:
    """The rows of a shard that is there."""
    rows = taker(table)(pa.table({"number": [number]}))
    assert rows.schema == table.schema
    return {row["item_id"]: row["vector"][0] for row in rows.to_pylist()}


def values(table: Table) -> dict[str, float]:
    return {row["item_id"]: row["vector"][0] for row in table.to_arrow().to_pylist()}


def test_rows_are_handed_over_in_shards_without_those_that_failed(table: Table) -> None:
    handover = begun(table)
    assert not handover.has_begun.is_set()
    write(table, handover, vectors(IDS[:6]))
    assert not handover.has_begun.is_set()  # eight make a shard
    write(table, handover, vectors(IDS[6:8], error="refused: no"))
    write(table, handover, vectors(IDS[8:13]))
    assert handover.has_begun.is_set()
    assert list(shard(table, 0)) == [*IDS[:6], *IDS[8:10]]
    write(table, handover, vectors(IDS[13:]))
    handover.flush()
    assert list(shard(table, 1)) == IDS[10:18]
    assert list(shard(table, 2)) == IDS[18:]


@pytest.mark.parametrize("repeat", [2.0, 3.0, 4.0, 5.0])  # the name of a part, a hash, says which would come first
def test_a_row_that_a_next_run_makes_again_stays_as_it_was_handed_over(table: Table, repeat: float) -> None:
    write(table, begun(table), vectors(IDS[:8]))
    # Killed; what a worker wrote meanwhile, the next run does not know of, and has it made again.
    rerun = Table(table.uri, Vector)
    handover = begun(rerun)
    assert handover.has_begun.is_set()
    write(rerun, handover, vectors(IDS, repeat))
    handover.flush()
    assert set(shard(table, 0).values()) == {1.0}
    assert list(shard(table, 1)) == IDS[8:16]
    rerun.finish(ORIGIN, "item_id", IDS, seconds=0)
    assert values(table) == dict.fromkeys(IDS[:8], 1.0) | dict.fromkeys(IDS[8:], repeat)


def test_what_an_earlier_run_wrote_and_did_not_hand_over_comes_first(table: Table) -> None:
    table.write_part(vectors(IDS[:9]), "item_id")
    handover = begun(table)
    assert list(shard(table, 0)) == IDS[:8]
    write(table, handover, vectors(IDS[9:]))
    assert list(shard(table, 1)) == IDS[8:16]


def test_two_drivers_hand_each_row_over_once(table: Table) -> None:
    second_table = Table(table.uri, Vector)
    first, second = begun(table), begun(second_table)
    write(table, first, vectors(IDS[:12], 1.0))
    write(second_table, second, vectors(IDS[:12], 2.0))
    assert shard(table, 0) == dict.fromkeys(IDS[:8], 1.0)
    write(second_table, second, vectors(IDS[12:], 2.0))
    second.flush()
    first.flush()
    rest = shard(table, 1) | shard(table, 2)
    assert rest == dict.fromkeys(IDS[8:], 2.0)
    table.finish(ORIGIN, "item_id", IDS, seconds=0)
    assert values(table) == shard_values(first=1.0, rest=2.0)


def shard_values(first: float, rest: float) -> dict[str, float]:
    return dict.fromkeys(IDS[:8], first) | dict.fromkeys(IDS[8:], rest)


def test_who_waits_for_a_shard_gets_it_when_it_comes_and_nothing_after_the_end(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "POLL_S", 0.01)
    made = begun(table)
    take = taker(table, made._end_path)
    answers: dict[int, int] = {}

    def wait(number: int) -> None:
        answers[number] = take(pa.table({"number": [number]})).num_rows

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    write(table, made, vectors(IDS[:8]))
    threads[0].join(timeout=30)
    assert answers == {0: 8}
    made.end()
    threads[1].join(timeout=30)
    assert answers == {0: 8, 1: 0}


def test_the_parts_stay_until_they_are_read_and_who_comes_later_takes_the_table(table: Table) -> None:
    handover = begun(table)
    write(table, handover, vectors(IDS))
    handover.flush()
    table.finish(ORIGIN, "item_id", IDS, seconds=0, keeps_parts=True)
    assert list(shard(table, 2)) == IDS[16:]
    Table(table.uri, Vector).delete_leftovers()  # as another driver does
    assert shard(table, 2) == {}
    assert taker(table)(pa.table({"number": [7]})).num_rows == 0
    handover.end()
    assert sorted(values(table)) == sorted(IDS)


def test_a_large_table_has_no_more_than_so_many_shards(table: Table) -> None:
    handover = begun(table, num_rows=1_000_000)
    ids = [f"q{number}" for number in range(250)]
    write(table, handover, vectors(ids))
    assert [len(shard(table, number)) for number in (0, 1)] == [100, 100]


def test_a_step_that_did_not_begin_hands_nothing_over() -> None:
    made = Handover("v")
    made.end(has_failed=True)
    assert made.has_begun.is_set()
    assert made.is_empty
    assert made.has_failed


@pytest.mark.engine
def test_rows_come_through_ray_while_the_table_is_made(table: Table, ray_session: None) -> None:
    del ray_session
    made = begun(table)
    first_is_read = threading.Event()

    def make() -> None:
        write(table, made, vectors(IDS[:8]))
        if first_is_read.wait(timeout=120):
            write(table, made, vectors([*IDS[8:12], *IDS[13:]]))
        made.flush()
        made.end()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    assert made.has_begun.wait(timeout=120)
    batches = []
    batch: Any
    for batch in made.dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        if batch.num_rows:
            batches.append(batch["item_id"].to_pylist())
            first_is_read.set()
    thread.join(timeout=120)
    assert batches[0] == IDS[:8]
    assert sorted(chain.from_iterable(batches)) == sorted([*IDS[:12], *IDS[13:]])
