"""The loop under Ray Train: what the driver calls, with a worker killed on the way."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.train.launch import fit
from medmm_ray.train.loop import TrainingError
from medmm_ray.train.policy import PolicyConfig, PolicyStage, read_parquet
from tests.train.conftest import SHAPE

pytestmark = pytest.mark.engine


class KilledOnce(PolicyStage):
    """Its worker is killed in the second epoch, the first time round."""

    def __init__(self, config: PolicyConfig, inputs: dict[str, str], device: str) -> None:
        super().__init__(config, inputs, device)
        self.mark = Path(inputs["mark"])

    def loss(self, units: Sequence[int], epoch: int) -> Any:
        if epoch == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(units, epoch)


class NeverSound(PolicyStage):
    def loss(self, units: Sequence[int], epoch: int) -> Any:
        return super().loss(units, epoch) * float("nan")


@pytest.fixture(scope="module")
def tables(policy_inputs: dict[str, str]) -> dict[str, pa.Table]:
    return {name: read_parquet(path) for name, path in policy_inputs.items()}


@pytest.fixture(autouse=True)
def by_value() -> None:
    """Workers cannot import the tests: send these classes whole."""
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_nothing(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    config = PolicyConfig(shape=SHAPE, epochs=2, batch_size=8, threads=1, cpus_per_worker=1.0, max_failures=1)
    figures = {}
    for stage, name in ((PolicyStage, "whole"), (KilledOnce, "killed")):
        inputs = {"mark": str(tmp_path / "mark")}
        figures[name] = fit(stage, config, tables, inputs, str(tmp_path / name), name)
        assert not (tmp_path / name / ".checkpoints").exists()
    assert (tmp_path / "mark").exists()
    assert figures["killed"]["updates"] == figures["whole"]["updates"] == 6.0
    assert figures["killed"]["loss"] == figures["whole"]["loss"]
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "killed")]
    assert histories[0]["updates"] == histories[1]["updates"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.usefixtures("ray_session")
def test_a_failed_training_says_why_and_keeps_what_it_reached(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    config = PolicyConfig(shape=SHAPE, epochs=1, threads=1, cpus_per_worker=1.0, max_failures=0)
    with pytest.raises(TrainingError, match=r"training bad failed on worker 0: the loss is nan in epoch 1.*\['s"):
        fit(NeverSound, config, tables, {}, str(tmp_path), "bad")
    assert pq.read_table(tmp_path / ".checkpoints" / "bad-inputs" / "samples.parquet").num_rows == 24


@pytest.mark.usefixtures("ray_session")
def test_two_workers_train_as_one(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    curves = []
    for num_workers in (1, 2):
        config = PolicyConfig(
            shape=SHAPE, epochs=1, batch_size=8, threads=1, cpus_per_worker=1.0, num_workers=num_workers,
            micro_batch_tokens=400, zero_stage=2 if num_workers == 2 else 0,
        )  # fmt: skip
        folder = tmp_path / str(num_workers)
        fit(PolicyStage, config, tables, {}, str(folder), f"workers-{num_workers}")
        curves.append([row["loss"] for row in json.loads((folder / "history.json").read_text())["updates"]])
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
