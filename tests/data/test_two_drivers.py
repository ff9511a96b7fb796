"""Two drivers of one run at a time, as real processes: what is complete never changes, and both end with it."""

import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
from pyarrow.fs import FileSelector

from medmm_ray.data.artifacts import create_file, filesystem
from medmm_ray.data.records import Vector
from medmm_ray.data.tables import Table, rows_hash
from tests.doubles.object_store import one_by_one

FINISH = """
import sys
from medmm_ray.data.records import Vector, to_arrow
from medmm_ray.data.tables import Provenance, Table

uri, value = sys.argv[1], float(sys.argv[2])
table = Table(uri, Vector, target_bytes=int(sys.argv[3]))
table.prepare()
ids = [f"i{number}" for number in range(20)]
for first in range(0, 20, 4):
    rows = [Vector(item_id=row_id, vector=[value]) for row_id in ids[first : first + 4]]
    table.write_part(to_arrow(Vector, rows), "item_id")
print("ready", flush=True)
input()
origin = Provenance(name="v", fingerprint="f", config={"driver": value}, upstream={})
manifest = table.finish(origin, "item_id", ids, seconds=0)
print(manifest.config["driver"], manifest.content_hash)
"""

CREATE = """
import sys
from medmm_ray.data.artifacts import create_file, filesystem

fs, path = filesystem(sys.argv[1])
fs.create_dir(path)
print("ready", flush=True)
input()
print(*(create_file(fs, f"{path}/{number}", sys.argv[2].encode()) for number in range(20)))
"""


def run_together(code: str, *arguments: list[str]) -> list[list[str]]:
    """The last lines of processes, one for each list of arguments, that all start at once when all are ready."""
    processes = []
    for words in arguments:
        command = [sys.executable, "-c", code, *words]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert pipe(process.stdout).readline() == "ready\n"
    for process in processes:
        pipe(process.stdin).write("\n")
        pipe(process.stdin).flush()
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@pytest.mark.parametrize("target_bytes", [1, 1 << 20])  # parts as they are, or merged
def test_one_of_two_drivers_finishes_a_table_and_the_other_takes_it(target_bytes: int, tmp_path: Path) -> None:
    """Both make all rows, and not the same ones: whose they are depends on the part, but not on who reads them."""
    for attempt in range(3):
        uri = f"{tmp_path}/{attempt}"
        first, second = run_together(FINISH, [uri, "1", str(target_bytes)], [uri, "2", str(target_bytes)])
        assert first == second
        table = Table(uri, Vector)
        manifest = table.manifest()
        assert (manifest.rows, manifest.content_hash) == (20, first[1])
        assert rows_hash(table.to_arrow()) == manifest.content_hash
        listing = table.fs.get_file_info(FileSelector(table.path))
        assert {entry.base_name for entry in listing} == {"manifest.json", *manifest.files}


def check_that_one_is_first(folder: str) -> None:
    won = run_together(CREATE, *([folder, writer] for writer in "abc"))
    for number in range(20):
        assert [words[number] for words in won].count("True") == 1
        fs, path = filesystem(folder)
        with fs.open_input_stream(f"{path}/{number}") as stream:
            winner = "abc".index(stream.read().decode())
        assert won[winner][number] == "True"


def test_of_those_that_create_a_file_one_is_first(tmp_path: Path) -> None:
    check_that_one_is_first(str(tmp_path / "files"))
    names = [path.name for path in (tmp_path / "files").iterdir()]
    assert sorted(names, key=int) == [str(number) for number in range(20)]


def test_of_those_that_create_an_object_one_is_first(bucket: str) -> None:
    check_that_one_is_first(f"{bucket}/files")


def test_the_store_that_tests_use_answers_one_request_at_a_time() -> None:
    """Moto looks whether an object is there and writes it later: between the two another request must not come."""
    objects: set[str] = set()

    def put_if_absent(environ: dict[str, Any], _: object) -> Iterable[bytes]:
        key = environ["PATH_INFO"]
        is_first = key not in objects
        time.sleep(0.005)
        objects.add(key)
        return [b"first" if is_first else b"late"]

    def put(application: Any, key: str) -> bytes:
        return b"".join(application({"PATH_INFO": key}, None))

    keys = [f"key {number // 8}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda key: put(one_by_one(put_if_absent), key), ["as it is"] * 8))
        assert answers.count(b"first") > 1  # eight locks are none
        application = one_by_one(put_if_absent)
        answers = list(pool.map(lambda key: put(application, key), keys))
    assert answers.count(b"first") == 3


def test_a_file_in_memory_is_created_once(tmp_path: Path) -> None:
    fs, path = filesystem(f"memory://{tmp_path.name}")
    assert create_file(fs, f"{path}/file", b"first")
    assert not create_file(fs, f"{path}/file", b"second")
    with fs.open_input_stream(f"{path}/file") as stream:
        assert stream.read() == b"first"
