"""GGUF checkpoints: the same ids, nearly the same scores, and how far these are from the original's."""

from pathlib import Path

import pytest
import torch

from medmm_ray.reward_model import CheckpointError, RewardModel, ScoreRequest
from medmm_ray.reward_model.score_agreement import score_agreement, spearman
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.gguf_files import write_gguf
from tests.engines.test_weights import POINTER

QUESTION = "Which lung shows the effusion? (A) left (B) right"
REQUESTS = [
    ScoreRequest(
        f"{QUESTION} {i}", [[tiny.WORDS[(5 * i + 3 * j + k) % 30] for k in range(1 + j)] for j in range(8)], ["a text"]
    )
    for i in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantised checkpoint, and beside it GGUF files of it."""
    made = tiny.save(tmp_path_factory.mktemp("model"))
    model = RewardModel.from_pretrained(made)
    for kind in ("F32", "Q8_0", "Q4_0"):
        write_gguf(made / f"{kind}.gguf", model.text_model, model.tokenizer, kind)
    return made


@pytest.fixture(scope="module")
def original(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder)


def test_unquantised_weights_in_a_gguf_give_the_same_scores(folder: Path, original: RewardModel) -> None:
    ours = RewardModel.from_pretrained(folder, gguf_file="F32.gguf")
    found = score_agreement(original, ours, REQUESTS)
    assert (found.num_steps, found.num_questions) == (12 * 36, 12)
    assert found.max_log_odds <= 1e-5
    assert found.same_best == 1.0


def test_the_tag_keeps_its_own_row_and_the_bos_is_written(folder: Path, original: RewardModel) -> None:
    """transformers spells the added " ки" in bytes: no text gives it then, and a new row would stand for it."""
    ours = RewardModel.from_pretrained(folder, gguf_file="F32.gguf")
    assert ours.family.ids == original.family.ids
    assert len(ours.tokenizer) == len(original.tokenizer)
    text = "Question: <|end|> is ки it + or -? 左肺 😀"
    assert ours.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert original.tokenizer(text)["input_ids"][0] == original.tokenizer.bos_token_id


@pytest.mark.parametrize(("add_bos", "writes"), [(True, True), (False, False), (None, True)])
def test_who_writes_a_bos(
    folder: Path, original: RewardModel, tmp_path: Path, add_bos: bool | None, writes: bool
) -> None:
    """Said by the file, or (Llama 3's tokenizer) llama.cpp's default."""
    write_gguf(tmp_path / "x.gguf", original.text_model, original.tokenizer, "F32", add_bos)
    ours = RewardModel.from_pretrained(tmp_path, gguf_file="x.gguf")
    ids = ours.tokenizer("left lung")["input_ids"]
    assert (ids[0] == ours.tokenizer.bos_token_id) is writes


def test_a_tag_that_is_missing_is_added_as_to_any_checkpoint(tmp_path: Path) -> None:
    plain = RewardModel.from_pretrained(tiny.save(tmp_path / "plain", tag=False))
    bare = tiny.save(tmp_path / "bare", tag=False)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = AutoModelForCausalLM.from_pretrained(bare), AutoTokenizer.from_pretrained(bare)
    write_gguf(tmp_path / "x.gguf", model, tok, "F32")
    ours = RewardModel.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert ours.family.ids == plain.family.ids
    assert score_agreement(plain, ours, REQUESTS[:2]).max_log_odds <= 1e-5


def test_the_agreement_says_how_far_quantised_weights_move_scores(folder: Path, original: RewardModel) -> None:
    eight, four = (score_agreement(original, RewardModel.from_pretrained(folder, gguf_file=f"{kind}.gguf"), REQUESTS)
                   for kind in ("Q8_0", "Q4_0"))  # fmt: skip
    assert 0 < eight.mean_log_odds < four.mean_log_odds < four.max_log_odds
    assert eight.mean_log_odds < 0.05 * eight.spread
    assert 0 < eight.max_prob < four.max_prob < 1
    assert 1 > eight.rank > four.rank > 0.5
    assert eight.rank > 0.998
    assert eight.same_best >= four.same_best


def test_it_is_saved_as_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    ours = RewardModel.from_pretrained(folder, gguf_file="Q8_0.gguf")
    ours.save_pretrained(tmp_path)
    back = RewardModel.from_pretrained(tmp_path)
    assert back.score(QUESTION, [["left"]]) == ours.score(QUESTION, [["left"]])
    assert ours.text_origin.source == "Q8_0.gguf"
    assert str(ours.text_origin.revision).startswith("content:")


def test_what_is_no_gguf_of_a_reward_model_is_refused(folder: Path, original: RewardModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.gguf is not a language model that can be read"):
        RewardModel.from_pretrained(folder, gguf_file="none.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match="broken.gguf is not whole"):
        RewardModel.from_pretrained(tmp_path, gguf_file="broken.gguf")
    with pytest.raises(CheckpointError, match="family qwen_prm: a GGUF holds a language model alone"):
        RewardModel.from_pretrained(folder, gguf_file="F32.gguf", family="qwen_prm")


def test_agreement_of_a_model_with_itself_and_of_nothing(original: RewardModel) -> None:
    same = score_agreement(original, original, REQUESTS[:2])
    assert (same.mean_log_odds, same.max_prob, same.same_best) == (0.0, 0.0, 1.0)
    assert same.rank == pytest.approx(1.0)
    assert same.num_unscored == 0
    assert score_agreement(original, original, [ScoreRequest(QUESTION, [["left"], [], ["no"]])]).num_unscored == 1
    with pytest.raises(ValueError, match="none of the 1 questions"):
        score_agreement(original, original, [ScoreRequest(QUESTION, [[]])])


def test_spearman_by_hand() -> None:
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 5])) == pytest.approx(-0.5)
    assert spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 3, 9])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0]), torch.tensor([4.0])) == 1.0


def test_a_gguf_that_is_not_whole_is_refused(folder: Path, original: RewardModel, tmp_path: Path) -> None:
    def fault(content: bytes) -> str:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            RewardModel.from_pretrained(tmp_path, gguf_file="x.gguf")
        return str(caught.value)

    whole = (folder / "F32.gguf").read_bytes()
    assert "x.gguf is a git-lfs pointer of 133 bytes" in fault(POINTER.encode())
    assert "x.gguf is no GGUF file: it begins with b'<!do'" in fault(b"<!doctype html>")
    for length in (len(whole) - 1000, len(whole) // 2, 5000, 30):
        assert "x.gguf is not whole" in fault(whole[:length])

    layer = original.text_model.model.layers[1]
    norm, layer.input_layernorm = layer.input_layernorm, torch.nn.Identity()  # so that no such tensor is written
    write_gguf(tmp_path / "written.gguf", original.text_model, original.tokenizer, "F32")
    layer.input_layernorm = norm
    assert "missing are 1: model.layers.1.input_layernorm.weight." in fault((tmp_path / "written.gguf").read_bytes())
