"""engines/llm/store.py: what is stored survives, whole or not at all."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FileSelector

from medmm_ray.data.tables import TableError
from medmm_ray.engines.llm import store as store_module
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer, stored_answers


def answer(text: str, cost: float = 0.5) -> PricedAnswer:
    return PricedAnswer(ChatReply((ChatChoice(text, "stop"), ChatChoice("b", "length")), 10, 4, 2, None), cost)


async def put_all(store: AnswerStore, requests: Iterable[tuple[str, str]]) -> None:
    await asyncio.gather(*(store.put(group, key, answer(f"{group} {key}")) for group, key in requests))


@pytest.fixture(params=["disk", "objects"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(store_module, "LINGER_S", 0.01)
    return str(tmp_path / "answers") if request.param == "disk" else f"memory://{tmp_path.name}/answers"


def test_answers_are_found_by_other_stores_and_share_segments(uri: str) -> None:
    requests = [(f"q/{i % 7}", f"k{i}") for i in range(50)]

    async def check() -> None:
        writer, reader = AnswerStore(uri), AnswerStore(uri)
        assert await reader.find("q/0", "k0") is None
        await put_all(writer, requests)
        await writer.put("q9", "k7", answer("u"))
        assert await writer.find("q/3", "k3") == answer("q/3 k3")
        later = AnswerStore(uri)
        for group, key in requests:
            assert await later.find(group, key) == answer(f"{group} {key}")
        assert await later.find("q9", "k7") == answer("u")
        assert await later.find("q9", "k8") is None
        assert await later.find("q8", "k7") is None
        # What was looked for before it was there is not looked for again; a group that is new to a reader is.
        assert await reader.find("q/1", "k1") == answer("q/1 k1")
        assert len(later.fs.get_file_info(FileSelector(later.path))) <= 2

    asyncio.run(check())


def test_a_look_up_reads_what_others_have_stored_since(uri: str) -> None:
    reader = AnswerStore(uri)
    requests = [("a", "1"), ("a", "2"), ("b", "1")]
    assert reader.look_up(requests) == {}
    asyncio.run(put_all(AnswerStore(uri), requests[:1]))
    assert reader.look_up(requests) == {("a", "1"): answer("a 1")}
    asyncio.run(put_all(AnswerStore(uri), requests[1:]))
    assert reader.look_up(requests) == {request: answer(" ".join(request)) for request in requests}


def test_a_writers_objects_become_one_and_readers_that_knew_them_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LINGER_S", 0.0)
    monkeypatch.setattr(store_module, "MERGED_OBJECTS", 4)
    uri = f"memory://{tmp_path.name}/answers"

    def num_objects() -> int:
        return len(MemoryFileSystem().ls(f"/{tmp_path.name}/answers"))

    async def check() -> None:
        writer, reader = AnswerStore(uri), AnswerStore(uri)
        for i in range(3):
            await writer.put("q", f"k{i}", answer(f"t{i}"))
        assert num_objects() == 3
        assert await reader.find("q", "k0") == answer("t0")  # knows where all three are
        await writer.put("q", "k3", answer("t3"))
        assert num_objects() == 1
        for store in (writer, reader, AnswerStore(uri)):
            assert [await store.find("q", f"k{i}") for i in range(3)] == [answer(f"t{i}") for i in range(3)]

    asyncio.run(check())
    assert sorted(stored.key for stored in stored_answers(uri)) == ["k0", "k1", "k2", "k3"]


def test_a_full_segment_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 1_000)

    async def write() -> None:
        store = AnswerStore(str(tmp_path))
        for i in range(12):
            await store.put("q", f"k{i}", answer("t" * 200))

    asyncio.run(write())
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) >= 3
    assert max(sizes) < 1_000 + 600  # one line more than full
    assert len(AnswerStore(str(tmp_path)).look_up(("q", f"k{i}") for i in range(12))) == 12


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    asyncio.run(AnswerStore(str(tmp_path)).put("q", "k", answer("text")))
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole.replace(b"text", b"test"), whole.replace(b" ", b"_", 1), b"x" + whole, whole[1:], b"\n"):
        file.write_bytes(damaged)
        with pytest.raises(TableError, match=f"{file.name} is damaged: a checksum does not fit its line"):
            asyncio.run(AnswerStore(str(tmp_path)).find("q", "k"))


def test_half_a_line_at_the_end_is_no_answer(tmp_path: Path) -> None:
    """As a writer leaves it that was killed while it wrote."""

    async def write() -> None:
        store = AnswerStore(str(tmp_path))
        await store.put("q", "k0", answer("t0"))
        await store.put("q", "k1", answer("t1"))

    asyncio.run(write())
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for cut in range(1, len(whole) // 2 - 1):
        file.write_bytes(whole[:-cut])
        assert AnswerStore(str(tmp_path)).look_up([("q", "k0"), ("q", "k1")]) == {("q", "k0"): answer("t0")}
    reader = AnswerStore(str(tmp_path))
    reader.refresh()
    file.write_bytes(whole)  # it was only slow
    assert len(reader.look_up([("q", "k0"), ("q", "k1")])) == 2


def test_an_answer_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")

    async def keep() -> None:
        await AnswerStore(str(tmp_path / "file" / "answers")).put("q", "k", answer("text"))

    with pytest.raises(TableError, match="cannot write .*file/answers/"):
        asyncio.run(keep())


def test_after_a_failed_write_answers_go_to_another_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that filled up in the middle of a line: what comes after it must not be read as its rest."""
    store = AnswerStore(str(tmp_path))

    def no_space(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 9)
        raise OSError(28, "No space left on device")

    async def check() -> None:
        await store.put("q", "k0", answer("t0"))
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", no_space)
            with pytest.raises(TableError, match="No space left on device"):
                await store.put("q", "k1", answer("t1"))
        await store.put("q", "k2", answer("t2"))

    asyncio.run(check())
    found = AnswerStore(str(tmp_path)).look_up(("q", f"k{i}") for i in range(3))
    assert found == {("q", "k0"): answer("t0"), ("q", "k2"): answer("t2")}


def test_an_answer_is_synced_to_the_disk_before_it_counts_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        time.sleep(0.05)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr("os.fsync", fsync)

    async def check() -> None:
        store = AnswerStore(str(tmp_path))
        await store.put("q", "k0", answer("t0"))
        [file] = tmp_path.iterdir()
        assert synced[0] == file.stat().st_size
        await store.put("q", "k1", answer("t1"))
        assert synced[-1] == file.stat().st_size

    asyncio.run(check())


def test_a_killed_writer_leaves_every_answer_that_it_had_kept(tmp_path: Path) -> None:
    """Killed in the middle of writing; each line that it printed names an answer that was kept by then."""
    code = """
import asyncio, sys
from medmm_ray.engines.llm.store import AnswerStore
from tests.engines.llm.test_store import answer

async def work():
    store = AnswerStore(sys.argv[1])
    async def one(i):
        await store.put(f"q{i % 3}", f"k{i}", answer("x" * 20_000))
        print(f"q{i % 3} k{i}", flush=True)
    for first in range(0, 10**6, 20):
        await asyncio.gather(*map(one, range(first, first + 20)))

asyncio.run(work())
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kept = [process.stdout.readline().split() for _ in range(200)]
        process.kill()
        kept += [words for line in process.stdout if len(words := line.split()) == 2 and line.endswith("\n")]
    found = AnswerStore(str(tmp_path)).look_up((group, key) for group, key in kept)
    assert len(kept) >= 200
    assert [request for request in kept if tuple(request) not in found] == []
    assert len(list(tmp_path.iterdir())) == 1
