"""Reward models that are adapters on a base: MedS3's own procedure written out, and what cannot be put together."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from medmm_ray.reward_model import CheckpointError, RewardModel
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.tiny_reward_model import DOCUMENTS, QUESTION, SOLUTIONS
from tests.engines.test_weights import POINTER, change_weights, without
from tests.reward_model.test_families import SHAPE, ids_of

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
    solutions = [*SOLUTIONS, ["Two findings:\n- blunt  angle", "So:\tthe answer is (A). "], [" left lung"]]
    for steps, scores in zip(solutions, ours.score(QUESTION, solutions, documents), strict=True):
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
    assert "of no use to it are" in fault(parts["prm"], base=tmp_path / "low")

    headless = tmp_path / "headless"
    shutil.copytree(parts["policy"], headless)
    config = json.loads((headless / "adapter_config.json").read_text())
    (headless / "adapter_config.json").write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    assert "brings no weights for score.bias, score.weight" in fault(headless, base=parts["base"])
    (headless / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    assert "an adapter for the task SEQ_CLS" in fault(headless, base=parts["base"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "score.bias" not in k},
            "missing are 1: base_model.model.score.bias",
        ),
        (lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, r"missing are 2: .*layers.1.mlp.down_proj"),
        (
            lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()},
            "The names hold '_orig_mod.', which torch.compile",
        ),
        (lambda w: w | {"base_model.model.v_head.summary.weight": torch.ones(1, 32)}, "A value head"),
    ],
)
def test_an_adapter_without_some_of_its_weights_is_refused(
    change: Any, words: str, parts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(parts["prm"], tmp_path / "adapter")
    change_weights(tmp_path / "adapter", change, "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        RewardModel.from_pretrained(tmp_path / "adapter", base=parts["base"])


def test_an_adapter_or_a_base_that_is_not_whole_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("prm", "base", "policy"):
        shutil.copytree(parts[name], tmp_path / name)
    options: dict[str, Any] = {"base": tmp_path / "base", "merge": [tmp_path / "policy"]}
    RewardModel.from_pretrained(tmp_path / "prm", **options)
    for file, words in (
        ("prm/adapter_model.safetensors", "adapter_model.safetensors is"),
        ("prm/adapter_config.json", "adapter_config.json is"),
        ("policy/adapter_model.safetensors", "policy/adapter_model.safetensors is"),
        ("base/model.safetensors", "base/model.safetensors is"),
    ):
        whole = (tmp_path / file).read_bytes()
        for content, fault in ((POINTER.encode(), "a git-lfs pointer"), (whole[:-100], "not whole")):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(CheckpointError, match=f"{words} {fault}"):
                RewardModel.from_pretrained(tmp_path / "prm", **options)
        (tmp_path / file).write_bytes(whole)
    change_weights(tmp_path / "base", without("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"the base .*base of .* missing are 1: model.layers.0.mlp.up_proj.weight"
    ):
        RewardModel.from_pretrained(tmp_path / "prm", **options)


def test_an_adapter_beside_full_weights_is_merged_in_and_they_are_checked(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(parts["base"], folder)
    for file in parts["policy"].glob("adapter_*"):
        shutil.copy(file, folder)
    ours = RewardModel.from_pretrained(folder)
    assert ours.score(QUESTION, SOLUTIONS) == RewardModel.from_pretrained(parts["policy"], base=parts["base"]).score(
        QUESTION, SOLUTIONS
    )
    ours.save_pretrained(tmp_path / "saved")
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert back.score(QUESTION, SOLUTIONS) == ours.score(QUESTION, SOLUTIONS)
    change_weights(folder, without("model.norm.weight"))
    with pytest.raises(CheckpointError, match=f"^{folder} does not hold .* missing are 1: model.norm.weight"):
        RewardModel.from_pretrained(folder)


def with_tag(folder: Path, rows: int, tied: bool, **lora: Any) -> tuple[Path, Any, PreTrainedTokenizerFast]:
    """A base of `rows` rows without the tag; an adapter that was trained after the tag was added and the embeddings
    resized to the tokenizer; the trained model as one, and its tokenizer."""
    tok = tiny.tokenizer(tag=False)
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SHAPE)
    model: Any = LlamaForCausalLM(shape)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    tok.add_tokens([AddedToken(tiny.TAG, special=True, normalized=False)], special_tokens=True)
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    lora = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **lora}
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **lora))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                weight.normal_(0, 0.5)
    adapted.save_pretrained(str(folder / "adapter"))
    tok.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted.merge_and_unload().eval(), tok


@pytest.mark.parametrize(
    ("rows", "tied", "lora"),
    [
        (500, False, {}),
        (500, True, {}),
        (512, False, {}),  # a base that is padded; resizing to the tokenizer made it smaller
        (500, False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (500, True, {"trainable_token_indices": [500]}),
    ],
)
def test_the_base_gets_the_vocabulary_that_the_adapter_was_trained_with(
    rows: int, tied: bool, lora: dict[str, Any], tmp_path: Path
) -> None:
    adapter, trained, tok = with_tag(tmp_path, rows, tied, **lora)
    assert len(tok) == 501
    ours = RewardModel.from_pretrained(adapter)
    found = ours.score(QUESTION, SOLUTIONS[:1])[0].plus_probs
    assert found == pytest.approx(tiny.reference_probs(trained, tok, QUESTION, SOLUTIONS[0], []), abs=1e-5)
    assert ours.text_model.config.vocab_size == 501
    ours.save_pretrained(tmp_path / "saved")
    assert RewardModel.from_pretrained(tmp_path / "saved").score(QUESTION, SOLUTIONS[:1])[0].plus_probs == found


def test_added_tokens_whose_rows_the_adapter_does_not_bring_are_refused(tmp_path: Path) -> None:
    adapter, *_ = with_tag(tmp_path, 500, False)
    change_weights(adapter, without("base_model.model.lm_head.weight"), "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"500 rows, the adapter brings .*501.*expected all of lm_head, model.embed"
    ):
        RewardModel.from_pretrained(adapter)
    change_weights(adapter, without("base_model.model.model.embed_tokens.weight"), "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"501 entries but the model's vocabulary 500.*save_embedding_layers=True"
    ):
        RewardModel.from_pretrained(adapter)
