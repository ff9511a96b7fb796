"""The loop under DeepSpeed, in this process: the stages train, a kill changes nothing, a bad loss names its batch."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.train import loop
from medmm_ray.train.image_text import ImageTextConfig, ImageTextStage
from medmm_ray.train.loop import Stage, TrainConfig, TrainingError, Worker, run
from medmm_ray.train.policy import PolicyConfig, PolicyStage
from medmm_ray.train.text_prm import TextPrmConfig, TextPrmStage
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage
from tests.train.conftest import CLIP, SHAPE, image_text_stage, labelled, written

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    import torch

    before = dict(os.environ)
    os.environ.update(LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class KilledError(Exception):
    """Stands for a kill after so many checkpoints."""


class Keeper:
    """A worker's ways to keep things: folders beside the artifact's; ends itself after `limit` checkpoints."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.kept: list[Path] = sorted(folder.parent.glob(f"{folder.name}-kept-*"))

    def worker(self) -> Worker:
        return Worker(0, 1, f"{self.folder}/.checkpoints", str(self.folder), self.latest, self.keep)

    def latest(self) -> str | None:
        return str(self.kept[-1]) if self.kept else None

    def keep(self, scratch: str, metrics: dict[str, float]) -> None:
        target = Path(f"{self.folder}-kept-{len(self.kept):03}")
        Path(scratch).rename(target)
        Path(scratch).mkdir()
        self.kept.append(target)
        assert metrics["updates"] > 0
        if self.limit is not None and len(self.kept) >= self.limit:
            raise KilledError


def history(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "history.json").read_text())
    return read


def test_policy_learns_and_leaves_a_checkpoint_that_transformers_reads(
    policy_inputs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(loop, "REPORT_SECONDS", 0.0)
    assert loop.how_far(str(tmp_path / "out")) == ""

    config = PolicyConfig(shape=SHAPE, epochs=3, batch_size=6, learning_rate=5e-3, micro_batch_tokens=500, threads=1)
    run(PolicyStage, config, policy_inputs, Keeper(tmp_path / "out").worker())
    told = history(tmp_path / "out")
    assert told["samples"] == 72
    assert len(told["updates"]) == 12
    assert told["best_epoch"] is None
    assert loop.how_far(str(tmp_path / "out")).startswith(f"update 12 of 12, loss {told['updates'][-1]['loss']:.3f}, ")
    losses = [epoch["loss"] for epoch in told["epochs"]]
    assert losses[2] < losses[1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kill_after", [1, 4])
def test_a_killed_training_goes_on_to_the_same_weights(
    policy_inputs: dict[str, str],
    tmp_path: Path,
    kill_after: int,
) -> None:
    import torch
    from safetensors.torch import load_file

    config = PolicyConfig(shape=SHAPE, epochs=2, batch_size=8, checkpoint_every=2, threads=1)
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


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_zero_gives_the_loss_curve_of_plain_training(
    policy_inputs: dict[str, str],
    tmp_path: Path,
    zero_stage: Any,
) -> None:
    curves = []
    for stage in (0, zero_stage):
        config = PolicyConfig(
            shape=SHAPE, epochs=1, batch_size=8, micro_batch_tokens=400, threads=1, zero_stage=stage
        )  # fmt: skip
        run(PolicyStage, config, policy_inputs, Keeper(tmp_path / f"zero{stage}").worker())
        curves.append([row["loss"] for row in history(tmp_path / f"zero{stage}")["updates"]])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_text_prm_keeps_its_best_epoch(policy: Path, tmp_path: Path) -> None:
    from medmm_ray.engines.reward_model import RewardModel

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
    inputs = {name: str(tmp_path / f"{name}.parquet") for name in ("captions", "texts")}
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
    from medmm_ray.engines.reward_model import RewardModel

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

    padded = False

    def __init__(self, config: TrainConfig, inputs: dict[str, str], device: str) -> None:
        import torch

        self.module = torch.nn.Linear(1, 1)
        self.names = [f"good{i}" for i in range(3)] + ["bad"] if inputs else []
        self.sizes = self.costs = [1] * len(self.names)
        self.budget = 1

    def loss(self, units: Sequence[int], epoch: int) -> Any:
        import torch

        value = float("nan") if self.names[units[0]] == "bad" else 1.0
        return self.module(torch.tensor([[value]])).sum()

    def save(self, folder: Path) -> None:
        raise AssertionError("nothing is to be saved")


def test_a_loss_that_is_no_number_stops_with_the_batchs_ids(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 1, after \d updates, on \['bad'\]"):
        run(Divergent, TrainConfig(epochs=1, batch_size=2), {"some": ""}, Keeper(tmp_path / "out").worker())


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Divergent: there is not one sample to train on"):
        run(Divergent, TrainConfig(), {}, Keeper(tmp_path / "out").worker())
