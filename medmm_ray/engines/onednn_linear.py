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
        if type(module) is nn.Linear:  # not a subclass, whose forward pass may do more
            module.__class__ = OneDnnLinear


@contextmanager
def pytorch_linear() -> Iterator[None]:
    """Have PyTorch compute linear layers as it does by itself, for comparison."""
    global _by_onednn
    before, _by_onednn = _by_onednn, False
    try:
        yield
    finally:
        _by_onednn = before


class OneDnnLinear(nn.Linear):
    """`nn.Linear`, computed by oneDNN in float32 on a CPU, else by PyTorch."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., I] -> [..., O]."""
        is_float32 = input.dtype == self.weight.dtype == torch.float32
        if not (_by_onednn and input.device.type == "cpu" and is_float32):
            return super().forward(input)
        out: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None -> [..., O]. oneDNN's operator has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product; what the backward pass needs is kept."""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias, those that are needed."""
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if needs_x else None,
            _product(flat.t(), x.flatten(0, -2).t()) if needs_weight else None,
            flat.sum(dim=0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # of other strides oneDNN makes products a thousand times as slow
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
