"""Scoring N solutions of a question: shared prefix against the reference's one by one, a padded batch, and vLLM.

The reference: one solution a forward pass, logits of the whole vocabulary, softmax over " +" and " -" at each tag. It
is timed on a few solutions and scaled, as they do not depend on each other. On a CPU both sides have PyTorch's linear
layers; ours with oneDNN's, as a loaded model has them, is a row of its own, and what vLLM, which has them too, is held
against.
"""

from collections.abc import Iterator, Sequence
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
    no_grad_logits,
    packed_flops,
    reference_ids,
    reward_model,
    start,
)
from jobs.benches.timing import peak_bytes, timed
from jobs.benches.vllm_scorer import installed, vllm_scorer
from medmm_ray.engines.linear import pytorch_linear

if TYPE_CHECKING:
    from medmm_ray.engines.reward_model import RewardModel


class BenchConfig(ModelConfig):
    """What is scored, and how often."""

    shapes: tuple[Literal["smollm2", "wide", "8b"], ...] = ("smollm2", "wide")
    """Models with random weights: SmolLM2's width and vocabulary in 8 blocks, one of width 1,536, Llama-3.1-8B's."""
    reference_solutions: int = 4
    """Solutions on which the reference is timed."""
    token_budget: int | None = None
    """Most tokens of a forward pass of ours; null: the device's default."""
    vllm_solutions: int = 8
    """Solutions on which vLLM is timed, where it is installed; 0: not at all."""
    cells: tuple[tuple[int, int], ...] = ((64, 3072), (16, 3072), (8, 3072), (64, 1024), (64, 0))
    """Pairs of solutions and tokens of documents."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    console.print(start(config.dtype, config.device, config.threads))
    for name in config.shapes:
        shape = SHAPES[name]
        model = reward_model(shape, config.dtype, config.device, context=8192)
        for solutions, documents in config.cells:
            asked = case(shape.vocab_size, config.question, documents, solutions, config.solution)
            yield from _cell(f"{name}, N = {solutions}, documents {documents:,}", model, shape, asked, config)
        del model


def _cell(name: str, model: "RewardModel", shape: Shape, asked: Case, config: BenchConfig) -> Iterator[Measured]:
    flops = Flops(shape)
    ids = reference_ids(model, asked)
    ideal = flops.one_by_one([len(i) for i in ids]) / packed_flops(flops, model, asked)

    def ours() -> list[list[float]]:
        scores = model.score(asked.question, asked.solutions, asked.documents, token_budget=config.token_budget)
        return [s.log_odds for s in scores]

    def reference() -> list[list[float]]:
        return [reference_log_odds(model, i, config.device) for i in ids[: config.reference_solutions]]

    with pytorch_linear():  # the same kernels on both sides
        ours(), reference_log_odds(model, ids[0], config.device)  # warm
        seconds, found = timed(ours, config.repeats, config.device)
        alone, expected = timed(reference, 1, config.device)
    _agree(f"{name}, reference", found, expected, config)
    theirs = len(ids) / (alone / min(len(ids), config.reference_solutions) * len(ids))
    mine = len(ids) / seconds
    yield Measured(f"scoring, {name}", theirs, mine, mine / theirs, _target(ideal, asked), "solutions/s")
    yield Measured(f"share of the FLOP ideal of {ideal:.1f}, {name}", ideal, mine / theirs, mine / theirs / ideal,
                   "≥ 0.8", "times the reference")  # fmt: skip
    if len(ids) == 64:
        with pytorch_linear():
            padded, _ = timed(lambda: padded_batch(model, ids[:8], config.device), 1, config.device)
        yield Measured(f"against a padded batch of 8, {name}", 8 / padded, mine, mine / (8 / padded), "", "solutions/s")
        peak = (
            peak_bytes(ours, config.device),
            peak_bytes(lambda: reference_log_odds(model, ids[0], config.device), config.device),
        )
        yield Measured(f"peak memory above the weights, {name}", peak[1] / 2**20, peak[0] / 2**20, peak[0] / peak[1],
                       "≤ 0.5", "MiB")  # fmt: skip
        served = mine
        if config.device == "cpu":
            seconds, _ = timed(ours, config.repeats, config.device)
            served = len(ids) / seconds
            yield Measured(f"oneDNN's products against PyTorch's, {name}", mine, served, served / mine, "",
                           "solutions/s")  # fmt: skip
        if config.vllm_solutions and installed():
            theirs = _vllm(name, model, ids[: config.vllm_solutions], found, config)
            ideal = flops.one_by_one([len(i) for i in ids], rows=0) / packed_flops(flops, model, asked)
            yield Measured(f"against vLLM token_classify (FLOP ideal {ideal:.1f}), {name}", theirs, served,
                           served / theirs, "≥ 4" if ideal > 4 else "", "solutions/s")  # fmt: skip
    if config.device != "cpu":
        rate = packed_flops(flops, model, asked) / seconds / 1e12
        yield Measured(f"model TFLOP/s of ours, {name}", 0.0, rate, rate, "", "TFLOP/s")


def _vllm(
    name: str, model: "RewardModel", ids: list[list[int]], found: list[list[float]], config: BenchConfig
) -> float:
    """Solutions per second of vLLM, once its scores are seen to be ours."""
    with vllm_scorer(model, config.dtype, config.threads, max(len(i) for i in ids) + 1) as scorer:
        scorer.log_odds(ids[:1])  # warm
        seconds, theirs = timed(lambda: scorer.log_odds(ids), 1, config.device)
    _agree(f"{name}, vLLM", found, theirs, config)
    return len(ids) / seconds


def _agree(name: str, found: list[list[float]], expected: list[list[float]], config: BenchConfig) -> None:
    apart = max(abs(a - b) for f, e in zip(found, expected, strict=False) for a, b in zip(f, e, strict=True))
    if apart > (1e-3 if config.dtype == "float32" else 0.5):
        raise AssertionError(f"{name}: its log-odds differ from ours by {apart}")


def _target(ideal: float, asked: Case) -> str:
    if not asked.documents:
        return "≥ 1.7"
    return f"≥ {0.8 * ideal:.2f}"


def reference_log_odds(model: "RewardModel", ids: Sequence[int], device: str) -> list[float]:
    """The reference's procedure for one solution, its two logits as log-odds."""
    logits_LV = no_grad_logits(model.text_model, ids, device)[0]
    at = torch.tensor([i for i, token in enumerate(ids) if token == model.family.ids["tag"]], device=device)
    pair_T2 = logits_LV[at][:, [model.family.ids["plus"], model.family.ids["minus"]]].float()
    log_odds: list[float] = (pair_T2[:, 0] - pair_T2[:, 1]).tolist()
    return log_odds


def padded_batch(model: "RewardModel", rows: Sequence[Sequence[int]], device: str) -> None:
    """A padded batch of whole sequences, the head at the tags alone."""
    longest = max(len(row) for row in rows)
    ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    with torch.inference_mode():
        states_BLD = model.text_model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        model.head_log_odds(states_BLD[ids_BL == model.family.ids["tag"]]).tolist()
