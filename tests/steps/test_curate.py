import io
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.config import build
from medmm_ray.data.records import Image, Question, to_arrow
from medmm_ray.data.sources.phantom import make_case, render
from medmm_ray.data.sources.phantom.case import generator
from medmm_ray.data.tables import TableError
from medmm_ray.pages.curation_page import render as render_curation
from medmm_ray.steps.curate import CurateConfig, confirm, curate, propose, thumbnails
from medmm_ray.steps.curate.diagnostic import reason
from medmm_ray.steps.curate.merging import components
from medmm_ray.steps.curate.near_duplicates import detail, near_pairs, thumbnail_batch
from medmm_ray.steps.curate.splits import joined_groups
from medmm_ray.steps.ingest import (
    IngestConfig,
    SourceConfig,
    drawings_of,
    image_table,
    inspect_batch,
    question_rows,
    read_sources,
)
from tests.paths import REAL_DATA

REAL = REAL_DATA / "vqa_rad"
CONFIG = CurateConfig()


def image(name: str, split: str = "train", **changes: object) -> Image:
    values: dict[str, object] = {
        "image_id": f"im-{name}", "uri": f"/{name}.png", "sha256": name, "perceptual_hash": "0" * 16, "width": 8,
        "height": 8, "split": split, "modality": "radiology", "diagnosis": "", "annotation": "", **changes,
    }  # fmt: skip
    return Image(**values)  # type: ignore[arg-type]


def question(name: str, images: list[str], split: str = "train", text: str = "", **changes: object) -> Question:
    values: dict[str, object] = {
        "question_id": f"q-{name}", "source": "s", "split": split, "modality": "radiology", "difficulty": "",
        "question": text or name, "options": [], "answer": "yes", "answer_type": "yes_no",
        "image_ids": [f"im-{i}" for i in images], **changes,
    }  # fmt: skip
    return Question(**values)  # type: ignore[arg-type]


def clean(
    questions: list[Question],
    images: list[Image],
    duplicates: list[tuple[str, str]] | None = None,
    config: CurateConfig = CONFIG,
) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """Splits of questions and images by id, and the figures that are not 0."""
    done = curate(to_arrow(Question, questions), to_arrow(Image, images), {"near_duplicate": duplicates or []}, config)
    splits = {q.question_id: q.split for q in done.questions}
    return splits, {i.image_id: i.split for i in done.images}, {k: v for k, v in done.figures.items() if v}


# Near duplicates


@st.composite
def alike_hashes(draw: st.DrawFn) -> list[int]:
    """Hashes that differ from one of a few in any bits: spread, in a run, or none."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    values = []
    for _ in range(draw(st.integers(0, 40))):
        bits = draw(st.lists(st.integers(0, 63), max_size=14))
        run_length, start = draw(st.integers(0, 14)), draw(st.integers(0, 63))
        run = ((1 << run_length) - 1) << start & (2**64 - 1)
        values.append(draw(st.sampled_from(centres)) ^ run ^ sum(1 << bit for bit in set(bits)))
    return values


@settings(max_examples=300, deadline=None)
@given(alike_hashes(), st.integers(0, 64), st.sampled_from([1, 7, 4096]))
def test_near_pairs_are_those_of_a_plain_double_loop(values: list[int], distance: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmm_ray.steps.curate.near_duplicates._BLOCK", block)
        pairs = near_pairs([f"{value:016x}" for value in values], distance)
    assert pairs.shape == (len(pairs), 2)
    assert [tuple(pair) for pair in pairs.tolist()] == [
        (i, j) for i, j in combinations(range(len(values)), 2) if (values[i] ^ values[j]).bit_count() <= distance
    ]


def test_a_copy_is_found_among_many_hashes() -> None:
    values = np.random.default_rng(1).integers(0, 2**63, 100_000).tolist()
    values[70_000] = values[3] ^ 0b101
    assert near_pairs([f"{value:016x}" for value in values], 2).tolist() == [[3, 70_000]]


def copies(picture: PIL.Image.Image) -> list[PIL.Image.Image]:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=60)
    small = picture.resize((int(picture.width * 0.6), int(picture.height * 0.6)))
    return [PIL.Image.open(stream), small, picture.point([min(255, int(v * 0.8 + 20)) for v in range(256)])]


def test_detail_tells_copies_from_other_phantoms() -> None:
    pictures = [render(make_case(generator("d", i)), 64) for i in range(120)]
    details = np.stack([detail(p) for p in pictures])
    alike = details @ details.T - np.eye(120)
    assert alike.max() < CONFIG.pixel_correlation
    for picture, own in zip(pictures[:20], details[:20], strict=True):
        assert min(float(own @ detail(c)) for c in copies(picture)) > CONFIG.pixel_correlation


def test_a_blank_picture_has_no_detail_and_is_like_none() -> None:
    assert not detail(PIL.Image.new("L", (40, 40), 7)).any()


def files(folder: Path) -> pa.Table:
    """Two phantoms, the first also as a JPEG, and a copy of its very bytes."""
    first, second = (render(make_case(generator("f", i), ["normal"]), 96) for i in range(2))
    first.save(folder / "a.png")
    first.save(folder / "b.jpg", quality=70)
    second.save(folder / "c.png")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    rows = [
        {"uri": str(folder / name), "split": "train", "modality": "", "diagnosis": "", "annotation": ""}
        for name in ("a.png", "b.jpg", "c.png", "d.png")
    ]
    return inspect_batch(pa.Table.from_pylist(rows))


def test_hashes_propose_and_pixels_confirm(tmp_path: Path) -> None:
    images = files(tmp_path)
    a, b, c, d = images["image_id"].to_pylist()
    assert a == d
    config = CurateConfig(hash_distance=64)  # proposes every pair
    proposed, pairs = propose(images, config)
    assert set(proposed["image_id"].to_pylist()) == {a, b, c}
    assert len(pairs) == 3
    assert [set(p) for p in confirm(proposed, pairs, thumbnail_batch(proposed), config)] == [{a, b}]


def test_without_near_duplicates_nothing_is_proposed(tmp_path: Path) -> None:
    proposed, pairs = propose(files(tmp_path), CurateConfig(near_duplicates=False))
    assert (proposed.num_rows, len(pairs)) == (0, 0)
    assert confirm(proposed, pairs, thumbnail_batch(proposed), CONFIG) == []


def test_a_thumbnail_that_cannot_be_made_confirms_nothing(tmp_path: Path) -> None:
    images = files(tmp_path)
    proposed, pairs = propose(images, CurateConfig(hash_distance=64))
    (tmp_path / "b.jpg").unlink()
    details = thumbnail_batch(proposed)
    assert [e.partition(":")[0] for e in details["error"].to_pylist() if e] == ["image_missing"]
    assert confirm(proposed, pairs, details, CONFIG) == []
    with pytest.raises(TableError, match="2 of 3 thumbnails are missing"):
        confirm(proposed, pairs, details.slice(0, 1), CONFIG)


# Cleaning


def test_rows_with_errors_leave_and_are_counted() -> None:
    questions, images, figures = clean(
        [
            question("1", ["a"]),
            question("2", ["a"], error="answer_empty: x"),
            question("3", ["b"], error="upstream: y"),
        ],
        [image("a"), image("b", error="image_corrupt: z")],
    )
    assert (questions, images) == ({"q-1": "train"}, {"im-a": "train"})
    assert figures == {
        "questions_error_answer_empty": 1, "questions_error_upstream": 1, "images_error_image_corrupt": 1,
        "train_questions": 1, "train_images": 1,
    }  # fmt: skip


def test_equal_bytes_are_one_image_and_near_duplicates_the_largest() -> None:
    done = curate(
        to_arrow(Question, [question("1", ["a"]), question("2", ["b"])]),
        to_arrow(Image, [image("a"), image("a", uri="/z.png"), image("b", width=80, height=80), image("c")]),
        {"near_duplicate": [("im-a", "im-b")]},
        CONFIG,
    )
    assert [(i.image_id, i.uri) for i in done.images] == [("im-b", "/b.png"), ("im-c", "/c.png")]
    assert [q.image_ids for q in done.questions] == [["im-b"], ["im-b"]]
    assert (done.figures["images_same_bytes"], done.figures["images_near_duplicate"]) == (1, 1)


def test_a_repeated_question_stays_once_and_the_test_one_wins() -> None:
    questions, _, figures = clean(
        [
            question("1", ["a"], text="Is it clear?"),
            question("2", ["b"], "test", "is it clear"),
            question("3", ["b"], text="Is it clear?", answer="no"),
            question("4", ["c"], text="Is it clear?"),
        ],
        [image("a"), image("b"), image("c")],
        [("im-a", "im-b")],
    )
    assert questions == {"q-2": "test", "q-4": "train"}
    assert (figures["questions_repeated"], figures["questions_repeated_other_answer"]) == (1, 1)


# Splits


LEAK = (
    [
        question("1", ["a"], "test"), question("2", ["a"]), question("3", ["b"]), question("4", ["b", "c"]),
        question("5", ["c"], "test"), question("6", ["d"]), question("7", []), question("8", [], "test"),
    ],
    [image(n) for n in "abcde"],
)  # fmt: skip


def test_groups_reach_through_questions_with_several_images() -> None:
    assert joined_groups(LEAK[0]) == {
        "q-1": "im-a", "q-2": "im-a", "q-3": "im-b", "q-4": "im-b", "q-5": "im-b", "q-6": "im-d", "q-7": "q-7",
        "q-8": "q-8",
    }  # fmt: skip


def test_groups_reach_through_patients_too() -> None:
    questions = [
        question("1", ["a"], group="s/patient 2"), question("2", ["b"], group="s/patient 2"),
        question("3", ["b"], group="s/patient 1"), question("4", ["c"], group="im-c"), question("5", [], group="q-5"),
    ]  # fmt: skip
    expected = dict.fromkeys(("q-1", "q-2", "q-3"), "s/patient 1") | {"q-4": "im-c", "q-5": "q-5"}
    assert joined_groups(questions) == expected
    done = curate(to_arrow(Question, questions), to_arrow(Image, [image(n) for n in "abc"]), {}, CONFIG)
    assert {q.question_id: q.group for q in done.questions} == expected


def test_a_patient_in_the_test_leaves_training() -> None:
    questions, _, figures = clean(
        [question("1", ["a"], "test", group="s/p"), question("2", ["b"], group="s/p"), question("3", ["c"])],
        [image(n) for n in "abc"],
    )
    assert questions == {"q-1": "test", "q-3": "train"}
    assert figures["questions_leaked"] == 1


def test_drop_train_drops_what_training_shares_with_the_test() -> None:
    questions, images, figures = clean(*LEAK)
    assert questions == {"q-1": "test", "q-5": "test", "q-6": "train", "q-7": "train", "q-8": "test"}
    assert images == {"im-a": "test", "im-b": "train", "im-c": "test", "im-d": "train", "im-e": "train"}
    assert figures["questions_leaked"] == 3


def test_resplit_keeps_every_question_and_shares_no_picture() -> None:
    questions = [question(str(i), [str(i // 3)], "test" if i % 2 else "train") for i in range(300)]
    images = [image(str(i)) for i in range(100)]
    config = CurateConfig(leakage="resplit", test_fraction=0.3)
    done = curate(to_arrow(Question, questions), to_arrow(Image, images), {}, config)
    assert len(done.questions) == 300
    by_image = {(q.image_ids[0], q.split) for q in done.questions}
    assert len(by_image) == 100
    assert 20 <= sum(split == "test" for _, split in by_image) <= 40
    assert {i.image_id: i.split for i in done.images} == dict(by_image)
    again = curate(to_arrow(Question, questions[::-1]), to_arrow(Image, images[::-1]), {}, config)
    assert (again.questions, again.images) == (done.questions, done.images)
    other = curate(to_arrow(Question, questions), to_arrow(Image, images), {}, config.model_copy(update={"seed": 1}))
    assert {q.question_id: q.split for q in other.questions} != {q.question_id: q.split for q in done.questions}


def test_limits_keep_the_same_questions_whatever_the_order() -> None:
    questions = [question(str(i), [str(i)], "test" if i < 20 else "train") for i in range(60)]
    images = [image(str(i), "test" if i < 20 else "train") for i in range(60)]
    config = CurateConfig(max_train=10, max_test=5)
    splits, kept_images, figures = clean(questions, images, config=config)
    assert Counter(splits.values()) == {"train": 10, "test": 5}
    assert Counter(kept_images.values()) == {"train": 40, "test": 5}  # training's others may serve as references
    assert (figures["questions_over_limit_train"], figures["questions_over_limit_test"]) == (30, 15)
    assert figures["images_without_question"] == 15
    assert clean(questions[::-1], images, config=config)[0] == splits


def test_an_official_test_stays_as_published() -> None:
    """What repeats or shares it leaves training; its own repeats are counted, and stay."""
    official = {"dataset": "medqa", "split": "test"}
    questions, _, figures = clean(
        [
            question("1", [], text="Why?", **official), question("2", [], text="why", **official),
            question("3", [], text="Why?"), question("4", ["a"], **{**official, "dataset": "vqa_rad"}),
            question("5", ["a"]), question("6", [], "test", "Who?"), question("7", [], "test", "Who?"),
        ],
        [image("a")],
        config=CurateConfig(max_test=0),
    )  # fmt: skip
    assert questions == {"q-1": "test", "q-2": "test", "q-4": "test"}
    assert figures == {
        "official_test_repeated": 1, "official_test_medqa": 2, "official_test_vqa_rad": 1, "questions_repeated": 2,
        "questions_leaked": 1, "questions_over_limit_test": 1, "test_questions": 3, "test_images": 1,
    }  # fmt: skip


def test_a_second_copy_of_a_benchmark_does_not_double_it() -> None:
    official = {"dataset": "medqa", "split": "test", "text": "Why?"}
    questions, _, figures = clean([question("1", [], **official), question("2", [], source="other", **official)], [])
    assert questions == {"q-1": "test"}
    assert (figures["questions_repeated"], figures["official_test_medqa"]) == (1, 1)


def test_a_new_split_leaves_the_official_test_alone() -> None:
    questions = [
        question(str(i), [str(i // 2)], dataset="slake", split="test" if i < 20 else "train") for i in range(99)
    ]
    questions.append(question("x", ["0"]))
    images = [image(str(i)) for i in range(50)]
    splits, _, figures = clean(questions, images, config=CurateConfig(leakage="resplit", test_fraction=0.3))
    assert {f"q-{i}" for i in range(20)} <= {name for name, split in splits.items() if split == "test"}
    assert "q-x" not in splits
    assert figures["questions_leaked"] == 1
    assert sum(split == "test" for split in splits.values()) > 25


QUOTAS = {"train": {"radiology": {"easy": 2, "hard": 3}, "pathology": 1}}


def test_quotas_are_exact_and_say_what_they_lack() -> None:
    questions = [question(f"e{i}", [], difficulty="easy") for i in range(5)]
    questions += [question(f"h{i}", [], difficulty="hard") for i in range(2)]
    questions += [question("u", []), question("t", [], "test"), question("o", [], "test", dataset="medqa")]
    config = build(CurateConfig, {"quotas": QUOTAS}, "test")
    done = curate(to_arrow(Question, questions), to_arrow(Image, [image("x")]), {}, config)
    assert Counter((q.split, q.difficulty) for q in done.questions) == {
        ("train", "easy"): 2, ("train", "hard"): 2, ("test", ""): 2,
    }  # fmt: skip
    assert done.figures["quota_lacks_train/radiology/hard"] == 1
    assert done.figures["quota_lacks_train/pathology"] == 1
    assert done.figures["questions_over_quota"] == 4
    first, second = done.notes
    assert first.startswith(
        "quota train/radiology/hard: 2 of 3 questions, 1 lacking. 1 questions of this modality have no difficulty "
        "(curate.difficulty=estimate); others of this modality: easy 5; write_questions can write some for 1 pictures"
    )
    assert "slake (4,919 questions)" in first
    assert "data sets that have some (ingest.sources): path_vqa (19,654 questions)" in second
    again = curate(to_arrow(Question, questions[::-1]), to_arrow(Image, []), {}, config)
    assert [q.question_id for q in again.questions] == [q.question_id for q in done.questions]


def test_difficulties_are_estimated_by_shares_where_there_is_none() -> None:
    questions = [question(str(i), [], text=" ".join(f"{w}of{i}" for w in range(i + 1))) for i in range(10)]
    questions.append(question("p", [], difficulty="hard", text="Is it?"))
    done = curate(
        to_arrow(Question, questions), to_arrow(Image, []), {}, build(CurateConfig, {"difficulty": "estimate"}, "test")
    )
    difficulties = {q.question_id: q.difficulty for q in done.questions}
    assert Counter(difficulties[f"q-{i}"] for i in range(10)) == {"easy": 3, "medium": 5, "hard": 2}
    assert (difficulties["q-0"], difficulties["q-9"], difficulties["q-p"]) == ("easy", "hard", "hard")
    assert done.figures["difficulty_estimated"] == 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("How many ribs are visible?", "counts"),
        ("What is the number of lesions?", "counts"),
        ("What imaging modality is used?", "names_the_kind"),
        ("Which plane is the image displayed in?", "names_the_kind"),
        ("Is this a MRI of the chest?", "names_the_kind"),
        ("Is this an axial plane?", "names_the_kind"),
        ("How was this image taken?", "names_the_kind"),
        ("What is the function of the liver?", "needs_no_picture"),
        ("How to treat pneumonia?", "needs_no_picture"),
        ("Is there a pneumothorax?", None),
        ("What is the most likely diagnosis?", None),
        ("What causes the opacity seen in this image?", None),
        ("Where is the lesion?", None),
        ("Are the lungs normal appearing?", None),
    ],
)
def test_which_questions_say_nothing_of_a_diagnosis(text: str, why: str | None) -> None:
    assert reason(text) == why


def test_the_diagnostic_filter_spares_official_tests_and_questions_without_pictures() -> None:
    text = "How many ribs are visible?"
    questions, _, figures = clean(
        [
            question("1", ["a"], text=text), question("2", ["b"], "test", text, dataset="vqa_rad"),
            question("3", [], text=text), question("4", ["a"], text="Is there a mass?"),
        ],
        [image("a"), image("b")],
        config=CurateConfig(diagnostic_only=True),
    )  # fmt: skip
    assert set(questions) == {"q-2", "q-3", "q-4"}
    assert figures["questions_not_diagnostic_counts"] == 1


@pytest.mark.skipif(not (REAL_DATA / "mirage").is_dir(), reason=f"MIRAGE is not at {REAL_DATA}")
def test_mirage_keeps_its_denominators(tmp_path: Path) -> None:
    source = SourceConfig(name="mirage", path=str(REAL_DATA / "mirage"))
    questions, images = real_tables(IngestConfig(sources=(source,)), str(tmp_path))
    done = curate(questions, images, {}, CONFIG)
    assert Counter(q.dataset for q in done.questions) == {
        "mmlu": 1089, "medqa": 1273, "medmcqa": 4183, "pubmedqa": 500, "bioasq": 618,
    }  # fmt: skip
    assert done.figures["test_questions"] == 7663


def test_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(TableError, match=r"leaves none of 1 questions \(questions_error_answer_empty 1\)"):
        clean([question("1", [], error="answer_empty: x")], [])


@pytest.mark.parametrize(("phi", "kept"), [("flag", {"q-1", "q-2", "q-3"}), ("drop", {"q-1", "q-3"})])
def test_questions_with_identifiers(phi: str, kept: set[str]) -> None:
    """Official tests stay as published; what is found in them is counted apart."""
    questions = [
        question("1", []), question("2", []), question("3", [], "test", dataset="medqa"),
    ]  # fmt: skip
    config = build(CurateConfig, {"phi": phi}, "test")
    found = {"q-2": ["name", "date"], "q-3": ["date"]}
    done = curate(to_arrow(Question, questions), to_arrow(Image, []), {}, config, found)
    assert {q.question_id for q in done.questions} == kept
    assert {k: v for k, v in done.figures.items() if "phi" in k and v} == {
        "phi_name": 1, "phi_date": 1, "phi_official_test_date": 1, "questions_with_phi": 2,
    } | ({"questions_phi_dropped": 1} if phi == "drop" else {})  # fmt: skip
    assert [(f.question_id, f.kinds, f.is_kept) for f in done.report.phi] == [
        ("q-2", ["name", "date"], phi == "flag"), ("q-3", ["date"], True),
    ]  # fmt: skip


def test_the_report_has_every_gate_and_pictures_side_by_side(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))
    images = []
    for name, side in (("a", 64), ("b", 32), ("c", 48)):
        picture.resize((side, side)).save(tmp_path / f"{name}.png")
        images.append(image(name, uri=str(tmp_path / f"{name}.png"), width=side, height=side))
    questions = [
        question("1", ["a"]), question("2", ["b"], text="1"), question("3", ["c"]), question("4", [], error="x: y"),
    ]  # fmt: skip
    config = build(CurateConfig, {"quotas": {"train": {"radiology": 5}}}, "test")
    pairs = {"near_duplicate": [("im-a", "im-b")], "altered": [("im-b", "im-a")]}
    report = curate(to_arrow(Question, questions), to_arrow(Image, images), pairs, config).report
    assert [(gate.name, gate.before, gate.after) for gate in report.gates] == [
        ("readable", 4, 3), ("diagnostic", 3, 3), ("phi", 3, 3), ("once", 3, 2), ("near_texts", 2, 2),
        ("benchmarks", 2, 2), ("leaks", 2, 2), ("quotas", 2, 2), ("limits", 2, 2),
    ]  # fmt: skip
    assert report.num_pairs == {"near_duplicate": 1, "altered": 0}
    assert [(pair.kept_id, pair.removed_id) for pair in report.pairs] == [("im-a", "im-b")]
    assert (report.images_read, report.images_merged, report.images_kept) == (3, 1, 2)
    assert [(quota.name, quota.count, quota.filled) for quota in report.quotas] == [("train/radiology", 5, 2)]
    assert [(part.split, part.modality, part.questions) for part in report.portions] == [("train", "radiology", 2)]
    page = render_curation(report, PIL.Image.open)
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.index(">a.png<") < page.index(">b.png<")
    assert "Quotas that are not filled: 1 of 1." in page
    lost = render_curation(report, lambda uri: PIL.Image.open("nowhere.png"))
    assert lost.count("cannot be opened") == 2


def test_components() -> None:
    assert components("dcbae", [("a", "c"), ("c", "d"), ("d", "a")]) == [["a", "c", "d"], ["b"], ["e"]]


def real_tables(config: IngestConfig, folder: str) -> tuple[pa.Table, pa.Table]:
    sources = read_sources(config)
    images = inspect_batch(image_table(sources, folder), drawings_of(sources))
    return to_arrow(Question, question_rows(sources, images, folder)), images


def test_phantoms_lose_nothing(tmp_path: Path) -> None:
    """They look alike: hashes propose some pairs, pixels refuse them all."""
    questions, images = real_tables(IngestConfig(sources=(SourceConfig(num_train=250, num_test=50),)), str(tmp_path))
    proposed, pairs = propose(images, CONFIG)
    assert len(pairs) > 20
    assert confirm(proposed, pairs, thumbnail_batch(proposed), CONFIG) == []
    done = curate(questions, images, {}, CONFIG)
    assert {k: v for k, v in done.figures.items() if v} == {
        "train_questions": 250, "test_questions": 50, "train_images": 250, "test_images": 50,
    }  # fmt: skip


@pytest.mark.engine
@pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_every_test_image_of_vqa_rad_also_occurs_in_train(tmp_path: Path) -> None:
    questions, images = real_tables(IngestConfig(sources=(SourceConfig(name="vqa_rad", path=str(REAL)),)), "")
    proposed, pairs = propose(images, CONFIG)
    duplicates = confirm(proposed, pairs, thumbnail_batch(proposed), CONFIG)
    dropped = curate(questions, images, {"near_duplicate": duplicates}, CONFIG)
    resplit = curate(
        questions, images, {"near_duplicate": duplicates}, CurateConfig(leakage="resplit", official_test="as_others")
    )
    for done in (dropped, resplit):
        by_split = {
            split: {i for q in done.questions if q.split == split for i in q.image_ids} for split in ("train", "test")
        }
        assert not by_split["train"] & by_split["test"]
    assert dropped.figures["questions_leaked"] > 1000
    assert resplit.figures["train_questions"] + resplit.figures["test_questions"] > 2900


@pytest.mark.engine
def test_ray_workers_make_the_same_thumbnails(tmp_path: Path, ray_session: None) -> None:
    import ray

    proposed, _ = propose(files(tmp_path), CurateConfig(hash_distance=64))
    rows = thumbnails(ray.data.from_arrow(proposed), CONFIG).take_all()
    assert {r["image_id"]: r["detail"] for r in rows} == {
        r["image_id"]: r["detail"] for r in thumbnail_batch(proposed).to_pylist()
    }
