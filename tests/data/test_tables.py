import itertools
import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSelector, FileSystem, FSSpecHandler, PyFileSystem

from medmm_ray.data import compaction, part_log, tables
from medmm_ray.data.records import Document, Labels, States, Vector, to_arrow
from medmm_ray.data.tables import (
    LOOKUPS,
    Artifact,
    Manifest,
    Provenance,
    RowError,
    Table,
    TableError,
    filesystem,
    rows_hash,
    write_file,
    write_rows,
)

ORIGIN = Provenance(name="document_vectors", fingerprint="f", config={"k": 1}, upstream={"documents": "e"})


def vectors(*ids: str, error: str | None = None) -> pa.Table:
    return to_arrow(Vector, [Vector(item_id=i, vector=[1.0, 2.0], error=error) for i in ids])


@pytest.fixture(params=["local", "file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"local": f"{tmp_path}/t", "file": f"file://{tmp_path}/t", "memory": f"memory://{tmp_path.name}/t"}[
        request.param
    ]


def test_a_table_is_complete_when_its_manifest_exists(uri: str) -> None:
    table = Table(uri, Vector)
    table.prepare()
    table.write_part(vectors("a", "b"), "item_id")
    table.write_part(vectors("c"), "item_id")
    with pytest.raises(TableError, match=r"not complete: it has no manifest.json \(2 files so far\)"):
        table.to_arrow()
    manifest = table.finish(ORIGIN, "item_id", ["a", "b", "c"], seconds=1.5)
    assert table.is_complete
    assert (manifest.rows, len(manifest.files), manifest.seconds, manifest.upstream) == (3, 1, 1.5, {"documents": "e"})
    assert {"python", "ray", "pyarrow"} <= set(manifest.versions)
    assert table.manifest() == manifest
    assert sorted(table.to_arrow(["item_id"])["item_id"].to_pylist()) == ["a", "b", "c"]


def test_too_many_failed_rows_are_told_with_an_example_and_what_helps(uri: str) -> None:
    table = Table(uri, Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    table.write_part(vectors("b", "c", error="judge_reply: judge gave no verdicts: 'the heart is wide'"), "item_id")
    table.write_part(vectors("d", error="request: m answered 400: no such field"), "item_id")
    with pytest.raises(TableError) as error:
        table.finish(ORIGIN, "item_id", "abcd", seconds=0, max_error_rate=0.5)
    assert str(error.value) == (
        f"{uri}: 3 of 4 rows failed (judge_reply 2, request 1), more than max_error_rate=0.5; one says 'request: m "
        "answered 400: no such field'. All rows are kept in the part files there (column 'error'); mend the cause and "
        "run again to retry only those, or raise max_error_rate to accept them. Replies that do not fit (judge_reply) "
        "are kept: to ask anew, run again with one more of the step's `tries`."
    )


def test_resume_knows_what_is_done_and_retries_what_failed(uri: str) -> None:
    table = Table(uri, Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    table.write_part(vectors("b", error="image_corrupt: x"), "item_id")
    assert table.done_ids() == {"a"}
    assert table.rows_so_far() == 2
    table.write_part(vectors("b"), "item_id")
    manifest = table.finish(ORIGIN, "item_id", ["a", "b"], seconds=0)
    assert (manifest.rows, manifest.errors) == (2, {})


def test_what_a_retried_task_wrote_twice_is_kept_once(uri: str) -> None:
    once, twice = Table(uri + "1", Vector), Table(uri + "2", Vector)
    for table in (once, twice):
        table.prepare()
        table.write_part(vectors("a", "b", "c"), "item_id")
    twice.write_part(vectors("b", "c", "d"), "item_id")
    once.write_part(vectors("d"), "item_id")
    first = once.finish(ORIGIN, "item_id", "abcd", seconds=0)
    second = twice.finish(ORIGIN, "item_id", "abcd", seconds=0)
    assert second.rows == 4
    assert first.content_hash == second.content_hash


def test_a_part_within_another_is_not_lost_with_it(tmp_path: Path) -> None:
    """Cut down to what it alone holds, a part may get the name of a part that holds just that."""
    for a, b, c in itertools.permutations("abcd", 3):  # the parts' names, hashes of their ids, decide the order
        table = Table(f"{tmp_path}/{a}{b}{c}", Vector)
        table.prepare()
        for ids in ([a, b], [b, c], [c]):
            table.write_part(vectors(*ids), "item_id")
        assert table.finish(ORIGIN, "item_id", [a, b, c], seconds=0).rows == 3
        assert set(table.to_arrow()["item_id"].to_pylist()) == {a, b, c}


@pytest.mark.parametrize("other", ["x", "y", "z"])  # the name of a part decides which one is seen first
def test_a_retry_that_mended_some_rows_is_kept_whatever_its_parts_are_called(other: str, tmp_path: Path) -> None:
    failed = pa.concat_tables([vectors("b", "c", error="refused: no"), vectors("a")])
    half_mended = pa.concat_tables([vectors("b", other), vectors("c", error="refused: no")])
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(failed, "item_id")
    table.write_part(half_mended, "item_id")
    assert table.done_ids() == {"a", "b", other}
    assert table.finish(ORIGIN, "item_id", ["a", "b", "c", other], seconds=0).errors == {"refused": 1}
    errors = {row["item_id"]: row["error"] for row in table.to_arrow().to_pylist()}
    assert errors == {"a": None, "b": None, "c": "refused: no", other: None}


def test_a_part_that_comes_while_a_table_is_finished_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that outlived its driver writes once more when the parts have been listed."""
    table, of_worker = (Table(str(tmp_path / "t"), Vector) for _ in range(2))
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    table.write_part(vectors("b"), "item_id")

    def compact_late(*arguments: Any) -> list[str]:
        of_worker.write_part(vectors("a", "b"), "item_id")
        return compaction.compact(*arguments)

    monkeypatch.setattr(tables, "compact", compact_late)
    assert table.finish(ORIGIN, "item_id", "ab", seconds=0).rows == 2
    assert sorted(table.to_arrow()["item_id"].to_pylist()) == ["a", "b"]
    assert names_in(tmp_path / "t") == {"manifest.json", *table.manifest().files}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("target_bytes", "num_files"),
    [(1, 5), (4_000, 2), (1 << 20, 1)],  # of five parts of 1.6 kB
)
def test_parts_become_files_of_about_the_target_size(target_bytes: int, num_files: int, uri: str) -> None:
    tables_of_target = []
    for target in (target_bytes, 1 << 30):
        table = Table(f"{uri}{target}", Vector, target_bytes=target)
        table.prepare()
        for row_id in "abcd":
            table.write_part(vectors(row_id), "item_id")
        table.write_part(vectors("e", "f", error="refused: no"), "item_id")
        manifest = table.finish(ORIGIN, "item_id", "abcdef", seconds=0)
        tables_of_target.append((table, manifest))
    (table, manifest), (_, in_one_file) = tables_of_target
    assert len(manifest.files) == num_files
    assert (manifest.rows, manifest.errors) == (6, {"refused": 2})
    assert manifest.content_hash == in_one_file.content_hash == rows_hash(table.to_arrow())
    assert sorted(table.to_arrow()["item_id"].to_pylist()) == list("abcdef")
    listing = table.fs.get_file_info(pyarrow.fs.FileSelector(table.path, recursive=True))
    assert {entry.base_name for entry in listing} == {"manifest.json", *manifest.files}


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_parts_are_merged_where_they_can_be_read_in_a_ray_session(uri: str) -> None:
    table = Table(uri, Vector, target_bytes=3_500)
    table.prepare()
    for row_id in "abcdef":
        table.write_part(vectors(row_id), "item_id")
    assert len(table.finish(ORIGIN, "item_id", "abcdef", seconds=0).files) == 2
    assert sorted(table.to_arrow()["item_id"].to_pylist()) == list("abcdef")


def states_of(question: str, number: int) -> dict[str, Any]:
    """A question's row with so many entries of states, each with its own number in its bytes."""
    entries = [
        States(
            question_id=question, solution_id=f"{question}-{i}", model="m", evidence_hash="", num_steps=1,
            hidden_size=4, dtype="float32", states=bytes([i] * 16), summaries=bytes(16), text_log_odds=[0.5],
        )
        for i in range(number)
    ]  # fmt: skip
    return {"question_id": question, "states": to_arrow(States, entries).to_pylist()}


@pytest.mark.parametrize("target_bytes", [1, 1 << 30])  # parts as they are, and merged
def test_states_of_a_question_are_row_groups_of_their_own(target_bytes: int, uri: str) -> None:
    table = Table(uri, States, target_bytes=target_bytes)
    table.prepare()
    table.write_part(pa.Table.from_pylist([states_of("q1", 9), states_of("q2", 3)]), "question_id", "states")
    table.write_part(pa.Table.from_pylist([states_of("q3", 8)]), "question_id", "states")
    manifest = table.finish(ORIGIN, "question_id", ["q1", "q2", "q3"], seconds=0)
    assert len(manifest.files) == (2 if target_bytes == 1 else 1)
    groups = []
    for name in manifest.files:
        file = pyarrow.parquet.ParquetFile(table.fs.open_input_file(f"{table.path}/{name}"))
        rows_of_groups = [file.read_row_group(i).to_pylist() for i in range(file.num_row_groups)]
        groups += [[(row["solution_id"], row["states"][0]) for row in rows] for rows in rows_of_groups]
    assert sorted(groups) == [
        [(f"q1-{i}", i) for i in range(8)],
        [("q1-8", 8)],
        [(f"q2-{i}", i) for i in range(3)],
        [(f"q3-{i}", i) for i in range(8)],
    ]


def test_a_disk_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_link)
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    table.finish(ORIGIN, "item_id", "a", seconds=0)
    assert table.to_arrow()["item_id"].to_pylist() == ["a"]


class CountingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A disk that counts how often each file is opened, and how often a folder is listed."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.opened: Counter[str] = Counter()
        self.listed = 0

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "rb":
            self.opened[path] += 1
        return super().open(path, mode, **more)

    def find(self, path: str, *arguments: Any, **more: Any) -> Any:
        self.listed += 1
        return super().find(path, *arguments, **more)

    def ls(self, path: str, *arguments: Any, **more: Any) -> Any:
        self.listed += 1
        return super().ls(path, *arguments, **more)


def test_a_part_is_opened_twice_at_most_and_progress_lists_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a resumed run: its footer, once, where no index names it, and its rows for the table's file."""
    first = Table(str(tmp_path / "t"), Vector)
    first.prepare()
    monkeypatch.setattr(part_log, "INDEXED_PARTS", 8)
    for number in range(12):  # eight of them in an index
        first.write_part(vectors(f"i{number}"), "item_id")
    disk = CountingFileSystem()
    table = Table(str(tmp_path / "t"), Vector, PyFileSystem(FSSpecHandler(disk)))
    assert len(table.done_ids()) == 12
    opened = {Path(path).suffix: count for path, count in disk.opened.items()}
    assert (opened, len(disk.opened)) == ({".index": 1, ".parquet": 1}, 1 + 4)
    listed = disk.listed
    assert table.rows_written == 12
    assert disk.listed == listed
    table.finish(ORIGIN, "item_id", [f"i{number}" for number in range(12)], seconds=0)
    num_opened = [disk.opened[f"{tmp_path}/t/.parts/{part.name}"] for part in first._log.parts()]
    assert sorted(num_opened) == [1] * 8 + [2] * 4


def test_what_another_driver_finished_stays_as_it_is(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a", "b"), "item_id")
    manifest = table.finish(ORIGIN, "item_id", "ab", seconds=1)
    with pytest.raises(TableError, match="cannot write"):  # a worker of a driver that came too late
        table.write_part(vectors("a"), "item_id")
    assert table.finish(ORIGIN, "item_id", "ab", seconds=2) == manifest
    assert table.to_arrow().num_rows == 2


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    fs, path = filesystem(str(tmp_path / "part"))
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(50):
            write_file(fs, path, content)
            assert Path(path).read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))


class KilledError(Exception):
    """The process ends here."""


class Fatal(LocalFileSystem):  # type: ignore[misc]
    """A disk that is reached a number of times; then its process is killed."""

    cachable = False

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self._count()
        return super().open(path, mode, **more)

    def mv(self, *arguments: Any, **more: Any) -> None:
        self._count()
        super().mv(*arguments, **more)

    def cp_file(self, *arguments: Any, **more: Any) -> None:
        self._count()
        super().cp_file(*arguments, **more)

    def rm(self, path: Any, recursive: bool = False, **more: Any) -> None:
        self._count()
        if recursive:  # the folder goes file by file
            for file in sorted(Path(path).iterdir()):
                self._count()
                file.unlink()
        super().rm(path, recursive=recursive, **more)

    def rm_file(self, path: str) -> None:
        self._count()
        super().rm_file(path)


@pytest.mark.parametrize("target_bytes", [1, 3_000, 1 << 20])
def test_an_end_at_any_access_to_the_disk_leaves_what_a_second_run_completes(
    target_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that overlap, half of them failed: written, cut to size, merged and committed, ended at each access."""
    monkeypatch.setattr(part_log, "INDEXED_PARTS", 3)

    def work(uri: str, fs: FileSystem | None = None) -> Manifest:
        table = Table(uri, Vector, fs, target_bytes)
        table.prepare()
        done = table.done_ids()
        for ids, error in ((("a", "b"), "refused: no"), (("b", "c"), None), (("c", "d", "e"), None), (("a",), None)):
            if not set(ids) <= done:
                table.write_part(vectors(*ids, error=error), "item_id")
        return table.finish(ORIGIN, "item_id", "abcde", seconds=0)

    expected = work(f"{tmp_path}/calm").content_hash
    num_complete = 0  # killed after the commit
    for calls in itertools.count():
        uri = f"{tmp_path}/{calls}"
        try:
            work(uri, PyFileSystem(FSSpecHandler(Fatal(calls))))
            break
        except KilledError:
            pass
        num_complete += Table(uri, Vector).is_complete
        assert work(uri).content_hash == expected
        rows = Table(uri, Vector).to_arrow()
        assert sorted(rows["item_id"].to_pylist()) == list("abcde")
        assert rows["error"].null_count == 5
    assert calls >= 20
    assert num_complete > 3


def test_missing_and_unknown_ids_refuse_the_commit(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    with pytest.raises(TableError, match="1 of 2 ids are missing and 0 are unknown, e.g. \\['b'\\]"):
        table.finish(ORIGIN, "item_id", ["a", "b"], seconds=0)
    with pytest.raises(TableError, match="0 of 0 ids are missing and 1 are unknown"):
        table.finish(ORIGIN, "item_id", [], seconds=0)
    assert not table.is_complete


def test_error_rate_above_the_limit_fails_with_counts_and_keeps_all_rows(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a", "b"), "item_id")
    table.write_part(vectors("c", error="image_empty: c.png has 0 bytes"), "item_id")
    table.write_part(vectors("d", error="upstream: image_corrupt"), "item_id")
    with pytest.raises(TableError, match=r"1 of 4 rows failed \(image_empty 1\), more than max_error_rate=0.01"):
        table.finish(ORIGIN, "item_id", "abcd", seconds=0, max_error_rate=0.01)
    assert table.rows_so_far() == 4
    assert table.finish(ORIGIN, "item_id", "abcd", seconds=0, max_error_rate=0.5).errors == {"image_empty": 1}


def label_groups(*groups: tuple[str, int]) -> pa.Table:
    def label(question: str, i: int) -> dict[str, Any]:
        return {"question_id": question, "solution_id": f"{question}{i}", "source": "judge", "annotator": "m",
                "steps": [{"label": 1}], "cost": 0.25, "saw_answer": False, "error": None}  # fmt: skip

    rows = [{"question_id": q, "labels": [label(q, i) for i in range(n)]} for q, n in groups]
    schema = pa.schema([("question_id", pa.string()), ("labels", pa.list_(pa.struct(list(Table("x", Labels).schema))))])
    return pa.Table.from_pylist(rows, schema=schema)


def test_exploded_rows_keep_their_question_as_the_unit_of_resuming(uri: str) -> None:
    table = Table(uri, Labels)
    table.prepare()
    table.write_part(label_groups(("p", 2), ("q", 0)), "question_id", explode="labels")
    table.write_part(label_groups(("r", 0)), "question_id", explode="labels")
    assert table.done_ids() == {"p", "q", "r"}
    made = table.finish(ORIGIN, "question_id", "pqr", seconds=0)
    assert (made.rows, made.cost) == (2, 0.5)
    assert sorted(table.to_arrow()["solution_id"].to_pylist()) == ["p0", "p1"]


def test_a_table_of_an_earlier_version_is_read_with_what_it_did_not_have_empty(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Labels)
    table.prepare()
    table.write_part(label_groups(("p", 1)), "question_id", explode="labels")
    table.finish(ORIGIN, "question_id", "p", seconds=0)
    [file] = table.files()
    rows = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(rows.drop_columns(["answered_by"]), file)
    for read in (table.to_arrow(), *table.stream()):
        assert (read.schema.names, read["answered_by"].to_pylist()) == (table.schema.names, [None])
    pyarrow.parquet.write_table(rows.drop_columns(["annotator"]), file)
    with pytest.raises(KeyError, match="annotator"):  # one that no row can do without
        table.to_arrow()


def test_a_run_goes_on_with_parts_of_an_earlier_version(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    (old,) = (tmp_path / "t").rglob("part-*.parquet")
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(old).drop_columns(["encoder"]), old)
    new = to_arrow(Vector, [Vector(item_id="b", vector=[1.0, 2.0], encoder="{}")])
    table.write_part(new, "item_id")
    table.finish(ORIGIN, "item_id", ["a", "b"], seconds=0)
    rows = table.to_arrow()
    encoder_of = dict(zip(rows["item_id"].to_pylist(), rows["encoder"].to_pylist(), strict=True))
    assert encoder_of == {"a": None, "b": "{}"}


def test_what_tasks_of_a_killed_driver_looked_up_goes_when_the_table_is_complete(uri: str) -> None:
    table = Table(uri, Vector)
    table.prepare()
    folder = f"{table.path}/{LOOKUPS}/of-a-killed-driver"
    table.fs.create_dir(folder, recursive=True)
    with table.fs.open_output_stream(f"{folder}/questions") as stream:
        stream.write(b"rows")
    table.write_part(vectors("a"), "item_id")
    table.finish(ORIGIN, "item_id", ["a"], seconds=0)
    entries = table.fs.get_file_info(FileSelector(table.path, recursive=True))
    assert [entry.base_name for entry in entries if entry.is_file and not entry.base_name.endswith(".parquet")] == [
        "manifest.json"
    ]


def test_figures_of_rows_become_the_manifests_sums_whatever_was_written_twice(uri: str) -> None:
    table = Table(uri, Labels)
    table.prepare()
    for groups, took in (((("p", 1), ("q", 2)), [3, 0]), ((("q", 2), ("r", 0)), [0, 4])):
        figures = pa.array([{"tokens": n, "failed": 0} for n in took])
        table.write_part(label_groups(*groups).append_column("figures", figures), "question_id", explode="labels")
    manifest = table.finish(ORIGIN, "question_id", "pqr", seconds=0)
    assert (manifest.rows, manifest.figures) == (3, {"tokens": 7, "failed": 0})


def test_rows_that_do_not_fit_the_record_are_refused(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    with pytest.raises(TableError, match=r"rows lack the columns \['vector', 'encoder', 'error'\]"):
        table.write_part(pa.table({"item_id": ["a"]}), "item_id")
    row = {"item_id": "a", "vector": "text", "encoder": None, "error": None}
    with pytest.raises(TableError, match="do not fit the record Vector"):
        table.write_part(pa.Table.from_pylist([row]), "item_id")


def test_unwritable_places_and_unknown_schemes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot write to .*file/t"):
        Table(f"{tmp_path}/file/t", Vector).prepare()
    with pytest.raises(TableError, match="unknown scheme 'nosuch'"):
        filesystem("nosuch://bucket/t")


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    table.prepare()
    table.write_part(vectors("a"), "item_id")
    table.write_part(vectors("b"), "item_id")
    [lost] = [
        file
        for file in Path(table.path).glob(".parts/*")
        if b'["b"]' in pyarrow.parquet.read_schema(file).metadata[b"medmm"]
    ]
    lost.unlink()
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    Path(f"{lost}.{uuid.uuid4().hex}.tmp").symlink_to("/dev/full")
    with pytest.raises(TableError, match="No space left on device.*What is written so far is kept"):
        table.write_part(vectors("b"), "item_id")
    assert Table(table.uri, Vector).done_ids() == {"a"}
    assert not list(Path(table.path).glob(".parts/*.tmp"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[]", "medmm_ray.data.artifacts.Manifest() argument after ** must be a mapping, not list"),
        (
            '{"name": "v"}',
            "Manifest.__init__() missing 3 required keyword-only arguments: 'fingerprint', 'config', and",
        ),
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TableError) as caught:
        Table(str(tmp_path), Vector).manifest()
    assert str(caught.value).startswith(f"{tmp_path}/manifest.json is no manifest ({fault}")


def test_foreign_parquet_in_the_folder_is_named(tmp_path: Path) -> None:
    table = Table(str(tmp_path), Vector)
    table.prepare()
    pa.parquet.write_table(pa.table({"a": [1]}), tmp_path / ".parts" / "part-x.parquet")
    with pytest.raises(TableError, match="part-x.parquet is not a part file"):
        table.done_ids()


def test_unknown_column(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Vector)
    write_rows(table, [Vector(item_id="a", vector=[0.0])], ORIGIN, "item_id")
    with pytest.raises(TableError, match=r"has no column \['vectr'\]"):
        table.to_arrow(["vectr"])


def test_content_hash_knows_neither_order_nor_cost() -> None:
    rows = label_groups(("p", 3)).column("labels").combine_chunks().flatten()
    table = pa.Table.from_struct_array(rows)
    dearer = table.set_column(table.column_names.index("cost"), "cost", pa.array([9.0] * 3))
    assert rows_hash(table) == rows_hash(dearer.take([2, 0, 1]))
    assert rows_hash(table) != rows_hash(table.slice(1))


def test_write_rows_replaces_an_unfinished_attempt(tmp_path: Path) -> None:
    table = Table(str(tmp_path / "t"), Document)
    table.prepare()
    rows = [Document(document_id=i, corpus="c", title="t", text="x") for i in "ab"]
    table.write_part(to_arrow(Document, rows[:1]), "document_id")
    assert write_rows(table, rows, ORIGIN, "document_id").rows == 2
    empty = Table(str(tmp_path / "e"), Document)
    assert write_rows(empty, [], ORIGIN, "document_id").rows == 0
    assert empty.to_arrow().num_rows == 0


def test_artifact(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path / "index"))
    with pytest.raises(TableError, match="nothing is there"):
        artifact.manifest()
    artifact.prepare()
    artifact.commit(ORIGIN, 2.0, {"auroc": 0.9})
    stored = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert (stored["figures"], stored["seconds"]) == ({"auroc": 0.9}, 2.0)


def test_row_errors_carry_their_kind() -> None:
    error = RowError("image_empty", "x.png has 0 bytes")
    assert (error.kind, str(error)) == ("image_empty", "image_empty: x.png has 0 bytes")


@pytest.mark.parametrize(
    ("message", "stable"),
    [
        ("no image in <_io.BytesIO object at 0x7f8483cfe8e0>", "no image in <_io.BytesIO object at …>"),
        ("cannot open /tmp/tmpab12_xyz/a.png", "cannot open /tmp/…/a.png"),
        ("see /tmp/ray/session_2026-11-30_07-29-04_123456_789/logs", "see /tmp/ray/…/logs"),
        ("try again at 2026-11-30T07:29:04.125Z, or later", "try again at …, or later"),
        ("12 of 36 at 0.5 in /data/tmp/scan-2026-11-30.png", "12 of 36 at 0.5 in /data/tmp/scan-2026-11-30.png"),
    ],
)
def test_a_row_error_says_what_an_equal_run_would_say(message: str, stable: str) -> None:
    assert str(RowError("image_corrupt", message)) == f"image_corrupt: {stable}"
