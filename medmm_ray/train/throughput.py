"""What training costs: floating-point operations of a language model, the share of the GPU's peak, peak memory.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311) counts what the model needs, not what is computed again.
"""

import re
import resource
from typing import TYPE_CHECKING, Any

from medmm_ray.estimate import GPUS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from medmm_ray.engines.image_tower import ImageTower
    from medmm_ray.reward_model import Fusion

GIB = 1 << 30


class TrainingFlops:
    """FLOPs of a language model's blocks, forward and backward, over packed questions; embeddings and head left out.

    A token costs 2 a weight forward, 2 for the gradient of what enters it, and 2 for its own where it is trained: 6N
    for a model that is trained whole. A pair of tokens that attend costs 12 x layers x heads x head width.
    """

    def __init__(self, model: Any) -> None:
        layers = model.base_model.layers
        self.per_token = 0.0
        for parameter in layers.parameters():
            self.per_token += (6 if parameter.requires_grad else 4) * parameter.numel()
        self.per_pair: float = 12 * len(layers) * model.config.num_attention_heads * layers[0].self_attn.head_dim

    def prefix(self, length: int) -> float:
        """FLOPs of a prefix, read causally."""
        return self.per_token * length + self.per_pair * _causal_pairs(length)

    def branch(self, prefix: int, length: int) -> float:
        """FLOPs of a branch, which attends to its prefix and, causally, to itself."""
        return self.per_token * length + self.per_pair * (prefix * length + _causal_pairs(length))


def _causal_pairs(length: int) -> float:
    return length * (length + 1) / 2


class FusionFlops:
    """FLOPs of training the image part, of a tag and of a picture: six a weight that is trained, for each token that it
    meets; two where a frozen tower runs, which is once, and so not counted."""

    def __init__(
        self,
        fusion: "Fusion",
        tower_weights: int,
        num_patches: int,
        is_frozen: bool,
    ) -> None:
        of_tag = (fusion.query, fusion.attend_query, fusion.attend_out, fusion.mlp, fusion.output)
        of_token = (fusion.projector, fusion.attend_key, fusion.attend_value)
        num_tokens = tokens_of_picture(fusion.config.tokens, num_patches)
        self.per_tag = 6.0 * num_weights(of_tag)
        self.per_picture = 6.0 * num_tokens * num_weights(of_token)
        if not is_frozen:
            self.per_picture += 6.0 * (num_patches + 1) * tower_weights


def tokens_of_picture(tokens: str, num_patches: int) -> int:
    """Tokens that a fusion reads of a picture (`FusionConfig.tokens`)."""
    return {"pooled": 1, "patches": num_patches, "both": num_patches + 1}[tokens]


def num_patches(tower: "ImageTower") -> int:
    """Patch tokens of a picture: towers do not tell, so one looks at a blank one."""
    import torch

    side = tower.image_size
    with torch.no_grad():
        return int(tower(torch.zeros(1, 3, side, side)).patches_BPD.shape[1])


def num_weights(modules: "Iterable[torch.nn.Module]") -> int:
    """Weights of modules, in number."""
    total = 0
    for module in modules:
        total += sum(parameter.numel() for parameter in module.parameters())
    return total


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s by a GPU's name as CUDA gives it ("NVIDIA A100-SXM4-80GB"); None where it is not known."""
    words = re.split(r"[ -]", device_name)
    for name, gpu in GPUS.items():
        if name.split("-")[0] in words:
            return gpu.peak * 1e12
    return None


def peak_memory(device: "torch.device") -> float:
    """Peak memory of this process in GiB: on a GPU of its tensors, else in all (resident)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    max_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return max_kib * 1024 / GIB


class ThroughputMeter:
    """Tokens per second and MFU over all workers; `peak` is what their GPUs could do, in FLOP/s (None: not known)."""

    def __init__(self, peak: float | None) -> None:
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self.tokens = 0.0
        self.flops = 0.0
        self.seconds = 0.0

    def add(
        self,
        tokens: float,
        flops: float,
        seconds: float,
    ) -> dict[str, float]:
        """Count an update; gives its own figures."""
        self.tokens += tokens
        self.flops += flops
        self.seconds += seconds
        return self._figures(tokens, flops, seconds)

    def take(self) -> dict[str, float]:
        """The figures of all updates since the last time."""
        figures = self._figures(self.tokens, self.flops, self.seconds) if self.seconds else {}
        self._reset()
        return figures

    def _figures(
        self,
        tokens: float,
        flops: float,
        seconds: float,
    ) -> dict[str, float]:
        figures = {"tokens_per_second": tokens / seconds}
        if self.peak is not None and flops:
            figures["mfu"] = flops / seconds / self.peak
        return figures
