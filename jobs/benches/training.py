"""Training the text tower, packed by question with a shared prefix, against two ways without sharing.

*Padded*: every solution to the maximum, with full logits, as Med-PRM's own code does. *Packed*: whole sequences one
after another without padding, the head at the tags alone, as TRL and verl pack for attention of variable lengths; our
kernel serves there too. All sides run forward and backward over the same solutions in the same model; the optimizer,
the same on all, is left out. The baselines are timed on a few solutions and scaled: they do not depend on each other.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console

from jobs.benches import Measured
from jobs.benches.models import (
    SHAPES,
    BenchQuestion,
    ForwardFlops,
    ModelConfig,
    Shape,
    bench_question,
    packed_flops,
    reference_ids,
    reward_model,
    set_up_torch,
)
from jobs.benches.timing import peak_bytes, timed
from medmm_ray.engines.onednn_linear import pytorch_linear

if TYPE_CHECKING:
    from torch import Tensor

    from medmm_ray.reward_model import Branch, PackedQuestion, RewardModel


class BenchConfig(ModelConfig):
    """What is trained, and how often."""

    shapes: tuple[Literal["smollm2", "wide", "8b"], ...] = ("smollm2",)
    """Models with random weights: SmolLM2's width and vocabulary in 8 blocks, one of width 1,536, Llama-3.1-8B's."""
    padded_solutions: int = 2
    """Solutions on which padding is timed."""
    packed_solutions: int = 2
    """Solutions on which packing without sharing is timed, in one row."""
    max_length: int = 4096
    """Tokens that every solution is padded to."""
    documents: int = 3072
    """Tokens of documents."""
    solutions: tuple[int, ...] = (16, 5)
    """Solutions of a question: the pipeline's 16, and the 5.2 that the reference trained on."""


TARGETS = {16: "≥ 5"}


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Solutions per second of each side, shape by shape."""
    console.print(set_up_torch(config.dtype, config.device, config.threads))
    for name in config.shapes:
        shape = SHAPES[name]
        model = reward_model(shape, config.dtype, config.device, context=8192).train()
        for solutions in config.solutions:
            case = bench_question(shape.vocab_size, config.question, config.documents, solutions, config.solution)
            label = f"{name}, {solutions} solutions, documents {config.documents:,}"
            yield from _cell(label, model, shape, case, config)


def _cell(
    name: str, model: "RewardModel", shape: Shape, case: BenchQuestion, config: BenchConfig
) -> Iterator[Measured]:
    flops = ForwardFlops(shape)
    ids = reference_ids(model, case)
    number = len(ids)
    shared_flops = packed_flops(flops, model, case, training=True)
    ideal = flops.one_by_one([config.max_length] * number) / shared_flops
    (packed,) = model.pack(case.question, case.solutions, case.documents, training=True).groups
    unshared = without_sharing(packed)
    lengths = [len(branch.ids) for branch in unshared.branches]
    ideal_unshared = flops.one_by_one(lengths, rows=0) / shared_flops

    few = replace(unshared, branches=unshared.branches[: config.packed_solutions])

    def ours() -> None:
        _step(model, packed)

    def whole_sequences() -> None:
        _step(model, few)

    def padded() -> None:
        for row in ids[: config.padded_solutions]:
            _padded_step(model, row, config)

    with pytorch_linear():  # the same kernels on both sides
        ours()  # warm
        seconds, _ = timed(ours, config.repeats, config.device)
        alone, _ = timed(padded, 1, config.device)
    mine, theirs = number / seconds, config.padded_solutions / alone
    yield Measured(f"training, {name}", theirs, mine, mine / theirs, TARGETS.get(number, ""), "solutions/s")
    gain = mine / theirs
    yield Measured(f"share of the FLOP ideal of {ideal:.1f}, {name}", ideal, gain, gain / ideal, "", "times padding")
    with torch.no_grad():
        apart = float((model(packed) - model(unshared)).abs().max())
    if apart > (1e-3 if config.dtype == "float32" else 0.5):
        raise AssertionError(f"{name}: log-odds of packed sequences differ from ours by {apart}")
    # From here on with the linear layers that a loaded model has.
    seconds_unshared, _ = timed(whole_sequences, config.repeats, config.device)
    seconds, _ = timed(ours, config.repeats, config.device)
    served, rate_unshared = number / seconds, min(number, config.packed_solutions) / seconds_unshared
    label = f"against packing without sharing (FLOP ideal {ideal_unshared:.1f}), {name}"
    target = f"≥ {0.8 * ideal_unshared:.2f}"
    yield Measured(label, rate_unshared, served, served / rate_unshared, target, "solutions/s")
    if config.device == "cpu":
        yield Measured(f"oneDNN's products against PyTorch's, {name}", mine, served, served / mine, "", "solutions/s")
    model.zero_grad()
    peak = peak_bytes(ours, config.device)
    peak_padded = peak_bytes(lambda: torch.autograd.backward(_padded_loss(model, ids[0], config)), config.device)
    label = f"peak memory above the weights, {name}"
    yield Measured(label, peak_padded / 2**20, peak / 2**20, peak / peak_padded, "", "MiB")


def without_sharing(packed: "PackedQuestion") -> "PackedQuestion":
    """The same solutions as whole sequences in one row, each with the prefix of its own."""
    prefix = len(packed.prefix_ids)
    branches: list[Branch] = []
    for branch in packed.branches:
        tags = [tag + prefix for tag in branch.tags]
        branches.append(replace(branch, ids=[*packed.prefix_ids, *branch.ids], tags=tags))
    return replace(packed, prefix_ids=[], branches=branches)


def _step(model: "RewardModel", packed: "PackedQuestion") -> None:
    """Forward and backward over a packed row."""
    model.zero_grad()
    loss = torch.nn.functional.softplus(-model(packed)).mean()
    torch.autograd.backward(loss)


def _padded_step(model: "RewardModel", row: list[int], config: BenchConfig) -> None:
    """Forward and backward over one solution padded to the maximum."""
    model.zero_grad()
    torch.autograd.backward(_padded_loss(model, row, config))


def _padded_loss(model: "RewardModel", row: list[int], config: BenchConfig) -> "Tensor":
    """One solution padded to the maximum, logits of the whole vocabulary, the loss of its tags."""
    ids = torch.zeros(1, config.max_length, dtype=torch.long, device=config.device)
    ids[0, : len(row)] = torch.tensor(row[: config.max_length], device=config.device)
    mask = torch.zeros_like(ids)
    mask[0, : len(row)] = 1
    logits_LV = model.text_model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    token_ids = model.family.ids
    pair_T2 = logits_LV[ids[0] == token_ids["tag"]][:, [token_ids["plus"], token_ids["minus"]]].float()
    loss: Tensor = torch.nn.functional.softplus(pair_T2[:, 1] - pair_T2[:, 0]).mean()
    return loss
