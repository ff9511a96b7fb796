"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a language model by peft: small matrices are trained, the rest kept.

Embeddings and head stay as they are. What a stage saves has the adapter merged in: plain weights, which transformers
and vLLM load as before; the adapter itself lies beside them in ``adapter/``.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medmm_ray.config import Config

if TYPE_CHECKING:
    import torch

FOLDER = "adapter"


class LoraConfig(Config):
    """A low-rank adapter on the linear layers of every block."""

    rank: int = 32
    """Rank of the update of each matrix; MedS3's."""
    alpha: int = 64
    """The update is scaled by alpha / rank; MedS3's."""
    dropout: float = 0.05
    """Share of a layer's inputs that the adapter does not see while it is trained."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get an adapter, e.g. [q_proj, v_proj]; null: every linear one but the head."""


class Segment(NamedTuple):
    """Tokens of a packed row that belong together, and what they are: a question's prefix, or one of its solutions."""

    length: int
    name: str


class LoraAdapter:
    """A low-rank adapter inside `model`, which stays the object that it is; only the adapter's weights are trained.

    `segments` of the row that comes next decide what its dropout leaves out: a solution loses the same inputs whatever
    it is packed with, and on whichever worker.
    """

    def __init__(self, model: Any, config: LoraConfig) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        self.segments: Sequence[Segment] = ()
        self.peft = get_peft_model(
            model,
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
                exclude_modules=r".*\b(lm_head|score)\b.*",
            ),
        )
        if config.dropout > 0:
            self._replace_dropout(config.dropout)
        if model.is_gradient_checkpointing:
            model.enable_input_require_grads()  # else nothing asks for a gradient where recomputation starts

    def _replace_dropout(self, share: float) -> None:
        """Put a dropout by segments where peft has one by rows."""
        from peft.tuners.lora import LoraLayer

        # By number, as all workers, and a training that goes on, find the layers in the same order.
        layers = [module for module in self.peft.modules() if isinstance(module, LoraLayer)]
        for number, layer in enumerate(layers):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = _segment_dropout(
                    self,
                    number,
                    share,
                )

    def save_and_merge(self, folder: Path) -> None:
        """Write the adapter to `folder`, then add it to the model's weights: a plain model again, trained no more."""
        self.peft.save_pretrained(str(folder / FOLDER))
        self.peft.merge_and_unload()


def _segment_dropout(
    adapter: LoraAdapter,
    number: int,
    share: float,
) -> "torch.nn.Module":
    """The dropout of the adapter's layer of this number."""
    import torch

    class SegmentDropout(torch.nn.Module):
        def forward(self, inputs_1LD: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return inputs_1LD
            stays: list[torch.Tensor] = []
            generator = torch.Generator(inputs_1LD.device)
            for segment in adapter.segments:
                # By a string: seeds of neighbouring layers and solutions would else give like numbers.
                generator.manual_seed(random.Random(f"{number}/{segment.name}").getrandbits(62))
                shape = (segment.length, inputs_1LD.shape[-1])
                stays.append(torch.rand(shape, generator=generator, device=inputs_1LD.device) >= share)
            return inputs_1LD * torch.cat(stays)[None] / (1 - share)

    return SegmentDropout()
