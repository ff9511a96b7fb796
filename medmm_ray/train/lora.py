"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a language model by peft: small matrices are trained, the rest kept.

Embeddings and head stay as they are. What a stage saves has the adapter merged in: plain weights, which transformers
and vLLM load as before; the adapter itself lies beside them in ``adapter/``.
"""

from pathlib import Path
from typing import Any

from medmm_ray.config import Config

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


class LoraAdapter:
    """A low-rank adapter inside `model`, which stays the object that it is; only the adapter's weights are trained."""

    def __init__(self, model: Any, config: LoraConfig) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

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
        if model.is_gradient_checkpointing:
            model.enable_input_require_grads()  # else nothing asks for a gradient where recomputation starts

    def save_and_merge(self, folder: Path) -> None:
        """Write the adapter to `folder`, then add it to the model's weights: a plain model again, trained no more."""
        self.peft.save_pretrained(str(folder / FOLDER))
        self.peft.merge_and_unload()
