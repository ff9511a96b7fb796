"""Corpora from files and folders, by a column map."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.config import ConfigError, build
from medmm_ray.data.documents import DocumentsConfig, read_corpora
from medmm_ray.data.sources import SourceDocument
from medmm_ray.data.tables import TableError
from tests.paths import REAL_DATA

MEDQUAD = REAL_DATA / "medquad" / "medquad.jsonl"


def corpus(path: Path, **settings: object) -> list[SourceDocument]:
    return read_corpora([build(DocumentsConfig, {"path": str(path), **settings}, "test")])


def test_a_jsonl_file_of_titles_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "guides.jsonl"
    path.write_text('{"title": "A", "text": "one"}\n\n{"title": "B", "text": "two", "corpus": "own"}\n')
    assert corpus(path) == [
        SourceDocument(corpus="guides", title="A", text="one"),
        SourceDocument(corpus="own", title="B", text="two"),
    ]
    path.write_text('{"title": null, "text": "one\u2028two"}\n')
    assert corpus(path) == [SourceDocument(corpus="guides", title="", text="one\u2028two")]


def test_a_folder_of_chunks_as_medrag_lays_them_out(tmp_path: Path) -> None:
    folder = tmp_path / "textbooks" / "chunk"
    folder.mkdir(parents=True)
    for name in ("Anatomy_Gray", "Biochemistry"):
        row = {"id": f"{name}_0", "title": name, "content": f"Of {name}.", "contents": f"{name}. Of {name}."}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert corpus(folder.parent, columns={"text": ["content"]}) == [
        SourceDocument(corpus="textbooks", title="Anatomy_Gray", text="Of Anatomy_Gray."),
        SourceDocument(corpus="textbooks", title="Biochemistry", text="Of Biochemistry."),
    ]
    pq.write_table(pa.table({"q": ["What?"], "a": ["That."]}), tmp_path / "qa.parquet")
    assert corpus(tmp_path / "qa.parquet", corpus="nih", columns={"text": ["q", "a"]}) == [
        SourceDocument(corpus="nih", title="", text="What?\nThat.")
    ]


def test_dates_and_modalities_by_their_columns(tmp_path: Path) -> None:
    rows = {"text": ["a", "b", "c"], "year": [2011, None, 2024], "kind": ["radiology", "", "pathology"]}
    pq.write_table(pa.table(rows), tmp_path / "papers.parquet")
    documents = corpus(tmp_path / "papers.parquet", columns={"date": "year", "modality": "kind"})
    assert [(document.date, document.modality) for document in documents] == [
        ("2011", "radiology"),
        ("", ""),
        ("2024", "pathology"),
    ]
    path = tmp_path / "guides.jsonl"
    path.write_text('{"text": "a", "day": "2024-05-31T10:00:00"}\n')
    assert corpus(path, columns={"date": "day"})[0].date == "2024-05-31"
    path.write_text('{"text": "a", "day": "May 2024"}\n')
    with pytest.raises(TableError, match="row 1: day is 'May 2024', and no date; expected 2024, 2024-05 or 2024-05-31"):
        corpus(path, columns={"date": "day"})


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ('{"title": "A"}\n', TableError, r"guides\.jsonl row 1 has no column 'text'; it has title"),
        ("{oops\n", TableError, r"guides\.jsonl line 1 is not valid JSON"),
        ('{"text": " "}\n', ConfigError, "has no document with text; check `columns.text`"),
        ("", ConfigError, "has no document with text"),
    ],
)
def test_faults_of_a_corpus_are_named(content: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    path = tmp_path / "guides.jsonl"
    path.write_text(content)
    with pytest.raises(error, match=words):
        corpus(path)


@pytest.mark.skipif(not MEDQUAD.is_file(), reason=f"MedQuAD is not at {MEDQUAD}")
def test_medquad_by_its_columns() -> None:
    documents = corpus(MEDQUAD, columns={"title": "question", "text": ["answer"], "corpus": "source"})
    assert len(documents) == 16407
    assert documents[0].title == "What is (are) Adult Acute Lymphoblastic Leukemia ?"
    assert documents[0].corpus == "CancerGov"
