import json
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.data.sources import SourceRequest, load, names
from medmm_ray.data.sources.vqa_rad import read
from medmm_ray.data.tables import TableError
from tests.paths import REAL_DATA

REAL = REAL_DATA / "vqa_rad"


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "qid": 1, "image_name": "a.jpg", "image_organ": "CHEST", "answer": "Yes", "answer_type": "CLOSED ",
        "question": "Is it clear? ", **changes,
    }  # fmt: skip


def folder(path: Path, train: Any, test: Any) -> SourceRequest:
    (path / "trainset.json").write_text(json.dumps(train))
    (path / "testset.json").write_text(json.dumps(test))
    return SourceRequest(path=str(path))


def test_closed_yes_no_and_open_questions(tmp_path: Path) -> None:
    request = folder(
        tmp_path,
        [entry(), entry(qid=2, image_name="b.jpg", image_organ="ABD", answer="PA", question="Which view?")],
        [entry(qid=3, answer=12, answer_type="OPEN", question="How many ribs?")],
    )
    data = read(request)
    assert [(q.name, q.split, q.answer, q.answer_type) for q in data.questions] == [
        ("train-1", "train", "yes", "yes_no"),
        ("train-2", "train", "PA", "open"),  # closed, but not a yes or no
        ("test-3", "test", "12", "open"),
    ]
    assert data.questions[0].question == "Is it clear?"
    assert [(q.published_type, q.topic) for q in data.questions] == [
        ("closed", "chest"), ("closed", "abdomen"), ("open", "chest"),
    ]  # fmt: skip
    assert [(i.uri, i.split, i.modality, i.diagnosis) for i in data.images] == [
        (f"{tmp_path}/images/a.jpg", "train", "radiology", "chest"),
        (f"{tmp_path}/images/b.jpg", "train", "radiology", "abdomen"),
    ]
    assert data.questions[2].images == (f"{tmp_path}/images/a.jpg",)
    assert data.draw is None


def test_limits_take_the_first_rows(tmp_path: Path) -> None:
    request = folder(tmp_path, [entry(qid=i) for i in range(5)], [entry(qid=i) for i in range(5)])
    data = read(SourceRequest(path=request.path, num_train=2, num_test=1))
    assert [q.name for q in data.questions] == ["train-0", "train-1", "test-0"]


def test_faults_name_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainset\.json does not exist; check the `path`"):
        read(SourceRequest(path=str(tmp_path)))
    bad = entry()
    del bad["answer"]
    with pytest.raises(TableError, match=r"testset\.json entry 1: the field 'answer' is missing"):
        read(folder(tmp_path, [entry()], [entry(), bad]))
    with pytest.raises(TableError, match="entry 0: it must be an object, not 'text'"):
        read(folder(tmp_path, ["text"], []))
    with pytest.raises(TableError, match="entry 0: question must be text, not null"):
        read(folder(tmp_path, [entry(question=None)], []))
    with pytest.raises(TableError, match="must hold a list of questions, got dict"):
        read(folder(tmp_path, {}, []))
    (tmp_path / "trainset.json").write_text('[{"qid": 1,')
    with pytest.raises(ConfigError, match=r"trainset\.json is not valid JSON"):
        read(SourceRequest(path=str(tmp_path)))
    (tmp_path / "trainset.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"trainset\.json is not UTF-8 text"):
        read(SourceRequest(path=str(tmp_path)))


def test_sources_are_found_by_name() -> None:
    assert {"phantom", "vqa_rad"} <= set(names())
    assert load("vqa_rad").read is read
    with pytest.raises(ConfigError, match=r"source 'vqarad' is unknown; known sources: .*vqa_rad"):
        load("vqarad")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_the_real_data_set() -> None:
    data = read(SourceRequest(path=str(REAL)))
    assert len(data.questions) == 3064 + 451
    assert len(data.images) == 314
    assert sum(q.answer_type == "yes_no" for q in data.questions) == 884 + 829 + 133 + 118
    assert {i.diagnosis for i in data.images} == {"chest", "abdomen", "head"}
