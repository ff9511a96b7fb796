"""What a stage brings to the training loop (`Stage`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why, with ids, and what to do."""


class Stage(ABC):
    """A stage of training as the loop runs it. It is made in the worker: ``stage(config, inputs, device)``.

    `module` is the model; its parameters that ask for a gradient are trained. `names` (ids), `sizes` (samples) and
    `costs` (tokens, or pictures) describe the units, see `schedule`. A micro-batch, one forward pass, takes units that
    cost `micro_batch_budget` together; `padded` says whether they cost their longest one times their number.
    """

    module: "torch.nn.Module"
    names: Sequence[str]
    sizes: Sequence[int]
    costs: Sequence[int]
    micro_batch_budget: int
    padded: bool

    def learning_rates(self) -> dict[str, float]:
        """Learning rates by the beginning of a parameter's name; all others take the config's."""
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
