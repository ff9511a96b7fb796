"""The published plan's image part, as a baseline of `arms`: LN(h + attention over one repeated pooled vector), no MLP.

Attention over copies of one vector gives each of them the same share, so it reads that vector whatever the query: one
copy is enough here. The LayerNorm changes the scores without an image too.

Legend: T tags, D text width, Q questions.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from medmm_ray.reward_model import ImageFeatures
from medmm_ray.train.two_tower import TwoTowerConfig, TwoTowerStage


class PublishedFusion(nn.Module):
    """``delta_TD`` such that states + delta is what the plan's fusion gives the head."""

    reads_patches = False

    def __init__(self, text_width: int, image_width: int, num_heads: int = 4) -> None:
        super().__init__()
        self.projector = nn.Linear(image_width, text_width)
        self.attention = nn.MultiheadAttention(text_width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(text_width)

    def forward(
        self, states_TD: Tensor, summaries_TD: Tensor, images: ImageFeatures, question_T: Tensor | None = None
    ) -> Tensor:
        """The change of each tag's state [T, D]."""
        del summaries_TD
        if question_T is None:
            question_T = torch.zeros(len(states_TD), dtype=torch.long)
        image_T1D = self.projector(images.pooled_QIW[:, 0])[question_T, None]
        attended_T1D, _ = self.attention(states_TD[:, None], image_T1D, image_T1D, need_weights=False)
        fused_TD: Tensor = self.norm(states_TD + attended_T1D[:, 0])
        return fused_TD - states_TD


class PublishedStage(TwoTowerStage):
    """The stage with the plan's fusion in place of ours; its model stays in memory."""

    def __init__(self, config: TwoTowerConfig, inputs: dict[str, str], device: str) -> None:
        super().__init__(config, inputs, device)
        torch.manual_seed(config.seed)
        self.fusion = PublishedFusion(self.head.hidden_size, self.tower.width)  # type: ignore[assignment]
        self.module = nn.ModuleDict({"fusion": self.fusion})

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Leave a folder for the history alone."""
        folder.mkdir(parents=True)
