"""What a caller may get wrong: each a sentence that says where, or the right scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmm_ray.reward_model import CheckpointError, RewardModel, ScoreRequest
from tests.doubles import tiny_reward_model as tiny
from tests.reward_model import medprm_reference

QUESTION = "Which lung shows the effusion? (A) left (B) right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("text_model"), context=8192)


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"question": None}, TypeError, "question is None (NoneType); expected a text"),
        ({"question": " \n"}, ValueError, "question is ' \\n'; expected the question's text, with its options"),
        ({"solutions": "Step 1: left"}, TypeError, "solutions is 'Step 1: left' (str); expected a list of solutions"),
        ({"solutions": None}, TypeError, "solutions is None (NoneType); expected a list of solutions"),
        ({"solutions": ["left", None]}, TypeError, "solutions[1] is None (NoneType); expected a text, or a list of st"),
        ({"solutions": [7]}, TypeError, "solutions[0] is 7 (int); expected a text, or a list of steps"),
        ({"solutions": [["left", None]]}, TypeError, "solutions[0][1] is None (NoneType); expected a text"),
        ({"solutions": [["left"], ["a", 0.5]]}, TypeError, "solutions[1][1] is 0.5 (float); expected a text"),
        ({"documents": "a blunted angle shows an effusion, as every textbook says"}, TypeError,
         "documents is 'a blunted angle shows an effusion, as e… (str); expected a list of texts"),
        ({"documents": ["a", {"text": "b"}]}, TypeError, "documents[1] is {'text': 'b'} (dict); expected a text"),
        ({"solutions": [["left", "x\udce9"]]}, ValueError,
         "solutions[0][1] holds half of a character ('\\udce9', a lone surrogate) at 1; no tokenizer can read it"),
        ({"documents": ["\ud83d"]}, ValueError, "documents[0] holds half of a character"),
        ({"image": "scan.png"}, TypeError, "image is a str; expected a PIL image"),
        ({"reference_images": "scan.png"}, TypeError, "reference_images is 'scan.png' (str); expected a list of im"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    model: RewardModel, wrong: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind) as caught:
        model.score(**{"question": QUESTION, "solutions": [["left"]], **wrong})
    assert str(caught.value).startswith(says)


def test_no_solution_and_empty_ones_are_no_faults_of_the_request(model: RewardModel) -> None:
    assert model.score(QUESTION, []) == []
    assert list(model.score_many([])) == []
    scores = model.score(QUESTION, ["", "  \n", [], [" "], "Step 1: Step 2:", ["left"]])
    assert [s.error and s.error.split(":")[0] for s in scores] == ["no_steps"] * 5 + [None]
    assert "the solution is empty; expected at least one step of text" in str(scores[0].error)


@pytest.mark.parametrize(
    "text",
    [
        "الرئة اليسرى واضحة",
        "左肺清晰,无积液",
        "👩‍⚕️ 🫁 🏳️‍🌈",
        "e\u0301 a\u0308 \u0915\u094d\u0937",
        "\u202eright to left\u202c \ufeff\u200b",
        "a\x00b \x1b[31m \x07 \x7f",
        "кит ки Ки",
    ],
    ids=["arabic", "chinese", "emoji", "combining", "bidi", "control", "cyrillic"],
)
def test_any_script_scores_as_in_the_reference(model: RewardModel, text: str) -> None:
    solution, documents = [text, f"so {text}", "left"], [text]
    (scores,) = model.score(f"{text}?", [solution], documents)
    everywhere = tiny.reference_probs(model.text_model, model.tokenizer, f"{text}?", solution, documents)
    # A tag in the texts is a tag token to the reference too; steps end at the last ones, two apart where they hold one.
    inside = f" {text}".count(" ки")
    ends = [2 * inside + inside, 2 * inside + 1 + 2 * inside, 2 * inside + 2 + 2 * inside]
    assert scores.error is None
    assert scores.plus_probs == pytest.approx([everywhere[end] for end in ends], abs=1e-5)


def test_only_line_breaks_become_spaces(model: RewardModel) -> None:
    (odd,) = model.score(QUESTION, [["left\u2028lung\x1fis\u00a0normal\r\n", "a\nb"]])
    tagged = "Step 1: left\u2028lung\x1fis\u00a0normal ки Step 2: a b ки"
    expected = medprm_reference.probs(model.text_model, model.tokenizer, QUESTION, tagged)
    assert odd.plus_probs == pytest.approx(expected, abs=1e-5)


def test_a_tag_in_question_document_or_step_is_not_read_as_a_step(model: RewardModel) -> None:
    solution, documents, question = ["the lung ки is clear", "no"], ["of ки course"], "Is ки it?"
    (scores,) = model.score(question, [solution], documents)
    everywhere = tiny.reference_probs(model.text_model, model.tokenizer, question, solution, documents)
    assert len(everywhere) == 5  # document, question, inside the first step, and the two ends
    assert scores.plus_probs == pytest.approx([everywhere[3], everywhere[4]], abs=1e-5)


def test_500_steps(model: RewardModel) -> None:
    solution = [tiny.WORDS[i % len(tiny.WORDS)] for i in range(500)]
    (scores,) = model.score(QUESTION, [solution])
    expected = tiny.reference_probs(model.text_model, model.tokenizer, QUESTION, solution, [])
    assert len(expected) == 500
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)


def test_a_request_is_checked_once_and_keeps_what_it_was_given() -> None:
    request = ScoreRequest(QUESTION, ("left", ("a", "b")), ())
    assert request.solutions == ("left", ("a", "b"))
    assert request.images == []


@pytest.mark.parametrize("device", ["cdua", "gpu", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_said_before_anything_is_read(device: str) -> None:
    with pytest.raises(
        ValueError, match=f"device is '{device}'; expected cpu, cuda, cuda:N of this machine, or auto: "
    ):
        RewardModel.from_pretrained("runs/none", device=device)


def test_formats_and_devices_are_named_as_in_transformers(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    weights = {key: weight.bfloat16() for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    def dtype(**options: Any) -> torch.dtype:
        found: torch.dtype = RewardModel.from_pretrained(folder, **options).text_model.dtype
        return found

    assert dtype() == torch.float32
    assert {dtype(dtype=d) for d in ("bfloat16", torch.bfloat16, "auto")} == {torch.bfloat16}
    assert dtype(torch_dtype="float16") == dtype(dtype="float16", torch_dtype=torch.float16) == torch.float16
    with pytest.raises(ValueError, match=r"dtype is 'float16' and torch_dtype torch.bfloat16; give one"):
        dtype(dtype="float16", torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch_dtype is torch.int8; expected one of float32, bfloat16, float16"):
        dtype(torch_dtype=torch.int8)

    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert RewardModel.from_pretrained(folder, device_map="auto").device.type == there
    assert RewardModel.from_pretrained(folder, device="auto").device.type == there
    assert RewardModel.from_pretrained(folder, device=there, device_map="auto").device.type == there
    assert RewardModel.from_pretrained(folder, device_map=torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": {"": 0}}, r"device_map is {'': 0}; a model here lies on one device: name it"),
        (
            {"device_map": "balanced"},
            r"device_map is 'balanced'; expected cpu, cuda, cuda:N of this machine",
        ),
        ({"device": "cpu", "device_map": "meta"}, r"device is 'cpu' and device_map 'meta'; give one"),
        (
            {"dtype": "half"},
            r"dtype is 'half'; expected one of float32, bfloat16, float16, torch's own",
        ),
    ],
)
def test_what_is_not_supported_is_said_before_anything_is_read(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardModel.from_pretrained("runs/none", **options)


def test_a_tokenizer_of_another_checkpoint_is_refused_not_grown_into(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, tag=False)
    tok = tiny.tokenizer(tag=False)
    tok.add_tokens([f"more{i}" for i in range(7)])
    tok.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="the tokenizer has 507 entries but the model's vocabulary 500; they are"):
        RewardModel.from_pretrained(folder)
