"""What a run will cost, before it runs: calls, tokens, dollars, GPU-hours and bytes, step by step.

Enters: a `Plan`, plain numbers that a recipe states. Leaves: an `Estimate`, one line a step, and its table. Pure
arithmetic: nothing is measured and no API is called. The model of time is floating-point operations over a share of the
GPU's peak, with P parameters: 2P a token of prefill or decoding, 6P a token of training (Kaplan et al. 2020, attention
left out). The shares (utilisation):

- prefill (prompts, scoring, states): 0.28. Med-PRM's own scorer did 1.5 solutions/s of 3,720 tokens on an A100: 8e9
  parameters x 2 x 3,720 x 1.5 = 89 of 312 TFLOP/s.
- training: 0.35, what well-fed dense models reach under ZeRO.
- decoding (at large batches): 0.15, that is 2,900 tokens/s for 8e9 parameters on an A100.

They are rough: expect a factor of two. Where a step was measured, put its hours into `Plan.known_gpu_hours`.
"""

from medmm_ray.estimate.costs import estimate
from medmm_ray.estimate.hardware import GPUS, Gpu, Hardware
from medmm_ray.estimate.plan import (
    PUBLISHED,
    Grading,
    Judging,
    ModelCost,
    Plan,
    QuestionWriting,
    Reviewing,
    Rollouts,
    Training,
    Trees,
    Workload,
)
from medmm_ray.estimate.result import Estimate, Line, size
from medmm_ray.estimate.table import rendered

__all__ = [
    "GPUS",
    "PUBLISHED",
    "Estimate",
    "Gpu",
    "Grading",
    "Hardware",
    "Judging",
    "Line",
    "ModelCost",
    "Plan",
    "QuestionWriting",
    "Reviewing",
    "Rollouts",
    "Training",
    "Trees",
    "Workload",
    "estimate",
    "rendered",
    "size",
]
