"""Reward models that are adapters on a base: MedS3's own procedure written out, and what cannot be put together."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from medmm_ray.engines.reward_model import CheckpointError, RewardModel
from tests import tiny_reward_model as tiny
from tests.test_families import SHAPE, ids_of
from tests.tiny_reward_model import DOCUMENTS, QUESTION, SOLUTIONS

ROOT = "Let's break down this problem step by step."


def adapt(model: Any, folder: Path, task: str, seed: int, **more: Any) -> Path:
    """Save an adapter of random weights for `model` to `folder`."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task,
                        init_lora_weights=False, **more)  # fmt: skip
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a policy's adapter on it, and a reward model's adapter for the base with the policy merged in."""
    folder = tmp_path_factory.mktemp("meds3")
    tok = tiny.tokenizer(tag=False, own_bos=True)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **SHAPE))  # type: ignore[no-untyped-call]
    base.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    policy = adapt(base, folder / "policy", "CAUSAL_LM", seed=1)
    classifier = AutoModelForTokenClassification.from_pretrained(folder / "base", num_labels=2)
    classifier.score.bias.data = torch.tensor([0.25, -0.5])  # a head that is lost or turned round must show
    prm = adapt(classifier, folder / "prm", "TOKEN_CLS", seed=2)
    tok.save_pretrained(prm)
    return {"base": folder / "base", "policy": policy, "prm": prm}


def named_base(parts: dict[str, Path], folder: Path, base: str | None) -> Path:
    """The reward model's adapter, which names `base` as its base."""
    shutil.copytree(parts["prm"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


@torch.no_grad()
def meds3_probs(model: Any, tok: PreTrainedTokenizerFast, prompt: str, steps: Sequence[str]) -> list[float]:
    """Values of all steps, Step 0 first, as MedS3 computes them for one pair of prompt and response."""
    response = "\n\n".join(f"Step {i}: {step}" for i, step in enumerate([ROOT, *steps]))
    completions = [c if c.startswith("Step") else f"Step{c}" for c in response.split("\n\nStep")]
    text = tok.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids, ends = ids_of(tok, str(text)), []
    for completion in completions:
        ids += ids_of(tok, completion + "\n\n")
        ends.append(len(ids) - 1)
    probs = model(input_ids=torch.tensor([ids])).logits.softmax(dim=-1)[0, :, 1]
    return [float(p) for p in probs[ends]]


def plain(parts: dict[str, Path], *adapters: str) -> Any:
    model: Any = AutoModelForTokenClassification.from_pretrained(parts["base"], num_labels=2)
    for adapter in adapters:
        if adapter == "policy":  # peft's wrapper of a language model wants one
            config = LoraConfig.from_pretrained(str(parts[adapter]))
            config.task_type = None
            model = PeftModel.from_pretrained(model, str(parts[adapter]), config=config).merge_and_unload()
        else:
            model = PeftModel.from_pretrained(model, str(parts[adapter])).merge_and_unload()
    return model.eval()


@pytest.mark.parametrize("documents", [[], DOCUMENTS])
@pytest.mark.parametrize("merge", [[], ["policy"]])
def test_scores_are_those_of_meds3s_own_procedure(
    parts: dict[str, Path], merge: list[str], documents: list[str]
) -> None:
    ours = RewardModel.from_pretrained(parts["prm"], base=parts["base"], merge=[parts[m] for m in merge])
    assert ours.family.name == "meds3"
    theirs = plain(parts, *merge, "prm")
    prompt = "".join(f"Document {i}: {text}\n\n" for i, text in enumerate(documents, 1)) + QUESTION
    for steps, scores in zip(SOLUTIONS, ours.score(QUESTION, SOLUTIONS, documents), strict=True):
        expected = meds3_probs(theirs, ours.tokenizer, prompt, steps)
        assert scores.plus_probs == pytest.approx(expected[1:], abs=1e-5)
    assert len({round(p, 3) for p in ours.score(QUESTION, SOLUTIONS)[1].plus_probs}) == 3


def test_the_policy_below_changes_the_scores(parts: dict[str, Path]) -> None:
    alone = RewardModel.from_pretrained(parts["prm"], base=parts["base"]).score(QUESTION, SOLUTIONS)
    on_policy = RewardModel.from_pretrained(parts["prm"], base=parts["base"], merge=[parts["policy"]])
    assert abs(alone[0].plus_probs[0] - on_policy.score(QUESTION, SOLUTIONS)[0].plus_probs[0]) > 1e-3


def test_step_0_is_read_where_the_solution_brings_it(parts: dict[str, Path]) -> None:
    ours = RewardModel.from_pretrained(parts["prm"], base=parts["base"])
    steps = SOLUTIONS[0]
    expected = meds3_probs(plain(parts, "prm"), ours.tokenizer, QUESTION, steps)
    as_text = f"Step 0: {ROOT}\n\nStep 1: {steps[0]}\n\nStep 2: {steps[1]}"
    for solution in ([ROOT, *steps], as_text):
        assert ours.score(QUESTION, [solution])[0].plus_probs == pytest.approx(expected, abs=1e-5)


def test_what_is_saved_is_plain_and_needs_no_peft(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = RewardModel.from_pretrained(parts["prm"], base=parts["base"], merge=[parts["policy"]])
    ours.save_pretrained(tmp_path / "saved")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert back.family.name == "meds3"
    assert back.score(QUESTION, SOLUTIONS) == ours.score(QUESTION, SOLUTIONS)
    assert not list((tmp_path / "saved").glob("adapter_*"))
    with pytest.raises(CheckpointError, match="pip install peft"):
        RewardModel.from_pretrained(parts["prm"], base=parts["base"])


def test_trls_format_can_be_named(parts: dict[str, Path]) -> None:
    ours = RewardModel.from_pretrained(parts["prm"], family="token_classification", base=parts["base"])
    model, tok = plain(parts, "prm"), ours.tokenizer
    ids, ends = [int(tok.bos_token_id), *ids_of(tok, QUESTION)], []
    for step in SOLUTIONS[1]:
        ids += ids_of(tok, step) + ids_of(tok, "\n")
        ends.append(len(ids) - 1)
    with torch.no_grad():
        probs = model(torch.tensor([ids])).logits[0].softmax(dim=-1)[:, 1]
    found = ours.score(QUESTION, SOLUTIONS)[1].plus_probs
    assert found == pytest.approx([float(probs[end]) for end in ends], abs=1e-5)


def test_the_base_is_the_one_that_the_adapter_names(parts: dict[str, Path], tmp_path: Path) -> None:
    said = RewardModel.from_pretrained(parts["prm"], base=parts["base"]).score(QUESTION, SOLUTIONS)
    folder = named_base(parts, tmp_path / "named", str(parts["base"]))
    assert RewardModel.from_pretrained(folder).score(QUESTION, SOLUTIONS) == said
    (folder / "tokenizer_config.json").unlink()  # then the base's
    (folder / "tokenizer.json").unlink()
    assert RewardModel.from_pretrained(folder).score(QUESTION, SOLUTIONS) == said


def test_an_adapter_beside_the_bases_own_weights_is_left_out(parts: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "policy_and_weights"
    shutil.copytree(parts["base"], base)
    for file in parts["policy"].glob("adapter_*"):
        shutil.copy(file, base)
    found = RewardModel.from_pretrained(parts["prm"], base=base).score(QUESTION, SOLUTIONS)
    assert found == RewardModel.from_pretrained(parts["prm"], base=parts["base"]).score(QUESTION, SOLUTIONS)
    merged = RewardModel.from_pretrained(parts["prm"], base=base, merge=[base]).score(QUESTION, SOLUTIONS)
    as_named = RewardModel.from_pretrained(parts["prm"], base=parts["base"], merge=[parts["policy"]])
    assert merged == as_named.score(QUESTION, SOLUTIONS)


def test_a_language_models_adapter_is_read_as_what_it_makes(parts: dict[str, Path]) -> None:
    ours = RewardModel.from_pretrained(parts["policy"], base=parts["base"])
    assert ours.family.name == "medprm"
    model: Any = LlamaForCausalLM.from_pretrained(parts["base"])
    merged = PeftModel.from_pretrained(model, str(parts["policy"])).merge_and_unload()
    weights, expected = ours.text_model.model.layers[1].self_attn.q_proj.weight, merged.model.layers[1].self_attn
    assert torch.equal(weights, expected.q_proj.weight)


def test_what_does_not_fit_says_what_to_do(parts: dict[str, Path], tmp_path: Path) -> None:
    def fault(path: Path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            RewardModel.from_pretrained(path, **options)
        return str(caught.value)

    assert "say which: from_pretrained(..., base=" in fault(named_base(parts, tmp_path / "none", None))
    gone = fault(named_base(parts, tmp_path / "gone", str(tmp_path / "nowhere")))
    assert "nowhere does not exist" in gone
    assert "say it: from_pretrained(..., base=)" in gone
    assert "nowhere does not exist" in fault(parts["prm"], base=parts["base"], merge=[tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    assert "of the adapter" in fault(parts["prm"], base=tmp_path / "empty")
    assert "is itself an adapter" in fault(parts["prm"], base=parts["policy"])
    assert "is no adapter, so it takes no base=" in fault(parts["base"], base=parts["policy"])
    assert "is no adapter that can be read" in fault(parts["prm"], base=parts["base"], merge=[parts["base"]])

    wide = LlamaForCausalLM(LlamaConfig(vocab_size=500, **(SHAPE | {"hidden_size": 48})))  # type: ignore[no-untyped-call]
    wide.save_pretrained(tmp_path / "wide")
    assert "does not fit its base" in fault(parts["prm"], base=tmp_path / "wide")
    low = LlamaForCausalLM(LlamaConfig(vocab_size=500, **(SHAPE | {"num_hidden_layers": 2})))  # type: ignore[no-untyped-call]
    low.save_pretrained(tmp_path / "low")
    assert "weights are on one side only" in fault(parts["prm"], base=tmp_path / "low")

    headless = tmp_path / "headless"
    shutil.copytree(parts["policy"], headless)
    config = json.loads((headless / "adapter_config.json").read_text())
    (headless / "adapter_config.json").write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    assert "brings no weights for score.bias, score.weight" in fault(headless, base=parts["base"])
    (headless / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    assert "an adapter for the task SEQ_CLS" in fault(headless, base=parts["base"])
