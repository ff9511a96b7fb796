"""On a storage that fails, waits and lists late nothing is lost, doubled or taken for missing."""

import asyncio
import errno
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import FileSelector

from jobs.entry import root_cause
from jobs.graph import BY_NAME
from jobs.step import Run, load_recipe, run_step
from medmm_ray.data import compaction, part_log, storage, tries
from medmm_ray.data.artifacts import (
    Artifact,
    Manifest,
    create_file,
    files_below,
    filesystem,
    follow,
    read_file,
    write_file,
)
from medmm_ray.data.records import Vector
from medmm_ray.data.storage import StorageError, is_transient
from medmm_ray.data.tables import Table, TableError
from medmm_ray.engines import checkpoints
from medmm_ray.engines.llm import store as store_module
from medmm_ray.engines.llm.ledger import LedgerFile
from medmm_ray.engines.llm.store import AnswerStore
from medmm_ray.train.checkpoints import copy
from tests.data.test_tables import ORIGIN, vectors
from tests.data.test_tries import FILES, TRY, contents, write
from tests.data.test_two_drivers import run_together
from tests.doubles.failing_storage import FailingStorage, Plan, age, write_plan
from tests.engines.llm.test_store import answer, put_all

TINY = "jobs/recipes/tiny.yaml"
SEEDS = range(6)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSE_S", 1e-5)
    monkeypatch.setattr(store_module, "LINGER_S", 0.0)


@pytest.fixture(params=SEEDS)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store of which two calls in five fail, half of these after they have had their effect."""
    before = FailingStorage.num_faults.total()
    yield write_plan(tmp_path / "store", Plan(seed=request.param, rate=0.4))
    assert FailingStorage.num_faults.total() - before > 5


def make_table(uri: str, num_written: int = 4) -> Manifest:
    """A table of parts that overlap, some rows failed at first, of which the first parts are written; then finished."""
    table = Table(uri, Vector, target_bytes=3000)
    table.prepare()
    done = table.done_ids()
    parts = ((("a", "b"), "refused: no"), (("b", "c"), None), (("c", "d", "e"), None), (("a",), None))
    for ids, error in parts[:num_written]:
        if not set(ids) <= done:
            table.write_part(vectors(*ids, error=error), "item_id")
    if num_written < len(parts):
        raise KeyboardInterrupt
    return table.finish(ORIGIN, "item_id", "abcde", seconds=0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_table(str(tmp_path_factory.mktemp("calm") / "t"))


def check_table(uri: str, manifest: Manifest, calm: Manifest) -> None:
    assert (manifest.content_hash, manifest.rows, manifest.errors) == (calm.content_hash, 5, {})
    assert sorted(Table(uri, Vector).to_arrow()["item_id"].to_pylist()) == list("abcde")


@pytest.mark.parametrize("num_written", [1, 3, 4])
def test_a_table_is_written_resumed_and_finished(
    uri: str, num_written: int, calm: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_log, "INDEXED_PARTS", 2)
    monkeypatch.setattr(compaction, "THREADS", 2)
    if num_written < 4:
        with pytest.raises(KeyboardInterrupt):
            make_table(f"{uri}/t", num_written)
    check_table(f"{uri}/t", make_table(f"{uri}/t"), calm)
    table = Table(f"{uri}/t", Vector)
    listing = table.fs.get_file_info(FileSelector(table.path))
    names = {entry.base_name for entry in listing}
    assert names == {"manifest.json", *table.manifest().files}


def test_a_try_is_made_and_followed(uri: str) -> None:
    artifact = Artifact(f"{uri}/model/f")
    with pytest.raises(KeyboardInterrupt):
        tries.make(artifact, ORIGIN, interrupted, lambda: 1.0, resumes=True)
    attempt = tries.begin(artifact, resumes=True)
    assert attempt is not None
    assert contents(Artifact(attempt.uri)) == dict.fromkeys(FILES, "half")
    manifest = tries.make(artifact, ORIGIN, lambda uri: write(uri, "whole"), lambda: 2.0, resumes=True)
    assert artifact.manifest() == manifest
    files = contents(artifact)
    assert {name: content for name, content in files.items() if ".tries" not in name} == dict.fromkeys(FILES, "whole")
    assert follow(f"{uri}/model/latest") == artifact.uri


def interrupted(uri: str) -> dict[str, float]:
    write(uri, "half")
    raise KeyboardInterrupt


def test_answers_are_stored_merged_and_looked_up(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MERGED_OBJECTS", 3)
    requests = [("q", f"k{number}") for number in range(10)]
    writer = AnswerStore(f"{uri}/answers")
    for request in requests:
        asyncio.run(put_all(writer, [request]))
        writer._writing = None  # of the loop that has ended
    expected = {(group, key): answer(f"{group} {key}") for group, key in requests}
    assert AnswerStore(f"{uri}/answers").look_up(requests) == expected


def test_a_ledger_is_kept(uri: str) -> None:
    file = LedgerFile(f"{uri}/api")
    file.create_folder()
    assert file.read().ledger.epoch == 0
    for epoch in (1, 2, 3):
        assert file.write(json.dumps({"epoch": epoch, "reserved": []}).encode(), epoch)
    assert file.read().ledger.epoch == 3
    assert not file.write(b"{}", 2)


def test_a_checkpoint_is_copied_there_and_back(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "RANGE_BYTES", 7)
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    (source / "weights").write_bytes(bytes(range(50)))
    (source / "sub" / "config.json").write_text("{}")
    copy(str(source), f"{uri}/copy")
    folder = checkpoints.local_folder(f"{uri}/copy")
    assert (folder / "weights").read_bytes() == bytes(range(50))
    assert (folder / "sub" / "config.json").read_text() == "{}"


def test_each_operation_has_its_effect_once(uri: str) -> None:
    fs, path = filesystem(f"{uri}/files")
    fs.create_dir(path, recursive=True)
    fs.create_dir(path, recursive=True)
    for number in range(9):
        write_file(fs, f"{path}/{number}", b"first")
        write_file(fs, f"{path}/{number}", b"0123456789")
    with fs.open_input_file(f"{path}/3") as file:
        assert (file.size(), file.read(4), file.tell(), file.read_at(3, 1)) == (10, b"0123", 4, b"123")
    fs.copy_file(f"{path}/0", f"{path}/copy")
    fs.move(f"{path}/1", f"{path}/sub/moved")
    for number in range(2, 8):
        fs.delete_file(f"{path}/{number}")
    names = sorted(file.path.removeprefix(f"{path}/") for file in files_below(fs, path))
    assert names == ["0", "8", "copy", "sub/moved"]
    assert read_file(fs, f"{path}/sub/moved") == read_file(fs, f"{path}/copy") == b"0123456789"
    assert fs.get_file_info(f"{path}/1").type == fs.get_file_info(f"{path}/none").type == pa.fs.FileType.NotFound
    with pytest.raises(FileNotFoundError):
        fs.delete_file(f"{path}/1")
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(f"{path}/1")
    fs.delete_dir(path)
    assert fs.get_file_info(path).type == pa.fs.FileType.NotFound


def test_who_is_second_to_create_a_file_is_told(uri: str) -> None:
    fs, path = filesystem(f"{uri}/files")
    for number in range(9):
        # By the first one's own attempt too, where that failed after it had written.
        create_file(fs, f"{path}/{number}", b"first")
        assert not create_file(fs, f"{path}/{number}", b"second")
        assert read_file(fs, f"{path}/{number}") == b"first"


@pytest.fixture
def down(tmp_path: Path) -> str:
    """A store with a table in the making, that then answers nothing any longer."""
    uri = write_plan(tmp_path / "store", Plan())
    with pytest.raises(KeyboardInterrupt):
        make_table(f"{uri}/t", 3)
    return write_plan(tmp_path / "store", Plan(rate=1.0, most=99))


@pytest.mark.parametrize(
    "call",
    [
        lambda uri: Table(uri, Vector).done_ids(),
        lambda uri: Table(uri, Vector).is_complete,
        lambda uri: Artifact(uri).exists,
        lambda uri: read_file(*filesystem(f"{uri}/manifest.json")),
        lambda uri: follow(f"{uri}/latest"),
        lambda uri: tries.begin(Artifact(uri)),
        lambda uri: AnswerStore(f"{uri}/.parts").look_up([("q", "k")]),
        lambda uri: LedgerFile(uri).read(),
        lambda uri: checkpoints.local_folder(f"{uri}/.parts"),
    ],
)
def test_what_cannot_be_seen_is_not_taken_for_missing(down: str, call: Callable[[str], Any]) -> None:
    with pytest.raises(
        StorageError, match=r"(looking at|listing) /\S+/store/t\S* failed 8 times in \d+\.\d s: .+ kept"
    ):
        call(f"{down}/t")


def test_a_store_that_comes_back_is_gone_on_with(down: str, calm: Manifest, tmp_path: Path) -> None:
    with pytest.raises((StorageError, TableError), match="failed 8 times"):
        make_table(f"{down}/t")
    write_plan(tmp_path / "store", Plan())
    check_table(f"{down}/t", make_table(f"{down}/t"), calm)


@pytest.mark.parametrize("pattern", ["*/.parts/*.parquet", "*/.parts/*.index", "*/t/part-*", "*/manifest.json"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"cannot write /\S+: .*No space left on device.*kept: free space there, or name another"),
        (errno.EACCES, r"cannot write /\S+: .*Permission denied"),
        (
            0,
            r"(writing|copying) /\S+.* failed 8 times in .*503 Slow Down\. What .* is kept: run again when",
        ),
    ],
)
def test_a_write_that_goes_on_failing_is_said_and_resumed(
    tmp_path: Path, pattern: str, code: int, message: str, calm: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_log, "INDEXED_PARTS", 2)
    uri = write_plan(tmp_path / "store", Plan(refused=pattern, refusal=code))
    with pytest.raises(TableError, match=message):
        make_table(f"{uri}/t")
    assert not Table(f"{uri}/t", Vector).is_complete
    write_plan(tmp_path / "store", Plan())
    check_table(f"{uri}/t", make_table(f"{uri}/t"), calm)


def test_two_processes_end_with_the_artifact_of_one(tmp_path: Path) -> None:
    uri = write_plan(tmp_path / "store", Plan(rate=0.3, delay_s=0.01)) + "/a"
    first, second = run_together(TRY, [uri, "a"], [uri, "bb"])
    assert first == second
    winner = {"1.0": "a", "2.0": "bb"}[first[0]]
    files = contents(Artifact(uri))
    assert {name: files[name] for name in FILES} == dict.fromkeys(FILES, winner)


def test_a_table_of_which_no_listing_shows_anything_loses_and_doubles_nothing(tmp_path: Path, calm: Manifest) -> None:
    uri = write_plan(tmp_path / "store", Plan(late_s=600))
    with pytest.raises(KeyboardInterrupt):
        make_table(f"{uri}/t", 3)
    assert Table(f"{uri}/t", Vector).done_ids() == set()
    check_table(f"{uri}/t", make_table(f"{uri}/t"), calm)


def test_parts_that_are_listed_late_are_found_by_their_index(
    tmp_path: Path, calm: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_log, "INDEXED_PARTS", 3)
    uri = write_plan(tmp_path / "store", Plan(late_s=600))
    with pytest.raises(KeyboardInterrupt):
        make_table(f"{uri}/t", 3)
    [index] = (tmp_path / "store").rglob("*.index")
    age(index.parent)
    for part in index.parent.glob("*.parquet"):
        part.touch()
    next(index.parent.glob("*.parquet")).unlink()
    assert len(Table(f"{uri}/t", Vector).done_ids()) >= 1
    check_table(f"{uri}/t", make_table(f"{uri}/t"), calm)


def test_a_folder_is_taken_when_its_manifest_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the files that a listing misses would be missing from the artifact for good."""
    root = tmp_path / "store"
    uri = write_plan(root, Plan(late_s=600))
    pauses: list[float] = []

    def catch_up(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            age(root)

    monkeypatch.setattr(time, "sleep", lambda seconds: catch_up(seconds) if seconds else None)
    tries.make(Artifact(f"{uri}/a"), ORIGIN, lambda uri: write(uri, "whole"), lambda: 1.0)
    assert len(pauses) >= 3
    monkeypatch.undo()
    age(root)
    files = contents(Artifact(f"{uri}/a"))
    assert {name: files[name] for name in FILES} == dict.fromkeys(FILES, "whole")


def test_a_folder_that_is_never_listed_whole_is_no_artifact(tmp_path: Path) -> None:
    artifact = Artifact(write_plan(tmp_path / "store", Plan(late_s=600)) + "/a")
    with pytest.raises(StorageError, match=r"listing \S+ failed 8 times .*manifest.json is there and not listed yet"):
        tries.make(artifact, ORIGIN, lambda uri: write(uri, "whole"), lambda: 1.0)
    assert not artifact.is_complete


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_a_step_of_many_workers(tmp_path: Path) -> None:
    """Interrupted once: storage that is full ends it, and the same step goes on where there is room again."""
    hashes = []
    for plan in (Plan(), Plan(rate=0.1, delay_s=0.01, refused="*/raw_images/*.parquet", refusal=errno.ENOSPC)):
        uri = write_plan(tmp_path / str(plan.rate), plan)
        run = Run(load_recipe([TINY, f"run={uri}/run"]))
        if plan.refused:
            with pytest.raises(Exception, match="No space left on device") as refusal:
                run_step(run, BY_NAME["ingest"])
            assert "free space there, or name another output" in root_cause(refusal.value)
            write_plan(tmp_path / str(plan.rate), replace(plan, refused=""))
        run_step(run, BY_NAME["ingest"])
        images = run.table("raw_images")
        assert len(set(images.to_arrow()["uri"].to_pylist())) == images.manifest().rows
        hashes.append([manifest.content_hash for manifest in run.manifests(BY_NAME["ingest"])])
    assert hashes[0] == hashes[1]


def test_a_large_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRIED_BYTES", 10)
    fs, path = filesystem(write_plan(tmp_path / "store", Plan()) + "/large")
    with fs.open_output_stream(path) as stream:
        for word in (b"0123456", b"789abc", b"def"):
            stream.write(word)
    assert read_file(fs, path) == b"0123456789abcdef"


def test_which_faults_pass() -> None:
    passing = [OSError("503"), TimeoutError(), ConnectionError(), OSError(errno.EIO, ""), OSError(errno.ESTALE, "")]
    assert all(map(is_transient, passing))
    lasting = [OSError(errno.ENOSPC, ""), PermissionError(), FileNotFoundError(), FileExistsError(), StorageError("")]
    assert not any(map(is_transient, lasting))
