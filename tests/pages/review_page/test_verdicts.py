"""What readers said is kept: appended, never torn, on disks and object stores."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.data.tables import TableError
from medmm_ray.pages.review_page.export import export_verdicts
from medmm_ray.pages.review_page.verdicts import Verdict, VerdictLog, latest_verdicts, parse


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
    assert parse(b"\xff\xfe{\n" + whole, "anna.jsonl") == [verdict("anna", 1)]


def test_a_damaged_line_is_told_from_a_torn_one_by_the_number_that_is_missing(tmp_path: Path) -> None:
    log = VerdictLog(str(tmp_path))
    for number in (1, 2, 3):
        log.append(verdict("anna", number))
    file = tmp_path / "anna.jsonl"
    first, second, third = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b"?" + second[1:] + third)
    with pytest.raises(TableError, match=r"anna\.jsonl line 2 is no JSON, and anna's verdict 2 is missing: .*damaged"):
        log.read()
    file.write_bytes(b"\0" * 9 + b"\n" + second)
    with pytest.raises(TableError, match=r"anna\.jsonl line 1 is no JSON, and anna's verdict 1 is missing"):
        log.read()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "Input should be an object"),
        ({"number": "2"}, "'number': Input should be a valid integer"),
        ({"verdict": "bananas"},
         "'verdict': must be one of right, wrong, neutral, unsure, keep, drop, withdrawn"),
        ({"faults": ["taste"]}, "'faults.0': must be one of logical, medical, image_grounded"),
        ({"mood": "tired"}, "'mood': Unexpected keyword argument"),
        ({"item_id": None}, "'item_id': Input should be a valid string"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_verdict_is_named(changes: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    log = VerdictLog(str(tmp_path))
    log.append(verdict("anna", 1))
    line = json.dumps(None if changes is None else asdict(verdict("anna", 2)) | changes)
    with (tmp_path / "anna.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TableError) as fault:
        log.read()
    assert str(fault.value) == f"{tmp_path}/anna.jsonl line 2 is no verdict: {words}. Mend the line, or delete it"
    with pytest.raises(TableError, match=r"anna\.jsonl line 1 is no verdict: 'seen': Field required"):
        parse(b'{"reader": "anna", "number": 1, "item_id": "s/0", "verdict": "right"}', "anna.jsonl")


def test_exports_of_a_log_on_an_object_store_are_not_read_as_verdicts(tmp_path: Path) -> None:
    log = VerdictLog(f"memory://{tmp_path}")
    log.append(verdict("anna", 1))
    assert export_verdicts(log) == export_verdicts(log)
    assert log.read() == [verdict("anna", 1)]


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
    found = {item: {r: v.verdict for r, v in of.items()} for item, of in latest_verdicts(reversed(said)).items()}
    assert found == {"a": {"anna": "wrong", "ben": "neutral"}, "b": {}, "c": {}}
