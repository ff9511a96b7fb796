"""Each published format: tiny checkpoints of random weights, compared with that family's own procedure written out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from medmm_ray.reward_model import CheckpointError, RewardModel
from medmm_ray.reward_model.families import NAMES, QwenProcessRewardModel
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.tiny_reward_model import DOCUMENTS, QUESTION, SOLUTIONS

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
}  # fmt: skip


def tokenizer(*added: str, template: bool = True) -> PreTrainedTokenizerFast:
    tok = tiny.tokenizer(tag=False)
    tok.add_tokens(list(added), special_tokens=True)
    if not template:
        tok.chat_template = None
    return tok


def save(folder: Path, model: Any, tok: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def math_shepherd(folder: Path) -> Path:
    tok = tokenizer("ки", template=False)
    torch.manual_seed(0)
    return save(folder, LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **SHAPE)), tok)  # type: ignore[no-untyped-call]


def qwen_prm(folder: Path) -> Path:
    tok = tokenizer("<extra_0>")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tok) + 8, architectures=["Qwen2ForProcessRewardModel"], **SHAPE)
    save(folder, QwenProcessRewardModel(config), tok)
    text = (folder / "config.json").read_text().replace("QwenProcessRewardModel", "Qwen2ForProcessRewardModel")
    (folder / "config.json").write_text(text)  # as the published checkpoint, whose class is remote code
    return folder


def token_classification(folder: Path) -> Path:
    tok = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), id2label={0: "-", 1: "+"}, **SHAPE)
    return save(folder, LlamaForTokenClassification(config), tok)  # type: ignore[no-untyped-call]


# Each family's own procedure, one solution at a time: probabilities of its steps.


def ids_of(tok: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    ids: list[int] = tok(text, add_special_tokens=special)["input_ids"]
    return ids


@torch.no_grad()
def math_shepherd_probs(model: Any, tok: PreTrainedTokenizerFast, solution: Sequence[str], head: str) -> list[float]:
    """Its data have "Step 1: … ки" a line a step."""
    text = f"{head}{QUESTION} " + "\n".join(f"Step {i}: {s} ки" for i, s in enumerate(solution, 1))
    return math_shepherd_text_probs(model, tok, text)


@torch.no_grad()
def math_shepherd_text_probs(model: Any, tok: PreTrainedTokenizerFast, text: str) -> list[float]:
    ids = ids_of(tok, text, special=True)
    plus, minus, tag = (ids_of(tok, sign)[-1] for sign in ("+", "-", "ки"))
    probs = model(torch.tensor([ids])).logits[0][:, [plus, minus]].softmax(dim=-1)[:, 0]
    return [float(probs[i]) for i, token in enumerate(ids) if token == tag]


@torch.no_grad()
def qwen_probs(model: Any, tok: PreTrainedTokenizerFast, steps: Sequence[str], head: str) -> list[float]:
    """Its card joins the steps as they are, the mark behind each."""
    messages = [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": head + QUESTION},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]
    text = str(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    ids = ids_of(tok, text, special=True)
    states = model.model(torch.tensor([ids])).last_hidden_state[0]
    probs = model.score(states).softmax(dim=-1)[:, 1]
    return [float(probs[i]) for i, token in enumerate(ids) if token == ids_of(tok, "<extra_0>")[0]]


@torch.no_grad()
def token_probs(model: Any, tok: PreTrainedTokenizerFast, steps: Sequence[str], head: str) -> list[float]:
    """TRL's trainer tokenises each completion as it is and puts the separator behind."""
    ids, ends = [int(tok.bos_token_id), *ids_of(tok, head + QUESTION)], []
    for step in steps:
        ids += ids_of(tok, step) + ids_of(tok, "\n")
        ends.append(len(ids) - 1)
    probs = model(torch.tensor([ids])).logits[0].softmax(dim=-1)[:, 1]
    return [float(probs[end]) for end in ends]


# The tokenizers are those of the checkpoints as they were made, not as they were read.
CASES = {
    "math_shepherd": (math_shepherd, LlamaForCausalLM, math_shepherd_probs, tokenizer("ки", template=False)),
    "qwen_prm": (qwen_prm, QwenProcessRewardModel, qwen_probs, tokenizer("<extra_0>")),
    "token_classification": (token_classification, LlamaForTokenClassification, token_probs, tokenizer()),
}
AS_WRITTEN = [
    ["Two findings:\n- blunt angle\n- no  air", "So:\n\nthe answer is (A)."],
    [" left\tlung ", "", "normal\r\n"],
    ["heart.\n"],
    ["Step 1:  Look.", "Step 2: no"],
]


@pytest.mark.parametrize("documents", [[], DOCUMENTS])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_familys_own_procedure(name: str, documents: list[str], tmp_path: Path) -> None:
    make, plain_class, procedure, tok = CASES[name]
    folder = make(tmp_path / "made")
    ours = RewardModel.from_pretrained(folder)
    assert ours.family.name == name
    plain: Any = plain_class.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    head = "".join(f"Document {i}: {text}\n\n" for i, text in enumerate(documents, 1))
    solutions = [*SOLUTIONS, *(AS_WRITTEN if name != "math_shepherd" else AS_WRITTEN[:-1])]
    for steps, scores in zip(solutions, ours.score(QUESTION, solutions, documents), strict=True):
        assert scores.plus_probs == pytest.approx(procedure(plain, tok, steps, head), abs=1e-5)
    assert len({round(p, 4) for p in ours.score(QUESTION, SOLUTIONS)[1].plus_probs}) > 1


RAW = "So.\nStep 1:  Look.\n- blunt\n\nStep 2: the answer is (A).\n"
CUT = ["So.\nStep 1:  Look.\n- blunt", "Step 2: the answer is (A)."]


@pytest.mark.parametrize(
    ("name", "text", "steps"),
    [
        ("qwen_prm", RAW, CUT),
        ("qwen_prm", "Look.\n\n<extra_0>So:  (A).<extra_0>", ["Look.\n\n", "So:  (A)."]),
        ("token_classification", RAW, CUT),
        ("token_classification", "Look.\nThink.", ["Look.\nThink."]),
    ],
)
def test_raw_text_is_cut_and_kept(name: str, text: str, steps: list[str], tmp_path: Path) -> None:
    make, plain_class, procedure, tok = CASES[name]
    folder = make(tmp_path / "made")
    plain: Any = plain_class.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    (scores,) = RewardModel.from_pretrained(folder).score(QUESTION, [text])
    assert scores.plus_probs == pytest.approx(procedure(plain, tok, steps, ""), abs=1e-5)


@pytest.mark.parametrize(
    ("solution", "written"),
    [
        ("Step 1:  Look. ки\nStep 2: no\tair ки", "Step 1:  Look. ки\nStep 2: no\tair ки"),
        ("Step 1:  Look. ки Step 2: no ки\n", "Step 1:  Look. ки Step 2: no ки"),
        (["Step 1:  Look. ки", "Step 2: no ки"], "Step 1:  Look. ки\nStep 2: no ки"),
        (RAW, "So.\nStep 1:  Look.\n- blunt ки\nStep 2: the answer is (A). ки"),
        ("no air", "no air ки"),
    ],
)
def test_math_shepherds_text_is_kept(solution: str | list[str], written: str, tmp_path: Path) -> None:
    folder = math_shepherd(tmp_path / "made")
    plain: Any = LlamaForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    expected = math_shepherd_text_probs(plain, CASES["math_shepherd"][-1], f"{QUESTION} {written}")
    (scores,) = RewardModel.from_pretrained(folder).score(QUESTION, [solution])
    assert scores.plus_probs == pytest.approx(expected, abs=1e-5)


def test_a_tokenizer_is_read_as_its_file_has_it(tmp_path: Path) -> None:
    """transformers gives Qwen's models Qwen's splitting of words, whatever the file says."""
    found = RewardModel.from_pretrained(qwen_prm(tmp_path / "made")).tokenizer
    for text in ("So:\n\nthe answer", "12 345 mg", "a  b\t\tc"):
        assert found(text)["input_ids"] == tokenizer("<extra_0>")(text)["input_ids"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    ours = RewardModel.from_pretrained(CASES[name][0](tmp_path / "made"))
    ours.save_pretrained(tmp_path / "saved")
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert back.family.name == name
    assert back.score(QUESTION, SOLUTIONS) == ours.score(QUESTION, SOLUTIONS)


def test_the_family_can_be_said_and_must_fit(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "medprm")
    assert RewardModel.from_pretrained(folder, family="medprm").family.name == "medprm"
    with pytest.raises(CheckpointError, match=r"missing are 13: .*and 8 more.*family qwen_prm"):
        RewardModel.from_pretrained(folder, family="qwen_prm")
    other = qwen_prm(tmp_path / "qwen")
    tiny.tokenizer(tag=False).save_pretrained(other)
    with pytest.raises(CheckpointError, match="'<extra_0>' as"):
        RewardModel.from_pretrained(other)


def test_a_checkpoint_that_fits_no_family_says_what_was_looked_for(tmp_path: Path) -> None:
    tok = tokenizer(template=False)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **SHAPE))  # type: ignore[no-untyped-call]
    folder = save(tmp_path, model, tok)
    with pytest.raises(CheckpointError, match="fits no family") as caught:
        RewardModel.from_pretrained(folder)
    assert all(name in str(caught.value) for name in NAMES)
    assert "has no chat template" in str(caught.value)


def test_an_image_part_needs_log_odds_that_add_up(tmp_path: Path) -> None:
    ours = RewardModel.from_pretrained(qwen_prm(tmp_path / "made"))
    with pytest.raises(CheckpointError, match="family qwen_prm takes no image part"):
        ours.add_image_tower("nowhere")
