"""The one training loop, for every stage: DeepSpeed in each worker of a group (`launch` makes the group).

Enters: a stage (its model, its samples, its loss), a `TrainConfig`, and what this worker is in its group. Leaves: the
stage's model in a folder, with ``history.json`` (the loss of each update, validation figures, seconds, tokens).

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from medmm_ray.config import Config, execution
from medmm_ray.data.tables import filesystem, write_file
from medmm_ray.engines.weights import WeightMismatch
from medmm_ray.train import checkpoints, throughput
from medmm_ray.train.engine import Engine
from medmm_ray.train.schedule import epoch_batches, learning_rate_factor, micro_batches
from medmm_ray.train.trackers import TrackerName, open_trackers

if TYPE_CHECKING:
    import torch

WORK = ".checkpoints"
HISTORY = "history.json"
PROGRESS = f"{WORK}/progress.json"
REPORT_SECONDS = 5.0
NOTICE_SECONDS = 5.0  # a spot machine is taken 30 s (GCP) to 120 s (AWS) after its notice


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why, with ids, and what to do."""


class TrainConfig(Config):
    """What every stage is trained with: AdamW, a cosine with warm-up, gradients clipped."""

    seed: int = 0
    """Of initial weights, data order and augmentation."""
    epochs: int = Field(3, ge=1)
    """Times that every sample is seen."""
    batch_size: int = Field(64, ge=1)
    """Samples of one update, over all workers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's, on matrices; not on biases and norms."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of all updates in which the learning rate rises."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients above this norm are scaled down to it."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a better validation figure after which training ends; null: never before the last epoch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights in the forward and backward pass; auto: bfloat16 on a GPU, float32 without."""
    activation_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass: less memory, about 30 % more time."""
    zero_stage: Literal[0, 1, 2, 3] = execution(0)
    """What DeepSpeed divides among workers: 1 optimizer states, 2 and gradients, 3 and weights. In bfloat16 at least
    1."""
    offload: Literal["none", "optimizer", "parameters"] = execution("none")
    """What lies in CPU memory between uses: optimizer states (from ZeRO 1 on), or weights too (ZeRO 3)."""
    num_workers: int = execution(1)
    """Training processes. A training that was interrupted may go on with another number of them."""
    cpus_per_worker: float = execution(2.0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = execution(0.0)
    """GPUs of a worker; 0 trains on CPU."""
    threads: int = execution(2)
    """Torch threads of a worker that trains on CPU. Two runs are equal bit by bit only at the same number."""
    micro_batch_tokens: int = execution(8192)
    """Tokens of one forward pass of a worker; lower it when memory runs out."""
    checkpoint_every: int = execution(0)
    """Updates between checkpoints; 0: at the ends of epochs."""
    max_failures: int = execution(1)
    """Worker failures, preemptions apart, after which training starts again from its last checkpoint by itself."""
    trackers: tuple[TrackerName, ...] = execution(("tensorboard",))
    """Where each update's figures go: tensorboard (a folder beside the model), wandb, mlflow."""

    @model_validator(mode="after")
    def _offloads(self) -> "TrainConfig":
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage={needed} or more, not {self.zero_stage}")
        return self


class Stage(ABC):
    """What a stage brings to the loop. It is made in the worker: ``stage(config, inputs, device)``.

    `module` is the model; its parameters that ask for a gradient are trained. `names` (ids), `sizes` and `costs`
    describe the units (see `schedule`); a forward pass takes units that cost `budget` together, and `padded` says
    whether they cost their longest one times their number.
    """

    module: "torch.nn.Module"
    names: Sequence[str]
    sizes: Sequence[int]
    costs: Sequence[int]
    budget: int
    padded: bool

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of parameters whose names start with a key; all others take the config's."""
        return {}

    @abstractmethod
    def loss(self, units: Sequence[int], epoch: int) -> "torch.Tensor":
        """The *sum* of the samples' losses: the loop divides by the samples of the global batch."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, after each epoch; ``selection`` (higher is better) picks the epoch that is kept."""
        return {}

    def flops(self, units: Sequence[int]) -> float:  # noqa: ARG002
        """Floating-point operations that the model needs to train on these units once; 0: not counted."""
        return 0.0

    @abstractmethod
    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the model, whole, in the form that other steps read; `figures` are those of the epoch that is kept."""


StageFactory = Callable[[Any, dict[str, str], str], Stage]


@dataclass
class Progress:
    """Where training is: everything that a checkpoint holds besides weights and optimizer."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    tokens: int = 0
    samples: int = 0
    updates: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)

    @property
    def best_epoch(self) -> int | None:
        """The epoch, from 0, with the highest selection figure; None where there is none."""
        scored = [(row["selection"], -row["epoch"]) for row in self.epochs if "selection" in row]
        return int(-max(scored)[1]) if scored else None

    def is_over(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or the last `patience` of them brought no better selection figure."""
        best = self.best_epoch
        stale = 0 if best is None else self.epoch - 1 - best
        return self.epoch >= epochs or (patience is not None and stale >= patience)


@dataclass(frozen=True)
class Worker:
    """One process of the training group `name`, and its ways to keep things.

    `latest` gives the folder of the newest checkpoint, `keep` takes this worker's part of a new one. `notice` says
    which machines of the group will be taken away soon, the same to all workers, which must all ask together.
    """

    rank: int
    size: int
    name: str
    work: str
    folder: str
    latest: Callable[[], str | None]
    keep: Callable[[str, dict[str, float]], None]
    notice: Callable[[], Sequence[str]]


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
    training = Trainer(make_stage(config, inputs, device), config, worker, device)
    training.restore()
    with training.tracked():
        while not training.progress.is_over(config.epochs, config.patience):
            training.epoch(training.progress.epoch)
    training.leave()
    torch.distributed.barrier()


class Trainer:
    """A stage under DeepSpeed, and how far it is."""

    def __init__(self, stage: Stage, config: TrainConfig, worker: Worker, device: str) -> None:
        import torch

        self.stage, self.config, self.worker = stage, config, worker
        self.batches = [epoch_batches(stage.sizes, config.batch_size, config.seed, e) for e in range(config.epochs)]
        self.num_updates = sum(len(batches) for batches in self.batches)
        if self.num_updates == 0:
            raise TrainingError(f"{type(stage).__name__}: there is not one sample to train on; look at the inputs")
        self.progress = Progress()
        dtype = config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        self.engine = Engine(stage.module, stage.loss, stage.learning_rates(), config, dtype)
        known = device != "cpu" and dtype == "bfloat16"
        peak = throughput.peak_flops(torch.cuda.get_device_name()) if known else None
        self.speed = throughput.ThroughputMeter(None if peak is None else peak * worker.size)
        self._said = self._asked = time.perf_counter()
        self._noticed: set[str] = set()

    @contextmanager
    def tracked(self) -> Iterator[None]:
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

    def _log(self, kind: str, figures: dict[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in figures.items() if name != "epoch"}
        for tracker in self.trackers:
            tracker.log(named, len(self.progress.updates))

    def epoch(self, epoch: int) -> None:
        """The rest of an epoch, its validation, and a checkpoint."""
        progress, stage, every = self.progress, self.stage, self.config.checkpoint_every
        self._started = time.perf_counter() - progress.seconds
        stage.module.train()
        for number in range(progress.batch, len(self.batches[epoch])):
            self._update(epoch, self.batches[epoch][number])
            progress.batch = number + 1
            self._say()
            if self._taken_away_soon() or (every and len(progress.updates) % every == 0):
                self._checkpoint()
        losses = [row["loss"] for row in progress.updates if row["epoch"] == epoch]
        figures = {"loss": sum(losses) / len(losses), **self._validated(), **self.speed.take()}
        progress.epochs.append({"epoch": epoch, **figures})
        self._log("epoch", figures)
        if progress.best_epoch == epoch:
            self._keep_best(epoch)
        progress.epoch, progress.batch = epoch + 1, 0
        progress.seconds = time.perf_counter() - self._started
        self._checkpoint()

    def _validated(self) -> dict[str, float]:
        """The stage's figures, rank 0's on all workers, and the highest peak of memory among them."""
        import torch

        self.stage.module.eval()
        with torch.no_grad():
            figures = self.stage.validate()
        found: list[Any] = [None] * self.worker.size
        torch.distributed.all_gather_object(found, (figures, throughput.peak_memory(self.engine.device)))
        broken = {name: value for name, value in found[0][0].items() if not math.isfinite(value)}
        if broken:
            raise TrainingError(
                f"validation gives {broken} after {len(self.progress.updates)} updates; expected finite numbers. Lower "
                "learning_rate or train in float32."
            )
        return {**found[0][0], "peak_memory_gib": max(peak for _, peak in found)}

    def _update(self, epoch: int, units: Sequence[int]) -> None:
        stage, progress = self.stage, self.progress
        tokens, began = sum(stage.costs[u] for u in units), time.perf_counter()
        rate = self.engine.set_learning_rate(
            learning_rate_factor(len(progress.updates), self.num_updates, self.config.warmup)
        )
        loss, norm = self._step(units, epoch)
        progress.samples += sum(stage.sizes[u] for u in units)
        progress.tokens += tokens
        progress.seconds = time.perf_counter() - self._started
        row = {"epoch": float(epoch), "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        progress.updates.append(row)
        speed = self.speed.add(tokens, stage.flops(units), time.perf_counter() - began)
        self._log("train", {**row, **speed, "peak_memory_gib": throughput.peak_memory(self.engine.device)})

    def _step(self, units: Sequence[int], epoch: int) -> tuple[float, float]:
        """One step of the optimizer over a global batch, of which this worker takes every n-th group; its mean loss
        and the norm of its gradient.

        DeepSpeed averages gradients over workers, hence the factor `size`. A worker without a group left runs the
        first one with weight 0: ZeRO's collectives want the same number of passes everywhere.
        """
        import torch

        stage, rank, size = self.stage, self.worker.rank, self.worker.size
        num_samples = sum(stage.sizes[u] for u in units)
        groups = micro_batches(units, stage.costs, stage.budget, stage.padded)
        losses: list[tuple[list[int], torch.Tensor]] = []
        for at in range(0, len(groups), size):
            mine = at + rank < len(groups)
            group = groups[at + rank] if mine else groups[0]
            torch.manual_seed(self._seed(epoch, group))
            with self._within_memory(epoch, group):
                loss = self.engine.loss(group, epoch) / num_samples
                self.engine.backward(loss * (size if mine else 0.0))
            if mine:
                losses.append((group, loss.detach()))
        total = torch.stack([torch.zeros((), device=self.engine.device), *(value.float() for _, value in losses)]).sum()
        torch.distributed.all_reduce(total)
        if not torch.isfinite(total):
            bad = [stage.names[u] for group, value in losses if not torch.isfinite(value) for u in group]
            self._refuse("loss", float(total), epoch, bad)
        with self._within_memory(epoch, units):
            norm = self.engine.step()
        if not math.isfinite(norm):  # no checkpoint has these weights yet, and none will
            self._refuse("gradient's norm", norm, epoch, [stage.names[u] for group, _ in losses for u in group])
        return float(total), norm

    def _seed(self, epoch: int, group: Sequence[int]) -> int:
        """Of the random numbers of one forward pass."""
        names = sorted(self.stage.names[u] for u in group)
        return random.Random(f"{self.config.seed}/{epoch}/{names}").getrandbits(62)

    def _refuse(self, figure: str, value: float, epoch: int, bad: list[str]) -> None:
        """Stop on all workers, each with the ids of all samples in whose passes a figure was not finite."""
        import torch

        found: list[Any] = [None] * self.worker.size
        torch.distributed.all_gather_object(found, bad)
        raise TrainingError(
            f"the {figure} is {value} in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
            f"{sorted(name for names in found for name in names)}. Look at these samples; if they are sound, lower "
            "learning_rate or train in float32."
        )

    @contextmanager
    def _within_memory(self, epoch: int, units: Sequence[int]) -> Iterator[None]:
        import torch

        try:
            yield
        except RuntimeError as error:  # torch says it so on a CPU
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            config, tokens = self.config, sum(self.stage.costs[u] for u in units)
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
                f"{[self.stage.names[u] for u in units]} (cost {tokens:,}): {error} Lower micro_batch_tokens (now "
                f"{config.micro_batch_tokens:,}), set activation_checkpointing (now {config.activation_checkpointing}),"
                f" raise zero_stage (now {config.zero_stage}, with {config.num_workers} workers) or offload (now "
                f"{config.offload}): training then goes on from its last checkpoint. Or train with lora, anew."
            ) from error

    def _taken_away_soon(self) -> bool:
        """Whether a machine of the group is about to be taken away, of which nobody knew before."""
        import torch

        due = torch.tensor(time.perf_counter() - self._asked > NOTICE_SECONDS, device=self.engine.device).int()
        torch.distributed.broadcast(due, 0)
        if not due:
            return False
        self._asked = time.perf_counter()
        new = set(self.worker.notice()) - self._noticed
        self._noticed |= new
        return bool(new)

    def _say(self) -> None:
        """Tell who waits, every few seconds, how far training is: a small file beside the checkpoints."""
        if self.worker.rank == 0 and time.perf_counter() - self._said > REPORT_SECONDS:
            self._said, done = time.perf_counter(), len(self.progress.updates)
            fs, path = filesystem(f"{self.worker.folder}/{PROGRESS}")
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            write_file(fs, path, json.dumps({
                "update": done, "updates": self.num_updates, "loss": self.progress.updates[-1]["loss"],
                "tokens_per_second": self.progress.tokens / self.progress.seconds,
                "seconds_left": self.progress.seconds / done * (self.num_updates - done),
            }).encode())  # fmt: skip
            for tracker in self.trackers:
                tracker.flush()

    def _checkpoint(self) -> None:
        """Every worker writes its part and hands it over; the group's parts make one checkpoint."""
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints.save(self.engine, asdict(self.progress), Path(scratch), self.worker.rank, self.worker.size)
            done = {"epoch": float(self.progress.epoch), "updates": float(len(self.progress.updates))}
            self.worker.keep(scratch, done)

    def restore(self) -> None:
        """Go on from the newest checkpoint, where there is one."""
        latest = self.worker.latest()
        if latest is not None:
            self.progress = Progress(**checkpoints.progress_in(Path(latest)))
            checkpoints.load(self.engine, Path(latest), len(self.progress.updates))

    def leave(self) -> None:
        """The model of the best epoch (else of the last) and the history, in the artifact's folder."""
        from safetensors.torch import load_file

        best, rank = self.progress.best_epoch, self.worker.rank
        with self.engine.whole_weights(), tempfile.TemporaryDirectory() as made:
            if rank != 0:
                return
            if best is not None:
                checkpoints.copy(self._best_weights(best), f"{made}/best")
                weights_of = load_file(f"{made}/best")
                WeightMismatch.between(self.engine.trained, weights_of).check(f"what epoch {best} left")
                for name, weights in weights_of.items():
                    self.engine.trained[name].data.copy_(weights)
            self.stage.save(Path(made) / "model", selected_figures(self.progress.epochs, best))
            checkpoints.copy(f"{made}/model", self.worker.folder)
        fs, path = filesystem(f"{self.worker.folder}/{HISTORY}")
        stopped = self.progress.epoch < self.config.epochs
        history = asdict(self.progress) | {"best_epoch": best, "stopped_early": stopped}
        write_file(fs, path, json.dumps(history, allow_nan=False).encode())

    def _keep_best(self, epoch: int) -> None:
        """Set the trained weights of an epoch aside (not the frozen ones: a text tower may have 16 GB of them)."""
        with tempfile.TemporaryDirectory() as made:
            checkpoints.save_trained(self.engine, Path(made) / "best", self.worker.rank)
            if self.worker.rank == 0:
                checkpoints.copy(f"{made}/best", self._best_weights(epoch))

    def _best_weights(self, epoch: int) -> str:
        return f"{self.worker.work}/best-{epoch}.safetensors"


def selected_figures(epochs: Sequence[Mapping[str, float]], best: int | None) -> dict[str, float]:
    """What was measured in the epoch that is kept: the best one, else the last."""
    kept = epochs[-1 if best is None else best]
    return {key: value for key, value in kept.items() if key not in ("epoch", "selection")}


def progress_text(folder: str) -> str:
    """What the training of `folder` last told, in words; nothing where none is under way (or has not told yet)."""
    fs, path = filesystem(f"{folder}/{PROGRESS}")
    try:
        with fs.open_input_stream(path) as stream:
            told = json.loads(stream.read())
    except FileNotFoundError:
        return ""
    return (
        f"update {told['update']:,} of {told['updates']:,}, loss {told['loss']:.3f}, "
        f"{told['tokens_per_second']:,.0f} tokens/s, {told['seconds_left']:.0f} s left"
    )
