"""What is left of a text tower where its states are stored: the direction that its head reads them in.

Enters: a reward model's checkpoint. Leaves: a `TextHead`, of two rows of its files; the tower itself is not loaded.

Legend: D text width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medmm_ray.reward_model import checkpoint, families, text_tower
from medmm_ray.reward_model.checkpoint import TrainedInputs
from medmm_ray.reward_model.errors import CheckpointError
from medmm_ray.reward_model.model import RewardModel


@dataclass(frozen=True)
class TextHead:
    """The log-odds of a state are its product with `direction_D`; `trained_inputs` are those of the checkpoint."""

    direction_D: Tensor
    trained_inputs: TrainedInputs

    @property
    def hidden_size(self) -> int:
        """The text tower's width."""
        return len(self.direction_D)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str) -> "TextHead":
        """The head of a checkpoint that `RewardModel.from_pretrained` reads, its weights in `dtype`.

        What has its head in no file as it is (an adapter, a vocabulary that lacks the tag) is loaded whole for it.
        Raises `CheckpointError` for a model that takes no image part.
        """
        # The usual case first: 8 billion weights stay on the disk.
        try:
            return _of_files(path, dtype)
        except CheckpointError:
            model = RewardModel.from_pretrained(path, dtype=dtype)
            model.check_image_part()
            with torch.no_grad():  # linear, so its values on the unit vectors are all of it
                direction_D = model.head_log_odds(torch.eye(model.hidden_size))
            return cls(direction_D, model.trained_inputs)


def _of_files(path: str | Path, dtype: str) -> TextHead:
    path = checkpoint.locate(path, None)
    saved = checkpoint.read(path)
    text = text_tower.load_without_weights(
        path,
        saved.family if saved else None,
        dtype,
    )
    family = families.make(text.family, text.tokenizer, None)
    if not family.additive:
        raise CheckpointError(f"{path}: the head of the family {family.name} is no row of a matrix")
    rows_2D = text_tower.load_head_rows(path, text.model, [family.ids["plus"], family.ids["minus"]]).float()
    return TextHead(rows_2D[0] - rows_2D[1], saved.trained_inputs if saved else TrainedInputs())
