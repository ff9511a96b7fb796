"""What a stage brings to the training loop (`Stage`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmm_ray.train.schedule import Part, Units

if TYPE_CHECKING:
    import torch


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why, with ids, and what to do."""


class Stage(ABC):
    """A stage of training as the loop runs it. It is made in the worker: ``stage(config, inputs, device)``.

    `module` is the model; its parameters that ask for a gradient are trained. `units` are what it is trained on, and
    `held_out` those of them that are only measured. A pass takes parts of `micro_batch_budget` tokens together. Where
    samples are compared with each other (`joint`), all workers have a share of the same `micro_batch_budget` samples in
    each round, and `loss` meets the shares of the others in a collective; a worker that has none repeats another one's,
    `idle`, and they count for nothing.
    """

    module: "torch.nn.Module"
    units: Units
    micro_batch_budget: int
    held_out: Sequence[int] = ()
    joint: bool = False
    idle: bool = False

    def learning_rates(self) -> dict[str, float]:
        """Learning rates by the beginning of a parameter's name; all others take the config's."""
        return {}

    def prepare(self, parts: Sequence[Part], epoch: int | None) -> None:
        """Begin to read what a later `loss` of these parts needs, or a `measure` of their units (epoch None)."""
        del parts, epoch

    @abstractmethod
    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """The *sum* of the samples' losses: the loop divides by the samples of the global batch."""

    def measure(self, unit: int) -> Any:
        """What `figures` needs of a held-out unit, as plain values, by one forward pass."""
        raise NotImplementedError(f"{type(self).__name__} holds nothing out")

    def figures(self, measured: Sequence[Any]) -> dict[str, float]:
        """Figures of what was measured of all held-out units, in their order, after each epoch; ``selection`` (higher
        is better) picks the epoch that is kept."""
        del measured
        return {}

    def validate(self) -> dict[str, float]:
        """The figures, all held-out units measured in this process."""
        return self.figures([self.measure(unit) for unit in self.held_out])

    @abstractmethod
    def save(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the model, whole, in the form that other steps read; `figures` are those of the epoch that is kept."""


StageFactory = Callable[[Any, dict[str, str], str], Stage]
