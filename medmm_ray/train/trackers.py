"""Experiment trackers, by their names in the recipe: TensorBoard, Weights & Biases, MLflow.

Enters: figures of an update or an epoch, by the number of updates. Each library is imported where it is used. W&B and
MLflow are told where to write by their own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME …), set on the nodes that train; a training that goes on after a kill goes on in the same run.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from medmm_ray.config import ConfigError
from medmm_ray.train.checkpoints import copy
from medmm_ray.train.config import TrackerName

PROJECT = "medmm-ray"
FOLDER = "tensorboard"
_PACKAGES: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


class Tracker(Protocol):
    """A place that figures are sent to."""

    def log(self, figures: Mapping[str, float], updates: int) -> None:
        """Send figures, taken after so many updates."""

    def flush(self) -> None:
        """Bring what was sent to where it stays."""

    def close(self) -> None:
        """End the run: no more figures will come."""


def check_installed(names: Iterable[str]) -> None:
    """Raise `ConfigError` where a tracker's package is missing."""
    for name in names:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"trackers has {name!r}, but the package {package} is not installed: run pip install {package} (on "
                f"every node), or take {name} out of trackers"
            )


def open_trackers(
    names: Sequence[TrackerName], run: str, folder: str, config: Mapping[str, Any], updates: int
) -> list[Tracker]:
    """The trackers of a run that has done so many updates already; `folder` gets what TensorBoard reads."""
    makers: Mapping[str, Callable[[str, str, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WandB,
        "mlflow": MLflow,
    }
    # A tracker that is named twice is opened once.
    return [makers[name](run, folder, config, updates) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in ``<folder>/tensorboard``; where that is a URI they are written here and copied there."""

    def __init__(self, run: str, folder: str, config: Mapping[str, Any], updates: int) -> None:  # noqa: ARG002
        from tensorboardX import SummaryWriter

        self.target = f"{folder}/{FOLDER}"
        self.scratch = None
        if "://" in folder:
            self.scratch = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(
            self.scratch.name if self.scratch else self.target,
            purge_step=updates + 1 if updates else None,  # what a killed worker wrote beyond its checkpoint
            filename_suffix=f".{updates}",  # by itself a file is named by the second, and opened anew
        )

    def log(self, figures: Mapping[str, float], updates: int) -> None:
        """Add a point to each figure's curve."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, updates)

    def flush(self) -> None:
        """Write what is buffered, and copy it where the folder is a URI."""
        self.writer.flush()
        if self.scratch:
            copy(self.scratch.name, self.target)

    def close(self) -> None:
        """Close the event file, and copy it where the folder is a URI."""
        self.writer.close()
        if self.scratch:
            copy(self.scratch.name, self.target)
            self.scratch.cleanup()


class WandB:
    """A run of Weights & Biases with the training's name as its id."""

    def __init__(self, run: str, folder: str, config: Mapping[str, Any], updates: int) -> None:  # noqa: ARG002
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run, name=run, resume="allow", config=dict(config)
        )

    def log(self, figures: Mapping[str, float], updates: int) -> None:
        """Send figures to W&B's process."""
        self.run.log(dict(figures), step=updates)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Mark the run as finished."""
        self.run.finish()


class MLflow:
    """A run of MLflow with the training's name; one that is there already goes on."""

    def __init__(self, run: str, folder: str, config: Mapping[str, Any], updates: int) -> None:  # noqa: ARG002
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.make_metric, self.client = Metric, MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self.client.get_experiment_by_name(experiment)
        experiment_id = existing.experiment_id if existing else self.client.create_experiment(experiment)
        runs = self.client.search_runs([experiment_id], f"attributes.run_name = '{run}'", max_results=1)
        self.run = runs[0] if runs else self.client.create_run(experiment_id, run_name=run)
        if not runs:  # MLflow refuses to log a parameter anew
            for name, value in config.items():
                self.client.log_param(self.run.info.run_id, name, value)

    def log(self, figures: Mapping[str, float], updates: int) -> None:
        """Send all figures in one request."""
        import time

        now = int(time.time() * 1000)
        metrics = [self.make_metric(name, value, now, updates) for name, value in figures.items()]
        self.client.log_batch(self.run.info.run_id, metrics=metrics)

    def flush(self) -> None:
        """MLflow has written already."""

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run.info.run_id)
