"""Scoring N solutions of a question: shared prefix against the reference's one by one, a padded batch, and vLLM.

The reference: one solution a forward pass, logits of the whole vocabulary, softmax over " +" and " -" at each tag. It
is timed on a few solutions and scaled, as they do not depend on each other. On a CPU both sides have PyTorch's linear
layers; ours with oneDNN's, as a loaded model has them, is a row of its own.

vLLM (`engines.token_pooler`, what ``score.engine=vllm`` uses) has oneDNN's too and is held against that. It is measured
with its prefix cache, all solutions in one call that finds nothing of earlier ones there, and without it, on a few
solutions. Sides take turns, and both read sequences that end with the last tag.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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
    no_grad_logits,
    packed_flops,
    reference_ids,
    reward_model,
    set_up_torch,
)
from jobs.benches.timing import peak_bytes, timed
from medmm_ray.engines.onednn_linear import pytorch_linear
from medmm_ray.engines.token_pooler import Pooling, TokenPooler, TokenSequence

if TYPE_CHECKING:
    from medmm_ray.reward_model import RewardModel


class BenchConfig(ModelConfig):
    """What is scored, and how often."""

    shapes: tuple[Literal["smollm2", "wide", "8b"], ...] = ("smollm2", "wide")
    """Models with random weights: SmolLM2's width and vocabulary in 8 blocks, one of width 1,536, Llama-3.1-8B's."""
    reference_solutions: int = 4
    """Solutions on which the reference is timed."""
    token_budget: int | None = None
    """Most tokens of a forward pass of ours; null: the device's default."""
    vllm_solutions: int = 8
    """Solutions on which vLLM without its cache is timed, where it is installed; 0: vLLM not at all."""
    cells: tuple[tuple[int, int], ...] = ((64, 3072), (16, 3072), (8, 3072), (64, 1024), (64, 0))
    """Pairs of solutions and tokens of documents."""


def measure(config: BenchConfig, console: Console) -> Iterator[Measured]:
    """Solutions per second of each side, shape by shape and cell by cell."""
    console.print(set_up_torch(config.dtype, config.device, config.threads))
    for name in config.shapes:
        shape = SHAPES[name]
        model = reward_model(shape, config.dtype, config.device, context=8192)
        cells: dict[str, BenchQuestion] = {}
        for number, documents in config.cells:
            label = f"{name}, N = {number}, documents {documents:,}"
            cells[label] = bench_question(shape.vocab_size, config.question, documents, number, config.solution)
        for label, case in cells.items():
            yield from _cell(label, model, shape, case, config)
        if config.vllm_solutions and find_spec("vllm") is not None:
            yield from _vllm_cells(cells, model, shape, config)
        del model


def _cell(
    name: str, model: "RewardModel", shape: Shape, case: BenchQuestion, config: BenchConfig
) -> Iterator[Measured]:
    flops = ForwardFlops(shape)
    ids = reference_ids(model, case)
    lengths = list(map(len, ids))
    ideal = flops.one_by_one(lengths) / packed_flops(flops, model, case)

    def ours() -> list[list[float]]:
        return _score(model, case, config)

    def reference() -> list[list[float]]:
        return [reference_log_odds(model, i, config.device) for i in ids[: config.reference_solutions]]

    with pytorch_linear():  # the same kernels on both sides
        ours(), reference_log_odds(model, ids[0], config.device)  # warm
        seconds, scores = timed(ours, config.repeats, config.device)
        seconds_reference, expected = timed(reference, 1, config.device)
    _agree(f"{name}, reference", scores, expected, config)
    rate_reference = min(len(ids), config.reference_solutions) / seconds_reference
    rate = len(ids) / seconds
    gain = rate / rate_reference
    yield Measured(f"scoring, {name}", rate_reference, rate, gain, _target(ideal, case), "solutions/s")
    label = f"share of the FLOP ideal of {ideal:.1f}, {name}"
    yield Measured(label, ideal, gain, gain / ideal, "≥ 0.8", "times the reference")
    if len(ids) == 64:
        with pytorch_linear():
            seconds_padded, _ = timed(lambda: padded_batch(model, ids[:8], config.device), 1, config.device)
        rate_padded = 8 / seconds_padded
        label = f"against a padded batch of 8, {name}"
        yield Measured(label, rate_padded, rate, rate / rate_padded, "", "solutions/s")
        peak = peak_bytes(ours, config.device)
        peak_reference = peak_bytes(lambda: reference_log_odds(model, ids[0], config.device), config.device)
        label = f"peak memory above the weights, {name}"
        # Without documents the reference's one solution is half as long as a row of ours.
        most = "≤ 0.5" if case.documents else "≤ 1"
        yield Measured(label, peak_reference / 2**20, peak / 2**20, peak / peak_reference, most, "MiB")
        if config.device == "cpu":
            seconds_onednn, _ = timed(ours, config.repeats, config.device)
            rate_onednn = len(ids) / seconds_onednn
            label = f"oneDNN's products against PyTorch's, {name}"
            yield Measured(label, rate, rate_onednn, rate_onednn / rate, "", "solutions/s")
    if config.device != "cpu":
        teraflops = packed_flops(flops, model, case) / seconds / 1e12
        yield Measured(f"model TFLOP/s of ours, {name}", 0.0, teraflops, teraflops, "", "TFLOP/s")


def _vllm_cells(
    cells: dict[str, BenchQuestion], model: "RewardModel", shape: Shape, config: BenchConfig
) -> Iterator[Measured]:
    """All cells against vLLM with and without its prefix cache, on one engine."""
    sequences: dict[str, list[TokenSequence]] = {}
    longest = 0
    for name, case in cells.items():
        sequences[name] = [_up_to_last_tag(model, ids) for ids in reference_ids(model, case)]
        longest = max(longest, *(len(sequence.ids) for sequence in sequences[name]))
    with _pooler(model, config, longest + 1) as pooler:
        for name, case in cells.items():
            yield from _vllm_cell(name, pooler, model, shape, case, sequences[name], config)


@contextmanager
def _pooler(model: "RewardModel", config: BenchConfig, max_model_len: int) -> Iterator[TokenPooler]:
    """vLLM on a copy of the text tower; stopped at the end."""
    from medmm_ray.engines.vllm_engine import VllmEngine

    on_gpu = config.device != "cpu"
    settings = VllmEngine(
        dtype=config.dtype,
        max_model_len=max_model_len,
        num_threads=config.threads,
        num_gpus=float(on_gpu),
        gpu_memory_utilization=0.5,
    )
    pair_ids = [model.family.ids["plus"], model.family.ids["minus"]]
    plus, minus = model.tokenizer.convert_ids_to_tokens(pair_ids)
    with tempfile.TemporaryDirectory() as folder:
        model.text_model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        pooler = TokenPooler(folder, settings, Pooling.difference(plus=plus, minus=minus))
        try:
            yield pooler
        finally:
            pooler.shutdown()


def _vllm_cell(
    name: str,
    pooler: TokenPooler,
    model: "RewardModel",
    shape: Shape,
    case: BenchQuestion,
    sequences: list[TokenSequence],
    config: BenchConfig,
) -> Iterator[Measured]:
    few = sequences[: config.vllm_solutions]
    flops = ForwardFlops(shape)

    def ours() -> list[list[float]]:
        return _score(model, case, config)

    def theirs(some: list[TokenSequence], cached: bool) -> list[list[float]]:
        return [values_T1[:, 0].tolist() for values_T1 in pooler.values(some, cached)]

    scores = ours()
    _agree(f"{name}, vLLM with its cache", scores, theirs(sequences, cached=True), config)  # both are warm then
    _agree(f"{name}, vLLM without its cache", scores, theirs(few, cached=False), config)
    seconds, seconds_cached = _in_turn(ours, lambda: theirs(sequences, cached=True), config)
    seconds_alone, _ = timed(lambda: theirs(few, cached=False), 1, config.device)
    rate, rate_cached, rate_alone = len(sequences) / seconds, len(sequences) / seconds_cached, len(few) / seconds_alone
    with_documents = bool(case.documents) and config.device == "cpu" and config.dtype == "float32"
    label = f"against vLLM with its prefix cache, {name}"
    yield Measured(label, rate_cached, rate, rate / rate_cached, "≥ 1" if with_documents else "", "solutions/s")
    lengths = [len(sequence.ids) for sequence in sequences]
    ideal = flops.one_by_one(lengths, rows=0) / packed_flops(flops, model, case)
    label = f"against vLLM without its cache (FLOP ideal {ideal:.1f}), {name}"
    yield Measured(label, rate_alone, rate, rate / rate_alone, "", "solutions/s")


def _in_turn(ours: Callable[[], object], theirs: Callable[[], object], config: BenchConfig) -> tuple[float, float]:
    """Median seconds of both, measured one after the other `repeats` times: what runs beside them disturbs both."""
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for _ in range(config.repeats):
        ours_s.append(timed(ours, 1, config.device)[0])
        theirs_s.append(timed(theirs, 1, config.device)[0])
    return statistics.median(ours_s), statistics.median(theirs_s)


def _score(model: "RewardModel", case: BenchQuestion, config: BenchConfig) -> list[list[float]]:
    scores = model.score(case.question, case.solutions, case.documents, token_budget=config.token_budget)
    return [solution.log_odds for solution in scores]


def _up_to_last_tag(model: "RewardModel", ids: list[int]) -> TokenSequence:
    """Later tokens cannot influence a causal score; ours does not read them either."""
    tags = _tags_in(model, ids)
    return TokenSequence(ids[: tags[-1] + 1], tags)


def _tags_in(model: "RewardModel", ids: Sequence[int]) -> list[int]:
    """Where a sequence has its tags."""
    tag_id = model.family.ids["tag"]
    return [place for place, token in enumerate(ids) if token == tag_id]


def _agree(name: str, scores: list[list[float]], expected: list[list[float]], config: BenchConfig) -> None:
    """Raise where the log-odds of the solutions that `expected` has (the first ones) are others."""
    apart = 0.0
    # Not strict: the reference is timed on the first solutions alone.
    for ours, theirs in zip(scores, expected, strict=False):
        differences_T = torch.tensor(ours) - torch.tensor(theirs)
        apart = max(apart, float(differences_T.abs().max()))
    if apart > (1e-3 if config.dtype == "float32" else 0.5):
        raise AssertionError(f"{name}: its log-odds differ from ours by {apart}")


def _target(ideal: float, case: BenchQuestion) -> str:
    if not case.documents:
        return "≥ 1.7"
    return f"≥ {0.8 * ideal:.2f}"


def reference_log_odds(model: "RewardModel", ids: Sequence[int], device: str) -> list[float]:
    """The reference's procedure for one solution, its two logits as log-odds."""
    logits_LV = no_grad_logits(model.text_model, ids, device)[0]
    tags_T = torch.tensor(_tags_in(model, ids), device=device)
    pair_ids = [model.family.ids["plus"], model.family.ids["minus"]]
    pair_T2 = logits_LV[tags_T][:, pair_ids].float()
    log_odds: list[float] = (pair_T2[:, 0] - pair_T2[:, 1]).tolist()
    return log_odds


def padded_batch(model: "RewardModel", rows: Sequence[Sequence[int]], device: str) -> None:
    """A padded batch of whole sequences, the head at the tags alone."""
    longest = max(map(len, rows))
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    for ids_L, row in zip(ids_BL, rows, strict=True):
        ids_L[: len(row)] = torch.tensor(row)
    ids_BL = ids_BL.to(device)
    with torch.inference_mode():
        states_BLD = model.text_model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        model.head_log_odds(states_BLD[ids_BL == model.family.ids["tag"]]).tolist()
