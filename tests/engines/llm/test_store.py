"""engines/llm/store.py: what is stored survives, whole or not at all."""

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from medmm_ray.data.tables import TableError
from medmm_ray.engines.llm.endpoint import ChatChoice, ChatReply
from medmm_ray.engines.llm.store import AnswerStore, PricedAnswer, parse_segment, segment


def answer(text: str, cost: float = 0.5) -> PricedAnswer:
    return PricedAnswer(ChatReply((ChatChoice(text, "stop"), ChatChoice("b", "length")), 10, 4, 2, None), cost)


def test_answers_are_found_by_another_process_and_share_segments(tmp_path: Path) -> None:
    async def keep() -> None:
        store = AnswerStore(str(tmp_path))
        await asyncio.gather(
            *(store.put("q/1", f"k{i}", answer(f"t{i}")) for i in range(50)), store.put("q2", "k", answer("u"))
        )
        assert await store.find("q/1", "k7") == answer("t7")

    asyncio.run(keep())
    assert len(list((tmp_path / "q%2F1").iterdir())) == 1

    async def look() -> None:
        store = AnswerStore(str(tmp_path))
        assert [await store.find("q/1", f"k{i}") for i in range(50)] == [answer(f"t{i}") for i in range(50)]
        assert await store.find("q2", "k") == answer("u")
        assert await store.find("q2", "k7") is None
        assert await store.find("q3", "k") is None

    asyncio.run(look())


def test_a_kept_half_of_a_surrogate_pair_is_replaced() -> None:
    """As answers were kept before they were made well-formed."""
    kept = (
        segment({"k": answer("x")}).partition(b"\n")[2].replace(b'"x"', b'"bad \\ud800"').replace(b"null", b'"\\udc00"')
    )
    found = parse_segment(hashlib.sha256(kept).hexdigest().encode() + b"\n" + kept, "file")["k"].reply
    assert (found.text, found.refusal) == ("bad \ufffd", "\ufffd")


def test_an_answer_that_was_kept_before_models_were_named_is_read() -> None:
    line = {"key": "k", "reply": {"choices": [{"text": "x", "finish": "stop"}], "read": 5, "cached": 0, "written": 1,
            "refusal": None}, "cost": 0.25}  # fmt: skip
    kept = json.dumps(line).encode() + b"\n"
    found = parse_segment(hashlib.sha256(kept).hexdigest().encode() + b"\n" + kept, "file")["k"]
    assert (found.reply.text, found.reply.model, found.reply.tier, found.cost) == ("x", None, None, 0.25)


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    asyncio.run(AnswerStore(str(tmp_path)).put("q", "k", answer("text")))
    [file] = (tmp_path / "q").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole.replace(b"text", b"test"), b""):
        file.write_bytes(damaged)
        with pytest.raises(
            TableError, match=f"{file.name} is damaged: its checksum does not fit its {len(damaged)} bytes"
        ):
            asyncio.run(AnswerStore(str(tmp_path)).find("q", "k"))


def test_an_answer_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")

    async def keep() -> None:
        await AnswerStore(str(tmp_path / "file" / "answers")).put("q", "k", answer("text"))

    with pytest.raises(TableError, match="cannot write .*file/answers/q"):
        asyncio.run(keep())


def test_a_killed_writer_leaves_whole_segments_and_every_answer_that_it_had_kept(tmp_path: Path) -> None:
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
    store = AnswerStore(str(tmp_path))
    found = {group: store.read(group) for group in ("q0", "q1", "q2")}
    assert len(kept) >= 200
    assert [key for group, key in kept if key not in found[group]] == []
