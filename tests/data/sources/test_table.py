"""Data of anyone's own: tables of every kind by a column map, and pictures as files, in tables and as DICOM."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.config import ConfigError, build
from medmm_ray.data.records import Image, Question
from medmm_ray.data.tables import TableError
from medmm_ray.steps.ingest import (
    ReadSource,
    SourceConfig,
    drawings_of,
    image_table,
    inspect_batch,
    question_rows,
    read_source,
)


def png(value: int = 90) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(np.full((10, 20), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def rows(tmp_path: Path, path: Path, columns: dict[str, Any], **settings: Any) -> tuple[list[Question], list[Image]]:
    """The questions and images of a folder or file as ingest makes them."""
    values = {"name": "mine", "reader": "table", "path": str(path), "columns": columns, **settings}
    source = build(SourceConfig, values, "test")
    sources = [ReadSource(source, read_source(source))]
    images = inspect_batch(image_table(sources, f"{tmp_path}/made"), drawings_of(sources))
    return question_rows(sources, images, f"{tmp_path}/made"), [Image(**row) for row in images.to_pylist()]


def test_a_folder_of_images_and_a_csv(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "b.png").write_bytes(png(91))
    (tmp_path / "questions.csv").write_text(
        "file,ask,A,B,key,patient,set\n"
        'a.png,"Seen, here?",a mass,nothing,B,p1,train\n'
        "b.png,Clear?,,,yes,p2,held out\n"
        "c.png,Where?,left,right,left,p2,held out\n"
    )
    columns = {
        "question": ["ask"], "answer": "key", "options": ["A", "B"], "images": ["file"], "group": "patient",
        "split": "set", "words": {"split": {"held out": "test"}}, "constants": {"modality": "radiology"},
    }  # fmt: skip
    questions, images = rows(tmp_path, tmp_path, columns, files={"all": ["questions.csv"]})
    assert [(q.split, q.question, q.options, q.answer, q.answer_type, q.group, q.error) for q in questions] == [
        ("train", "Seen, here?", ["a mass", "nothing"], "B", "choice", "mine/p1", None),
        ("test", "Clear?", [], "yes", "yes_no", "mine/p2", None),
        ("test", "Where?", ["left", "right"], "A", "choice", "mine/p2",
         f"upstream: image_missing in {tmp_path}/images/c.png"),
    ]  # fmt: skip
    assert [image.modality for image in images] == ["radiology"] * 3
    assert [image.error is None for image in images] == [True, True, False]


def test_pictures_inside_parquet_are_written_as_they_are(tmp_path: Path) -> None:
    """As the datasets library saves an Image column."""
    pictures = [{"bytes": png(value), "path": "x.png"} for value in range(5)]
    table = pa.table({"image": pictures, "question": ["Q?"] * 5, "answer": ["A"] * 5})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    questions, images = rows(tmp_path, tmp_path, {"images": ["image"]})
    assert [q.error for q in questions] == [None] * 5
    assert len({q.question_id for q in questions}) == 5
    assert [Path(image.uri).read_bytes() for image in images] == [png(value) for value in range(5)]


def test_jsonl_with_nested_fields_lists_and_letters(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    entries = [
        {"ask": {"text": "Which?\nA. one\nB. two"}, "right": "B", "lang": "en"},
        {"ask": {"text": "Welche?\nA. eins\nB. zwei"}, "right": "B", "lang": "de"},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    columns = {"question": ["ask.text"], "answer": "right", "lettered": True, "where": {"lang": ["en"]}}
    (question,), _ = rows(tmp_path, path, columns)
    assert (question.split, question.question, question.options, question.answer) == (
        "validation", "Which?", ["one", "two"], "B",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "columns", "words"),
    [
        ("a.csv", b"question,answer\nQ?,A,B\n", {}, r"line 2 has 3 fields and the file 2 columns"),
        ("a.csv", "question,answer\nWeiß?,A\n".encode("cp1252"), {}, r"a\.csv is not UTF-8 text"),
        ("a.csv", b"ask,answer\nQ?,A\n", {}, r"a\.csv row 0 has no column 'question'; it has answer, ask"),
        ("a.json", b'{"data": 3}', {"records": "data"}, "has no list in a field 'data'"),
        ("a.jsonl", b"[1]\n", {}, r"line 1 must be an object with named fields, not a list"),
        ("a.csv", b"question,answer,s\nQ?,A,dev\n", {"split": "s"}, r"the split is 'dev'; it is one of"),
        ("a.parquet", b"no parquet", {}, "is no Parquet or Arrow file"),
        ("a.zip", b"PK\x03\x04", {}, "it is an archive; unpack it, and name the folder"),
        ("a.xlsx", b"what", {}, "its ending is not known"),
    ],
)
def test_bad_tables_are_named(name: str, content: bytes, columns: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((ConfigError, TableError), match=words):
        rows(tmp_path, path, columns)


def test_rows_that_cannot_be_used_are_counted_not_raised(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("id,question,key,o1,o2\n1,Q?,0,x,y\n2,Q2?,2,x,y\n3,,1,x,y\n1,Other?,1,x,y\n")
    columns = {"id": "id", "answer": "key", "first_number": 0, "options": ["o1", "o2"]}
    questions, _ = rows(tmp_path, path, columns)
    assert [(q.error or "").partition(":")[0] for q in questions] == [
        "", "answer_not_in_options", "question_empty", "duplicate_id",
    ]  # fmt: skip
    assert questions[0].answer == "A"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A. one", "B. two"], ["one", "two"]),
        (["A: one", "(B) two"], ["one", "two"]),
        (["E. coli", "A. baumannii"], ["E. coli", "A. baumannii"]),
        (["A. baumannii", "E. coli"], ["A. baumannii", "E. coli"]),
        ([{"letter": "A", "content": "one"}, {"letter": "B", "content": "two"}], ["one", "two"]),
        ({"label": ["A", "B"], "text": ["one", "two"]}, ["one", "two"]),
        ("A. one\nB. two", ["one", "two"]),
    ],
)
def test_options_in_every_form(options: object, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"question": "Q?", "answer": "B", "o": options}]))
    (question,), _ = rows(tmp_path, tmp_path / "a.json", {"options": ["o"]})
    assert (question.options, question.answer, question.error) == (expected, "B", None)


def test_a_source_of_its_own_needs_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nQ?,A\n")
    with pytest.raises(ConfigError, match="source 'mine' has no columns"):
        read_source(SourceConfig(name="mine", reader="table", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="constants and words name fields of a question"):
        build(SourceConfig, {"name": "x", "columns": {"constants": {"modalty": "x"}}}, "test")
