"""The idea: each solution alone through the language model, the log-odds of + against − at each step's tag.

    families/            how a solution is written, and at which tokens its steps are read
    packing, request     all solutions of a question as one shared prefix and its branches
    attention, forward   one forward pass over a packed row; a token attends to its prefix and its own branch alone
    fusion               what the images add to the log-odds
    model, vllm          the public classes: one runs in torch, one has its text tower run by vLLM
    text_tower, checkpoint and the rest open, check and save published checkpoints

The rest computes exactly this, faster.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medmm_ray.reward_model.families import Family
from medmm_ray.reward_model.full_sequence import QuestionContext, Solution


def reference_log_odds(
    text_model: Any, family: Family, question: str, solution: Solution, documents: Sequence[str] = ()
) -> Tensor:
    """Log-odds [T] that each step of one solution is right, with gradient; for heads that read + against −."""
    context = QuestionContext(question, documents)
    (sequence,), _ = family.sequences(context, {0: solution})
    ids_1L = torch.tensor([sequence.ids], device=text_model.device)
    logits_LV = text_model(input_ids=ids_1L, use_cache=False).logits[0]
    plus, minus = family.ids["plus"], family.ids["minus"]
    log_odds_T: Tensor = logits_LV[sequence.tags, plus] - logits_LV[sequence.tags, minus]
    return log_odds_T
