"""Files as people have them by mistake: each error says what it is, the value, what was expected, what to do."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.config import ConfigError, build
from medmm_ray.data.records import Question
from medmm_ray.steps.ingest import (
    IngestConfig,
    SourceConfig,
    drawings_of,
    image_table,
    inspect_batch,
    question_rows,
    read_source,
    read_sources,
)

TABLE: dict[str, Any] = {"options": ["A", "B"], "constants": {"modality": "clinical"}}
ROW = "question,answer,A,B\nIs café au lait seen?,A,yes it is,no\n"


def source(path: Path, name: str = "clinic", **changes: object) -> SourceConfig:
    values: dict[str, object] = {"name": name, "path": str(path), **changes}
    return build(SourceConfig, values, "source")


def table(path: Path, **columns: object) -> SourceConfig:
    return source(path, reader="table", columns=TABLE | columns)


def rows_of(config: SourceConfig, folder: Path) -> list[Question]:
    """The questions with their errors, as `ingest` writes them."""
    sources = read_sources(IngestConfig(sources=(config,)))
    images = inspect_batch(image_table(sources, str(folder)), drawings_of(sources))
    return list(question_rows(sources, images, str(folder)))


@pytest.mark.parametrize("name", ["vqa_rad", "medqa", "mirage"])
def test_an_archive_in_the_place_of_a_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("trainset.json", "[]")
    with pytest.raises(ConfigError) as error:
        read_source(source(path, name))
    assert str(error.value) == f"{path} is no folder: it is an archive; unpack it, and name the folder"


def test_a_folder_of_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as error:
        read_source(source(tmp_path, "medqa"))
    message = str(error.value)
    assert message.startswith(f"{tmp_path} has 1 tables, and none is of MedQA (4 options); expected ")
    assert "phrases_no_exclude_test.jsonl" in message
    assert "data_clean.zip" in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf_8(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.csv"
    file.write_bytes(ROW.encode(encoding))
    with pytest.raises(ConfigError) as error:
        read_source(table(tmp_path))
    assert str(error.value).startswith(f"{file} is not UTF-8 text: ")
    assert str(error.value).endswith("; save it as UTF-8")


def test_files_of_two_encodings(tmp_path: Path) -> None:
    """The one that is sound does not hide the other."""
    (tmp_path / "a.csv").write_text(ROW)
    (tmp_path / "b.csv").write_bytes(ROW.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"b\.csv is not UTF-8 text"):
        read_source(table(tmp_path))


def test_one_id_for_two_questions(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,question,answer,A,B\n7,Is it?,A,x,y\n7,Was it?,B,x,y\n")
    first, second = rows_of(table(tmp_path, id="id"), tmp_path / "out")
    assert first.error is None
    assert second.error == "duplicate_id: the source has '7' more than once; each id names one"


@pytest.mark.parametrize("answer", ["", "E", "purple"])
def test_an_answer_that_is_no_option(answer: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f"id,question,answer,A,B\n7,Is it?,{answer},x,y\n")
    (row,) = rows_of(table(tmp_path, id="id"), tmp_path / "out")
    assert row.error == "answer_not_in_options: the answer of '7' is none of its 2 options"


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("file,question,answer\nnowhere.png,Is it?,yes\n")
    (row,) = rows_of(table(tmp_path, options=[], images=["file"]), tmp_path / "out")
    assert row.error == f"upstream: image_missing in {tmp_path}/images/nowhere.png"
