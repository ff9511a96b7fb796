"""The loop under DeepSpeed, in this process: the stages train, a kill changes nothing, a bad loss names its batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.engines.weights import WeightsError
from medmm_ray.train import checkpoints, loop
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.image_text import ImageTextConfig, ImageTextStage
from medmm_ray.train.loop import run
from medmm_ray.train.lora import LoraConfig
from medmm_ray.train.policy import PolicyConfig, PolicyStage
from medmm_ray.train.progress import progress_text
from medmm_ray.train.schedule import Part, Units
from medmm_ray.train.stage import Stage, TrainingError
from medmm_ray.train.text_prm import TextPrmConfig, TextPrmStage
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage
from tests.engines.test_weights import change_weights, cut, without
from tests.train.conftest import CLIP, SHAPE, Keeper, KilledError, history, image_text_stage, labelled, written

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("lone_group")]


def test_policy_learns_and_leaves_a_checkpoint_that_transformers_reads(
    policy_inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(loop, "REPORT_SECONDS", 0.0)
    assert progress_text(str(tmp_path / "out")) == ""

    config = PolicyConfig(shape=SHAPE, epochs=3, batch_size=6, learning_rate=5e-3, micro_batch_tokens=500, threads=1)
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out").worker())
    told = history(tmp_path / "out")
    assert told["samples"] == 72
    assert len(told["updates"]) == 12
    assert told["best_epoch"] is None
    assert progress_text(str(tmp_path / "out")).startswith(f"update 12 of 12, loss {told['updates'][-1]['loss']:.3f}, ")
    assert all(row["gradient_norm"] > 0 for row in told["updates"])
    assert all(row["tokens_per_second"] > 0 and 0.1 < row["peak_memory_gib"] < 64 for row in told["epochs"])
    losses = [epoch["loss"] for epoch in told["epochs"]]
    assert losses[2] < losses[1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("kill_after", "settings"),
    [(1, {}), (4, {}), (1, {"zero_stage": 2, "dtype": "bfloat16"}), (4, {"zero_stage": 3, "offload": "parameters"})],
)
def test_a_killed_training_goes_on_to_the_same_weights(
    policy_inputs: dict[str, str], tmp_path: Path, kill_after: int, settings: dict[str, Any]
) -> None:
    import torch
    from safetensors.torch import load_file

    config = PolicyConfig(shape=SHAPE, epochs=2, batch_size=8, checkpoint_every=2, threads=1, **settings)
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "whole").worker())
    # Checkpoints after 2 updates, at the end of the first epoch (3), after 4 and 6 updates, and at the end.
    with pytest.raises(KilledError):
        run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "killed", limit=kill_after).worker())
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "killed").worker())
    whole, killed = history(tmp_path / "whole"), history(tmp_path / "killed")
    assert killed["updates"] == whole["updates"]
    assert (killed["samples"], killed["tokens"]) == (whole["samples"], whole["tokens"])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_finished_training_that_starts_again_only_leaves_its_model(
    policy_inputs: dict[str, str],
    tmp_path: Path,
) -> None:
    config = PolicyConfig(shape=SHAPE, epochs=1, batch_size=8, threads=1)
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out").worker())
    first = history(tmp_path / "out")
    (tmp_path / "out" / "history.json").unlink()
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out").worker())
    assert history(tmp_path / "out") == first


def test_a_checkpoint_that_is_not_whole_is_refused(policy_inputs: dict[str, str], tmp_path: Path) -> None:
    config = PolicyConfig(shape=SHAPE, epochs=1, batch_size=8, checkpoint_every=1, threads=1)
    with pytest.raises(KilledError):
        run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out", limit=1).worker())
    keeper = Keeper(tmp_path / "out")
    (file,) = keeper.kept[-1].glob("weights-*.safetensors")
    change_weights(file.parent, without("exp_avg:model.norm.weight"), file.name)
    with pytest.raises(WeightsError, match=r"^the training's checkpoint .* missing are 1: exp_avg:model.norm.weight"):
        run(PolicyStage, config, policy_inputs, keeper.worker())
    cut(file)
    with pytest.raises(WeightsError, match=r"weights-0-0.safetensors is not whole"):
        run(PolicyStage, config, policy_inputs, keeper.worker())


def test_text_prm_keeps_its_best_epoch(policy: Path, tmp_path: Path) -> None:
    from medmm_ray.reward_model import RewardModel

    config = TextPrmConfig(
        epochs=3, learning_rate=3e-3, batch_size=8, max_length=400, reserve=200, validation_fraction=0.25, threads=1
    )  # fmt: skip
    inputs = {**written(tmp_path, questions=labelled()), "base": str(policy)}
    run(TextPrmStage, config, inputs, Keeper(tmp_path / "out").worker())
    told = history(tmp_path / "out")
    best = told["best_epoch"]
    assert told["epochs"][best]["selection"] == max(epoch["selection"] for epoch in told["epochs"])
    assert told["epochs"][-1]["loss"] < told["epochs"][0]["loss"]
    stage = TextPrmStage(config, {**inputs, "base": str(tmp_path / "out")}, "cpu")
    assert stage.validate()["validation_auroc"] == pytest.approx(told["epochs"][best]["validation_auroc"], abs=1e-9)
    assert RewardModel.from_pretrained(tmp_path / "out").max_length == 400


def test_image_text_learns_to_tell_the_pictures_apart(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    image_text_stage(tmp_path)
    inputs = {"captions": str(tmp_path / "captions.parquet")}
    config = ImageTextConfig(
        shape=CLIP, epochs=8, batch_size=6, contrast_size=6, learning_rate=3e-3, max_shift=1, threads=1
    )  # fmt: skip
    run(ImageTextStage, config, inputs, Keeper(tmp_path / "out").worker())
    epochs = history(tmp_path / "out")["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.2
    # A CLIP's scale is a number without a dimension again.
    assert load_file(tmp_path / "out" / "open_clip_model.safetensors")["logit_scale"].shape == ()


@pytest.mark.parametrize("frozen", [True, False])
def test_two_tower_learns_what_the_text_cannot_know(
    two_tower_inputs: dict[str, str],
    tmp_path: Path,
    frozen: bool,
) -> None:
    from medmm_ray.reward_model import RewardModel

    config = TwoTowerConfig(
        label_policy="judge", epochs=30, learning_rate=3e-3, batch_size=8, freeze_image_tower=frozen,
        validation_fraction=0.25, threads=1,
    )  # fmt: skip
    run(TwoTowerStage, config, two_tower_inputs, Keeper(tmp_path / "out").worker())
    told = history(tmp_path / "out")
    kept = told["epochs"][told["best_epoch"]]
    assert kept["validation_auroc"] > kept["validation_auroc_text_only"] + 0.1
    model = RewardModel.from_pretrained(tmp_path / "out")
    assert model.fusion is not None
    assert model.fusion.reference_bias.shape == ()


class Divergent(Stage):
    """Its loss is no number on the sample "bad"."""

    def __init__(self, config: TrainConfig, inputs: dict[str, str], device: str) -> None:
        import torch

        self.module = torch.nn.Linear(1, 1)
        self.units = Units.singles([f"good{i}" for i in range(3)] + ["bad"] if inputs else [])
        self.micro_batch_budget = 1

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        value = float("nan") if self.units.names[parts[0].unit] == "bad" else 1.0
        return self.module(torch.tensor([[value]])).sum()

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        raise AssertionError("nothing is to be saved")


def test_a_loss_that_is_no_number_stops_with_the_batchs_ids(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 1, after \d updates, on \['bad'\]"):
        run(Divergent, TrainConfig(epochs=1, batch_size=2), {"some": ""}, Keeper(tmp_path / "out").worker())


class Steep(Divergent):
    """Its loss is 0 and its gradient no number: that of a square root at 0."""

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        dtype = next(self.module.parameters()).dtype
        return (self.module(torch.ones(1, 1, dtype=dtype)) * 0).sum().sqrt()


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 1}, {"zero_stage": 2, "dtype": "bfloat16"}, {"zero_stage": 3}])
def test_a_gradient_that_is_no_number_stops_before_a_checkpoint_is_kept(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = TrainConfig(epochs=1, batch_size=2, checkpoint_every=1, **settings)
    keeper = Keeper(tmp_path / "out")
    with pytest.raises(
        TrainingError, match=r"the gradient's norm is (nan|inf) in epoch 1, after 0 updates, on \['\w+', '\w+'\]"
    ):
        run(Steep, config, {"some": ""}, keeper.worker())
    assert keeper.latest() is None


class Unvalidated(Divergent):
    """Its loss is 1, its validation figure no number."""

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        return self.module(torch.ones(1, 1)).sum()

    def figures(self, measured: Sequence[Any]) -> dict[str, float]:
        return {"selection": float("nan"), "validation_steps": 3.0}


def test_a_validation_figure_that_is_no_number_stops(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"validation gives \{'selection': nan\} after 2 updates"):
        run(Unvalidated, TrainConfig(epochs=1, batch_size=2), {"some": ""}, Keeper(tmp_path / "out").worker())


class Exhausted(Divergent):
    """It asks for more memory than any machine has."""

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        return torch.zeros(1 << 48).sum()


def test_memory_that_runs_out_says_what_to_turn(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=2, micro_batch_tokens=77, zero_stage=1)
    said = (
        r"out of memory in epoch 1, after 0 updates, on \['\w+'\] \(cost 1\): .*DefaultCPUAllocator.* Lower "
        r"micro_batch_tokens \(now 77\), set activation_checkpointing \(now False\), raise zero_stage \(now 1, with 1 "
        r"workers\) or offload \(now none\)"
    )
    with pytest.raises(TrainingError, match=f"(?s){said}"):
        run(Exhausted, config, {"some": ""}, Keeper(tmp_path / "out").worker())


class Graded(Divergent):
    """Its validation figures are given: the third epoch is the best."""

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        self.epoch = epoch
        return self.module(torch.ones(1, 1)).sum()

    def figures(self, measured: Sequence[Any]) -> dict[str, float]:
        return {"selection": [0.1, 0.2, 0.6, 0.5, 0.4, 0.3, 0.9][self.epoch]}

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        folder.mkdir()


def test_training_ends_where_validation_gets_no_better_also_after_a_kill(tmp_path: Path) -> None:
    config = TrainConfig(epochs=7, patience=2, batch_size=4, trackers=())
    with pytest.raises(KilledError):
        run(Graded, config, {"some": ""}, Keeper(tmp_path / "out", limit=4).worker())
    run(Graded, config, {"some": ""}, Keeper(tmp_path / "out").worker())
    told = history(tmp_path / "out")
    assert [row["selection"] for row in told["epochs"]] == [0.1, 0.2, 0.6, 0.5, 0.4]
    assert (told["best_epoch"], told["stopped_early"]) == (2, True)
    run(Graded, config, {"some": ""}, Keeper(tmp_path / "out").worker())
    assert len(history(tmp_path / "out")["epochs"]) == 5
    run(Graded, config.model_copy(update={"patience": None}), {"some": ""}, Keeper(tmp_path / "all").worker())
    assert (len(history(tmp_path / "all")["epochs"]), history(tmp_path / "all")["stopped_early"]) == (7, False)


def test_a_notice_of_preemption_makes_one_checkpoint_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PREEMPTION_CHECK_SECONDS", 0.0)

    class Warned(Graded):
        def loss(self, parts: Sequence[Part], epoch: int) -> Any:
            if epoch == 1:
                keeper.taken = ["node-a"]
            return super().loss(parts, epoch)

    keeper = Keeper(tmp_path / "out")
    run(Warned, TrainConfig(epochs=3, batch_size=1, trackers=()), {"some": ""}, keeper.worker())
    done = [checkpoints.read_progress(kept) for kept in keeper.kept]
    assert [(len(p["updates"]), p["epoch"], p["batch"]) for p in done] == [(4, 1, 0), (5, 1, 1), (8, 2, 0), (12, 3, 0)]


def test_an_adapter_leaves_plain_merged_weights_and_itself(policy: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = TextPrmConfig(
        epochs=2, learning_rate=1e-2, batch_size=8, max_length=400, reserve=200, validation_fraction=0.0, threads=1,
        lora=LoraConfig(rank=4, alpha=8),
    )  # fmt: skip
    inputs = {**written(tmp_path, questions=labelled()), "base": str(policy)}
    run(TextPrmStage, config, inputs, Keeper(tmp_path / "out").worker())
    epochs = history(tmp_path / "out")["epochs"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = TextPrmStage(config.model_copy(update={"lora": None}), inputs, "cpu").model.text_model  # with the tag's row
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    base.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)


def test_a_policys_adapter_is_merged_too(policy: Path, policy_inputs: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = PolicyConfig(
        base=str(policy), epochs=2, batch_size=8, learning_rate=1e-2, threads=1, zero_stage=3,
        activation_checkpointing=True, lora=LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
    )  # fmt: skip
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out").worker())
    losses = [row["loss"] for row in history(tmp_path / "out")["epochs"]]
    assert losses[1] < losses[0]
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (policy, tmp_path / "out")
    )
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == {"q_proj", "v_proj"}


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Divergent: there is not one sample to train on"):
        run(Divergent, TrainConfig(), {}, Keeper(tmp_path / "out").worker())
