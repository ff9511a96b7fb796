"""The loop under Ray Train: what the driver calls, with its worker or itself killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmm_ray.data import tries
from medmm_ray.data.artifacts import Artifact, Provenance
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.policy import PolicyConfig, PolicyStage
from medmm_ray.train.schedule import Part
from medmm_ray.train.stage import TrainingError
from tests.paths import ROOT
from tests.train.conftest import SHAPE, curve

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_session")]

CONFIG = PolicyConfig(shape=SHAPE, epochs=2, batch_size=8, threads=1, cpus_per_worker=1.0, max_failures=1)


class KilledOnce(PolicyStage):
    """In the second epoch it kills the process that the file ``victim`` names (none: its own), once."""

    def __init__(self, config: PolicyConfig, inputs: dict[str, str], device: str) -> None:
        super().__init__(config, inputs, device)
        self.mark, self.victim = Path(inputs["mark"]), Path(inputs["victim"])

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        if epoch == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(int(self.victim.read_text()) if self.victim.exists() else os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the driver's end takes this worker along
        return super().loss(parts, epoch)


class UnsoundOnce(PolicyStage):
    """In the second epoch its loss is no number, unless the file ``mark`` is there."""

    def __init__(self, config: PolicyConfig, inputs: dict[str, str], device: str) -> None:
        super().__init__(config, inputs, device)
        self.mark = Path(inputs["mark"])

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        loss = super().loss(parts, epoch)
        return loss * float("nan") if epoch == 1 and not self.mark.exists() else loss


def train_killed(worked: str, texts: str, folder: Path) -> dict[str, float]:
    """The driver's part of a training that is killed once; run again, it goes on."""
    inputs = {"mark": str(folder.parent / "mark"), "victim": str(folder.parent / "victim")}
    tables = {"worked": read_input(worked), "texts": read_input(texts)}
    return fit(KilledOnce, CONFIG, tables, inputs, str(folder), "killed")


@pytest.fixture(scope="module")
def tables(policy_inputs: dict[str, str]) -> dict[str, pa.Table]:
    return {name: read_input(path) for name, path in policy_inputs.items()}


@pytest.fixture(autouse=True)
def by_value() -> None:
    """Workers cannot import the tests: send these classes whole."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def whole(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """The folder of an undisturbed training."""
    folder = tmp_path_factory.mktemp("whole")
    fit(PolicyStage, CONFIG, tables, {}, str(folder), "whole")
    assert not (folder / ".checkpoints").exists()
    return folder


def assert_equal(folder: Path, whole: Path) -> None:
    """The same loss of each update, and bit by bit the same weights."""
    import torch
    from safetensors.torch import load_file

    histories = [json.loads((path / "history.json").read_text()) for path in (folder, whole)]
    assert len(histories[1]["updates"]) == 6
    assert histories[0]["updates"] == histories[1]["updates"]
    weights = [load_file(path / "model.safetensors") for path in (folder, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_a_killed_worker_changes_nothing(policy_inputs: dict[str, str], whole: Path, tmp_path: Path) -> None:
    figures = train_killed(policy_inputs["worked"], policy_inputs["texts"], tmp_path / "out")
    assert (tmp_path / "mark").exists()
    assert figures["updates"] == 6.0
    assert_equal(tmp_path / "out", whole)


DRIVER = """
import os, sys
from pathlib import Path
from ray import cloudpickle
from medmm_ray.session import session
from tests.train import test_ray
cloudpickle.register_pickle_by_value(test_ray)
(Path(sys.argv[3]).parent / "victim").write_text(str(os.getpid()))
with session():
    test_ray.train_killed(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
"""


def test_a_killed_driver_changes_nothing(policy_inputs: dict[str, str], whole: Path, tmp_path: Path) -> None:
    arguments = [policy_inputs["worked"], policy_inputs["texts"], str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.run([sys.executable, "-c", DRIVER, *arguments], cwd=ROOT, env=environment, check=False)
    assert driver.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "history.json").exists()
    train_killed(policy_inputs["worked"], policy_inputs["texts"], tmp_path / "out")
    assert_equal(tmp_path / "out", whole)
    assert not (tmp_path / "out" / ".checkpoints").exists()


class Waits(PolicyStage):
    """In the second epoch it waits for the file ``go``; the file ``waits`` says that it does."""

    def __init__(self, config: PolicyConfig, inputs: dict[str, str], device: str) -> None:
        super().__init__(config, inputs, device)
        self.waits, self.go = Path(inputs["waits"]), Path(inputs["go"])

    def loss(self, parts: Sequence[Part], epoch: int) -> Any:
        while epoch == 1 and not self.go.exists():
            self.waits.touch()
            time.sleep(0.1)
        return super().loss(parts, epoch)


ORIGIN = Provenance(name="policy", fingerprint="f", config={}, upstream={})


def train_waiting(worked: str, texts: str, artifact: Path) -> None:
    tables = {"worked": read_input(worked), "texts": read_input(texts)}
    inputs = {"waits": str(artifact.parent / "waits"), "go": str(artifact.parent / "go")}
    manifest = tries.make(
        Artifact(str(artifact)),
        ORIGIN,
        lambda uri: fit(Waits, CONFIG, tables, inputs, uri, "twice"),
        lambda: 1.0,
        resumes=True,
    )
    print("seconds", manifest.seconds)


OVERTAKEN = """
import sys
from pathlib import Path
from ray import cloudpickle
from medmm_ray.session import session
from tests.train import test_ray
cloudpickle.register_pickle_by_value(test_ray)
with session():
    test_ray.train_waiting(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
"""


def test_a_training_that_is_started_twice_ends_once(
    policy_inputs: dict[str, str], tables: dict[str, pa.Table], whole: Path, tmp_path: Path
) -> None:
    """The later driver goes on from the earlier one's checkpoint; that one lives, and ends or takes the other's model.

    Both are drivers of one cluster, as two submissions of a job are.
    """
    import ray

    artifact = tmp_path / "out"
    arguments = [policy_inputs["worked"], policy_inputs["texts"], str(artifact)]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    command = [sys.executable, "-c", OVERTAKEN, *arguments]
    log = tmp_path / "earlier.log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as earlier,
    ):
        while not (tmp_path / "waits").exists():
            assert earlier.poll() is None, log.read_text()
            time.sleep(0.1)
        manifest = tries.make(
            Artifact(str(artifact)),
            ORIGIN,
            lambda uri: fit(PolicyStage, CONFIG, tables, {}, uri, "twice"),
            lambda: 2.0,
            resumes=True,
        )
        assert_equal(artifact, whole)
        (tmp_path / "go").touch()
        code = earlier.wait(timeout=300)
    # At its next write, before the other's end or after it.
    words = {1: f"a later run has taken over {artifact} and goes on", 0: "seconds 2.0"}[code]
    assert words in log.read_text()
    assert Artifact(str(artifact)).manifest() == manifest
    assert_equal(artifact, whole)


def test_ctrl_c_is_an_interrupt_and_its_handler_is_put_back(
    tables: dict[str, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train's handler of SIGINT ends the driver with code 0, as if all were well."""

    class Interrupted:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(0)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(PolicyStage, CONFIG, tables, {}, str(tmp_path / "out"), "stopped")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_of_two_workers_that_fails_says_why_and_one_goes_on_as_if_it_had_been_one(
    tables: dict[str, pa.Table], whole: Path, tmp_path: Path
) -> None:
    out, mark = tmp_path / "out", tmp_path / "mark"

    def train(**settings: Any) -> None:
        config = CONFIG.model_copy(update=settings)
        fit(UnsoundOnce, config, tables, {"mark": str(mark)}, str(out), "bad")

    with pytest.raises(TrainingError, match=r"training bad failed on worker \d: the loss is nan in epoch 2.*\['q"):
        train(num_workers=2, zero_stage=2, micro_batch_tokens=400, max_failures=0)
    assert not (out / "history.json").exists()
    assert pq.read_table(out / ".checkpoints" / "bad-inputs" / "worked.parquet").num_rows == 12
    mark.touch()
    train()
    assert curve(out) == pytest.approx(curve(whole), abs=1e-4)
    assert len(list((out / "tensorboard").iterdir())) == 2  # it went on: it did not begin again
