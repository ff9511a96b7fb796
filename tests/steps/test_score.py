import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from jobs.graph import BY_NAME, MAKER
from jobs.step import Job, Run, load_recipe, run_step
from medmm_ray.config import ConfigError, digest
from medmm_ray.data.records import (
    Evidence,
    Image,
    Question,
    RetrievedDocument,
    RetrievedImage,
    Scores,
    Solution,
    Solutions,
    States,
    to_arrow,
)
from medmm_ray.data.sorted_rows import scratch_folder
from medmm_ray.data.tables import Provenance, Table, write_rows
from medmm_ray.reward_model import FusionConfig, RewardModel, StepScores, TrainedInputs
from medmm_ray.reward_model.states import from_bytes, to_bytes
from medmm_ray.steps import score
from medmm_ray.steps.score import (
    ScoreConfig,
    Scorer,
    ScoringConfig,
    StateExtractor,
    StatesConfig,
    input_files,
)
from medmm_ray.steps.score.actors import split_image_part, stored_solutions
from tests.doubles import tiny_reward_model as tiny
from tests.doubles import tiny_vision
from tests.doubles.clip_folders import write_native_clip

STEPS = {"s1": ["the left lung shows an effusion", "the answer is (A)"], "s2": ["normal"]}
ORIGIN = Provenance(name="test", fingerprint="f", config={}, upstream={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-tower checkpoint whose image part is not zero."""
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(tiny.save(tmp_path_factory.mktemp("text")))
    model.add_image_tower(write_native_clip(tmp_path_factory.mktemp("clip")), FusionConfig(width=16))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight)
    saved = tmp_path_factory.mktemp("two_tower") / "model"
    model.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    uris = {}
    for name, shade in {"a": 10, "b": 120, "c": 240, "ref": 60}.items():
        uris[name] = str(tmp_path_factory.mktemp("pictures") / f"{name}.png")
        Pictures.new("RGB", (40, 40), (shade,) * 3).save(uris[name])
    return uris


def question(name: str, images: list[str], split: str = "test", error: str | None = None) -> Question:
    return Question(
        question_id=name, source="test", split=split, modality="radiology", difficulty="easy", question="Which lung?",
        options=["left", "right"], answer="A", answer_type="choice", image_ids=images, error=error,
    )  # fmt: skip


def image(name: str, uri: str, error: str | None = None) -> Image:
    return Image(
        image_id=name, uri=uri, sha256=name, perceptual_hash="", width=40, height=40, split="test",
        modality="radiology", diagnosis="", annotation="", error=error,
    )  # fmt: skip


def evidence(name: str, references: list[str], error: str | None = None) -> Evidence:
    return Evidence(
        question_id=name, config_hash="c",
        documents=[RetrievedDocument(document_id=d, text=f"the {d} heart", score=1.0) for d in ("d1", "d2")],
        images=[RetrievedImage(image_id="r", uri=uri, diagnosis="", similarity=1.0) for uri in references], error=error,
    )  # fmt: skip


def solutions(name: str, steps: dict[str, list[str]] | None = None, error: str | None = None) -> Solutions:
    made = [
        Solution(solution_id=f"{name}-{i}", index=n, text="", steps=s, answer=None, correct=None,
                 finish_reason="stop", seed=0, text_sha="")
        for n, (i, s) in enumerate((STEPS if steps is None else steps).items())
    ]  # fmt: skip
    return Solutions(question_id=name, policy="p", config_hash="c", num_requested=2, solutions=made, error=error)


def joined(questions: list[Question], images: list[Image], found: list[Evidence], sampled: list[Solutions]) -> pa.Table:
    """The rows of `score.inputs`, joined without Ray."""
    case = {row["question_id"]: row for row in tables_cases(questions, images, found).to_pylist()}
    read = {e["question_id"]: e for e in to_arrow(Evidence, list(found)).to_pylist()}
    rows = []
    for row in to_arrow(Solutions, list(sampled)).to_pylist():
        own = read.get(row["question_id"], {"documents": None, "error": None})
        blank = dict.fromkeys(score.INPUT_SCHEMA.names)
        rows.append(
            {**blank, **case.get(row["question_id"], {}), **row, "documents": own["documents"],
             "evidence_error": own["error"]}
        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def tables_cases(questions: list[Question], images: list[Image], found: list[Evidence], seed: int = 0) -> pa.Table:
    """The rows of questions, of tables that come a row at a time."""
    parts = {
        "questions": [to_arrow(Question, [row]) for row in questions],
        "images": [to_arrow(Image, [row]) for row in images],
        "evidence": [to_arrow(Evidence, [row]) for row in found],
    }
    with scratch_folder() as folder:
        return input_files(**parts, folder=folder, seed=seed).cases.between(None, None)


@pytest.fixture(scope="module")
def batch(pictures: dict[str, str]) -> pa.Table:
    return joined(
        [question("q1", ["ia"]), question("q2", ["ib"]), question("q3", [])],
        [image("ia", pictures["a"]), image("ib", pictures["b"])],
        [evidence("q1", [pictures["ref"]]), evidence("q2", []), evidence("q3", [])],
        [solutions("q1"), solutions("q2"), solutions("q3")],
    )


def entries(table: pa.Table, column: str = "scores") -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["solution_id"], e.get("arm", "")): e for row in table.to_pylist() for e in row[column]}


# The shuffle


def swaps(questions: list[Question], seed: int = 0) -> dict[str, str]:
    """For each question that is shown another's images, a question that has these."""
    images = [image(image_id, image_id) for image_id in dict.fromkeys(i for q in questions for i in q.image_ids)]
    owners = {tuple(q.image_ids): q.question_id for q in reversed(questions)}
    rows = tables_cases(questions, images, [], seed).to_pylist()
    shown = {row["question_id"]: tuple(row["shuffled_image_uris"]) for row in rows if row["image_uris"]}
    return {question_id: owners[images] for question_id, images in shown.items() if images}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=9, unique=True), st.integers(0, 9))
def test_each_question_shows_the_images_of_another_and_each_ones_are_shown(ids: list[str], seed: int) -> None:
    questions = [question(question_id, [f"im-{question_id}"]) for question_id in ids]
    moved = swaps(questions, seed)
    assert set(moved) == set(moved.values()) == set(ids)
    assert all(a != b for a, b in moved.items())
    assert swaps(questions[::-1], seed) == moved


def test_which_images_are_shown_depends_on_the_seed() -> None:
    questions = [question(f"q{i}", [f"im{i}"]) for i in range(20)]
    assert swaps(questions, 0) != swaps(questions, 1)


def test_the_order_in_which_images_are_swapped_is_that_of_the_digests() -> None:
    """One cycle through the questions: a run that is made again with other code shows the same."""
    ids = [f"q{i:02}" for i in range(20)]
    cycle = sorted(ids, key=lambda question_id: digest(3, question_id))
    expected = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    assert swaps([question(question_id, [f"im-{question_id}"]) for question_id in ids], 3) == expected


def test_a_question_is_shown_other_images_of_its_own_split() -> None:
    rows = [
        replace(question(f"{split}{i}", [f"{split}-im{i // 2}"]), split=split)
        for split in ("train", "test")
        for i in range(8)
    ]
    rows.append(question("none", []))
    moved = swaps(rows)
    assert set(moved) == {f"{split}{i}" for split in ("train", "test") for i in range(8)}
    by_id = {row.question_id: row for row in rows}
    for question_id, other in moved.items():
        assert by_id[question_id].split == by_id[other].split
        assert by_id[question_id].image_ids != by_id[other].image_ids
    assert swaps(rows[:1]) == {}


# Joining


def test_cases_carry_the_files_of_a_question_and_of_another() -> None:
    rows = tables_cases(
        [question("q1", ["ia", "ib"]), question("q2", ["ic"]), question("q3", [], error="no_answer: none")],
        [image("ia", "a.png"), image("ib", "b.png"), image("ic", "c.png")],
        [evidence("q1", ["r1.png"]), evidence("q2", ["r2.png"])],
    ).to_pylist()
    assert rows[0] == {
        "question_id": "q1", "question": "Which lung? (A) left (B) right", "question_error": None,
        "image_uris": ["a.png", "b.png"], "reference_uris": ["r1.png"], "image_error": None,
        "shuffled_image_uris": ["c.png"], "shuffled_reference_uris": ["r2.png"], "shuffled_image_error": None,
    }  # fmt: skip
    assert rows[1]["shuffled_image_uris"] == ["a.png", "b.png"]
    assert rows[2]["question_error"] == "no_answer: none"
    assert (rows[2]["shuffled_image_uris"], rows[2]["shuffled_image_error"]) == ([], None)


def test_images_that_are_not_there_are_said() -> None:
    rows = tables_cases(
        [question("q1", ["gone"]), question("q2", ["broken"]), question("q3", ["ia"], split="train")],
        [image("broken", "", "image_empty: 0 bytes"), image("ia", "a.png")],
        [],
    ).to_pylist()
    assert rows[0]["image_error"] == "image_missing: gone is not in the table images"
    assert rows[1]["image_error"] == "upstream: image_empty: 0 bytes"
    assert rows[1]["shuffled_image_error"] == rows[0]["image_error"]
    assert rows[2]["shuffled_image_error"].startswith("no_other_image: ")
    assert rows[2]["image_error"] is None


# Scoring


def by_transformers(model: RewardModel, text: str, steps: list[str], documents: list[str]) -> list[float]:
    """P(+) of each step by a plain forward pass of the text tower over the whole sequence."""
    return tiny.reference_probs(model.text_model, model.tokenizer, text, steps, documents)


def probabilities(log_odds: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-x)) for x in log_odds]


def test_arms_are_those_of_the_model_scored_directly(
    model: RewardModel, batch: pa.Table, pictures: dict[str, str]
) -> None:
    config = ScoreConfig(arms=("multimodal", "text_only", "shuffled_image", "no_documents"))
    table = Scorer(config, model, "m1")(batch)
    assert table["question_id"].to_pylist() == ["q1", "q2", "q3"]
    found = entries(table)
    assert len(found) == 3 * 4 * 2
    text = "Which lung? (A) left (B) right"
    a, b, ref = (Pictures.open(pictures[name]) for name in ("a", "b", "ref"))
    documents = ["the d1 heart", "the d2 heart"]
    expected = {
        "multimodal": model.score(text, list(STEPS.values()), documents, a, [ref]),
        "text_only": model.score(text, list(STEPS.values()), documents),
        "shuffled_image": model.score(text, list(STEPS.values()), documents, b),
        "no_documents": model.score(text, list(STEPS.values()), [], a, [ref]),
    }
    for arm, scores in expected.items():
        for name, steps, own in zip(("q1-s1", "q1-s2"), STEPS.values(), scores, strict=True):
            entry = found[name, arm]
            plain = by_transformers(model, text, steps, [] if arm == "no_documents" else documents)
            assert probabilities(entry["text_log_odds"]) == pytest.approx(plain, abs=1e-6)
            assert entry["image_log_odds"] == pytest.approx(own.image_log_odds, abs=1e-5)
            assert (entry["question_id"], entry["model"], entry["error"]) == ("q1", "m1", None)
    assert found["q1-s1", "text_only"]["image_log_odds"] == [0.0, 0.0]
    assert found["q3-s1", "multimodal"]["image_log_odds"] == [0.0, 0.0]
    assert found["q3-s1", "shuffled_image"]["image_log_odds"] == [0.0, 0.0]
    assert found["q1-s1", "shuffled_image"]["image_log_odds"] != found["q1-s1", "multimodal"]["image_log_odds"]
    assert found["q1-s1", "no_documents"]["text_log_odds"] != found["q1-s1", "multimodal"]["text_log_odds"]


def test_the_text_is_read_once_for_all_arms(
    model: RewardModel, batch: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    read = model.pack

    def count(question: str, *args: Any, **options: Any) -> Any:
        calls.append(question)
        return read(question, *args, **options)

    monkeypatch.setattr(model, "pack", count)
    Scorer(ScoreConfig(), model, "m")(batch)
    assert len(calls) == batch.num_rows == 3


def test_documents_and_references_are_limited_by_the_config(
    model: RewardModel, batch: pa.Table, pictures: dict[str, str]
) -> None:
    found = entries(Scorer(ScoreConfig(num_documents=1, num_references=0, arms=("multimodal",)), model, "m")(batch))
    picture = Pictures.open(pictures["a"])
    text = "Which lung? (A) left (B) right"
    (first, _) = model.score(text, list(STEPS.values()), ["the d1 heart"], picture)
    plain = by_transformers(model, text, STEPS["s1"], ["the d1 heart"])
    assert probabilities(found["q1-s1", "multimodal"]["text_log_odds"]) == pytest.approx(plain, abs=1e-6)
    assert found["q1-s1", "multimodal"]["image_log_odds"] == pytest.approx(first.image_log_odds, abs=1e-5)


def test_faults_of_rows_become_entries(model: RewardModel, pictures: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    table = joined(
        [question("q1", ["ok"]), question("q2", ["empty"]), question("q3", ["ok"], error="no_answer: x"),
         question("q5", ["ok"])],
        [image("ok", pictures["a"]), image("empty", str(tmp_path / "empty.png"))],
        [evidence("q1", [str(tmp_path / "nowhere.png")]), evidence("q2", []), evidence("q5", [], "query: y")],
        [solutions("q1", {"good": ["left"], "empty": [], "long": ["word " * 4000]}), solutions("q2"), solutions("q3"),
         solutions("q4"), solutions("q5"), solutions("q6", {}, error="upstream: z")],
    )  # fmt: skip
    scored = Scorer(ScoreConfig(), model, "m")(table)
    found = entries(scored)
    errors = {key: (e["error"] or "").split(":")[0] for key, e in found.items()}
    assert errors["q1-good", "text_only"] == ""
    assert errors["q1-empty", "text_only"] == "no_steps"
    assert errors["q1-long", "text_only"] == "too_long"
    assert errors["q1-good", "multimodal"] == "image_missing"  # a reference that is not there
    assert errors["q1-good", "shuffled_image"] == "image_empty"
    assert (errors["q2-s1", "multimodal"], errors["q2-s1", "text_only"]) == ("image_empty", "")
    assert found["q3-s1", "text_only"]["error"] == "upstream: no_answer: x"
    assert errors["q4-s1", "multimodal"] == "question_missing"
    assert found["q5-s2", "text_only"]["error"] == "upstream: query: y"
    assert scored.to_pylist()[-1] == {"question_id": "q6", "scores": []}
    assert all(e["text_log_odds"] == e["image_log_odds"] == [] for e in found.values() if e["error"])


def test_an_image_of_no_finite_numbers_is_an_error_of_its_arm(
    model: RewardModel, batch: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.image_tower is not None
    monkeypatch.setattr(model.image_tower, "preprocess", lambda image: torch.full((3, 32, 32), float("nan")))
    found = entries(Scorer(ScoreConfig(), model, "m")(batch))
    assert found["q1-s1", "multimodal"]["error"].startswith("image_not_finite: ")
    assert found["q1-s1", "text_only"]["error"] is None


def test_a_solution_of_no_finite_numbers_is_an_error_of_its_entries_alone(folder: Path, batch: pa.Table) -> None:
    broken = RewardModel.from_pretrained(folder)
    (word,) = broken.tokenizer(" normal", add_special_tokens=False)["input_ids"]  # s2's only word
    with torch.no_grad():
        broken.text_model.get_input_embeddings().weight[word] = math.nan
    scored = entries(Scorer(ScoreConfig(), broken, "m")(batch))
    assert {str(e["error"]).partition(":")[0] for key, e in scored.items() if "s2" in key[0]} == {"not_finite"}
    assert {e["error"] for key, e in scored.items() if "s1" in key[0]} == {None}
    assert all(e["text_log_odds"] == e["image_log_odds"] == [] for e in scored.values() if e["error"])
    read = entries(StateExtractor(StatesConfig(), broken, "m")(batch), "states")
    assert (read["q1-s2", ""]["states"], read["q1-s2", ""]["num_steps"]) == (b"", 0)
    assert [str(read[f"q1-s{i}", ""]["error"]).partition(":")[0] for i in (1, 2)] == ["None", "not_finite"]


def test_an_answer_without_the_image_that_is_missing_is_no_difference() -> None:
    with_image, without_image = StepScores([1.0], [0.0]), StepScores(error="not_finite: x")
    assert (
        split_image_part(with_image, without_image).error
        == split_image_part(without_image, with_image).error
        == "not_finite: x"
    )


def test_a_checkpoint_that_reads_no_images_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    text_only = str(tiny.save(tmp_path))
    with pytest.raises(ConfigError, match=r"score.arms has shuffled_image, but .* has no image tower"):
        score.check_image_input(text_only, ScoreConfig(arms=("text_only", "shuffled_image")))
    score.check_image_input(str(folder), ScoreConfig(arms=("text_only", "shuffled_image")))
    score.check_image_input(text_only, ScoreConfig(arms=("text_only", "no_documents")))
    with pytest.raises(ConfigError, match="nowhere"):
        score.check_image_input(str(tmp_path / "nowhere"), ScoreConfig(arms=("text_only",)))


# A vision-language model


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def vision_model(vision_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(vision_folder)


def test_arms_of_a_vision_language_model_are_each_read_with_their_image(
    vision_model: RewardModel, batch: pa.Table, pictures: dict[str, str]
) -> None:
    config = ScoreConfig(arms=("multimodal", "text_only", "shuffled_image", "no_documents"), num_references=0)
    found = entries(Scorer(config, vision_model, "m1")(batch))
    assert len(found) == 3 * 4 * 2
    text, (a, b) = "Which lung? (A) left (B) right", (Pictures.open(pictures[name]) for name in ("a", "b"))
    documents = ["the d1 heart", "the d2 heart"]
    expected = {
        "multimodal": vision_model.score(text, list(STEPS.values()), documents, a),
        "text_only": vision_model.score(text, list(STEPS.values()), documents),
        "shuffled_image": vision_model.score(text, list(STEPS.values()), documents, b),
        "no_documents": vision_model.score(text, list(STEPS.values()), [], a),
    }
    without_image = expected | dict.fromkeys(("multimodal", "shuffled_image"), expected["text_only"])
    without_image["no_documents"] = vision_model.score(text, list(STEPS.values()))
    for arm, scores in expected.items():
        for name, own, without in zip(("q1-s1", "q1-s2"), scores, without_image[arm], strict=True):
            entry = found[name, arm]
            assert entry["text_log_odds"] == pytest.approx(without.log_odds, abs=1e-5)
            both = [t + i for t, i in zip(entry["text_log_odds"], entry["image_log_odds"], strict=True)]
            assert both == pytest.approx(own.log_odds, abs=1e-5)
            assert entry["error"] is None
    assert len({tuple(found["q1-s1", arm]["image_log_odds"]) for arm in expected}) == 4
    for key in (("q1-s1", "text_only"), ("q3-s1", "multimodal"), ("q3-s1", "shuffled_image")):
        assert found[key]["image_log_odds"] == [0.0, 0.0]


def test_a_vision_language_model_reads_a_question_once_for_each_image(
    vision_model: RewardModel, batch: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, read = [], vision_model.pack

    def count(question: str, *args: Any, **options: Any) -> Any:
        calls.append(options["image_embeddings"] is not None)
        return read(question, *args, **options)

    monkeypatch.setattr(vision_model, "pack", count)
    Scorer(ScoreConfig(num_references=0), vision_model, "m")(batch)
    assert sorted(calls) == [False] * (3 + 2) + [True] * 4  # two of three questions have an image


def test_a_fault_of_an_image_is_one_of_its_arm_for_a_vision_language_model(
    vision_model: RewardModel, pictures: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    table = joined(
        [question("q1", ["ok"]), question("q2", ["empty"]), question("q3", ["gone"])],
        [image("ok", pictures["a"]), image("empty", str(tmp_path / "empty.png"))],
        [evidence("q1", []), evidence("q2", []), evidence("q3", [])],
        [solutions("q1"), solutions("q2"), solutions("q3"), solutions("q4")],
    )
    found = entries(Scorer(ScoreConfig(arms=("multimodal", "text_only"), num_references=0), vision_model, "m")(table))
    errors = {key: (e["error"] or "").split(":")[0] for key, e in found.items()}
    assert [errors[f"q{i}-s1", "multimodal"] for i in (1, 2, 3, 4)] == [
        "", "image_empty", "image_missing", "question_missing"
    ]  # fmt: skip
    assert [errors[f"q{i}-s1", "text_only"] for i in (1, 2, 3, 4)] == ["", "", "", "question_missing"]


def test_what_a_vision_language_model_is_not_for_is_refused_before_it_is_loaded(
    vision_model: RewardModel, vision_folder: Path, tmp_path: Path
) -> None:
    vision_model.save_pretrained(tmp_path / "saved")
    for path in (str(vision_folder), str(tmp_path / "saved")):
        score.check_image_input(path, score.with_trained_inputs(ScoreConfig(), path))
        score.check_image_input(path, ScoreConfig(arms=("text_only",), num_references=3))
        with pytest.raises(ConfigError, match=r"score.num_references is 3, but .* set score.num_references=0"):
            score.check_image_input(path, ScoreConfig(num_references=3))
        with pytest.raises(ConfigError, match="its states depend on the image"):
            score.states(None, StatesConfig(), path, "m")  # type: ignore[arg-type]


def test_the_configs_lengths_replace_the_checkpoints(folder: Path) -> None:
    assert (score.load(str(folder), ScoringConfig()).max_length, score.load(str(folder), ScoringConfig()).reserve) == (
        4096,
        1024,
    )
    loaded = score.load(str(folder), ScoringConfig(max_length=300, reserve=50, dtype="bfloat16"))
    assert (loaded.max_length, loaded.reserve, loaded.text_model.dtype) == (300, 50, torch.bfloat16)


# States


@pytest.mark.parametrize(
    ("number", "choose", "expected"),
    [(None, "first", "abcdef"), (9, "balanced", "abcdef"), (3, "first", "abc"), (4, "balanced", "abcf"),
     (2, "balanced", "af"), (5, "balanced", "abcdf")],
)  # fmt: skip
def test_states_can_be_stored_of_fewer_solutions(number: int | None, choose: Any, expected: str) -> None:
    # Only f is right; e has no answer.
    correct = {"a": False, "b": False, "c": False, "d": False, "e": None, "f": True}
    solutions = [{"solution_id": name, "correct": value} for name, value in correct.items()]
    chosen = stored_solutions(solutions, number, choose)
    assert "".join(str(solution["solution_id"]) for solution in chosen) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_that_are_scored(folder: Path, batch: pa.Table, dtype: Any) -> None:
    reader = StateExtractor(StatesConfig(dtype=dtype), str(folder), "m1")
    found = entries(reader(batch), "states")
    first, second = reader.model.text_states(
        "Which lung? (A) left (B) right", list(STEPS.values()), ["the d1 heart", "the d2 heart"]
    )
    entry = found["q1-s1", ""]
    assert (entry["num_steps"], entry["hidden_size"], entry["dtype"], entry["model"]) == (2, 32, dtype, "m1")
    assert torch.equal(from_bytes(entry["states"], 2, 32, dtype), first.states_TD)
    assert torch.equal(from_bytes(entry["summaries"], 2, 32, dtype), first.summaries_TD)
    assert found["q1-s2", ""]["text_log_odds"] == second.log_odds_T.tolist()
    shared = entries(
        StateExtractor(StatesConfig(dtype=dtype, pack_questions=True), reader.model, "m1")(batch), "states"
    )
    near = 1e-5 if dtype == "float32" else 2e-2
    # What is stored is what the reference reads: its head on the states gives the reference's probabilities.
    tok, head_VD = reader.model.tokenizer, reader.model.text_model.lm_head.weight.detach().float()
    plus, minus = (tok(sign, add_special_tokens=False)["input_ids"][0] for sign in (" +", " -"))
    log_odds = from_bytes(entry["states"], 2, 32, dtype).float() @ (head_VD[plus] - head_VD[minus])
    plain = by_transformers(
        RewardModel.from_pretrained(folder), "Which lung? (A) left (B) right", STEPS["s1"],
        ["the d1 heart", "the d2 heart"],
    )  # fmt: skip
    assert probabilities(log_odds.tolist()) == pytest.approx(plain, abs=near)
    states_TD = from_bytes(shared["q1-s1", ""]["states"], 2, 32, dtype)
    torch.testing.assert_close(states_TD, first.states_TD, atol=near, rtol=near)
    assert entry["evidence_hash"] == found["q2-s1", ""]["evidence_hash"]
    fewer = entries(StateExtractor(StatesConfig(num_documents=1), reader.model, "m1")(batch), "states")
    assert fewer["q1-s1", ""]["evidence_hash"] != entry["evidence_hash"]


def test_a_checkpoint_is_read_as_it_was_trained_and_another_number_is_told(
    model: RewardModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.trained_inputs = TrainedInputs(num_documents=2, num_references=5)
    model.save_pretrained(tmp_path / "trained")
    model.trained_inputs = TrainedInputs()
    model.save_pretrained(tmp_path / "silent")
    trained, silent = str(tmp_path / "trained"), str(tmp_path / "silent")

    def numbers(
        path: str, documents: int | None = None, references: int | None = None
    ) -> tuple[int | None, int | None]:
        config = ScoreConfig(num_documents=documents, num_references=references)
        score.warn_of_other_inputs(config, path)
        config = score.with_trained_inputs(config, path)
        return config.num_documents, config.num_references

    assert RewardModel.from_pretrained(trained).trained_inputs == TrainedInputs(2, 5)
    assert numbers(trained) == (2, 5)
    assert numbers(silent) == (32, 3)  # Med-PRM's documents
    assert numbers(trained, 2, 5) == (2, 5)
    assert score.with_trained_inputs(StatesConfig(), trained).num_documents == 2
    assert not caplog.records
    assert numbers(trained, 7, 0) == (7, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"num_documents is 7, but {trained} was trained on 2; leave it out to read as many",
        f"num_references is 0, but {trained} was trained on 5; leave it out to read as many",
    ]


def test_states_of_faulty_rows_are_errors(model: RewardModel, pictures: dict[str, str]) -> None:
    table = joined(
        [question("q1", []), question("q2", [])], [], [],
        [solutions("q1", {"empty": [], "good": ["left"]}), solutions("q2", error="policy: x")],
    )  # fmt: skip
    found = entries(StateExtractor(StatesConfig(), model, "m")(table), "states")
    assert found["q1-empty", ""]["error"].startswith("no_steps")
    assert (found["q1-empty", ""]["num_steps"], found["q1-empty", ""]["states"]) == (0, b"")
    assert found["q1-good", ""]["error"] is None
    assert found["q2-s1", ""]["error"] == "upstream: policy: x"


def test_stored_states_of_another_size_are_refused() -> None:
    assert from_bytes(to_bytes(torch.zeros(0, 4)), 0, 4, "float32").shape == (0, 4)
    with pytest.raises(ValueError, match="6 stored values for 2 steps of width 4"):
        from_bytes(to_bytes(torch.zeros(2, 3)), 2, 4, "float32")


# With Ray


@pytest.mark.engine
def test_tables_of_scores_and_states(
    ray_session: None, folder: Path, tmp_path: Path, pictures: dict[str, str], batch: pa.Table, model: RewardModel
) -> None:
    sampled = Table(str(tmp_path / "solutions"), Solutions)
    write_rows(sampled, [solutions("q1"), solutions("q2"), solutions("q3")], ORIGIN, "question_id")
    files = input_files(
        [to_arrow(Question, [question("q1", ["ia"]), question("q2", ["ib"]), question("q3", [])])],
        [to_arrow(Image, [image("ia", pictures["a"]), image("ib", pictures["b"])])],
        [to_arrow(Evidence, [evidence("q1", [pictures["ref"]]), evidence("q2", []), evidence("q3", [])])],
        str(tmp_path),
    )
    ds = score.inputs(sampled.dataset(), files)
    scores = Table(str(tmp_path / "scores"), Scores)
    scores.prepare()
    scores.write(score.score(ds, ScoreConfig(), str(folder), "m1"), key="question_id", explode="scores")
    assert scores.finish(ORIGIN, "question_id", ["q1", "q2", "q3"], 1.0).rows == 18
    expected = entries(Scorer(ScoreConfig(), model, "m1")(batch))
    for row in scores.to_arrow().to_pylist():
        other = expected[row["solution_id"], row["arm"]]
        assert row["text_log_odds"] == pytest.approx(other["text_log_odds"], abs=1e-5)
        assert row["image_log_odds"] == pytest.approx(other["image_log_odds"], abs=1e-5)
    kept = Table(str(tmp_path / "states"), States)
    kept.prepare()
    kept.write(score.states(ds, StatesConfig(), str(folder), "m1"), key="question_id", explode="states")
    assert kept.finish(ORIGIN, "question_id", ["q1", "q2", "q3"], 1.0).rows == 6


@pytest.mark.engine
def test_states_of_trees_lie_beside_those_of_samples(ray_session: None, tmp_path: Path) -> None:
    given = f"models.text_prm={tiny.save(tmp_path / 'prm')}"

    def run(*words: str) -> Run:
        made = Run(load_recipe(["jobs/recipes/tiny.yaml", f"run={tmp_path}", given, *words]))
        rows: dict[str, list[Any]] = {
            "questions": [question("q1", []), replace(question("q2", []), split="train")],
            "images": [],
            "evidence": [evidence("q1", []), evidence("q2", [])],
            "solutions": [solutions("q1"), solutions("q2")],
            "tree_solutions": [replace(solutions("q2"), solutions=solutions("q2").solutions[:1])],
        }
        for name, own in rows.items():
            if not made.table(name).is_complete:
                key = "image_id" if name == "images" else "question_id"
                write_rows(made.table(name), own, Job(made, MAKER[name]).origin(name), key)
        run_step(made, BY_NAME["states"])
        return made

    without, beside = run(), run("without=[]")
    counts = [[r.table(n).manifest().rows for n in ("states", "tree_states")] for r in (without, beside)]
    assert counts == [[2, 0], [2, 1]]
    own, trees = (
        {r["solution_id"]: r for r in beside.table(name).to_arrow().to_pylist()} for name in ("states", "tree_states")
    )
    assert list(trees) == ["q2-s1"]
    read, alone = (from_bytes(rows["q2-s1"]["states"], 2, 32, "float32") for rows in (own, trees))
    assert torch.allclose(read, alone, atol=1e-5)
