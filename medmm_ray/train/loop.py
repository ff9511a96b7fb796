"""The one training loop, for every stage: DeepSpeed in each worker of a group (`launch` makes the group).

Enters: a stage (its model, its samples, its loss), a `TrainConfig`, and what this worker is in its group. Leaves: the
stage's model in a folder, with ``history.json`` (the loss of each update, validation figures, seconds, tokens).

Ray Train runs the group and DeepSpeed steps and shards; the loop between them is ours because the trainers of
transformers and TRL batch rows, while here an update counts solutions, packed by question into micro-batches that
differ in number, and must come out the same on any number of workers.

The same seed gives the same batches on any number of workers, and a training that goes on from a checkpoint ends in the
same weights as an undisturbed one, also with another number of workers or another ZeRO stage. Random numbers inside a
model (dropout) are drawn anew for each forward pass from (seed, epoch, ids of its samples): they are the same on any
worker, but not for another `micro_batch_tokens`, which makes other passes, nor on another kind of device.
"""

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.engines.weights import WeightMismatch
from medmm_ray.train import checkpoints, throughput
from medmm_ray.train.config import TrainConfig
from medmm_ray.train.engine import Engine
from medmm_ray.train.progress import HISTORY, Progress, selected_figures, write_progress
from medmm_ray.train.schedule import epoch_batches, learning_rate_factor, micro_batches
from medmm_ray.train.stage import Stage, StageFactory, TrainingError
from medmm_ray.train.trackers import open_trackers

if TYPE_CHECKING:
    import torch

REPORT_SECONDS = 5.0
PREEMPTION_CHECK_SECONDS = 5.0  # a spot machine is taken 30 s (GCP) to 120 s (AWS) after its notice


@dataclass(frozen=True)
class Worker:
    """One process of the training group `name`, and its ways to keep things.

    `latest_checkpoint` gives the folder of the newest checkpoint, `save_checkpoint` takes this worker's part of a new
    one. `preempted_nodes` says which machines of the group will be taken away soon, the same to all workers, which must
    all ask together. `work` is the folder of checkpoints, `folder` that of the model.
    """

    rank: int
    size: int
    name: str
    work: str
    folder: str
    latest_checkpoint: Callable[[], str | None]
    save_checkpoint: Callable[[str, dict[str, float]], None]
    preempted_nodes: Callable[[], Sequence[str]]


@dataclass(frozen=True)
class _MicroBatch:
    """The units of one forward pass of this worker, and their share of the global batch's mean loss."""

    units: list[int]
    loss: "torch.Tensor"


def run(make_stage: StageFactory, config: TrainConfig, inputs: dict[str, str], worker: Worker) -> None:
    """Train in this process, one of the group; torch.distributed is initialised already.

    Raises `TrainingError` where a loss, a gradient or a validation figure is not finite, or memory runs out, with the
    ids of the batch.
    """
    if config.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    import torch

    device = f"cuda:{torch.cuda.current_device()}" if config.gpus_per_worker else "cpu"
    if device == "cpu":
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    trainer = Trainer(make_stage(config, inputs, device), config, worker, device)
    trainer.restore()
    with trainer.tracking():
        while not trainer.progress.is_over(config.epochs, config.patience):
            trainer.train_epoch(trainer.progress.epoch)
    trainer.save_model()
    # Rank 0 alone writes the model: nobody leaves the group before it is there.
    torch.distributed.barrier()


def forward_dtype(config: TrainConfig, device: str) -> str:
    """The number format of the forward and backward pass on `device`."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device == "cpu" else "bfloat16"


class Trainer:
    """A stage under DeepSpeed, and how far its training is."""

    def __init__(self, stage: Stage, config: TrainConfig, worker: Worker, device: str) -> None:
        self.stage = stage
        self.config = config
        self.worker = worker
        self.batches: list[list[list[int]]] = []
        for epoch in range(config.epochs):
            self.batches.append(epoch_batches(stage.sizes, config.batch_size, config.seed, epoch))
        self.num_updates = sum(map(len, self.batches))
        if self.num_updates == 0:
            raise TrainingError(f"{type(stage).__name__}: there is not one sample to train on; look at the inputs")
        self.progress = Progress()
        dtype = forward_dtype(config, device)
        self.engine = Engine(stage.module, stage.loss, stage.learning_rates(), config, dtype)
        self.meter = throughput.ThroughputMeter(_group_peak_flops(device, dtype, worker.size))
        self._last_report = time.perf_counter()
        self._last_preemption_check = self._last_report
        self._announced_nodes: set[str] = set()

    # Figures

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Have the trackers of the recipe open, on rank 0."""
        config, worker = self.config, self.worker
        names = config.trackers if worker.rank == 0 else ()
        settings = config.model_dump(mode="json")
        self.trackers = open_trackers(names, worker.name, worker.folder, settings, len(self.progress.updates))
        try:
            yield
        finally:
            for tracker in self.trackers:
                tracker.close()

    def _log(self, prefix: str, figures: dict[str, float]) -> None:
        """Send figures to the trackers as ``prefix/name``."""
        named = {f"{prefix}/{name}": value for name, value in figures.items() if name != "epoch"}
        for tracker in self.trackers:
            tracker.log(named, len(self.progress.updates))

    def _report_progress(self) -> None:
        """Write, every few seconds, how far training is, for those who wait for it."""
        if self.worker.rank != 0 or time.perf_counter() - self._last_report <= REPORT_SECONDS:
            return
        self._last_report = time.perf_counter()
        write_progress(self.worker.folder, self.progress, self.num_updates)
        for tracker in self.trackers:
            tracker.flush()

    # Epochs

    def train_epoch(self, epoch: int) -> None:
        """Run the rest of an epoch, its validation, and a checkpoint."""
        progress = self.progress
        self._started = time.perf_counter() - progress.seconds
        self.stage.module.train()
        batches = self.batches[epoch]
        for number in range(progress.batch, len(batches)):
            self._update(epoch, batches[number])
            progress.batch = number + 1
            self._report_progress()
            # The first first: it is a collective, that all workers enter or none.
            if self._preemption_announced() or self._checkpoint_is_due():
                self._checkpoint()
        self._finish_epoch(epoch)

    def _checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and len(self.progress.updates) % every == 0

    def _finish_epoch(self, epoch: int) -> None:
        progress = self.progress
        losses = [row["loss"] for row in progress.updates if row["epoch"] == epoch]
        figures = {"loss": sum(losses) / len(losses), **self._validate(), **self.meter.take()}
        progress.epochs.append({"epoch": epoch, **figures})
        self._log("epoch", figures)
        if progress.best_epoch == epoch:
            self._save_best_weights(epoch)
        progress.epoch = epoch + 1
        progress.batch = 0
        progress.seconds = time.perf_counter() - self._started
        self._checkpoint()

    def _validate(self) -> dict[str, float]:
        """The stage's figures, rank 0's on all workers, and the highest peak of memory among them."""
        import torch

        self.stage.module.eval()
        with torch.no_grad():
            own_figures = self.stage.validate()
        gathered: list[Any] = [None] * self.worker.size
        torch.distributed.all_gather_object(gathered, (own_figures, throughput.peak_memory(self.engine.device)))
        # Rank 0's for everybody: workers that disagreed on the best epoch would stop at different ones.
        figures: dict[str, float] = gathered[0][0]
        broken = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if broken:
            raise TrainingError(
                f"validation gives {broken} after {len(self.progress.updates)} updates; expected finite numbers. Lower "
                "learning_rate or train in float32."
            )
        return {**figures, "peak_memory_gib": max(peak for _, peak in gathered)}

    # Updates

    def _update(self, epoch: int, units: Sequence[int]) -> None:
        """Take one optimizer step, and note its figures."""
        stage, progress = self.stage, self.progress
        started = time.perf_counter()
        num_tokens = _total(stage.costs, units)
        factor = learning_rate_factor(len(progress.updates), self.num_updates, self.config.warmup)
        learning_rate = self.engine.set_learning_rate(factor)
        loss, norm = self._optimizer_step(units, epoch)
        progress.samples += _total(stage.sizes, units)
        progress.tokens += num_tokens
        progress.seconds = time.perf_counter() - self._started
        row = {"epoch": float(epoch), "loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}
        progress.updates.append(row)
        speed = self.meter.add(num_tokens, stage.flops(units), time.perf_counter() - started)
        self._log("train", {**row, **speed, "peak_memory_gib": throughput.peak_memory(self.engine.device)})

    def _optimizer_step(self, units: Sequence[int], epoch: int) -> tuple[float, float]:
        """One step of the optimizer over a global batch; its mean loss and the norm of its gradient."""
        import torch

        micro = self._accumulate_gradients(units, epoch)
        # With a zero in front: a worker may have had no micro-batch.
        losses = [torch.zeros((), device=self.engine.device)]
        losses += [batch.loss.float() for batch in micro]
        total = torch.stack(losses).sum()
        torch.distributed.all_reduce(total)
        if not torch.isfinite(total):
            broken = [batch for batch in micro if not torch.isfinite(batch.loss)]
            self._raise_not_finite("loss", float(total), epoch, broken)
        with self._memory_explained(epoch, units):
            norm = self.engine.step()
        if not math.isfinite(norm):  # no checkpoint has these weights yet, and none will
            self._raise_not_finite("gradient's norm", norm, epoch, micro)
        return float(total), norm

    def _accumulate_gradients(self, units: Sequence[int], epoch: int) -> list[_MicroBatch]:
        """Run forward and backward over every n-th micro-batch of a global batch, on this worker, the n-th of n.

        A worker without a micro-batch left runs the first one with weight 0: ZeRO's collectives want the same number of
        passes everywhere.
        """
        import torch

        stage, rank, size = self.stage, self.worker.rank, self.worker.size
        num_samples = _total(stage.sizes, units)
        batches = micro_batches(units, stage.costs, stage.micro_batch_budget, stage.padded)
        finished: list[_MicroBatch] = []
        for start in range(0, len(batches), size):
            has_batch = start + rank < len(batches)
            batch = batches[start + rank] if has_batch else batches[0]
            torch.manual_seed(self._dropout_seed(epoch, batch))
            with self._memory_explained(epoch, batch):
                loss = self.engine.loss(batch, epoch) / num_samples
                # DeepSpeed averages gradients over workers, where their sum is meant: hence the factor.
                self.engine.backward(loss * (size if has_batch else 0.0))
            if has_batch:
                finished.append(_MicroBatch(batch, loss.detach()))
        return finished

    def _dropout_seed(self, epoch: int, units: Sequence[int]) -> int:
        """The seed of the random numbers of one forward pass."""
        names = sorted(self._names_of(units))
        return random.Random(f"{self.config.seed}/{epoch}/{names}").getrandbits(62)

    def _names_of(self, units: Sequence[int]) -> list[str]:
        return [self.stage.names[unit] for unit in units]

    def _raise_not_finite(self, figure: str, value: float, epoch: int, batches: Sequence[_MicroBatch]) -> None:
        """Stop on all workers, each with the ids of all samples in whose passes a figure was not finite."""
        import torch

        own_names: list[str] = []
        for batch in batches:
            own_names += self._names_of(batch.units)
        gathered: list[Any] = [None] * self.worker.size
        torch.distributed.all_gather_object(gathered, own_names)
        all_names = sorted(chain.from_iterable(gathered))
        raise TrainingError(
            f"the {figure} is {value} in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
            f"{all_names}. Look at these samples; if they are sound, lower learning_rate or train in float32."
        )

    @contextmanager
    def _memory_explained(self, epoch: int, units: Sequence[int]) -> Iterator[None]:
        """Turn an out-of-memory error into a `TrainingError` that names the samples and the settings to change."""
        import torch

        try:
            yield
        except RuntimeError as error:
            # On a CPU torch has no error type of its own for it, only this word in the message.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            config = self.config
            num_tokens = _total(self.stage.costs, units)
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
                f"{self._names_of(units)} (cost {num_tokens:,}): {error} Lower micro_batch_tokens (now "
                f"{config.micro_batch_tokens:,}), set "
                f"activation_checkpointing (now {config.activation_checkpointing}), raise zero_stage (now "
                f"{config.zero_stage}, with {config.num_workers} workers) or offload (now {config.offload}): training "
                "then goes on from its last checkpoint. Or train with lora, anew."
            ) from error

    # Checkpoints

    def _preemption_announced(self) -> bool:
        """Whether a machine of the group is about to be taken away, of which nothing was known before."""
        import torch

        is_time = time.perf_counter() - self._last_preemption_check > PREEMPTION_CHECK_SECONDS
        # Rank 0's clock decides for all: the notice must be asked for by all workers together.
        is_time_on_rank_0 = torch.tensor(is_time, device=self.engine.device).int()
        torch.distributed.broadcast(is_time_on_rank_0, 0)
        if not is_time_on_rank_0:
            return False
        self._last_preemption_check = time.perf_counter()
        new_nodes = set(self.worker.preempted_nodes()) - self._announced_nodes
        self._announced_nodes |= new_nodes
        return bool(new_nodes)

    def _checkpoint(self) -> None:
        """Write this worker's part of a checkpoint and hand it over; the group's parts make one checkpoint."""
        progress, worker = self.progress, self.worker
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints.save(self.engine, asdict(progress), Path(scratch), worker.rank, worker.size)
            metrics = {"epoch": float(progress.epoch), "updates": float(len(progress.updates))}
            worker.save_checkpoint(scratch, metrics)

    def restore(self) -> None:
        """Go on from the newest checkpoint, where there is one."""
        latest = self.worker.latest_checkpoint()
        if latest is not None:
            self.progress = Progress(**checkpoints.read_progress(Path(latest)))
            checkpoints.load(self.engine, Path(latest), len(self.progress.updates))

    def save_model(self) -> None:
        """Write the model of the best epoch (else of the last) and the history to the artifact's folder."""
        best_epoch = self.progress.best_epoch
        # All workers must enter, though rank 0 alone goes on.
        with self.engine.gathered_weights(), tempfile.TemporaryDirectory() as scratch:
            if self.worker.rank != 0:
                return
            if best_epoch is not None:
                self._load_best_weights(best_epoch, scratch)
            self.stage.save(Path(scratch) / "model", selected_figures(self.progress.epochs, best_epoch))
            checkpoints.copy(f"{scratch}/model", self.worker.folder)
        fs, path = filesystem(f"{self.worker.folder}/{HISTORY}")
        stopped_early = self.progress.epoch < self.config.epochs
        # The history comes last: where it is, the model is whole.
        history = asdict(self.progress) | {"best_epoch": best_epoch, "stopped_early": stopped_early}
        write_file(fs, path, json.dumps(history, allow_nan=False).encode())

    def _load_best_weights(self, epoch: int, scratch: str) -> None:
        from safetensors.torch import load_file

        checkpoints.copy(self._best_weights_path(epoch), f"{scratch}/best")
        weights = load_file(f"{scratch}/best")
        WeightMismatch.between(self.engine.trainable, weights).check(f"what epoch {epoch} left")
        for name, weight in weights.items():
            self.engine.trainable[name].data.copy_(weight)

    def _save_best_weights(self, epoch: int) -> None:
        """Set the trained weights of an epoch aside (not the frozen ones: a text tower may have 16 GB of them)."""
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints.save_trainable(self.engine, Path(scratch) / "best", self.worker.rank)
            if self.worker.rank == 0:
                checkpoints.copy(f"{scratch}/best", self._best_weights_path(epoch))

    def _best_weights_path(self, epoch: int) -> str:
        return f"{self.worker.work}/best-{epoch}.safetensors"


def _total(values: Sequence[int], units: Sequence[int]) -> int:
    return sum(values[unit] for unit in units)


def _group_peak_flops(device: str, dtype: str, num_workers: int) -> float | None:
    """Peak FLOP/s of all the group's GPUs; None where it is not known, and on a CPU."""
    import torch

    # The published peaks are bfloat16's: a share of them says nothing of a float32 training.
    if device == "cpu" or dtype != "bfloat16":
        return None
    peak = throughput.peak_flops(torch.cuda.get_device_name())
    return None if peak is None else peak * num_workers
