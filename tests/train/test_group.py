"""Two workers, real ones (gloo, DeepSpeed): their gradient is that of the samples one by one, whatever ZeRO divides.

The two processes start once and write what they find into files, which the tests then read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.train.config import TrainConfig
from medmm_ray.train.engine import MOMENTS
from medmm_ray.train.image_text import ImageTextConfig, ImageTextStage
from medmm_ray.train.loop import Trainer, run
from medmm_ray.train.lora import LoraConfig
from medmm_ray.train.policy import PolicyConfig, PolicyStage
from medmm_ray.train.schedule import Part, Units
from medmm_ray.train.stage import Stage, TrainingError
from medmm_ray.train.text_prm import TextPrmConfig, TextPrmStage
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage
from tests.train.conftest import CLIP, SHAPE, Keeper, KilledError, curve, history, image_text_stage, labelled, written

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("lone_group")]

LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
DROPPED = LoraConfig(rank=4, alpha=8, dropout=0.5)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload_optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "offload_parameters": {"zero_stage": 3, "offload": "parameters"},
    "recomputed": {"activation_checkpointing": True},
    "lora": {"lora": LORA},
    "lora_zero3_recomputed": {"lora": LORA, "zero_stage": 3, "activation_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16", "zero_stage": 2},
    "bfloat16_zero3": {"dtype": "bfloat16", "zero_stage": 3},
}
RATE = 1e-3


def prm_config(**settings: Any) -> TextPrmConfig:
    """One update holds all solutions, in passes of one or two questions; nothing is clipped."""
    return TextPrmConfig(**{
        "epochs": 1, "learning_rate": RATE, "batch_size": 100, "max_length": 400, "reserve": 200, "max_grad_norm": 1e9,
        "micro_batch_tokens": 500, "validation_fraction": 0.0, "threads": 1, "trackers": (), **settings,
    })  # fmt: skip


def uneven() -> pa.Table:
    """Questions with one, two, one … labelled solutions, seven in all."""
    rows = labelled().to_pylist()[:5]
    for row, number in zip(rows, (1, 2, 1, 2, 1), strict=True):
        row["solutions"] = row["solutions"][:number]
    return pa.Table.from_pylist(rows, schema=labelled().schema)


@dataclass(frozen=True)
class Inputs:
    """What the two processes read, and where they write."""

    prm: dict[str, str]
    policy: dict[str, str]
    folder: Path
    stages: dict[str, dict[str, str]]


POLICY = PolicyConfig(
    shape=SHAPE, epochs=2, batch_size=8, micro_batch_tokens=400, checkpoint_every=2, threads=1, trackers=()
)


SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 8, "threads": 1, "trackers": (), "learning_rate": RATE}
PICTURES: dict[str, Any] = {**SMALL, "label_policy": "judge", "validation_fraction": 0.3, "questions_per_update": 4}
# Every stage as it is trained by one worker and by two: factory, config, units that an update has of a worker's share.
STAGES: dict[str, tuple[Callable[..., Stage], TrainConfig]] = {
    "policy": (PolicyStage, PolicyConfig(shape=SHAPE, questions_per_update=4, **SMALL)),
    "text_prm": (TextPrmStage, TextPrmConfig(max_length=400, reserve=200, validation_fraction=0.0, **SMALL)),
    "two_tower": (TwoTowerStage, TwoTowerConfig(**PICTURES)),
    "two_tower_trained": (
        TwoTowerStage,
        TwoTowerConfig(freeze_image_tower=False, tokens="both", **PICTURES),
    ),
    "image_text": (ImageTextStage, ImageTextConfig(shape=CLIP, contrast_size=6, **{**SMALL, "batch_size": 6})),
}


def counted(make_stage: Callable[..., Stage], file: Path) -> Callable[..., Stage]:
    """The stage, which writes of each of its passes whether it counts, its FLOPs and its samples."""

    def make(config: TrainConfig, inputs: dict[str, str], device: str) -> Stage:
        stage, passes = make_stage(config, inputs, device), []
        loss = stage.loss

        def count(parts: Sequence[Part], epoch: int) -> Any:
            passes.append([not stage.idle, stage.units.num_flops(parts), stage.units.num_samples(parts)])
            file.write_text(json.dumps(passes))
            return loss(parts, epoch)

        stage.loss = count  # type: ignore[method-assign]
        return stage

    return make


def train_every_stage(inputs: Inputs, rank: int, size: int) -> None:
    for name, (make_stage, config) in STAGES.items():
        file = inputs.folder / f"{name}-passes-{rank}-of-{size}.json"
        worker = Keeper(inputs.folder / f"{name}-by-{size}", rank=rank, size=size).worker()
        run(counted(make_stage, file), config, inputs.stages[name], worker)


def member(rank: int, inputs: Inputs) -> None:
    """The body of one of the two processes."""
    import os

    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    store = inputs.folder / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, settings in VARIANTS.items():
        one_update(prm_config(**settings), inputs.prm, inputs.folder / f"{name}.safetensors", rank, 2)
    train_every_stage(inputs, rank, 2)
    dropped = prm_config(lora=DROPPED, batch_size=3, epochs=2)
    run(TextPrmStage, dropped, inputs.prm, Keeper(inputs.folder / "dropped2", rank=rank, size=2).worker())
    # A training of one worker goes on with two, and one of two starts that will go on with one.
    grown = POLICY.model_copy(update={"zero_stage": 2, "num_workers": 2})
    run(PolicyStage, grown, inputs.policy, Keeper(inputs.folder / "grown", rank=rank, size=2).worker())
    divided = POLICY.model_copy(update={"zero_stage": 3, "offload": "parameters", "num_workers": 2})
    run(PolicyStage, divided, inputs.policy, Keeper(inputs.folder / "divided", rank=rank, size=2).worker())
    try:
        shrunk = POLICY.model_copy(update={"zero_stage": 3, "num_workers": 2})
        run(PolicyStage, shrunk, inputs.policy, Keeper(inputs.folder / "shrunk", 1, rank, 2).worker())
    except KilledError:
        torch.distributed.barrier()
    try:
        run(Divergent, TrainConfig(batch_size=4, trackers=()), {}, Keeper(inputs.folder / "no", None, rank, 2).worker())
    except TrainingError as error:
        (inputs.folder / f"divergent-{rank}").write_text(str(error))
    patient = TrainConfig(epochs=9, patience=2, batch_size=4, trackers=())
    run(Opinions, patient, {}, Keeper(inputs.folder / "opinions", None, rank, 2).worker())
    torch.distributed.destroy_process_group()


def one_update(config: TextPrmConfig, inputs: dict[str, str], file: Path, rank: int, size: int) -> None:
    """Train for one update and write each weight before and after, and its gradient: AdamW's first moment is then a
    tenth of it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    stage = TextPrmStage(config, inputs, "cpu")
    trainer = Trainer(stage, config, Keeper(file, rank=rank, size=size).worker(), "cpu")
    engine = trainer.engine
    with engine.gathered_weights():
        found = {f"before:{name}": p.detach().float().clone() for name, p in engine.trainable.items()}
    stage.module.train()
    engine.set_learning_rate(1.0)
    loss, norm = trainer._optimizer_step(trainer._deal(trainer.updates(0)[0]), 0)
    for name in engine.trainable:
        found[f"after:{name}"] = engine.master_weight(name).detach().float().clone()
        found[f"gradient:{name}"] = engine.master_weight(name, MOMENTS[0]).detach().float() / (1 - 0.9)
    if rank == 0:
        save_file({**found, "loss": torch.tensor([loss]), "norm": torch.tensor([norm])}, file)


class Opinions(Stage):
    """Four samples; each worker has its own opinion of each epoch: on rank 1 they get better and better."""

    def __init__(self, config: TrainConfig, inputs: dict[str, str], device: str) -> None:
        import torch

        self.rank, self.seen = torch.distributed.get_rank(), 0
        self.module = torch.nn.Linear(1, 1)
        self.units = Units.singles(["s0", "s1", "s2", "s3"])
        self.micro_batch_budget = 1

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        import torch

        return self.module(torch.ones(1, 1)).sum()

    def figures(self, measured: Sequence[Any]) -> dict[str, float]:
        self.seen += 1
        return {"selection": float(self.rank * self.seen)}

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        folder.mkdir()


class Divergent(Opinions):
    """On rank 1 its loss is no number."""

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        return super().loss(parts, epoch) * (float("nan") if self.rank else 1.0)


@pytest.fixture(scope="module")
def inputs(
    policy: Path,
    policy_inputs: dict[str, str],
    two_tower_inputs: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Inputs:
    folder = tmp_path_factory.mktemp("two")
    image_text_stage(folder)
    prm = {**written(folder, questions=uneven()), "base": str(policy)}
    questions = pq.read_table(two_tower_inputs["questions"])
    without_references = pa.Table.from_pylist(
        [{**row, "reference_uris": []} for row in questions.to_pylist()], questions.schema
    )
    stages = {
        "policy": policy_inputs,
        "text_prm": {**written(folder / "even", questions=labelled()), "base": str(policy)},
        "two_tower": two_tower_inputs,
        "two_tower_trained": {**two_tower_inputs, **written(folder / "alone", questions=without_references)},
        "image_text": {"captions": str(folder / "captions.parquet")},
    }
    return Inputs(prm, policy_inputs, folder, stages)


@pytest.fixture(scope="module")
def whole(inputs: Inputs, lone_group: None) -> Path:
    """An undisturbed training of one worker."""
    run(PolicyStage, POLICY, inputs.policy, Keeper(inputs.folder / "whole").worker())
    return inputs.folder / "whole"


@pytest.fixture(scope="module")
def two(inputs: Inputs, lone_group: None) -> Path:
    """What the two processes left."""
    from torch.multiprocessing.spawn import spawn

    for name in ("grown", "divided"):
        with pytest.raises(KilledError):
            run(PolicyStage, POLICY, inputs.policy, Keeper(inputs.folder / name, limit=1).worker())
    spawn(member, (inputs,), nprocs=2)  # type: ignore[no-untyped-call]
    return inputs.folder


def unpacked(inputs: Inputs, config: TextPrmConfig) -> dict[str, Any]:
    """The loss and its gradient in one process without a packed row, solution by solution; by parameter."""
    import torch

    from medmm_ray.reward_model import RewardModel

    torch.manual_seed(0)
    model = RewardModel.from_pretrained(inputs.prm["base"])
    model.max_length, model.reserve = 400, 200
    if config.lora:
        from medmm_ray.train.lora import LoraAdapter

        LoraAdapter(model.text_model, config.lora)
    model.text_model.set_attn_implementation("eager")
    losses = []
    for row in uneven().to_pylist():
        for solution in row["solutions"]:
            (group,) = model.pack(row["question"], [solution["steps"]], row["documents"]).groups
            ids = torch.tensor([group.prefix_ids + group.branches[0].ids])
            logits = model.text_model(input_ids=ids).logits[0]
            at = [len(group.prefix_ids) + tag for tag in group.branches[0].tags]
            two = logits[at][:, [model.family.ids["minus"], model.family.ids["plus"]]]
            aims = torch.tensor(solution["targets"]).long()
            losses.append(solution["weight"] * torch.nn.functional.cross_entropy(two, aims))
    loss = torch.stack(losses).sum() / sum(s["weight"] for row in uneven().to_pylist() for s in row["solutions"])
    loss.backward()
    found = {f"gradient:{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def flat(found: dict[str, Any], kind: str) -> Any:
    import torch

    return torch.cat([found[key].flatten() for key in sorted(found) if key.startswith(f"{kind}:")])


def test_deepspeed_compiles_nothing_where_a_training_starts(whole: Path) -> None:
    from deepspeed.comm.comm import cdb

    assert whole.exists()
    assert cdb.shm_comm_op is None


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_is_that_of_the_solutions_one_by_one(two: Path, inputs: Inputs, name: str) -> None:
    from safetensors.torch import load_file

    found, expected = load_file(two / f"{name}.safetensors"), unpacked(inputs, prm_config(**VARIANTS[name]))
    gradient, reference = flat(found, "gradient"), flat(expected, "gradient")
    limit = 0.03 if "bfloat16" in name else 1e-5
    assert float((gradient - reference).norm() / reference.norm()) <= limit
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=limit)
    assert float(found["norm"]) == pytest.approx(float(reference.norm()), rel=limit)


@pytest.mark.parametrize("name", [n for n, s in VARIANTS.items() if "dtype" not in s and "lora" not in s])
def test_zero_and_offload_end_in_the_weights_of_plain_training(two: Path, name: str) -> None:
    from safetensors.torch import load_file

    plain, found = load_file(two / "plain.safetensors"), load_file(two / f"{name}.safetensors")
    step = flat(plain, "after") - flat(plain, "before")
    assert float(step.abs().max()) == pytest.approx(RATE, rel=0.01)  # AdamW's first step
    assert float((flat(found, "after") - flat(plain, "after")).norm() / step.norm()) <= 1e-3


def test_a_training_goes_on_with_more_workers_or_fewer(two: Path, inputs: Inputs, whole: Path) -> None:
    run(PolicyStage, POLICY, inputs.policy, Keeper(inputs.folder / "shrunk").worker())
    for name in ("grown", "divided", "shrunk"):
        assert len(curve(two / name)) == len(curve(whole)) == 6
        assert curve(two / name) == pytest.approx(curve(whole), abs=1e-4)


def test_dropout_is_the_same_on_any_number_of_workers(two: Path, inputs: Inputs) -> None:
    config = prm_config(lora=DROPPED, batch_size=3, epochs=2)
    run(TextPrmStage, config, inputs.prm, Keeper(inputs.folder / "dropped1").worker())
    run(TextPrmStage, prm_config(lora=LORA, batch_size=3, epochs=2), inputs.prm, Keeper(two / "kept").worker())
    assert curve(two / "dropped2") == pytest.approx(curve(two / "dropped1"), abs=1e-5)
    assert curve(two / "kept") != pytest.approx(curve(two / "dropped1"), abs=1e-5)


def test_a_loss_that_is_no_number_stops_all_workers_with_its_ids(two: Path) -> None:
    told = [(two / f"divergent-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    (named,) = {line for line in ("['s0', 's1']", "['s0', 's2']", "['s0', 's3']", "['s1', 's2']", "['s1', 's3']",
                                  "['s2', 's3']") if line in told[0]}  # fmt: skip
    assert f"the loss is nan in epoch 1, after 0 updates, on {named}. Look at these samples" in told[0]


def test_all_workers_stop_early_together(two: Path) -> None:
    told = history(two / "opinions")
    assert (len(told["epochs"]), told["best_epoch"], told["stopped_early"]) == (3, 0, True)


@pytest.fixture(scope="module")
def one(inputs: Inputs, lone_group: None) -> Path:
    """What one worker leaves of every stage."""
    train_every_stage(inputs, 0, 1)
    return inputs.folder


@pytest.mark.parametrize("name", STAGES)
def test_two_workers_share_the_work_of_every_stage_and_train_as_one(one: Path, two: Path, name: str) -> None:
    by_one, by_two = curve(one / f"{name}-by-1"), curve(two / f"{name}-by-2")
    assert len(by_one) > 1
    assert by_two == pytest.approx(by_one, abs=1e-6)
    epochs = [history(folder)["epochs"] for folder in (one / f"{name}-by-1", two / f"{name}-by-2")]
    for alone, together in zip(*epochs, strict=True):
        for figure in ("validation_auroc", "validation_best_of_n", "right_steps", "too_long"):
            assert together.get(figure) == pytest.approx(alone.get(figure), abs=1e-6)
    passes = [json.loads((two / f"{name}-passes-{rank}-of-2.json").read_text()) for rank in (0, 1)]
    # No pass is a copy of weight 0, and what each worker has done is half of it all.
    assert all(counts for of_rank in passes for counts, _, _ in of_rank)
    done = [sum(flops for _, flops, _ in of_rank) for of_rank in passes]
    assert min(done) >= 0.9 * max(done)
    alone = json.loads((one / f"{name}-passes-0-of-1.json").read_text())
    assert sum(samples for of_rank in passes for _, _, samples in of_rank) == sum(samples for _, _, samples in alone)
