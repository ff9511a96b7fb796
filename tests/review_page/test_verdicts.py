"""What readers said is kept: appended, never torn, on disks and object stores."""

from pathlib import Path

import pytest

from medmm_ray.review_page.verdicts import Verdict, VerdictLog, parse, standing
from medmm_ray.tables import TableError


def verdict(reader: str, number: int, item_id: str = "s/0", said: str = "right", **more: object) -> Verdict:
    return Verdict(reader=reader, number=number, item_id=item_id, seen="x", verdict=said, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_what_was_appended_is_read_by_anyone(kind: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "log") if kind == "local" else f"memory://{tmp_path}"
    log = VerdictLog(uri)
    log.claim()
    said = [
        verdict(
            "anna", 1, faults=["logical"], feedback="The heart, “not” the lung.\nSee the left border.", seconds=3.5
        ),
        verdict("anna", 2, "s/1", "wrong"),
        verdict("ben", 1, answer_right=False, difficulty="hard", adjudicates=True),
    ]
    for one in reversed(said):
        log.append(one)
    assert VerdictLog(uri).read() == said
    log.release()


def test_nothing_is_there_before_the_first_verdict(tmp_path: Path) -> None:
    assert VerdictLog(str(tmp_path / "no")).read() == []


def test_a_torn_line_is_no_verdict_and_harms_no_other(tmp_path: Path) -> None:
    log = VerdictLog(str(tmp_path))
    file = tmp_path / "anna.jsonl"
    log.append(verdict("anna", 1))
    whole = file.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole + whole[:cut])
        assert log.read() == [verdict("anna", 1)]
        log.append(verdict("anna", 2, "s/1"))
        log.append(verdict("anna", 3, "s/2"))
        assert [v.number for v in log.read()] == [1, 2, 3]
    file.write_bytes(whole + whole.rstrip(b"\n"))  # only the end of the line is missing: the verdict is whole
    assert len(log.read()) == 2
    assert parse(b"\xff\xfe{\n" + whole) == [verdict("anna", 1)]


def test_one_page_at_a_time_writes(tmp_path: Path) -> None:
    first, second = VerdictLog(str(tmp_path)), VerdictLog(str(tmp_path))
    first.claim()
    with pytest.raises(TableError, match="another review page writes to"):
        second.claim()
    first.release()
    second.claim()
    second.release()


def test_the_last_word_of_a_reader_stands() -> None:
    said = [
        verdict("anna", 1, "a", "right"),
        verdict("anna", 2, "b", "wrong"),
        verdict("anna", 3, "a", "wrong"),
        verdict("anna", 4, "b", "withdrawn"),
        verdict("ben", 1, "a", "neutral"),
        verdict("ben", 2, "c", "withdrawn"),
    ]
    found = {item: {r: v.verdict for r, v in of.items()} for item, of in standing(reversed(said)).items()}
    assert found == {"a": {"anna": "wrong", "ben": "neutral"}, "b": {}, "c": {}}
