"""The one training loop, for every stage: DeepSpeed in each worker of a group (`launch` makes the group).

Enters: a stage (its model, its samples, its loss), a `TrainConfig`, and what this worker is in its group. Leaves: the
stage's model in a folder, with ``history.json`` (the loss of each update, validation figures, seconds, tokens).

Ray Train runs the group and DeepSpeed steps and shards; the loop between them is ours because the trainers of
transformers and TRL batch rows, while here an update counts solutions, packed by question into micro-batches that
differ in number, and must come out the same on any number of workers.

The same seed gives the same updates on any number of workers, and a training that goes on from a checkpoint ends in the
same weights as an undisturbed one, also with another number of workers or another ZeRO stage. An adapter's dropout
depends on (seed, epoch, solution) alone, on one kind of device. Other random numbers inside a model are drawn anew for
each forward pass from (seed, epoch, its samples): another number of workers, or another `micro_batch_tokens`, makes
other passes.
"""

import json
import math
import os
import random
import tempfile
import time
from collections import deque
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
from medmm_ray.train.schedule import (
    Part,
    Rounds,
    deal,
    deal_held_out,
    deal_jointly,
    epoch_updates,
    learning_rate_factor,
)
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
class _Update:
    """The samples of an update, and the passes that they are dealt to."""

    parts: Sequence[Part]
    rounds: Rounds


@dataclass(frozen=True)
class _Pass:
    """What one forward pass of this worker ran on, and its share of the global batch's mean loss."""

    parts: Sequence[Part]
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
        self.num_updates = sum(len(self.updates(epoch)) for epoch in range(config.epochs))
        if self.num_updates == 0:
            raise TrainingError(f"{type(stage).__name__}: there is not one sample to train on; look at the inputs")
        self.progress = Progress()
        dtype = forward_dtype(config, device)
        self.engine = Engine(stage.module, stage.loss, stage.learning_rates(), config, dtype)
        self.meter = throughput.ThroughputMeter(_group_peak_flops(device, dtype, worker.size))
        self._last_report = time.perf_counter()
        self._last_preemption_check = self._last_report
        self._announced_nodes: set[str] = set()

    def updates(self, epoch: int) -> list[list[Part]]:
        """What each update of an epoch is trained on."""
        config = self.config
        # Not kept: of all epochs together they take more memory than the samples' costs.
        return epoch_updates(self.stage.units, config.batch_size, config.num_questions_per_update, config.seed, epoch)

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
        for update in self._dealt(self.updates(epoch)[progress.batch :], epoch):
            self._update(epoch, update)
            progress.batch += 1
            self._report_progress()
            # The first first: it is a collective, that all workers enter or none.
            if self._preemption_announced() or self._checkpoint_is_due():
                self._checkpoint()
        self._finish_epoch(epoch)

    def _dealt(self, updates: Sequence[Sequence[Part]], epoch: int) -> Iterator[_Update]:
        """Updates dealt to the workers; while one is trained on, what the next one needs is read."""
        ahead: deque[_Update] = deque()
        for parts in updates:
            # One update ahead and no more: what is read ahead is held in memory.
            ahead.append(self._deal(parts))
            for passes in ahead[-1].rounds:
                self.stage.prepare(self._parts_of_pass(passes), epoch)
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _deal(self, parts: Sequence[Part]) -> _Update:
        stage, size = self.stage, self.worker.size
        if stage.joint:
            return _Update(parts, deal_jointly(parts, size, stage.micro_batch_budget))
        return _Update(parts, deal(parts, stage.units, size, stage.micro_batch_budget))

    def _parts_of_pass(self, passes: Sequence[Sequence[Part]]) -> Sequence[Part]:
        """This worker's pass of a round, or the one that it repeats where it has none."""
        return passes[self.worker.rank] or passes[0]

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
            own_figures = self.stage.figures(self._measure())
        peak = throughput.peak_memory(self.engine.device)
        # Rank 0's for everybody: workers that disagreed on the best epoch would stop at different ones.
        gathered = self._gather((own_figures, peak))
        figures: dict[str, float] = gathered[0][0]
        broken = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if broken:
            raise TrainingError(
                f"validation gives {broken} after {len(self.progress.updates)} updates; expected finite numbers. Lower "
                "learning_rate or train in float32."
            )
        return {**figures, "peak_memory_gib": max(peak for _, peak in gathered)}

    def _measure(self) -> list[Any]:
        """What all workers together measure of the held-out units, in their order."""
        stage, rank = self.stage, self.worker.rank
        rounds = deal_held_out(stage.held_out, stage.units, self.worker.size)
        measured: dict[int, Any] = {}
        for number, units in enumerate(rounds):
            # In the last round some repeat a unit: ZeRO's collectives want the same number of passes everywhere.
            unit = units[min(rank, len(units) - 1)]
            if number + 1 < len(rounds):
                following = rounds[number + 1]
                stage.prepare([stage.units.whole(following[min(rank, len(following) - 1)])], None)
            measured[unit] = stage.measure(unit)
        for of_worker in self._gather(measured):
            measured.update(of_worker)
        return [measured[unit] for unit in stage.held_out]

    def _gather(self, value: Any) -> list[Any]:
        """The value of each worker, on all of them."""
        import torch

        gathered: list[Any] = [None] * self.worker.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    # Updates

    def _update(self, epoch: int, update: _Update) -> None:
        """Take one optimizer step, and note its figures."""
        units, progress = self.stage.units, self.progress
        started = time.perf_counter()
        num_tokens = units.num_tokens(update.parts)
        factor = learning_rate_factor(len(progress.updates), self.num_updates, self.config.warmup)
        learning_rate = self.engine.set_learning_rate(factor)
        loss, norm = self._optimizer_step(update, epoch)
        progress.samples += units.num_samples(update.parts)
        progress.tokens += num_tokens
        progress.seconds = time.perf_counter() - self._started
        row = {"epoch": float(epoch), "loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}
        progress.updates.append(row)
        speed = self.meter.add(num_tokens, units.num_flops(update.parts), time.perf_counter() - started)
        self._log("train", {**row, **speed, "peak_memory_gib": throughput.peak_memory(self.engine.device)})

    def _optimizer_step(self, update: _Update, epoch: int) -> tuple[float, float]:
        """One step of the optimizer over a global batch; its mean loss and the norm of its gradient."""
        import torch

        passes = self._accumulate_gradients(update, epoch)
        # With a zero in front: a worker may have had no pass of its own.
        losses = [torch.zeros((), device=self.engine.device)]
        losses += [each.loss.float() for each in passes]
        total = torch.stack(losses).sum()
        torch.distributed.all_reduce(total)
        if not torch.isfinite(total):
            broken = [each for each in passes if not torch.isfinite(each.loss)]
            self._raise_not_finite("loss", float(total), epoch, broken)
        with self._memory_explained(epoch, update.parts):
            norm = self.engine.step()
        if not math.isfinite(norm):  # no checkpoint has these weights yet, and none will
            self._raise_not_finite("gradient's norm", norm, epoch, passes)
        return float(total), norm

    def _accumulate_gradients(self, update: _Update, epoch: int) -> list[_Pass]:
        """Run forward and backward over this worker's pass of each round.

        A worker that has none in the last round repeats another one's with weight 0: ZeRO's collectives want the same
        number of passes everywhere.
        """
        import torch

        stage, size = self.stage, self.worker.size
        num_samples = stage.units.num_samples(update.parts)
        finished: list[_Pass] = []
        for passes in update.rounds:
            stage.idle = not passes[self.worker.rank]
            parts = self._parts_of_pass(passes)
            torch.manual_seed(self._pass_seed(epoch, parts))
            with self._memory_explained(epoch, parts):
                loss = self.engine.loss(parts, epoch) / num_samples
                # DeepSpeed averages gradients over workers, where their sum is meant: hence the factor.
                self.engine.backward(loss * (0.0 if stage.idle else size))
            if not stage.idle:
                finished.append(_Pass(parts, loss.detach()))
        return finished

    def _pass_seed(self, epoch: int, parts: Sequence[Part]) -> int:
        """The seed of the random numbers of one forward pass."""
        samples = sorted((self.stage.units.names[part.unit], part.solutions) for part in parts)
        return random.Random(f"{self.config.seed}/{epoch}/{samples}").getrandbits(62)

    def _raise_not_finite(self, figure: str, value: float, epoch: int, passes: Sequence[_Pass]) -> None:
        """Stop on all workers, each with the ids of all samples in whose passes a figure was not finite."""
        own_names: list[str] = []
        for each in passes:
            own_names += self.stage.units.names_of(each.parts)
        all_names = sorted(set(chain.from_iterable(self._gather(own_names))))
        raise TrainingError(
            f"the {figure} is {value} in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
            f"{all_names}. Look at these samples; if they are sound, lower learning_rate or train in float32."
        )

    @contextmanager
    def _memory_explained(self, epoch: int, parts: Sequence[Part]) -> Iterator[None]:
        """Turn an out-of-memory error into a `TrainingError` that names the samples and the settings to change."""
        import torch

        try:
            yield
        except RuntimeError as error:
            # On a CPU torch has no error type of its own for it, only this word in the message.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            config = self.config
            units = self.stage.units
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
                f"{units.names_of(parts)} (cost {units.num_tokens(parts):,}): {error} Lower micro_batch_tokens (now "
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


def _group_peak_flops(device: str, dtype: str, num_workers: int) -> float | None:
    """Peak FLOP/s of all the group's GPUs; None where it is not known, and on a CPU."""
    import torch

    # The published peaks are bfloat16's: a share of them says nothing of a float32 training.
    if device == "cpu" or dtype != "bfloat16":
        return None
    peak = throughput.peak_flops(torch.cuda.get_device_name())
    return None if peak is None else peak * num_workers
