"""Figures reach the real trackers, and go on after a kill; no network is needed."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from medmm_ray.config import ConfigError
from medmm_ray.train.config import TrackerName
from medmm_ray.train.trackers import check_installed, open_trackers

RUN = "train_policy-0123456789abcdef"


def track(name: TrackerName, folder: str, restart: Callable[[], None] = lambda: None) -> None:
    """Two updates, a kill, then the second again and a third."""
    (first,) = open_trackers([name], RUN, folder, {"epochs": 3, "dtype": "auto"}, 0)
    first.log({"train/loss": 0.5, "train/gradient_norm": 2.0}, 1)
    first.log({"train/loss": 0.4}, 2)
    first.close()
    restart()
    (second,) = open_trackers([name], RUN, folder, {"epochs": 3, "dtype": "auto"}, 1)
    second.log({"train/loss": 0.4}, 2)
    second.log({"train/loss": 0.25}, 3)
    second.flush()
    second.close()


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard would read of its event files, in order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_tensorboard_gets_every_figure_also_behind_a_uri(tmp_path: Path, scheme: str) -> None:
    track("tensorboard", f"{scheme}{tmp_path}")
    assert scalars(tmp_path / "tensorboard") == [
        (1, "train/loss", 0.5), (1, "train/gradient_norm", 2.0), (2, "train/loss", pytest.approx(0.4)),
        (2, "train/loss", pytest.approx(0.4)), (3, "train/loss", 0.25),
    ]  # fmt: skip


def test_mlflow_goes_on_in_the_run_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    track("mlflow", str(tmp_path))
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("medmm-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (RUN, "FINISHED")
    assert run.data.params == {"epochs": "3", "dtype": "auto"}
    steps = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [(1, 0.5), (2, 0.4), (2, 0.4), (3, 0.25)]


@pytest.mark.engine  # W&B starts a process of its own
def test_wandb_needs_no_network_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    import wandb

    track("wandb", str(tmp_path), restart=wandb.teardown)  # else both runs share W&B's process, which no restart does
    wandb.teardown()  # it writes until it ends
    # A folder a run, with a number behind its name where both began in the same second.
    files = tmp_path.glob(f"wandb/offline-run-*-{RUN}*/run-{RUN}.wandb")
    first, second = sorted(files, key=lambda path: path.stat().st_mtime_ns)
    assert b"train/gradient_norm" in first.read_bytes()
    assert b"0.25" in second.read_bytes()


def test_a_missing_package_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trackers has 'wandb', but the package wandb is not installed: run pip"):
        check_installed(["wandb"])
