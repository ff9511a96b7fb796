"""The one training loop, for every stage: DeepSpeed in each worker of a group (`launch` makes the group).

Enters: a stage (its model, its samples, its loss), a `TrainConfig`, and what this worker is in its group. Leaves: the
stage's model in a folder, with ``history.json`` (the loss of each update, validation figures, seconds, tokens).

The same seed gives the same batches on any number of workers, and a training that goes on from a checkpoint ends in the
same weights as an undisturbed one.
"""

import json
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyarrow import fs as pafs

from medmm_ray.config import Config, execution
from medmm_ray.tables import filesystem, write_file
from medmm_ray.train.schedule import epoch_batches, learning_rate_factor, micro_batches

if TYPE_CHECKING:
    import torch

WORK = ".checkpoints"
HISTORY = "history.json"
PROGRESS = f"{WORK}/progress.json"
REPORT_SECONDS = 5.0


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why, with ids, and what to do."""


class TrainConfig(Config):
    """What every stage is trained with: AdamW, a cosine with warm-up, gradients clipped."""

    seed: int = 0
    """Of initial weights, data order and augmentation."""
    epochs: int = 3
    """Times that every sample is seen."""
    batch_size: int = 64
    """Samples of one update, over all workers."""
    learning_rate: float = 1e-4
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's, on matrices; not on biases and norms."""
    warmup: float = 0.05
    """Share of all updates in which the learning rate rises."""
    max_grad_norm: float = 1.0
    """Gradients above this norm are scaled down to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights in the forward and backward pass; auto: bfloat16 on a GPU, float32 without."""
    activation_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass: less memory, about 30 % more time."""
    zero_stage: Literal[0, 1, 2, 3] = execution(0)
    """What DeepSpeed divides among workers: 1 optimizer states, 2 and gradients, 3 and weights."""
    offload: Literal["none", "optimizer", "parameters"] = execution("none")
    """What lies in CPU memory between uses: optimizer states, or weights too (ZeRO 3)."""
    num_workers: int = execution(1)
    """Training processes."""
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

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model, whole, in the form that other steps read."""


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


@dataclass(frozen=True)
class Worker:
    """One process of the training group, and its ways to keep things."""

    rank: int
    size: int
    work: str
    folder: str
    latest: Callable[[], str | None]
    keep: Callable[[str, dict[str, float]], None]


def deepspeed_config(config: TrainConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's settings. An update's micro-batches vary in number, so the loop owns their accumulation."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def parameter_groups(
    module: "torch.nn.Module", default: float, rates: dict[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups, by learning rate and weight decay: matrices decay, biases, norms and scalars do not."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), default)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in sorted(groups.items())]


def run(make_stage: StageFactory, config: TrainConfig, inputs: dict[str, str], worker: Worker) -> None:
    """Train in this process, one of the group; torch.distributed is initialised already.

    Raises `TrainingError` where a loss is not finite, with the ids of its batch.
    """
    if config.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    import torch

    device = f"cuda:{torch.cuda.current_device()}" if config.gpus_per_worker else "cpu"
    if device == "cpu":
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    training = Training(make_stage(config, inputs, device), config, worker, device)
    training.restore()
    for epoch in range(training.progress.epoch, config.epochs):
        training.epoch(epoch)
    training.leave()
    torch.distributed.barrier()


def loss_module(stage: Stage) -> "torch.nn.Module":
    """The stage as a module whose forward pass is its loss: DeepSpeed's hooks want one call, one output."""
    import torch

    class LossModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = stage.module

        def forward(self, units: list[int], epoch: int) -> torch.Tensor:
            return stage.loss(units, epoch)

    return LossModule()


class Training:
    """A stage under DeepSpeed, and how far it is."""

    def __init__(self, stage: Stage, config: TrainConfig, worker: Worker, device: str) -> None:
        import deepspeed
        import torch

        self.stage, self.config, self.worker = stage, config, worker
        self.batches = [epoch_batches(stage.sizes, config.batch_size, config.seed, e) for e in range(config.epochs)]
        num_updates = sum(len(batches) for batches in self.batches)
        if num_updates == 0:
            raise TrainingError(f"{type(stage).__name__}: there is not one sample to train on; look at the inputs")
        self.progress = Progress()
        self._said = time.perf_counter()
        groups = parameter_groups(stage.module, config.learning_rate, stage.learning_rates(), config.weight_decay)
        # DeepSpeed 0.19.8 cannot broadcast parameters without a dimension (a CLIP's scale, for one).
        self._scalars = [parameter for parameter in stage.module.parameters() if parameter.dim() == 0]
        self._reshape_scalars((1,))
        dtype = config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        self.engine, *_ = deepspeed.initialize(
            model=loss_module(stage),
            optimizer=torch.optim.AdamW(groups),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda update: learning_rate_factor(update, num_updates, config.warmup)
            ),
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )

    def epoch(self, epoch: int) -> None:
        """The rest of an epoch, its validation, and a checkpoint."""
        import torch

        progress, stage, every = self.progress, self.stage, self.config.checkpoint_every
        self._started = time.perf_counter() - progress.seconds
        stage.module.train()
        for number in range(progress.batch, len(self.batches[epoch])):
            self._update(epoch, self.batches[epoch][number])
            progress.batch = number + 1
            self._say()
            if every and len(progress.updates) % every == 0:
                self._checkpoint()
        stage.module.eval()
        with torch.no_grad():
            figures = stage.validate()
        losses = [row["loss"] for row in progress.updates if row["epoch"] == epoch]
        progress.epochs.append({"epoch": epoch, "loss": sum(losses) / len(losses), **figures})
        if progress.best_epoch == epoch:
            self._keep_best(epoch)
        progress.epoch, progress.batch = epoch + 1, 0
        progress.seconds = time.perf_counter() - self._started
        self._checkpoint()

    def _update(self, epoch: int, units: Sequence[int]) -> None:
        stage, progress = self.stage, self.progress
        learning_rate = float(self.engine.get_lr()[0])
        loss = self._step(units, epoch)
        norm = self.engine.get_global_grad_norm()  # None without ZeRO
        progress.samples += sum(stage.sizes[u] for u in units)
        progress.tokens += sum(stage.costs[u] for u in units)
        progress.seconds = time.perf_counter() - self._started
        row = {"epoch": float(epoch), "loss": loss, "learning_rate": learning_rate}
        progress.updates.append(row if norm is None else {**row, "gradient_norm": float(norm)})

    def _step(self, units: Sequence[int], epoch: int) -> float:
        """One step of the optimizer over a global batch, of which this worker takes every n-th group; its mean loss.

        DeepSpeed averages gradients over workers, hence the factor `size`. A worker without a group left runs the
        first one with weight 0: ZeRO's collectives want the same number of passes everywhere.
        """
        import torch

        stage, rank, size = self.stage, self.worker.rank, self.worker.size
        num_samples = sum(stage.sizes[u] for u in units)
        groups = micro_batches(units, stage.costs, stage.budget, stage.padded)
        total = torch.zeros(())
        for at in range(0, len(groups), size):
            mine = at + rank < len(groups)
            group = groups[at + rank] if mine else groups[0]
            loss = self.engine(group, epoch) / num_samples
            value = loss.detach().float().cpu()
            if not torch.isfinite(value):
                raise TrainingError(
                    f"the loss is {value.item()} in epoch {epoch + 1}, after {len(self.progress.updates)} updates, on "
                    f"{[stage.names[u] for u in group]}. Look at these samples; if they are sound, lower learning_rate "
                    "or train in float32."
                )
            self.engine.backward(loss * (size if mine else 0.0))
            total += value * mine
        self.engine.step()
        if size > 1:
            total = total.to(self.engine.device)
            torch.distributed.all_reduce(total)
        return float(total)

    def _say(self) -> None:
        """Tell who waits, every few seconds, how far training is: a small file beside the checkpoints."""
        if self.worker.rank == 0 and time.perf_counter() - self._said > REPORT_SECONDS:
            self._said, done = time.perf_counter(), len(self.progress.updates)
            total = sum(len(batches) for batches in self.batches)
            fs, path = filesystem(f"{self.worker.folder}/{PROGRESS}")
            fs.create_dir(path.rpartition("/")[0], recursive=True)
            write_file(fs, path, json.dumps({
                "update": done, "updates": total, "loss": self.progress.updates[-1]["loss"],
                "tokens_per_second": self.progress.tokens / self.progress.seconds,
                "seconds_left": self.progress.seconds / done * (total - done),
            }).encode())  # fmt: skip

    def _checkpoint(self) -> None:
        """Every worker writes its part and hands it over; the group's parts make one checkpoint."""
        with tempfile.TemporaryDirectory() as scratch:
            self.engine.save_checkpoint(scratch, tag="state", client_state={"progress": asdict(self.progress)})
            done = {"epoch": float(self.progress.epoch), "updates": float(len(self.progress.updates))}
            self.worker.keep(scratch, done)

    def restore(self) -> None:
        """Go on from the newest checkpoint, where there is one."""
        latest = self.worker.latest()
        if latest is None:
            return
        path, state = self.engine.load_checkpoint(latest, tag="state")
        if path is None:
            raise TrainingError(
                f"the checkpoint in {latest} cannot be continued: it is none of {self.worker.size} workers with ZeRO "
                f"{self.config.zero_stage}. Go back to the earlier settings, or delete {self.worker.work}."
            )
        self.progress = Progress(**state["progress"])

    def leave(self) -> None:
        """The model of the best epoch (else of the last) and the history, in the artifact's folder."""
        from safetensors.torch import load_file

        best, rank = self.progress.best_epoch, self.worker.rank
        with self._whole_weights(), tempfile.TemporaryDirectory() as made:
            if rank != 0:
                return
            if best is not None:
                _copy(self._best_weights(best), f"{made}/best")
                for name, weights in load_file(f"{made}/best").items():
                    self.stage.module.get_parameter(name).data.copy_(weights)
            self._reshape_scalars(())
            self.stage.save(Path(made) / "model")
            self._reshape_scalars((1,))
            _copy(f"{made}/model", self.worker.folder)
        fs, path = filesystem(f"{self.worker.folder}/{HISTORY}")
        history = asdict(self.progress) | {"best_epoch": best}
        write_file(fs, path, json.dumps(history).encode())

    def _keep_best(self, epoch: int) -> None:
        """Set the trained weights of an epoch aside (not the frozen ones: a text tower may have 16 GB of them)."""
        from safetensors.torch import save_file

        trained = {n: p for n, p in self.stage.module.named_parameters() if p.requires_grad}
        with self._whole_weights(), tempfile.TemporaryDirectory() as made:
            if self.worker.rank == 0:
                save_file({n: p.detach().cpu().contiguous() for n, p in trained.items()}, f"{made}/best")
                _copy(f"{made}/best", self._best_weights(epoch))

    def _best_weights(self, epoch: int) -> str:
        return f"{self.worker.work}/best-{epoch}.safetensors"

    def _whole_weights(self) -> Any:
        """With ZeRO 3, all weights on every worker (all must enter); rank 0's changes are handed out at the end."""
        import deepspeed

        divided = self.config.zero_stage == 3
        parameters = list(self.stage.module.parameters()) if divided else []
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=divided)

    def _reshape_scalars(self, shape: tuple[int, ...]) -> None:
        for parameter in self._scalars:
            parameter.data = parameter.data.reshape(shape)


def how_far(folder: str) -> str:
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


def _copy(source: str, target: str) -> None:
    """Copy a file or a folder to where nothing, or something older, is."""
    (source_fs, source_path), (fs, path) = filesystem(source), filesystem(target)
    is_file = source_fs.get_file_info(source_path).is_file
    fs.create_dir(path.rpartition("/")[0] if is_file else path, recursive=True)
    pafs.copy_files(source_path, path, source_filesystem=source_fs, destination_filesystem=fs)
