"""Linear layers by oneDNN: the values and gradients of PyTorch's own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from medmm_ray.engines import onednn_linear
from medmm_ray.engines.onednn_linear import OneDnnLinear, use_onednn
from medmm_ray.session import worker_environment


def layer(bias: bool, outputs: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(40, outputs, bias=bias)
    use_onednn(made)
    assert isinstance(made, OneDnnLinear)
    return made


def values(made: nn.Linear, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 40, generator=generator).to(dtype).requires_grad_()
    out = made(x)
    weights = torch.randn(out.shape, generator=generator).to(dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *made.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1, 1, 6)])
def test_values_and_gradients_are_those_of_pytorch(bias: bool, shape: tuple[int, ...]) -> None:
    made = layer(bias)
    ours = values(made, shape)
    with onednn_linear.pytorch_linear():
        theirs = values(made, shape)
    assert len(ours) == (4 if bias else 3)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert torch.allclose(own, other, atol=1e-5)


def test_it_is_as_exact_as_float32_is() -> None:
    made = layer(False, outputs=300)
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ made.weight.double().t()
    assert (made(x).double() - exact).abs().max() < 3e-6  # bfloat16 products would be off by 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    made = layer(True).to(dtype)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_only_plain_layers_change_and_their_weights_stay() -> None:
    class Own(nn.Linear):
        """A layer with ways of its own."""

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.LayerNorm(2))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    assert [type(module) for module in model] == [OneDnnLinear, Own, nn.LayerNorm]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_workers_memory_does_not_grow_with_the_lengths_of_rows() -> None:
    program = """
import resource, torch
from medmm_ray.engines.onednn_linear import use_onednn
made = torch.nn.Linear(768, 768)
use_onednn(made)
torch.set_num_threads(1)
def read(lengths):
    with torch.inference_mode():
        for length in lengths:
            made(torch.zeros(length, 768))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(read(range(1000, 900, -1)), read(range(900, 200, -1)))
"""
    environment = {**os.environ, **worker_environment()}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(float, result.stdout.split())
    assert after < before + 20, "MiB"
