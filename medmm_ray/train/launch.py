"""A stage under Ray Train: `fit`, which the driver calls, and what each worker runs.

While it runs, everything lies in ``<folder>/.checkpoints``, which is removed on success: `fit` with the same name goes
on there, whatever was killed, as if nothing had happened.
"""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.train.loop import HISTORY, WORK, StageFactory, TrainConfig, TrainingError, Worker, run, selected_figures
from medmm_ray.train.trackers import check_installed


def figures(history: dict[str, Any]) -> dict[str, float]:
    """What a stage's manifest says of its training: the last epoch's loss, the kept epoch's figures, the speed."""
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
    tables: dict[str, pa.Table],
    inputs: dict[str, str],
    folder: str,
    name: str,
) -> dict[str, float]:
    """Run a stage under Ray Train; called in the driver, inside a Ray session.

    `tables` are written where the workers find them, `inputs` are paths and names passed on as they are; the stage gets
    both as ``{name: path}``. `folder` (a path or URI that every node reaches) gets the model; `name` identifies the
    run: the same name continues an interrupted one, so it must change with the config. Gives `figures`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    check_installed(config.trackers)
    folder = folder if "://" in folder else str(Path(folder).absolute())
    work = f"{folder}/{WORK}"
    fs, path = filesystem(work)
    fs.create_dir(f"{path}/{name}-inputs", recursive=True)
    for key, table in tables.items():
        inputs = {**inputs, key: f"{work}/{name}-inputs/{key}.parquet"}
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_file(fs, f"{path}/{name}-inputs/{key}.parquet", sink.getvalue().to_pybytes())
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "stage": make_stage,
            "config": config,
            "inputs": inputs,
            "name": name,
            "work": work,
            "folder": folder,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        with _interruptible():
            trainer.fit()
    except WorkerGroupError as error:
        rank, cause = min(error.worker_failures.items())
        raise TrainingError(
            f"training {name} failed on worker {rank}: {cause} What it had reached is kept in {work}: run the step "
            "again to go on from there."
        ) from error
    history_fs, history_path = filesystem(f"{folder}/{HISTORY}")
    with history_fs.open_input_stream(history_path) as stream:
        history = json.loads(stream.read())
    fs.delete_dir(path)
    return figures(history)


def read_input(uri: str) -> pa.Table:
    """One of the tables that `fit` wrote for the workers."""
    fs, path = filesystem(uri)
    return pq.read_table(path, filesystem=fs)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt: Ray Train's own handler ends the process with code 0, and stays after training."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _ray_worker(arguments: dict[str, Any]) -> None:
    """The body of one Ray Train worker."""
    import ray.train

    context = ray.train.get_context()
    with ExitStack() as stack:

        def latest() -> str | None:
            checkpoint = ray.train.get_checkpoint()
            return None if checkpoint is None else str(stack.enter_context(checkpoint.as_directory()))

        def keep(folder: str, metrics: dict[str, float]) -> None:
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

        def notice() -> Sequence[str]:
            info = ray.train.get_preemption_info()
            return [] if info is None else info.preempted_node_ids

        worker = Worker(
            context.get_world_rank(), context.get_world_size(), arguments["name"], arguments["work"],
            arguments["folder"], latest, keep, notice,
        )  # fmt: skip
        run(arguments["stage"], arguments["config"], arguments["inputs"], worker)
