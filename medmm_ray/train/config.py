"""What all stages are trained with (`TrainConfig`)."""

from typing import Literal

from pydantic import Field, model_validator

from medmm_ray.config import execution
from medmm_ray.engines.placement import GpuPlacement

TrackerName = Literal["tensorboard", "wandb", "mlflow"]

# The lowest ZeRO stage at which DeepSpeed can offload a thing: it moves only what it shards.
_LOWEST_ZERO_STAGE = {"none": 0, "optimizer": 1, "parameters": 3}


class TrainConfig(GpuPlacement):
    """What every stage is trained with: AdamW, a cosine with warm-up, gradients clipped."""

    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    epochs: int = Field(3, ge=1)
    """Times that every sample is trained on."""
    batch_size: int = Field(64, ge=1)
    """Samples of one update, over all workers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay, on matrices; not on biases and norms."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of all updates in which the learning rate rises."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients above this norm are scaled down to it."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a better validation figure after which training ends; null: never before the last epoch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights in the forward and backward pass; auto: bfloat16 on a GPU, float32 without."""
    activation_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass: less memory, about 30 % more time."""
    zero_stage: Literal[0, 1, 2, 3] = execution(0)
    """What DeepSpeed shards over the workers: 1 optimizer states, 2 and gradients, 3 and weights. In bfloat16 at least
    1."""
    offload: Literal["none", "optimizer", "parameters"] = execution("none")
    """What lies in CPU memory between uses: optimizer states (from ZeRO 1 on), or weights too (ZeRO 3)."""
    num_workers: int = execution(1, ge=1)
    """Training processes; unset, with GPUs: as the recipe's `gpus` says. A training that was interrupted may go on with
    another number of them."""
    min_workers: int | None = execution(None, ge=1)
    """Fewest training processes: where there is no room for num_workers, or a machine is lost, training runs on as many
    as there are, and grows again at a checkpoint. null: num_workers, no fewer."""
    cpus_per_worker: float = execution(2.0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = execution(0.0)
    """GPUs of a worker; 0 trains on CPU."""
    threads: int = execution(2)
    """Torch threads of a worker that trains on CPU. Two runs are equal bit by bit only at the same number."""
    micro_batch_tokens: int = execution(8192)
    """Most tokens of one forward pass of a worker; lower it when memory runs out."""
    checkpoint_every: int = execution(0)
    """Updates between checkpoints; 0: at the ends of epochs."""
    max_failures: int = execution(1)
    """Worker failures, preemptions apart, after which training starts again from its last checkpoint by itself."""
    trackers: tuple[TrackerName, ...] = execution(("tensorboard",))
    """Where each update's figures go: tensorboard (a folder beside the model), wandb, mlflow."""

    @model_validator(mode="after")
    def _fewest_are_no_more(self) -> "TrainConfig":
        is_sized_later = "num_workers" not in self.model_fields_set and self.gpus_per_worker > 0
        if self.min_workers is not None and self.min_workers > self.num_workers and not is_sized_later:
            raise ValueError(f"min_workers={self.min_workers} is more than num_workers={self.num_workers}")
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            raise ValueError(
                f"accelerator_type={self.accelerator_type!r} names a GPU, and gpus_per_worker is 0: set it, or leave "
                "accelerator_type out"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "TrainConfig":
        lowest = _LOWEST_ZERO_STAGE[self.offload]
        if self.zero_stage < lowest:
            raise ValueError(f"offload={self.offload} needs zero_stage={lowest} or more, not {self.zero_stage}")
        return self

    @property
    def num_questions_per_update(self) -> int:
        """The fewest questions that an update takes solutions of, where there are so many."""
        return 1


class QuestionTrainConfig(TrainConfig):
    """What stages that train on the solutions of questions are set by besides."""

    batch_size: int = Field(64, ge=1)
    """Solutions of one update, of several questions, over all workers."""
    questions_per_update: int = Field(8, ge=1)
    """Of one question an update takes at most batch_size / this many solutions, the rest of them later in the epoch. So
    its gradient is not one question's, and its work divides over as many workers at no cost; each of a question's
    parts reads its prefix anew. With batch_size itself, solutions are drawn as Med-PRM draws them: each of another
    question."""

    @property
    def num_questions_per_update(self) -> int:
        """The setting."""
        return self.questions_per_update
