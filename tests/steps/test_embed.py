"""Every row leaves once, in order, with a vector or a reason."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as Picture

from medmm_ray.data.records import Document, Image, Question, Vector, arrow_schema, to_arrow
from medmm_ray.data.tables import Provenance, Table
from medmm_ray.steps.embed import (
    PICTURES,
    EmbedConfig,
    Vectors,
    _Decode,
    _DocumentActor,
    _ImageActor,
    _load_encoder,
    _load_preprocess,
    _QuestionActor,
    decoded_images,
    document_vectors,
    embed_documents,
    embed_images,
    embed_questions,
    image_vectors,
    picture_vectors,
    question_vectors,
)
from tests.doubles.clip_folders import write_native_clip


def small_pixels(image: Picture.Image) -> Vectors:
    """Two pixels by two, channels first."""
    return np.asarray(image.resize((2, 2)), np.float32).transpose(2, 0, 1)


class MeanColour:
    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        means_N3: Vectors = pixels_N3HW.mean((2, 3)) if len(pixels_N3HW) else np.zeros((0, 3), np.float32)
        return means_N3


class Recorder:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.seen += texts
        return np.array([[len(text)] for text in texts], np.float32).reshape(-1, 1)


def image(image_id: str, uri: Path, error: str | None = None) -> Image:
    return Image(
        image_id=image_id, uri=str(uri), sha256=image_id, perceptual_hash="", width=1, height=1, split="train",
        modality="radiology", diagnosis="normal", annotation="", error=error,
    )  # fmt: skip


def question(question_id: str, options: list[str], error: str | None = None) -> Question:
    return Question(
        question_id=question_id, source="s", split="test", modality="radiology", difficulty="easy",
        question=f"What is {question_id}?", options=options, answer="A", answer_type="choice", image_ids=[],
        error=error,
    )  # fmt: skip


def document(document_id: str, title: str, error: str | None = None) -> Document:
    return Document(document_id=document_id, corpus="c", title=title, text="Fluid.", error=error)


def images_table(folder: Path) -> pa.Table:
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 100))):
        Picture.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    (folder / "empty.png").write_bytes(b"")
    return to_arrow(
        Image,
        [
            image("im1", folder / "red.png"),
            image("im2", folder / "empty.png"),
            image("im3", folder / "none.png"),
            image("im4", folder / "red.png", error="image_corrupt: cut"),
            image("im5", folder / "blue.png"),
        ],
    )


def test_images_keep_their_row_and_their_fault(tmp_path: Path) -> None:
    rows = image_vectors(images_table(tmp_path), small_pixels, MeanColour(), max_pixels=100)
    assert rows.schema == arrow_schema(Vector)
    assert rows["item_id"].to_pylist() == ["im1", "im2", "im3", "im4", "im5"]
    assert rows["vector"].to_pylist() == [[200, 0, 0], [], [], [], [0, 0, 100]]
    assert rows["error"].to_pylist() == [
        None,
        f"image_empty: {tmp_path}/empty.png has 0 bytes",
        f"image_missing: {tmp_path}/none.png does not exist",
        "upstream: image_corrupt: cut",
        None,
    ]


def test_pixels_leave_the_stage_that_opens_images_or_an_error(tmp_path: Path) -> None:
    rows = decoded_images(images_table(tmp_path), small_pixels, max_pixels=100)
    assert rows.schema == PICTURES
    assert rows["pixels"].to_pylist() == [[200] * 4 + [0] * 8, None, None, None, [0] * 8 + [100] * 4]
    assert rows["error"].is_null().to_pylist() == [True, False, False, False, True]
    nothing = picture_vectors(rows.slice(1, 3), MeanColour())
    assert nothing["vector"].to_pylist() == [[], [], []]


class Worker:
    """An encoder that gives the number of its process and the pictures of its batch."""

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        decoders_N = pixels_N3HW[:, 0, 0, 0]
        return np.stack([decoders_N, [os.getpid()] * len(decoders_N), [len(decoders_N)] * len(decoders_N)], axis=1)


def process_number(_: Picture.Image) -> Vectors:
    return np.full((3, 1, 1), os.getpid(), np.float32)


@pytest.mark.engine
@pytest.mark.usefixtures("ray_session")
def test_images_are_opened_in_other_processes_than_the_encoders(tmp_path: Path) -> None:
    import ray

    Picture.new("RGB", (4, 4)).save(tmp_path / "some.png")
    rows = [image(f"im{i:02}", tmp_path / ("none.png" if i % 8 == 7 else "some.png")) for i in range(32)]
    blocks = [to_arrow(Image, rows[first : first + 16]) for first in (0, 16)]
    # As many CPUs as the encoder: stages of equal options are those that Ray would run as one.
    config = EmbedConfig(image_batch_size=8, num_cpus=0.5, decode_num_cpus=0.5)
    ds = ray.data.from_arrow(blocks)
    vectors = embed_images(ds, config, "", lambda _: process_number, lambda _, __: Worker()).to_pandas()
    vectors = vectors.sort_values("item_id")
    is_sound = vectors["error"].isnull()
    assert vectors["item_id"].tolist() == [row.image_id for row in rows]
    assert vectors["error"][~is_sound].tolist() == [f"image_missing: {tmp_path}/none.png does not exist"] * 4
    decoders_N, encoders_N, batch_N = np.stack(vectors["vector"][is_sound].tolist()).T
    assert len(set(encoders_N)) == 1
    assert not set(decoders_N) & set(encoders_N)
    # Four batches of eight, in each of which one image has no picture.
    assert batch_N.tolist() == [7] * 28


def test_max_pixels_holds(tmp_path: Path) -> None:
    rows = image_vectors(images_table(tmp_path), small_pixels, MeanColour(), max_pixels=15)
    assert [str(e).partition(":")[0] for e in rows["error"].to_pylist()] == [
        "image_too_large", "image_empty", "image_missing", "upstream", "image_too_large",
    ]  # fmt: skip


def test_documents_are_embedded_with_their_title() -> None:
    encoder = Recorder()
    table = to_arrow(Document, [document("d1", "Effusion"), document("d2", ""), document("d3", "x", error="bad: row")])
    rows = document_vectors(table, encoder)
    assert encoder.seen == ["Effusion\nFluid.", "Fluid."]
    assert rows.to_pylist() == [
        {"item_id": "d1", "vector": [15.0], "error": None},
        {"item_id": "d2", "vector": [6.0], "error": None},
        {"item_id": "d3", "vector": [], "error": "upstream: bad: row"},
    ]


def test_questions_with_and_without_options() -> None:
    table = to_arrow(Question, [question("q1", ["left", "right"]), question("q2", [], error="bad: row")])
    plain, full = Recorder(), Recorder()
    rows = question_vectors(table, plain, with_options=False)
    question_vectors(table, full, with_options=True)
    assert plain.seen == ["What is q1?"]
    assert full.seen == ["What is q1? (A) left (B) right"]
    assert rows["error"].to_pylist() == [None, "upstream: bad: row"]


class Broken:
    """Gives NaN, infinity, nothing but zeros, and one vector."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        return np.array([[np.nan, 1.0], [1.0, np.inf], [0.0, 0.0], [0.0, 1.0]], np.float32)


def test_a_vector_without_a_direction_is_an_error_of_its_row() -> None:
    rows = document_vectors(to_arrow(Document, [document(f"d{i}", "") for i in range(4)]), Broken())
    assert rows["vector"].to_pylist() == [[], [], [], [0.0, 1.0]]
    assert [str(e).partition(":")[0] for e in rows["error"].to_pylist()] == [
        "not_finite", "not_finite", "zero_vector", "None"
    ]  # fmt: skip
    assert rows["error"][0].as_py() == (
        "not_finite: 1 of the vector's 2 values are no finite numbers; look at the encoder"
    )


def test_an_empty_batch() -> None:
    empty = to_arrow(Document, [])
    assert document_vectors(empty, Recorder()).schema == arrow_schema(Vector)


def test_the_actors_hold_the_real_encoders(tmp_path: Path) -> None:
    tower = str(write_native_clip(tmp_path / "tower"))
    pictures = _Decode(tower, 10_000, _load_preprocess)(images_table(tmp_path))
    images = _ImageActor(_load_encoder, tower, "cpu")(pictures)
    assert [len(v) for v in images["vector"].to_pylist()] == [16, 0, 0, 0, 16]
    documents = _DocumentActor(tower, "cpu")(to_arrow(Document, [document("d1", "normal chest")]))
    questions = _QuestionActor(tower, "cpu", True)(to_arrow(Question, [question("q1", ["left", "right"])]))
    for rows in (documents, questions):
        assert np.linalg.norm(rows["vector"].to_pylist()[0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.engine
def test_the_step_on_ray(tmp_path: Path) -> None:
    import ray

    from medmm_ray.session import session

    tower = str(write_native_clip(tmp_path / "tower"))
    questions = to_arrow(Question, [question(f"q{i}", ["left", "right"]) for i in range(9)])
    documents = to_arrow(Document, [document("d1", "normal"), document("d2", "", error="bad: row")])
    config = EmbedConfig(image_batch_size=2, text_batch_size=4)
    with session():
        for name, key, ds in (
            ("image_vectors", "image_id", embed_images(ray.data.from_arrow(images_table(tmp_path)), config, tower)),
            ("document_vectors", "document_id", embed_documents(ray.data.from_arrow(documents), config, tower)),
            ("query_vectors", "question_id", embed_questions(ray.data.from_arrow(questions), config, tower)),
        ):
            source = {"image_id": images_table(tmp_path), "document_id": documents, "question_id": questions}[key]
            table = Table(str(tmp_path / name), Vector)
            table.prepare()
            table.write(ds, key="item_id")
            origin = Provenance(name=name, fingerprint="f", config={}, upstream={})
            manifest = table.finish(origin, "item_id", source[key].to_pylist(), seconds=1.0)
            assert manifest.rows == len(source)
            assert sum(manifest.errors.values()) == (2 if key == "image_id" else 0)
