"""Every row leaves once, in order, with a vector or a reason."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as Picture

from medmm_ray.data.records import Document, Image, Passage, Query, Question, Vector, arrow_schema, to_arrow
from medmm_ray.data.tables import Provenance, Table
from medmm_ray.engines.encoder import ImageEncoder
from medmm_ray.engines.text_encoder import TextEncoder
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
    document_passages,
    embed_documents,
    embed_images,
    embed_questions,
    image_vectors,
    picture_vectors,
    question_queries,
)
from tests.doubles.clip_folders import write_native_clip


def small_pixels(image: Picture.Image) -> Vectors:
    """Two pixels by two, channels first."""
    return np.asarray(image.resize((2, 2)), np.float32).transpose(2, 0, 1)


class MeanColour:
    identity = None

    def encode(self, pixels_N3HW: Vectors) -> Vectors:
        means_N3: Vectors = pixels_N3HW.mean((2, 3)) if len(pixels_N3HW) else np.zeros((0, 3), np.float32)
        return means_N3


class Recorder:
    """An encoder that reads ten words, and notes what it is given."""

    max_tokens = 10
    document_identity = query_identity = None

    def __init__(self) -> None:
        self.inputs: list[tuple[str, str]] = []
        self.batches: list[int] = []

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode_documents(self, titles: Sequence[str], texts: Sequence[str]) -> Vectors:
        self.batches.append(len(texts))
        self.inputs += zip(titles, texts, strict=True)
        return np.array([[len(text)] for text in texts], np.float32).reshape(-1, 1)

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        return self.encode_documents(["query"] * len(texts), texts)


def passages_of(documents: pa.Table, encoder: Any, **settings: Any) -> list[dict[str, Any]]:
    rows = document_passages(documents, encoder, EmbedConfig(**settings))
    assert rows["document_id"].to_pylist() == documents["document_id"].to_pylist()
    passages = pa.Table.from_struct_array(rows["passages"].combine_chunks().flatten())
    assert passages.schema.names == arrow_schema(Passage).names
    listed: list[dict[str, Any]] = passages.to_pylist()
    return listed


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


def document(document_id: str, title: str, error: str | None = None, text: str = "Fluid.") -> Document:
    return Document(
        document_id=document_id, corpus="c", title=title, text=text, date="2024-05", modality="radiology", error=error
    )


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

    identity = None

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


def test_a_document_that_fits_is_one_passage_with_its_title() -> None:
    encoder = Recorder()
    table = to_arrow(Document, [document("d1", "Effusion"), document("d2", ""), document("d3", "x", error="bad: row")])
    rows = passages_of(table, encoder)
    assert encoder.inputs == [("Effusion", "Fluid."), ("", "Fluid.")]
    assert rows[0] == {
        "passage_id": "d1#0", "document_id": "d1", "corpus": "c", "title": "Effusion", "text": "Fluid.",
        "date": "2024-05", "modality": "radiology", "vector": [6.0], "encoder": None,
        "error": None,
    }  # fmt: skip
    assert [(row["passage_id"], row["vector"], row["error"]) for row in rows[1:]] == [
        ("d2#0", [6.0], None),
        ("d3#0", [], "upstream: bad: row"),
    ]


LONG = "One two three four. Five six seven. Eight nine ten eleven."


def test_a_long_document_is_cut_so_that_the_encoder_reads_all_of_it_with_its_title() -> None:
    encoder = Recorder()
    documents = to_arrow(Document, [document("d1", "A title", text=LONG), document("d2", "", text="Short.")])
    rows = passages_of(documents, encoder, passage_overlap=3, text_batch_size=2)
    assert [(row["passage_id"], row["title"], row["text"]) for row in rows] == [
        ("d1#0", "A title", "One two three four. Five six seven."),
        ("d1#1", "A title", "Five six seven. Eight nine ten eleven."),
        ("d2#0", "", "Short."),
    ]
    assert encoder.batches == [2, 1]
    short = passages_of(documents, Recorder(), passage_tokens=8, passage_overlap=0)
    assert [row["text"] for row in short[:3]] == ["One two three four.", "Five six seven.", "Eight nine ten eleven."]


def test_a_title_that_leaves_no_room_takes_half() -> None:
    rows = passages_of(to_arrow(Document, [document("d1", "w " * 30, text=LONG)]), Recorder(), passage_overlap=0)
    assert [row["text"] for row in rows] == ["One two three four.", "Five six seven.", "Eight nine ten eleven."]


def test_queries_with_and_without_options_and_traces() -> None:
    table = to_arrow(Question, [question("q1", ["left", "right"]), question("q2", [], error="bad: row")])
    rows = question_queries(table, Recorder())
    assert rows.schema == arrow_schema(Query)
    assert rows["text"].to_pylist()[0] == "What is q1?"
    assert rows["error"].to_pylist() == [None, "upstream: bad: row"]
    assert question_queries(table, Recorder(), True)["text"][0].as_py() == "What is q1? (A) left (B) right"
    traced = table.append_column("trace", pa.array(["Step 1: Look.", None]))
    assert question_queries(traced, Recorder())["text"].to_pylist() == ["What is q1?\nStep 1: Look.", "What is q2?"]


class Broken(Recorder):
    """Gives NaN, infinity, nothing but zeros, and one vector."""

    def encode_documents(self, titles: Sequence[str], texts: Sequence[str]) -> Vectors:
        return np.array([[np.nan, 1.0], [1.0, np.inf], [0.0, 0.0], [0.0, 1.0]], np.float32)


def test_a_vector_without_a_direction_is_an_error_of_its_row() -> None:
    rows = passages_of(to_arrow(Document, [document(f"d{i}", "") for i in range(4)]), Broken())
    assert [row["vector"] for row in rows] == [[], [], [], [0.0, 1.0]]
    assert [str(row["error"]).partition(":")[0] for row in rows] == ["not_finite", "not_finite", "zero_vector", "None"]
    assert rows[0]["error"] == "not_finite: 1 of the vector's 2 values are no finite numbers; look at the encoder"
    queries = question_queries(to_arrow(Question, [question(f"q{i}", []) for i in range(4)]), Broken())
    assert queries["error"].to_pylist() == [row["error"] for row in rows]


def test_an_empty_batch() -> None:
    assert document_passages(to_arrow(Document, []), Recorder(), EmbedConfig()).num_rows == 0
    assert question_queries(to_arrow(Question, []), Recorder()).schema == arrow_schema(Query)


def test_the_actors_hold_the_real_encoders(tmp_path: Path) -> None:
    tower = str(write_native_clip(tmp_path / "tower"))
    pictures = _Decode(tower, 10_000, _load_preprocess)(images_table(tmp_path))
    images = _ImageActor(_load_encoder, tower, "cpu")(pictures)
    assert [len(v) for v in images["vector"].to_pylist()] == [16, 0, 0, 0, 16]
    config = EmbedConfig(query_options=True)
    documents = _DocumentActor(config, tower)(to_arrow(Document, [document("d1", "normal chest")]))
    queries = _QuestionActor(config, tower)(to_arrow(Question, [question("q1", ["left", "right"])]))
    passage = documents["passages"][0].as_py()[0]
    for vector in (passage["vector"], queries["vector"][0].as_py()):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    identity = ImageEncoder(tower).identity.to_json()
    assert images["encoder"].to_pylist() == [identity, None, None, None, identity]
    encoder = TextEncoder(tower)
    assert passage["encoder"] == encoder.document_identity.to_json()
    assert queries["encoder"].to_pylist() == [encoder.query_identity.to_json()]


@pytest.mark.engine
def test_the_step_on_ray(tmp_path: Path) -> None:
    import ray

    from medmm_ray.session import session

    tower = str(write_native_clip(tmp_path / "tower"))
    questions = to_arrow(Question, [question(f"q{i}", ["left", "right"]) for i in range(9)])
    words = " ".join(["normal chest."] * 9)
    documents = to_arrow(Document, [document("d1", "", text=words), document("d2", "", error="bad: row")])
    config = EmbedConfig(image_batch_size=2, text_batch_size=4, passage_overlap=0)
    images = images_table(tmp_path)
    # name, record, key, column of lists, rows, errors of their own
    outputs = (
        ("image_vectors", Vector, "image_id", None, images, embed_images, (5, 2)),
        ("passages", Passage, "document_id", "passages", documents, embed_documents, (4, 0)),
        ("queries", Query, "question_id", None, questions, embed_questions, (9, 0)),
    )
    with session():
        for name, record, key, explode, source, embed, (num_rows, num_errors) in outputs:
            table = Table(str(tmp_path / name), record)
            table.prepare()
            output_key = "item_id" if record is Vector else key
            table.write(embed(ray.data.from_arrow(source), config, tower), output_key, explode)
            origin = Provenance(name=name, fingerprint="f", config={}, upstream={})
            manifest = table.finish(origin, output_key, source[key].to_pylist(), seconds=1.0)
            assert (manifest.rows, sum(manifest.errors.values())) == (num_rows, num_errors)
