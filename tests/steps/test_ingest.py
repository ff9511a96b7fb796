import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from medmm_ray.config import ConfigError, build, digest, identity
from medmm_ray.data.records import Image, to_arrow
from medmm_ray.data.sources import SourceData, SourceDocument, SourceImage, SourceQuestion
from medmm_ray.data.tables import Provenance, RowError, Table, TableError
from medmm_ray.steps.ingest import (
    IngestConfig,
    ReadSource,
    SourceConfig,
    checked_answer,
    demonstration_rows,
    document_rows,
    drawings_of,
    image_table,
    inspect_batch,
    inspect_image,
    inspect_images,
    question_rows,
    read_source,
    read_sources,
)

PHANTOM = SourceConfig(num_train=5, num_test=3, num_extra_images=2, num_worked=2, image_size=48)
PHANTOMS = IngestConfig(sources=(PHANTOM,), seed=3)


def picture(path: Path, value: int = 90, size: tuple[int, int] = (20, 10)) -> str:
    PIL.Image.fromarray(np.full(size[::-1], value, np.uint8)).save(path)
    return str(path)


def source_image(uri: str, split: str = "train") -> SourceImage:
    return SourceImage(uri=uri, split=split, modality="radiology")


def question(name: str = "1", images: tuple[str, ...] = (), **changes: Any) -> SourceQuestion:
    values = {
        "name": name, "split": "train", "modality": "radiology", "question": "What is seen?", "answer": "B",
        "answer_type": "choice", "options": ("a mass", "nothing"), "images": images, **changes,
    }  # fmt: skip
    return SourceQuestion(**values)


def of(data: SourceData, **config: Any) -> list[ReadSource]:
    return [ReadSource(SourceConfig(**config), data)]


def inspected(sources: list[ReadSource], folder: str = "") -> pa.Table:
    return inspect_batch(image_table(sources, folder), drawings_of(sources))


def test_data_set_and_group_of_a_question(tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 91)
    data = SourceData(
        images=[source_image(a), source_image(b)],
        questions=[
            question("1", (a, b)), question("2", (b,), dataset="slake", group="xmlab7", published_type="open"),
            question("3", dataset="medqa", topic="step1"),
        ],
    )  # fmt: skip
    sources = of(data, name="vqa_rad")
    rows = question_rows(sources, inspected(sources), "")
    first_image = hashlib.sha256(Path(a).read_bytes()).hexdigest()[:16]
    assert [(q.source, q.dataset, q.published_type, q.topic, q.group) for q in rows] == [
        ("vqa_rad", "vqa_rad", "", "", f"im{first_image}"),
        ("vqa_rad", "slake", "open", "", "slake/xmlab7"),
        ("vqa_rad", "medqa", "", "step1", rows[2].question_id),
    ]


# Images


def test_an_image_gets_its_hashes_and_size(tmp_path: Path) -> None:
    uri = picture(tmp_path / "a.png")
    content = Path(uri).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    (row,) = inspected(of(SourceData(images=[source_image(uri, "test")]))).to_pylist()
    assert row == {
        "image_id": f"im{sha256[:16]}", "uri": uri, "sha256": sha256, "width": 20, "height": 10, "split": "test",
        "perceptual_hash": str(imagehash.phash(PIL.Image.open(uri).convert("RGB"))), "modality": "radiology",
        "diagnosis": "", "annotation": "", "error": None,
    }  # fmt: skip


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_files_that_are_no_pictures_become_rows_with_errors(tmp_path: Path) -> None:
    whole = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(whole, "PNG")
    files = {
        "image_corrupt": whole.getvalue()[:200],
        "image_empty": b"",
        "image_too_large": bomb(),
        "image_missing": None,
    }
    images = []
    for kind, content in files.items():
        if content is not None:
            (tmp_path / kind).write_bytes(content)
        images.append(source_image(str(tmp_path / kind)))
    rows = inspected(of(SourceData(images=images))).to_pylist()
    assert [row["error"].partition(":")[0] for row in rows] == list(files)
    assert [row["image_id"] for row in rows] == [f"im{digest(i.uri)}" for i in images]
    assert {(row["sha256"], row["width"]) for row in rows} == {("", 0)}


def test_phantoms_are_drawn_below_the_folder_and_a_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    data = read_sources(PHANTOMS)
    first = inspected(data, f"{tmp_path}/one").to_pylist()
    again = inspected(data, f"{tmp_path}/two").to_pylist()
    assert len(first) == 10
    assert [r["sha256"] for r in first] == [r["sha256"] for r in again]
    assert len({r["image_id"] for r in first}) == 10
    assert {(r["width"], r["height"], r["error"]) for r in first} == {(48, 48, None)}
    file = Path(first[0]["uri"])
    assert file.is_relative_to(tmp_path / "one" / "phantom" / "train")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == first[0]["sha256"]
    assert json.loads(first[0]["annotation"])["difficulty"] in ("easy", "medium", "hard")


def test_a_file_listed_twice_is_refused() -> None:
    with pytest.raises(TableError, match=r"lists the image x\.png more than once"):
        image_table(of(SourceData(images=[source_image("x.png"), source_image("x.png")])), "")


# Questions


def test_a_question_s_id_is_made_of_its_content(tmp_path: Path) -> None:
    uri = picture(tmp_path / "a.png")
    data = SourceData(images=[source_image(uri)], questions=[question(images=(uri,), answer="nothing")])
    sources = of(data, name="vqa_rad")
    images = inspected(sources)
    (row,) = question_rows(sources, images, "")
    sha256 = images["sha256"][0].as_py()
    content = f'["vqa_rad","What is seen?",["a mass","nothing"],["{sha256}"]]'
    assert row.question_id == "q" + hashlib.sha256(content.encode()).hexdigest()[:16]
    assert (row.answer, row.image_ids, row.error) == ("B", [f"im{sha256[:16]}"], None)


def test_the_fault_of_an_image_is_upstream_in_its_question(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    uri = str(tmp_path / "empty.png")
    data = SourceData(images=[source_image(uri)], questions=[question(images=(uri,)), question("2", ("other.png",))])
    first, second = question_rows(of(data), inspected(of(data)), "")
    assert first.error == f"upstream: image_empty in {uri}"
    assert second.error == "image_unknown: other.png is none of the source's images"


def test_repeats_keep_a_row_of_their_own_and_a_second_name_is_an_error() -> None:
    data = SourceData(questions=[question("1"), question("2"), question("1", question="Other?")])
    rows = question_rows(of(data), to_arrow(Image, []), "")
    assert len({r.question_id for r in rows}) == 3
    assert [r.error for r in rows[:2]] == [None, None]
    assert rows[2].error == "duplicate_id: the source has '1' more than once; each id names one"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "B"),
        ({"answer": "A mass."}, "A"),
        ({"answer_type": "yes_no", "answer": " Yes "}, "yes"),
        ({"answer_type": "open", "answer": " left "}, "left"),
    ],
)
def test_answers_take_their_final_form(changes: dict[str, Any], expected: str) -> None:
    assert checked_answer(question(**changes)) == expected


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"answer": "C"}, "answer_not_in_options"),
        ({"answer": "a fracture"}, "answer_not_in_options"),
        ({"answer": ""}, "answer_not_in_options"),
        ({"options": ("only",)}, "options_missing"),
        ({"options": tuple(f"finding {i}" for i in range(27))}, "options_missing"),
        ({"options": ("A mass", " ")}, "options_missing"),
        ({"options": ("A mass", "a mass.")}, "options_repeated"),
        ({"question": " "}, "question_empty"),
        ({"answer_type": "yes_no", "answer": "maybe"}, "answer_not_yes_no"),
        ({"answer_type": "open", "answer": " "}, "answer_empty"),
    ],
)
def test_unusable_questions_have_a_kind(changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(RowError) as fault:
        checked_answer(question(**changes))
    assert fault.value.kind == kind
    (row,) = question_rows(of(SourceData(questions=[question(**changes)])), to_arrow(Image, []), "")
    assert row.error is not None
    assert row.error.startswith(kind)


# Documents, demonstrations, configuration


def test_equal_documents_are_kept_once() -> None:
    document = SourceDocument(corpus="c", title="t", text="x")
    (row,) = document_rows(of(SourceData(documents=[document, document])), IngestConfig())
    assert row.document_id == "d8cd73f0cc9651c79"  # of the SHA-256 of '["c","t","x"]'


def test_demonstrations_are_the_worked_solutions_of_training_questions(tmp_path: Path) -> None:
    sources = read_sources(PHANTOMS)
    data = sources[0].data
    questions = question_rows(sources, inspected(sources, str(tmp_path)), str(tmp_path))
    rows = demonstration_rows(sources, questions, PHANTOMS)
    assert [r.question_id for r in rows] == [q.question_id for q in questions if q.split == "train"]
    assert {(r.policy, r.num_requested, len(r.solutions), r.config_hash) for r in rows} == {
        ("worked", 2, 2, digest(identity(PHANTOMS)))
    }
    solution = rows[0].solutions[1]
    assert solution.text == " ".join(f"Step {i}: {step}" for i, step in enumerate(solution.steps, 1))
    assert solution.steps == list(data.questions[0].worked[1])
    assert (solution.answer, solution.correct, solution.index) == (questions[0].answer, True, 1)
    assert solution.solution_id == "s" + digest(rows[0].question_id, "worked", rows[0].config_hash, 1)


def test_a_real_source_needs_its_path() -> None:
    with pytest.raises(ConfigError, match=r"'vqa_rad' has no path, and needs the folder that holds its files"):
        read_sources(build(IngestConfig, {"sources": [{"name": "vqa_rad"}]}, "test"))


def test_an_official_test_question_with_equal_options_is_decided_by_its_letter() -> None:
    """MedMCQA's published test set has such questions, and figures count them."""
    repeated: dict[str, Any] = {"options": ("A mass", "a mass.", "none"), "answer": "C"}
    assert checked_answer(question(split="test", **repeated)) == "C"
    with pytest.raises(RowError, match="options_repeated"):
        checked_answer(question(split="train", **repeated))
    with pytest.raises(RowError, match="options_repeated"):
        checked_answer(question(split="test", **{**repeated, "answer": "a mass"}))


def test_several_sources_are_one_table(tmp_path: Path) -> None:
    uri = picture(tmp_path / "a.png")
    sources = [
        ReadSource(SourceConfig(name="one"), SourceData(images=[source_image(uri)], questions=[question("1", (uri,))])),
        ReadSource(SourceConfig(name="two"), SourceData(images=[source_image(uri)], questions=[question("1", (uri,))])),
        ReadSource(PHANTOM, read_source(PHANTOM, 3)),
    ]
    images = inspected(sources, f"{tmp_path}/drawn")
    assert images.num_rows == 1 + 10
    assert set(images["error"].to_pylist()) == {None}
    rows = question_rows(sources, images, f"{tmp_path}/drawn")
    assert [q.source for q in rows] == ["one", "two", *["phantom"] * 8]
    assert len({q.question_id for q in rows}) == 10
    assert rows[0].image_ids == rows[1].image_ids
    assert [q.error for q in rows] == [None] * 10


def test_a_list_of_sources_is_set_by_place_and_checked() -> None:
    with pytest.raises(ConfigError, match=r"sources has 'slake' twice"):
        build(IngestConfig, {"sources": [{"name": "slake"}, {"name": "slake"}]}, "recipe")
    with pytest.raises(ConfigError, match=r"unknown name 'sources\.0\.pth'; did you mean"):
        build(IngestConfig, {"sources": [{"name": "slake", "pth": "x"}]}, "recipe")
    with pytest.raises(ConfigError, match=r"sources is a list of 1: '3' is no place in it"):
        build(IngestConfig, {"sources": {"3": {"path": "x"}}}, "recipe")
    (source,) = build(IngestConfig, {"sources": {"0": {"num_train": 4}}}, "recipe").sources
    assert (source.name, source.num_train) == ("phantom", 4)
    assert identity(IngestConfig())["sources"][0]["name"] == "phantom"


def test_more_questions_leave_the_first_ones_as_they_are() -> None:
    few, more = read_source(PHANTOM, 3), read_source(PHANTOM.model_copy(update={"num_train": 7}), 3)
    assert list(more.questions[:5]) == list(few.questions[:5])
    assert list(more.questions[7:]) == list(few.questions[5:])


def test_inspecting_again_is_the_same_row(tmp_path: Path) -> None:
    row = {
        **dict.fromkeys(("modality", "diagnosis", "annotation"), ""),
        "uri": picture(tmp_path / "a.png"),
        "split": "",
    }
    assert inspect_image(row) == inspect_image(row)


@pytest.mark.engine
def test_ray_workers_draw_and_inspect(tmp_path: Path, ray_session: None) -> None:
    import ray

    sources = read_sources(PHANTOMS)
    images = image_table(sources, f"{tmp_path}/pictures")
    table = Table(f"{tmp_path}/raw_images", Image)
    table.prepare()
    table.write(inspect_images(ray.data.from_arrow(images), PHANTOMS, drawings_of(sources)), key="uri")
    origin = Provenance(name="raw_images", fingerprint="f", config={}, upstream={})
    assert table.finish(origin, "uri", images["uri"].to_pylist(), seconds=1.0).rows == 10
    here = inspected(sources, f"{tmp_path}/here").sort_by("sha256")
    assert table.to_arrow().sort_by("sha256")["image_id"].to_pylist() == here["image_id"].to_pylist()
