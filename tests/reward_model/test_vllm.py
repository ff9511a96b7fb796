"""reward_model/vllm.py: a text tower run by vLLM; with a plain engine, and with vLLM itself."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from medmm_ray.config import ConfigError, build
from medmm_ray.engines.token_pooler import Pooling, TokenPooler, TokenSequence
from medmm_ray.engines.vllm_engine import VllmEngine
from medmm_ray.reward_model import CheckpointError, FusionConfig, RewardModel, StepScores
from medmm_ray.reward_model.vllm import PooledRewardModel
from medmm_ray.steps.score import ScoreConfig, Scorer, engine_of, score
from tests.doubles import tiny_reward_model as tiny
from tests.doubles import tiny_vision
from tests.doubles.clip_folders import write_native_clip
from tests.doubles.tiny_reward_model import DOCUMENTS, QUESTION, SOLUTIONS
from tests.reward_model import test_families as families
from tests.steps import test_score as rows

CONFIG = VllmEngine(dtype="float32", max_model_len=1 << 30, num_threads=1)


class PlainPooler:
    """Each sequence alone through the checkpoint in transformers, all logits and layers: no cache, no packing."""

    def __init__(self, model: str, config: VllmEngine, pooling: Pooling) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model)
        self.longest, self.task = config.max_model_len, pooling.task
        signs = pooling.arguments["hf_overrides"].get("classifier_from_token", [])
        self.signs = [tiny.tokenizer().convert_tokens_to_ids(sign) for sign in signs]
        self.lengths: list[int] = []

    def values(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        return [self.one(list(sequence.ids))[list(sequence.positions)] for sequence in sequences]

    @torch.no_grad()
    def one(self, ids: list[int]) -> torch.Tensor:
        self.lengths.append(len(ids))
        output = self.model(torch.tensor([ids]), output_hidden_states=True)
        if self.task == "token_embed":
            layers = output.hidden_states  # of 3 layers: embeddings, after the first, after the second, after the norm
            return torch.cat([layers[3][0], layers[1][0]], dim=-1)
        minus, plus = self.signs
        difference_L1: torch.Tensor = output.logits[0, :, plus, None] - output.logits[0, :, minus, None]
        return difference_L1

    def shutdown(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("prm"), context=1024, spread=0.1, head_size=32)


def same(found: Sequence[StepScores], expected: Sequence[StepScores]) -> None:
    assert [(s.error, s.num_documents) for s in found] == [(s.error, s.num_documents) for s in expected]
    for ours, other in zip(found, expected, strict=True):
        assert ours.text_log_odds == pytest.approx(other.text_log_odds, abs=1e-5)
        assert ours.image_log_odds == pytest.approx(other.image_log_odds, abs=1e-5)


def test_documents_lengths_and_errors_are_those_of_torch(folder: Path) -> None:
    documents = [f"{DOCUMENTS[0]} {i} " * 20 for i in range(5)]
    solutions: list[str | list[str]] = [
        *SOLUTIONS,
        [],
        "Step 1: normal Step 2: clear",
        ["the heart is normal " * 60, "so (A)"],  # loses documents
        ["the heart is normal " * 400],  # too long without any
        SOLUTIONS[0],
    ]
    pooled = PooledRewardModel.open(folder, CONFIG, start=PlainPooler)
    found = pooled.score(QUESTION, solutions, documents)
    same(found, RewardModel.from_pretrained(folder).score(QUESTION, solutions, documents))
    assert found[6].error is not None
    assert found[6].error.startswith("too_long: ")
    assert found[3].error is not None
    assert found[3].error.startswith("no_steps: ")
    assert 0 < found[5].num_documents < found[0].num_documents
    assert found[7] == found[0]
    assert isinstance(pooled.pooler, PlainPooler)
    assert len(pooled.pooler.lengths) == 5  # the equal one is read once
    assert pooled.pooler.longest == 1024 >= max(pooled.pooler.lengths)


def test_a_shorter_context_of_the_engine_bounds_what_is_read(folder: Path) -> None:
    documents = [f"{DOCUMENTS[0]} {i} " * 10 for i in range(9)]
    settings = CONFIG.model_copy(update={"max_model_len": 400})
    pooled = PooledRewardModel.open(folder, settings, start=PlainPooler)
    (found,) = pooled.score(QUESTION, SOLUTIONS[:1], documents)
    assert isinstance(pooled.pooler, PlainPooler)
    assert (pooled.context, pooled.pooler.longest) == (400, 400)
    assert max(pooled.pooler.lengths) <= 400
    assert 0 < found.num_documents < 9


def test_what_the_engine_makes_no_number_of_is_an_error(folder: Path) -> None:
    class Overflowing(PlainPooler):
        def values(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
            found = super().values(sequences)
            found[1][0] = float("nan")
            return found

    first, second, _ = PooledRewardModel.open(folder, CONFIG, start=Overflowing).score(QUESTION, SOLUTIONS)
    assert first.error is None
    assert second.error is not None
    assert second.error.startswith("not_finite: 1 of 3 steps")
    assert second.log_odds == []


def test_a_checkpoint_that_vllm_cannot_read_is_refused_before_an_engine_starts(folder: Path, tmp_path: Path) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("an engine was started")

    def refused(path: Path, match: str, config: VllmEngine = CONFIG, states: bool = False) -> None:
        with pytest.raises(CheckpointError, match=match):
            PooledRewardModel.open(path, config, states=states, start=never)

    refused(tiny.save(tmp_path / "untagged", tag=False), "its tokenizer has no token ' ки'.*save_pretrained")
    refused(tiny_vision.save_llava(tmp_path / "llava"), "is a vision-language model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "is an adapter")
    gpus = CONFIG.model_copy(update={"tensor_parallel_size": 8})
    refused(folder, r"gives the first GPU 64 rows of the head, and \+ and - are the tokens", gpus)
    classes = families.token_classification(tmp_path / "classes")
    refused(classes, "this is a LlamaForTokenClassification of the family token_classification", states=True)


@pytest.fixture(scope="module")
def two_tower(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text tower with an image part that is not zero and reads summaries."""
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(folder)
    model.add_image_tower(write_native_clip(tmp_path_factory.mktemp("clip")), FusionConfig(width=16))
    assert model.fusion is not None
    torch.nn.init.normal_(model.fusion.output.weight, std=0.1)
    made = tmp_path_factory.mktemp("two_tower") / "model"
    model.save_pretrained(made)
    return made


def states_are_those_of_torch(pooled: PooledRewardModel, folder: Path, solutions: Sequence[list[str]]) -> None:
    model, documents = RewardModel.from_pretrained(folder), [*DOCUMENTS, " ".join(DOCUMENTS * 9)]
    expected = model.text_states(QUESTION, solutions, documents)
    for ours, other in zip(pooled.text_states(QUESTION, solutions, documents), expected, strict=True):
        assert ours.error == other.error
        torch.testing.assert_close(ours.states_TD, other.states_TD, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.summaries_TD, other.summaries_TD, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.log_odds_T, other.log_odds_T, atol=1e-5, rtol=0)
    found, scores = (m.score(QUESTION, solutions, documents, tiny_vision.picture(0)) for m in (pooled, model))
    same(found, scores)
    assert max(abs(x) for s in found for x in s.image_log_odds) > 1e-3


def test_states_and_the_image_part_are_those_of_torch(two_tower: Path) -> None:
    pooled = PooledRewardModel.open(two_tower, CONFIG, states=True, start=PlainPooler)
    states_are_those_of_torch(pooled, two_tower, [*SOLUTIONS, []])


def test_without_states_the_image_part_is_left_out(two_tower: Path) -> None:
    pooled = PooledRewardModel.open(two_tower, CONFIG, start=PlainPooler)
    assert (pooled.reads_images, pooled.fusion) == (False, None)
    same(
        pooled.score(QUESTION, SOLUTIONS, DOCUMENTS),
        RewardModel.from_pretrained(two_tower).score(QUESTION, SOLUTIONS, DOCUMENTS),
    )
    with pytest.raises(ValueError, match="was opened without states"):
        pooled.head_log_odds(torch.zeros(1, 32))


# The step


def test_settings_of_vllm_go_with_its_engine_alone() -> None:
    for name, value in {"vllm": {"block_size": 64}, "batch_invariant": True}.items():
        with pytest.raises(ConfigError, match=rf"{name}=.* is a setting of engine=vllm, and engine is 'torch'"):
            build(ScoreConfig, {name: value}, "here")
    config = ScoreConfig(engine="vllm", vllm={"max_model_len": 2048, "block_size": 64}, num_threads=1, kv_cache_gib=3)
    settings = engine_of(config)
    assert (settings.dtype, settings.max_model_len, settings.vllm) == ("float32", 2048, {"block_size": 64})
    assert (settings.num_threads, settings.kv_cache_gib) == (1, 3)


def test_a_vision_language_model_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = ScoreConfig(engine="vllm", num_references=0)
    path = str(tiny_vision.save_llava(tmp_path / "llava"))
    with pytest.raises(ConfigError, match="engine=vllm reads texts alone, and .* is a vision-language model"):
        score(cast(Any, None), config, path, "m")


# vLLM itself

BEGINNING = [f"the {side} lung shows a {name} opacity because the heart is {name}" for side in ("left", "right")
             for name in ("clear", "blunted", "enlarged")]  # fmt: skip
STEPS: dict[str, list[str]] = {
    "plain": BEGINNING,
    "equal": BEGINNING,
    "on": [*BEGINNING, "therefore the answer is (A)"],  # all tags but the last may lie in blocks of another one
    "off": [*BEGINNING[:5], "no finding", "therefore the answer is (B)"],
    "half": BEGINNING[:4],
    "other": ["normal"],
    "fewer": ["the heart is normal " * 60, "so (A)"],
    "long": ["the heart is normal " * 400],
    "none": [],
}


@pytest.mark.engine
def test_the_step_scores_as_torch_does(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Documents, equal solutions, common beginnings past tags, one question twice: in one call and in another."""
    sampled = [rows.solutions(q, STEPS) for q in ("q1", "q2", "q3")]
    questions = [rows.question(q, []) for q in ("q1", "q2", "q3")]
    found = [rows.evidence(q, []) for q in ("q1", "q2", "q3")]
    text = " ".join(f"the {i} heart is clear" for i in range(60))
    found = [replace(one, documents=[replace(one.documents[0], text=text), *one.documents]) for one in found]
    batch = rows.joined(questions, [], found, sampled)
    settings: dict[str, Any] = {"arms": ("text_only", "no_documents"), "num_references": 0}
    expected = rows.entries(Scorer(ScoreConfig(**settings), str(folder), "m")(batch))
    scorer = Scorer(ScoreConfig(engine="vllm", num_threads=1, **settings), str(folder), "m")
    assert isinstance(scorer.model, PooledRewardModel)
    try:
        ours = rows.entries(scorer(batch.slice(0, 2))) | rows.entries(scorer(batch.slice(2)))
        assert isinstance(scorer.model.pooler, TokenPooler)
        statistics = scorer.model.pooler.statistics
    finally:
        scorer.model.shutdown()
    assert list(ours) == list(expected)
    for key, entry in ours.items():
        assert entry["error"] == expected[key]["error"]
        assert entry["text_log_odds"] == pytest.approx(expected[key]["text_log_odds"], abs=1e-5)
    errors = {name: ours[f"q1-{name}", "text_only"]["error"] or "" for name in STEPS}
    assert {name: error.partition(":")[0] for name, error in errors.items() if error} == {
        "long": "too_long", "none": "no_steps",
    }  # fmt: skip
    assert ours["q1-plain", "text_only"]["text_log_odds"] == ours["q1-equal", "text_only"]["text_log_odds"]
    assert statistics.hit_rate > 0.5
    assert "computed anew" not in caplog.text  # what is in the cache is in this call's answers


@pytest.mark.engine
def test_states_of_vllm_are_those_of_torch(two_tower: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step summaries too, where a step's first tokens lie in another solution's cache."""
    pooled = PooledRewardModel.open(two_tower, CONFIG, states=True)
    try:
        states_are_those_of_torch(pooled, two_tower, list(STEPS.values()))
        assert isinstance(pooled.pooler, TokenPooler)
        assert pooled.pooler.statistics.hit_rate > 0.5
        assert "computed anew" not in caplog.text
    finally:
        pooled.shutdown()
    from vllm import ModelRegistry

    usual = ModelRegistry.models["LlamaForCausalLM"]  # what a later engine of this process loads
    assert usual.module_name == "vllm.model_executor.models.llama"
