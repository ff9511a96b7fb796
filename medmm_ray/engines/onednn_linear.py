"""Linear layers in float32 on a CPU, computed by oneDNN.

PyTorch gives them to MKL, which leaves half of an AMD processor unused: 170 to 200 GFLOP/s on two EPYC cores. oneDNN
reaches 410 to 460 there, 210 to 400 for a gradient of the weights (torch 2.13). The products stay float32's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_by_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def use_onednn(model: nn.Module) -> None:
    """Have oneDNN compute the linear layers of `model` wherever they run in float32 on a CPU."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


@contextmanager
def pytorch_linear() -> Iterator[None]:
    """As PyTorch computes them by itself, for comparison."""
    global _by_onednn
    before, _by_onednn = _by_onednn, False
    try:
        yield
    finally:
        _by_onednn = before


class OneDnnLinear(nn.Linear):
    """`nn.Linear`, by oneDNN where it serves."""

    def forward(self, input: Tensor) -> Tensor:
        served = _by_onednn and input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not served:
            return super().forward(input)
        out: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if wants_x else None,
            _product(flat.t(), x.flatten(0, -2).t()) if wants_weight else None,
            flat.sum(dim=0) if wants_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of other strides oneDNN makes products a thousand times as slow
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
