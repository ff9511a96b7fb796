"""What training costs: floating-point operations of a language model, the share of the GPU's peak, peak memory.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311) counts what the model needs, not what is computed again.
"""

import re
import resource
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from medmm_ray.estimate import GPUS

if TYPE_CHECKING:
    import torch

    from medmm_ray.reward_model.attention import Block

GIB = 1 << 30


class TrainingFlops:
    """FLOPs of a language model's blocks, forward and backward, over packed questions; embeddings and head left out.

    A token costs 2 a weight forward, 2 for the gradient of what enters it, and 2 for its own where it is trained: 6N
    for a model that is trained whole. A pair of tokens that see each other costs 12 x layers x heads x head width.
    """

    def __init__(self, model: Any) -> None:
        layers = model.base_model.layers
        self.token = sum((6 if p.requires_grad else 4) * p.numel() for p in layers.parameters())
        self.pair = 12 * len(layers) * model.config.num_attention_heads * layers[0].self_attn.head_dim

    def __call__(self, blocks: "Iterable[Block]") -> float:
        return float(sum(self.token * block.length + self.pair * attended_pairs(block) for block in blocks))


def attended_pairs(block: "Block") -> float:
    """Pairs of tokens that see each other: the prefix causally, branches the prefix and, causally, themselves."""
    return _causal(block.prefix) + sum(block.prefix * length + _causal(length) for length in block.branches)


def _causal(length: int) -> float:
    return length * (length + 1) / 2


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s by a GPU's name as CUDA says it ("NVIDIA A100-SXM4-80GB"); None where it is not known."""
    words = re.split(r"[ -]", device_name)
    return next((gpu.peak * 1e12 for name, gpu in GPUS.items() if name.split("-")[0] in words), None)


def peak_memory(device: "torch.device") -> float:
    """GiB that this process has held at most: on a GPU in tensors, else in all (resident)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class ThroughputMeter:
    """Tokens and FLOPs by the second, over all workers; `peak` is what their GPUs could do (None: not known)."""

    def __init__(self, peak: float | None) -> None:
        self.peak, self.tokens, self.flops, self.seconds = peak, 0.0, 0.0, 0.0

    def add(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        """Count an update; gives its own figures."""
        self.tokens, self.flops, self.seconds = self.tokens + tokens, self.flops + flops, self.seconds + seconds
        return self._figures(tokens, flops, seconds)

    def take(self) -> dict[str, float]:
        """The figures of all that was added since the last time."""
        figures = self._figures(self.tokens, self.flops, self.seconds) if self.seconds else {}
        self.tokens = self.flops = self.seconds = 0.0
        return figures

    def _figures(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        said = {"tokens_per_second": tokens / seconds}
        return said if self.peak is None or not flops else {**said, "mfu": flops / seconds / self.peak}
