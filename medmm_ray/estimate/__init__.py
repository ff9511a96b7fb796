"""What a run will cost, before it runs: calls, tokens, dollars, GPU-hours and bytes, step by step.

Enters: `Sizes`, plain numbers that a recipe states. Leaves: an `Estimate`, one line a step, and its table. Each line
comes from a function beside its step's config, as `steps.judge.cost.judge_cost`; `jobs.plan` collects them. Pure
arithmetic: nothing is measured and no API is called. The model of time is floating-point operations over a share of the
GPU's peak, with P parameters: 2P a token of prefill or decoding, 6P a token of training (Kaplan et al. 2020, attention
left out). The shares (utilisation):

- prefill (prompts, scoring, states): 0.28. Med-PRM's own scorer did 1.5 solutions/s of 3,720 tokens on an A100: 8e9
  parameters x 2 x 3,720 x 1.5 = 89 of 312 TFLOP/s.
- training: 0.35, what well-fed dense models reach under ZeRO.
- decoding (at large batches): 0.15, that is 2,900 tokens/s for 8e9 parameters on an A100.

They are rough: expect a factor of two.
"""

from medmm_ray.estimate.hardware import GPUS, Gpu, Hardware
from medmm_ray.estimate.result import Estimate, Line, size
from medmm_ray.estimate.sizes import BF16, BYTES_PER_TOKEN, PATCHES, ModelCost, PlanConfig, Sizes, at_most
from medmm_ray.estimate.table import rendered

__all__ = [
    "BF16",
    "BYTES_PER_TOKEN",
    "GPUS",
    "PATCHES",
    "Estimate",
    "Gpu",
    "Hardware",
    "Line",
    "ModelCost",
    "PlanConfig",
    "Sizes",
    "at_most",
    "rendered",
    "size",
]
