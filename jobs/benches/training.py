"""Training the text tower: packed by question against every solution padded to the maximum with full logits.

Both sides run forward and backward over the same solutions in the same model; the optimizer, the same on both sides, is
left out. The padded side is timed on a few solutions and scaled, as they do not depend on each other.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.models import (
    SHAPES,
    Case,
    Flops,
    ModelConfig,
    Shape,
    case,
    packed_flops,
    reference_ids,
    reward_model,
    start,
)
from jobs.benches.timing import peak_bytes, timed
from medmm_ray.engines.linear import pytorch_linear

if TYPE_CHECKING:
    from torch import Tensor

    from medmm_ray.engines.reward_model import RewardModel


class BenchConfig(ModelConfig):
    """What is trained, and how often."""

    shapes: tuple[Literal["smollm2", "wide", "8b"], ...] = ("smollm2",)
    """Models with random weights: SmolLM2's width and vocabulary in 8 blocks, one of width 1,536, Llama-3.1-8B's."""
    padded_solutions: int = 2
    """Solutions on which padding is timed."""
    max_length: int = 4096
    """Tokens that every solution is padded to."""
    documents: int = 3072
    """Tokens of documents."""
    solutions: tuple[int, ...] = (16, 5)
    """Solutions of a question: the pipeline's 16, and the 5.2 that the reference trained on."""


TARGETS = {16: "≥ 5"}


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    console.print(start(config.dtype, config.device, config.threads))
    for name in config.shapes:
        shape = SHAPES[name]
        model = reward_model(shape, config.dtype, config.device, context=8192).train()
        for solutions in config.solutions:
            asked = case(shape.vocab_size, config.question, config.documents, solutions, config.solution)
            label = f"{name}, {solutions} solutions, documents {config.documents:,}"
            yield from _cell(label, model, shape, asked, config)


def _cell(name: str, model: "RewardModel", shape: Shape, asked: Case, config: BenchConfig) -> Iterator[Measured]:
    flops = Flops(shape)
    ids = reference_ids(model, asked)
    number = len(ids)
    ideal = flops.one_by_one([config.max_length] * number) / packed_flops(flops, model, asked)
    (packed,) = model.pack(asked.question, asked.solutions, asked.documents, training=True).groups

    def ours() -> None:
        model.zero_grad()
        torch.autograd.backward(torch.nn.functional.softplus(-model(packed)).mean())

    def padded() -> None:
        for row in ids[: config.padded_solutions]:
            model.zero_grad()
            torch.autograd.backward(_padded_loss(model, row, config))

    with pytorch_linear():  # the same kernels on both sides
        ours()  # warm
        seconds, _ = timed(ours, config.repeats, config.device)
        alone, _ = timed(padded, 1, config.device)
    mine, theirs = number / seconds, config.padded_solutions / alone
    yield Measured(f"training, {name}", theirs, mine, mine / theirs, TARGETS.get(number, ""), "solutions/s")
    yield Measured(f"share of the FLOP ideal of {ideal:.1f}, {name}", ideal, mine / theirs, mine / theirs / ideal, "",
                   "times padding")  # fmt: skip
    if config.device == "cpu":
        by_onednn, _ = timed(ours, config.repeats, config.device)
        served = number / by_onednn
        yield Measured(f"oneDNN's products against PyTorch's, {name}", mine, served, served / mine, "", "solutions/s")
    model.zero_grad()
    peak = (
        peak_bytes(ours, config.device),
        peak_bytes(lambda: torch.autograd.backward(_padded_loss(model, ids[0], config)), config.device),
    )
    yield Measured(f"peak memory above the weights, {name}", peak[1] / 2**20, peak[0] / 2**20, peak[0] / peak[1], "",
                   "MiB")  # fmt: skip


def _padded_loss(model: "RewardModel", row: list[int], config: BenchConfig) -> "Tensor":
    """One solution padded to the maximum, logits of the whole vocabulary, the loss of its tags."""
    ids = torch.zeros(1, config.max_length, dtype=torch.long, device=config.device)
    ids[0, : len(row)] = torch.tensor(row[: config.max_length], device=config.device)
    mask = torch.zeros_like(ids)
    mask[0, : len(row)] = 1
    logits_LV = model.text_model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    signs = model.family.ids
    pair_T2 = logits_LV[ids[0] == signs["tag"]][:, [signs["plus"], signs["minus"]]].float()
    loss: Tensor = torch.nn.functional.softplus(pair_T2[:, 1] - pair_T2[:, 0]).mean()
    return loss
