"""The reward model on CUDA: its flash path against plain attention, and packed scores against one by one.

Needs torch, transformers and pytest alone: ``python -m pytest tests/gpu -m gpu -o addopts=``.
"""

import pytest
import torch

from jobs.benches.models import Shape, bench_question, reference_ids, reward_model
from jobs.benches.scoring import reference_log_odds
from medmm_ray.reward_model import attention
from medmm_ray.reward_model.attention import Block, PackedRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HEADS, GROUPS, WIDTH = 8, 2, 64
BLOCKS = [Block(300, (40, 40, 33, 200)), Block(1, (70, 3)), Block(129, ())]


def row_and_tensors(dtype: torch.dtype) -> tuple[PackedRow, list[torch.Tensor]]:
    row, generator = PackedRow(BLOCKS, "cuda"), torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, row.length, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return row, [torch.randn(s, generator=generator, device="cuda", dtype=torch.float64).to(dtype) for s in shapes]


def values(row: PackedRow, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in tensors)
    out: torch.Tensor = attention._SharedPrefix.apply(q, k, v, row, WIDTH**-0.5, 0)  # type: ignore[no-untyped-call]
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_output_and_gradient_are_those_in_double(dtype: torch.dtype, limit: float) -> None:
    row, tensors = row_and_tensors(dtype)
    exact = values(row, [t.double() for t in tensors])
    for own, other in zip(values(row, tensors), exact, strict=True):
        assert (own.double() - other).norm() <= limit * other.norm()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_packed_scores_are_those_one_by_one(dtype: str, limit: float) -> None:
    shape = Shape(hidden_size=256, num_layers=4, num_heads=4, num_key_value_heads=2, intermediate_size=512,
                  vocab_size=2000)  # fmt: skip
    model = reward_model(shape, dtype, "cuda", 4096)
    asked = bench_question(shape.vocab_size, 100, 600, 8, 120)
    for budget in (256, 100_000):
        scores = model.score(asked.question, asked.solutions, asked.documents, token_budget=budget)
        for own, ids in zip(scores, reference_ids(model, asked), strict=True):
            assert own.log_odds == pytest.approx(reference_log_odds(model, ids, "cuda"), abs=limit)
