"""A stage under Ray Train: `fit`, which the driver calls, and what each worker runs.

While it runs, everything lies in ``<folder>/.checkpoints``, which is removed on success: `fit` with the same name goes
on there, whatever was killed, as if nothing had happened.
"""

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from medmm_ray.data.artifacts import new_file
from medmm_ray.data.tables import filesystem
from medmm_ray.engines.placement import selector_of
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.loop import Worker, run
from medmm_ray.train.progress import HISTORY, WORK, selected_figures
from medmm_ray.train.stage import StageFactory, TrainingError
from medmm_ray.train.trackers import check_installed

if TYPE_CHECKING:
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import ScalingConfig

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # Ray Train's own variable
ROW_GROUP_BYTES = 1 << 20  # of what a worker reads at a time of its inputs


def figures(history: dict[str, Any]) -> dict[str, float]:
    """The figures in a stage's manifest: the last epoch's loss, the kept epoch's figures, the speed."""
    return {
        **selected_figures(history["epochs"], history["best_epoch"]),
        "updates": float(len(history["updates"])),
        "samples": float(history["samples"]),
        "tokens": float(history["tokens"]),
        "train_seconds": round(history["seconds"], 3),
        "tokens_per_second": round(history["tokens"] / max(history["seconds"], 1e-9), 1),
    }


def fit(
    make_stage: StageFactory,
    config: TrainConfig,
    tables: Mapping[str, pa.Table | Iterable[pa.Table]],
    inputs: dict[str, str],
    folder: str,
    name: str,
) -> dict[str, float]:
    """Run a stage under Ray Train; called in the driver, inside a Ray session.

    `tables`, whole or in parts, are written where the workers find them, `inputs` are paths and names passed on as they
    are; the stage gets both as ``{name: path}``. `folder` (a path or URI that every node reaches) gets the model;
    `name` identifies the run: the same name continues an interrupted one, so it must change with the config. Gives
    `figures`.
    """
    from ray.train.torch import TorchConfig

    check_installed(config.trackers)  # here, not in the worker after minutes of loading
    folder = folder if "://" in folder else str(Path(folder).absolute())
    work = f"{folder}/{WORK}"
    # Tables go through files: an argument of Ray Train is pickled into every worker.
    arguments = {
        "stage": make_stage,
        "config": config,
        "inputs": inputs | write_inputs(tables, f"{work}/{name}-inputs"),
        "name": name,
        "work": work,
        "folder": folder,
    }
    trainer = _trainer_class()(
        _ray_worker,
        train_loop_config=arguments,
        scaling_config=_scaling_config(config),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        run_config=_run_config(config, work, name),
    )
    _run(trainer, name, work)
    history = _read_history(folder)
    # Only now: where the history is missing, the checkpoints are what a next try goes on from.
    fs, path = filesystem(work)
    with suppress(FileNotFoundError):  # another run has taken them over, too late
        fs.delete_dir(path)
    return figures(history)


def write_inputs(tables: Mapping[str, pa.Table | Iterable[pa.Table]], folder: str) -> dict[str, str]:
    """Write tables, a part in memory at a time, as ``<folder>/<name>.parquet``; their URIs by name."""
    fs, path = filesystem(folder)
    uris: dict[str, str] = {}
    for key, table in tables.items():
        parts = iter([table] if isinstance(table, pa.Table) else table)
        # What is refused has no folder yet: rows raise before they give their first part.
        first = next(parts)
        fs.create_dir(path, recursive=True)
        with new_file(fs, f"{path}/{key}.parquet") as stream, pq.ParquetWriter(stream, first.schema) as file:
            for part in chain([first], parts):
                # Workers may read a row group at a time.
                rows = max(1, part.num_rows * ROW_GROUP_BYTES // max(1, part.nbytes))
                file.write_table(part, row_group_size=rows)
        uris[key] = f"{folder}/{key}.parquet"
    return uris


def read_input(uri: str) -> pa.Table:
    """One of the tables that `fit` wrote for the workers."""
    fs, path = filesystem(uri)
    return pq.read_table(path, filesystem=fs)


def _trainer_class() -> "type[TorchTrainer]":
    """Ray Train's trainer without two helpers, each a process of its own that takes seconds to start.

    One deals out Ray Data's datasets, while our tables go through files; the other clears up after a controller that
    died, whose driver ends here, and all of its Ray with it.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc] # Ray Train's own
            helpers = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in callbacks if not isinstance(callback, helpers)]

    return Trainer


def _scaling_config(config: TrainConfig) -> "ScalingConfig":
    from ray.train.v2.api.config import ScalingConfig

    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    fewest = config.num_workers if config.min_workers is None else config.min_workers
    return ScalingConfig(
        # A pair makes the group elastic: Ray Train then starts it anew, from its last checkpoint, at another size.
        num_workers=config.num_workers if fewest == config.num_workers else (fewest, config.num_workers),
        use_gpu=config.gpus_per_worker > 0,
        resources_per_worker=resources,
        # By label alone: Ray's accelerator_type makes no group grow from zero.
        label_selector=selector_of(config, config.gpus_per_worker) or None,
    )


def _run_config(config: TrainConfig, work: str, name: str) -> "RunConfig":
    """Ray Train's own state lies in `work`: a run of the same name goes on from its last checkpoint there."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig

    fs, path = filesystem(work)
    return RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=fs,
        failure_config=FailureConfig(max_failures=config.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=1),  # the best epoch's weights lie apart
    )


def _run(trainer: Any, name: str, work: str) -> None:
    """Run a Ray Train trainer; raises `TrainingError` with the first worker's reason where one failed."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    try:
        with _interruptible(), _without_watcher_on_one_machine():
            trainer.fit()
    except WorkerGroupError as error:
        rank, cause = min(error.worker_failures.items())
        raise TrainingError(
            f"training {name} failed on worker {rank}: {cause} What it had reached is kept in {work}: run the step "
            "again to go on from there."
        ) from error


def _read_history(folder: str) -> dict[str, Any]:
    fs, path = filesystem(f"{folder}/{HISTORY}")
    with fs.open_input_stream(path) as stream:
        history: dict[str, Any] = json.loads(stream.read())
    return history


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt: Ray Train's own handler ends the process with code 0, and stays after training."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        # Handlers can be set in the main thread alone; Ray Train set none elsewhere.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _without_watcher_on_one_machine() -> Iterator[None]:
    """Where no cluster was joined, none of its machines is taken away: no process has to watch for the notice."""
    if os.environ.get("RAY_ADDRESS") or WATCHER in os.environ:
        yield
        return
    os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[WATCHER]


def _ray_worker(arguments: dict[str, Any]) -> None:
    """The body of one Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    with ExitStack() as stack:

        def latest_checkpoint() -> str | None:
            checkpoint = ray.train.get_checkpoint()
            return None if checkpoint is None else str(stack.enter_context(checkpoint.as_directory()))

        def save_checkpoint(folder: str, metrics: dict[str, float]) -> None:
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

        def preempted_nodes() -> Sequence[str]:
            info = ray.train.get_preemption_info()
            return [] if info is None else info.preempted_node_ids

        worker = Worker(
            rank=context.get_world_rank(),
            size=context.get_world_size(),
            name=arguments["name"],
            work=arguments["work"],
            folder=arguments["folder"],
            latest_checkpoint=latest_checkpoint,
            save_checkpoint=save_checkpoint,
            preempted_nodes=preempted_nodes,
        )
        run(
            arguments["stage"],
            arguments["config"],
            arguments["inputs"],
            worker,
        )
